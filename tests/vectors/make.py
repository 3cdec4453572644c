"""Writes `off_policy_vectors.json`: python -m tests.vectors.make

Inputs are drawn from a seed, or set by hand where something is at an edge; `expected` is what `reference` computes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.vectors import reference
from tests.vectors.file import FORMAT

FILE = Path(__file__).parent / "off_policy_vectors.json"
TOLERANCE = 1e-9
CLIPS = {"clip_low": 0.2, "clip_high": 0.28}
SOURCES = {
    "gmpo": "arXiv 2507.20673",
    "sapo": "arXiv 2511.20347",
    "vespo": "arXiv 2602.10693",
    "dppo_tv": "arXiv 2602.04879",
    "dppo_kl": "arXiv 2602.04879",
    "estr": "arXiv 2607.22186",
    "m2po": "arXiv 2510.01161",
    "loglinear": "arXiv 2512.06547",
    "maxrl": "arXiv 2602.02710",
    "grpo_batch_std": "arXiv 2508.08221",
    "reinforce_pp": "arXiv 2501.03262",
    "reinforce_pp_baseline": "arXiv 2501.03262",
}
NUMBERS: dict[str, list[dict[str, Any]]] = {
    "gmpo": [{"clip_low": 0.4, "clip_high": 0.4}, {"clip_low": 0.2, "clip_high": 0.9}],
    "sapo": [{"sapo_tau": [1.0, 1.05]}, {"sapo_tau": [3.0, 0.5]}],
    "vespo": [
        {"vespo_k": [2.0, 3.0], "vespo_lambda": [3.0, 2.0]},
        {"vespo_k": [0.0, 1.5], "vespo_lambda": [1.0, 0.0]},
    ],
    "dppo_tv": [{"clip_low": 0.15, "clip_high": 0.15, "dppo_ratio_cap": 20.0}],
    "dppo_kl": [{"clip_low": 0.05, "clip_high": 0.05, "dppo_ratio_cap": 20.0}],
    "estr": [
        {"estr_threshold": 1.0, "dual_clip_c": None, **CLIPS},
        {"estr_threshold": 0.2, "dual_clip_c": 1.5, **CLIPS},
    ],
    "m2po": [{"m2po_threshold": 0.04}, {"m2po_threshold": 0.5}],
    "loglinear": [
        {"is_cap": 2.0, "dual_clip_c": None, **CLIPS},
        {"is_cap": 1.1, "dual_clip_c": 1.2, **CLIPS},
    ],
}
"""The keys of each loss: as published or near it, and others."""


def tokens(rng: random.Random, *, rows: int = 4, length: int = 6, spread: float = 0.5) -> dict[str, Any]:
    """Random responses. Advantages are of whole responses; positions outside the mask hold garbage."""

    def drawn(make: Any) -> list[list[Any]]:
        return [[make() for _ in range(length)] for _ in range(rows)]

    lengths = [rng.randint(1, length) for _ in range(rows)]
    logp = drawn(lambda: round(-rng.expovariate(1.0) - 0.01, 6))
    old = [[round(min(-1e-3, value + rng.gauss(0, spread)), 6) for value in line] for line in logp]
    made = {
        "logp": logp,
        "old_logp": old,
        "start_logp": [[round(value + rng.gauss(0, 0.05), 6) for value in line] for line in logp],
        "advantages": [[round(rng.gauss(0, 1), 6)] * length for _ in range(rows)],
        "mask": [[int(t < n) for t in range(length)] for n in lengths],
        "entropy": drawn(lambda: round(rng.expovariate(1.0), 6)),
        "staleness": drawn(lambda: rng.randint(0, 5)),
    }
    for line, old_line, bits in zip(made["logp"], made["old_logp"], made["mask"], strict=True):
        for t, bit in enumerate(bits):
            if not bit:
                line[t], old_line[t] = 1e30, -1e30
    return made


def edges(rng: random.Random) -> dict[str, dict[str, Any]]:
    """Responses at which an implementation may go wrong, by what they have."""
    far, single, empty, ties, negative = (tokens(rng) for _ in range(5))
    far["mask"][0] = [1] * 6
    far["logp"][0], far["old_logp"][0] = [-30.0, -0.001, -1.0, -2.0, -9.0, -1.0], [-1.0, -28.0, -1.0, -2.5, -1.0, -9.0]
    single["mask"] = [[0, 0, 0, 1, 0, 0] for _ in range(4)]
    for name in ("logp", "old_logp"):
        for line in single[name]:
            line[3] = round(-rng.random() - 0.01, 6)
        empty[name][2] = [1e30] * 6
        empty[name][3] = [-1e30] * 6
    empty["mask"][2] = empty["mask"][3] = [0] * 6
    ties["mask"] = [[1] * 6 for _ in range(4)]
    ties["logp"], ties["old_logp"] = [[-1.0] * 6 for _ in range(4)], [[-1.0, -1.5, -0.75, -1.5, -1.0, -2.0]] * 4
    ties["start_logp"] = ties["logp"]
    negative["advantages"] = [[-1.0] * 6, [0.0] * 6, [-0.5] * 6, [0.0] * 6]
    return {
        "ratios far away": far,
        "one token each": single,
        "a response without a token": empty,
        "equal ratios": ties,
        "no positive advantage": negative,
    }


def loss_vectors() -> list[dict[str, Any]]:
    made = []
    for group, settings in NUMBERS.items():
        rng = random.Random(group)
        cases = [(f"random {n}", tokens(rng, spread=0.3 + 0.3 * n), settings[n % len(settings)]) for n in range(3)]
        cases += [(name, inputs, settings[-1]) for name, inputs in edges(rng).items()]
        for number, (name, inputs, numbers) in enumerate(cases):
            agg = ("token-mean", "seq-mean-token-mean")[number % 2]
            names = {"estr": ("entropy",), "loglinear": ("staleness",), "m2po": ("start_logp",)}.get(group, ())
            common = {key: inputs[key] for key in ("logp", "old_logp", "advantages", "mask", *names)}
            given = {**common, "loss_agg": agg, **numbers}
            made.append(vector(group, name, given, reference.loss(group, given)))
    return made


def advantage_vectors() -> list[dict[str, Any]]:
    made = []
    for group in ("maxrl", "grpo_batch_std", "reinforce_pp", "reinforce_pp_baseline"):
        rng = random.Random(group)
        cases = {
            "right and wrong": ([rng.choice((0.0, 1.0)) for _ in range(12)], [n // 4 for n in range(12)]),
            "graded, groups of other sizes": ([round(rng.random(), 6) for _ in range(9)], [0, 0, 1, 1, 1, 2, 2, 2, 2]),
            "a constant group and one of one": ([1.0, 1.0, 1.0, 0.0, 0.25, 0.5], ["a", "a", "a", "b", "c", "c"]),
            "all equal": ([0.0, 0.0, 0.0, 0.0], [0, 0, 1, 1]),
        }
        for name, (rewards, ids) in cases.items():
            given = {"rewards": rewards, "group_ids": ids}
            made.append(vector(group, name, given, reference.advantages(group, given)))
    return made


def vector(group: str, name: str, inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    return {
        "group": group,
        "name": name,
        "inputs": inputs,
        "expected": expected,
        "tolerance": TOLERANCE,
        "source": SOURCES[group],
    }


def text() -> str:
    """The file, a vector a line."""
    vectors = loss_vectors() + advantage_vectors()
    lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in vectors)
    return f'{{"format": "{FORMAT}", "count": {len(vectors)}, "vectors": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    FILE.write_text(text())
    print(f"{FILE}: {json.loads(FILE.read_text())['count']} vectors")
