"""Losses and advantages of others once more, from the papers' equations: plain Python floats, one token at a time.

Nothing of the package is imported, no tensor, no automatic gradient. `make` writes vectors from it. In: a record of
inputs as README.md has them. Out: their `expected`. A row is a response; positions outside the mask are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

Row = dict[str, Any]
"""The unmasked tokens of one response: `d` = log π_θ − log π_old of each, `logp`, `old`, `adv`, and others by name."""
OfRow = Callable[[Row, dict[str, Any]], tuple[list[float], list[list[float]], list[bool]]]
"""Loss of each token, its derivative by each token's log-prob, and whether the token is left."""


def exp(x: float) -> float:
    return math.exp(min(max(x, -20.0), 20.0))


def slope(x: float) -> float:
    """Derivative of `exp`."""
    return math.exp(x) if -20.0 <= x <= 20.0 else 0.0


def own(derivatives: list[float]) -> list[list[float]]:
    """Of losses that depend on no other token."""
    return [[value if t == u else 0.0 for u in range(len(derivatives))] for t, value in enumerate(derivatives)]


def clipped(d: float, adv: float, numbers: dict[str, Any]) -> tuple[float, float]:
    """PPO's loss of a token and its derivative, with the dual clip."""
    r, low, high = exp(d), 1 - numbers["clip_low"], 1 + numbers["clip_high"]
    bound = numbers.get("dual_clip_c")
    if adv < 0 and bound is not None and r > bound:
        return -adv * bound, 0.0
    if (adv > 0 and r > high) or (adv < 0 and r < low):
        return -adv * min(max(r, low), high), 0.0
    return -adv * r, -adv * slope(d)


def gmpo(row: Row, numbers: dict[str, Any]) -> Any:
    n, adv = len(row["d"]), row["adv"]
    if not n:
        return [], [], []
    low, high = -numbers["clip_low"], numbers["clip_high"]
    moved = [min(d, high) if a > 0 else max(d, low) for d, a in zip(row["d"], adv, strict=True)]
    free = [float(c == d) for c, d in zip(moved, row["d"], strict=True)]
    s = math.exp(sum(moved) / n)
    return [-a * s for a in adv], [[-a * s * f / n for f in free] for a in adv], [True] * n


def sapo(row: Row, numbers: dict[str, Any]) -> Any:
    values, derivatives = [], []
    for d, a in zip(row["d"], row["adv"], strict=True):
        tau = numbers["sapo_tau"][0 if a > 0 else 1]
        sigma = 1 / (1 + math.exp(-tau * (exp(d) - 1)))
        values.append(-a * 4 / tau * sigma)
        derivatives.append(-a * 4 * sigma * (1 - sigma) * slope(d))
    return values, own(derivatives), [True] * len(values)


def vespo(row: Row, numbers: dict[str, Any]) -> Any:
    w = exp(sum(row["d"]))
    values, derivatives = [], []
    for logp, a in zip(row["logp"], row["adv"], strict=True):
        sign = 0 if a >= 0 else 1
        phi = w ** numbers["vespo_k"][sign] * math.exp(numbers["vespo_lambda"][sign] * (1 - w))
        values.append(-phi * a * logp)
        derivatives.append(-phi * a)
    return values, own(derivatives), [True] * len(values)


def dppo(divergence: str) -> OfRow:
    def of_row(row: Row, numbers: dict[str, Any]) -> Any:
        values, left = [], []
        for new, old, a in zip(row["logp"], row["old"], row["adv"], strict=True):
            p, q = math.exp(new), math.exp(old)
            gone = abs(p - q)
            if divergence == "kl":
                gone = q * math.log(q / p) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
            outside = (a > 0 and p > q and gone > numbers["clip_high"]) or (
                a < 0 and p < q and gone > numbers["clip_low"]
            )
            left.append(not outside)
            values.append(0.0 if outside else -a * min(exp(new - old), numbers["dppo_ratio_cap"]))
        return values, own(values), left  # the truncated ratio keeps its gradient

    return of_row


def estr(row: Row, numbers: dict[str, Any]) -> Any:
    values, derivatives, left = [], [], []
    for d, a, entropy in zip(row["d"], row["adv"], row["entropy"], strict=True):
        inside = d**2 / (entropy + 0.01) <= numbers["estr_threshold"]
        value, derivative = clipped(d, a, numbers)
        values.append(value if inside else 0.0)
        derivatives.append(derivative if inside else 0.0)
        left.append(inside)
    return values, own(derivatives), left


def m2po(row: Row, numbers: dict[str, Any]) -> Any:
    values = [-a * exp(d) if left else 0.0 for d, a, left in zip(row["d"], row["adv"], row["left"], strict=True)]
    slopes = [-a * slope(d) if left else 0.0 for d, a, left in zip(row["d"], row["adv"], row["left"], strict=True)]
    return values, own(slopes), row["left"]


def m2po_left(squares: list[float], threshold: float) -> list[bool]:
    """Mask the largest ones, until the mean of the others is at most the threshold."""
    left = list(squares)
    while left and fmean(left) > threshold:
        largest = max(left)
        left = [square for square in left if square < largest]
    return [bool(left) and square <= max(left) for square in squares]


def loglinear(row: Row, numbers: dict[str, Any]) -> Any:
    values, derivatives = [], []
    for new, old, a, staleness in zip(row["logp"], row["old"], row["adv"], row["staleness"], strict=True):
        alpha = 1 / max(1, staleness)
        prox = alpha * old + (1 - alpha) * new
        value, derivative = clipped(new - prox, a, numbers)
        weight = min(exp(prox - old), numbers["is_cap"])
        values.append(weight * value)
        derivatives.append(weight * derivative)
    return values, own(derivatives), [True] * len(values)


LOSSES: dict[str, OfRow] = {
    "gmpo": gmpo,
    "sapo": sapo,
    "vespo": vespo,
    "dppo_tv": dppo("tv"),
    "dppo_kl": dppo("kl"),
    "estr": estr,
    "m2po": m2po,
    "loglinear": loglinear,
}


def loss(group: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """`loss`, `grad` and `mask` of a method."""
    mask = inputs["mask"]
    places = [[t for t, bit in enumerate(line) if bit] for line in mask]
    weights = _weights(inputs["loss_agg"], [len(line) for line in places])
    rows = [_row(inputs, index, line) for index, line in enumerate(places)]
    if group == "m2po":
        start, old = inputs["start_logp"], inputs["old_logp"]
        squares = [(start[i][t] - old[i][t]) ** 2 for i, line in enumerate(places) for t in line]
        left = iter(m2po_left(squares, inputs["m2po_threshold"]))
        rows = [row | {"left": [next(left) for _ in row["d"]]} for row in rows]
    total, grad = 0.0, [[0.0] * len(line) for line in mask]
    kept = [[0] * len(line) for line in mask]
    for index, (row, line, weight) in enumerate(zip(rows, places, weights, strict=True)):
        values, derivatives, left_of_row = LOSSES[group](row, inputs)
        total += weight * sum(values)
        for of_token, t_left, t in zip(derivatives, left_of_row, line, strict=True):
            kept[index][t] = int(t_left)
            for u, derivative in zip(line, of_token, strict=True):
                grad[index][u] += weight * derivative
    return {"loss": total, "grad": grad, "mask": kept}


def _row(inputs: dict[str, Any], index: int, places: list[int]) -> Row:
    def at(name: str) -> list[float]:
        return [inputs[name][index][t] for t in places]

    extra = {name: at(name) for name in ("entropy", "staleness") if name in inputs}
    logp, old = at("logp"), at("old_logp")
    d = [new - before for new, before in zip(logp, old, strict=True)]
    return {"logp": logp, "old": old, "d": d, "adv": at("advantages"), **extra}


def _weights(agg: str, lengths: list[int]) -> list[float]:
    """Of each token of each row."""
    if agg == "token-mean":
        return [1 / max(1, sum(lengths)) for _ in lengths]
    num_rows = max(1, sum(n > 0 for n in lengths))
    return [1 / (num_rows * max(1, n)) for n in lengths]


def advantages(group: str, inputs: dict[str, Any]) -> dict[str, Any]:
    rewards, ids = inputs["rewards"], inputs["group_ids"]
    of_group = {one: fmean(r for r, other in zip(rewards, ids, strict=True) if other == one) for one in ids}
    means = [of_group[one] for one in ids]
    if group == "maxrl":
        return {"advantages": [(r - m) / m if m > 0 else 0.0 for r, m in zip(rewards, means, strict=True)]}
    centred = [r - m for r, m in zip(rewards, means, strict=True)]
    if max(rewards) == min(rewards):
        return {"advantages": [0.0] * len(rewards)}
    if group == "grpo_batch_std":
        return {"advantages": [c / (stdev(rewards) + 1e-6) for c in centred]}
    if group == "reinforce_pp":
        return {"advantages": [(r - fmean(rewards)) / (stdev(rewards) + 1e-6) for r in rewards]}
    if max(centred) == min(centred):
        return {"advantages": [0.0] * len(rewards)}
    return {"advantages": [(c - fmean(centred)) / (stdev(centred) + 1e-6) for c in centred]}
