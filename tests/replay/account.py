"""What is so in a replay run: the facts that events and actions establish, and what the rules call for then.

It shares no code with the core beyond the records. The rules are written down here a second time, in the plainest way,
at any cost of time. `Truth` keeps the facts and judges the actions by them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core import events as core


@dataclass
class TrueLease:
    prompt_id: int
    worker: int
    started_version: int | None = None


@dataclass
class TrueGroup:
    prompt_id: int
    min_version: int
    max_version: int
    verdict: str
    arrived: int
    """Number of the event that brought it."""
    step: int
    """The step that was being filled then."""
    state: str = "arrived"
    reason: str = ""
    changed: int = 0
    """Number of the event in which it came to this state."""
    was_stale: bool = False
    """It missed the bound when it came, so that it got no verdict that counts."""


class Account:
    """What is so, and what the rules call for then."""

    def __init__(
        self, config: ReplayConfig, filter: FilterConfig, *, max_attempts: int, num_prompts: int | None
    ) -> None:
        self.config, self.filter = config, filter
        self.size = config.prompts_per_step
        self.barrier = config.run_ahead == 0
        self.replaces = filter.enabled and filter.mode == "replace"
        self.limited = filter.max_gen_batches > 0
        self.bound = 0 if self.barrier else config.max_staleness
        self.max_attempts, self.num_prompts = max_attempts, num_prompts

        self.prompts: dict[int, str] = {}
        self.attempts: Counter[int] = Counter()
        self.places: dict[int, int] = {}
        self.lost: set[int] = set()
        self.leases: dict[int, TrueLease] = {}
        self.ended_leases: set[int] = set()
        self.groups: dict[int, TrueGroup] = {}
        self.credits: dict[int, int] = {}
        self.loaded: dict[int, int] = {}
        self.continuing: set[int] = set()
        """Workers that continue what others have sampled."""
        self.partials: dict[int, core.Partial] = {}
        """What is saved, by prompt."""
        self.verdicts: list[int] = []
        """Groups, in the order of their verdicts."""
        self.num_events = 0
        self.prompt_changed: dict[int, int] = {}
        """Number of the event in which a prompt came to its state."""

        self.num_cut = 0
        self.batches: dict[int, list[int]] = {}
        self.copies: dict[int, tuple[int, ...]] = {}
        """Of the batches that have some: how many more times each member stands in it."""
        self.trained: set[int] = set()
        self.published = 0
        self.wanted = 0
        self.at_limit = False
        self.over = False

        self.withdrawn_stale: list[int] = []
        """Numbers of the events in which a lease ended since it would miss the bound."""
        self.num_since_due = 0
        """Verdicts since the learner waits for a full batch."""
        self.measured: list[tuple[int, float, float]] = []
        """`run_ahead: auto`: step, groups that the workers and that the learner needed ahead."""
        self.gen_batch_step, self.gen_batch_number, self.gen_batch_verdicts = 0, 0, 0
        self.gen_batches_of_step = 0

    # ------------------------------------------------------------------------------------------------- what is so

    @property
    def next_step(self) -> int:
        return self.num_cut + 1

    @property
    def num_fresh(self) -> int:
        return len(self.prompts)

    def fits(self, version: int, step: int) -> bool:
        return (step - 1) - version <= self.bound

    def num_saved(self, prompt_id: int) -> int:
        return self.partials[prompt_id].num_tokens if prompt_id in self.partials else 0

    def check_partials(self) -> None:
        for prompt_id, partial in self.partials.items():
            assert self.prompts[prompt_id] in ("waiting", "leased"), "saved of a prompt that has its group, or an end"
            assert self.over or self.fits(partial.min_version, self.next_step), "what is saved can't be trained"

    def in_state(self, state: str) -> list[int]:
        return [group_id for group_id, group in self.groups.items() if group.state == state]

    def next_prompt(self) -> int | None:
        """Lowest place in the stream: own id, or behind the next batch's worth for the prompt of a lost lease."""
        candidates = [(self.places[p], p) for p, state in self.prompts.items() if state == "waiting"]
        if self.num_prompts is None or self.num_fresh < self.num_prompts:
            candidates.append((self.num_fresh, self.num_fresh))
        return min(candidates)[1] if candidates else None

    def in_queue_order(self, group_ids: list[int]) -> list[int]:
        return sorted(group_ids, key=lambda i: (self.groups[i].min_version, self.groups[i].prompt_id))

    def barren(self) -> list[int]:
        """Under `replace` groups at the head of the queue, as many as make a batch or several, of which none is
        kept."""
        held, barren = self._ahead(), []
        while len(held) >= self.size and not any(self.groups[i].verdict == "kept" for i in held[: self.size]):
            barren, held = barren + held[: self.size], held[self.size :]
        return barren

    def ready(self) -> list[int]:
        """Groups that the next batch can count on, in queue order: kept ones, under `replace` all but barren ones."""
        return self._ahead()[len(self.barren()) :] if self.replaces else self._ahead()

    def num_ready(self) -> int:
        return len(self.ready())

    def _ahead(self) -> list[int]:
        """At the barrier only groups before the next prompt of the stream."""
        held = self.in_state("queued") + (self.in_state("spare") if self.replaces else [])
        if self.barrier and (before := self.next_prompt()) is not None:
            held = [group_id for group_id in held if self.groups[group_id].prompt_id < before]
        return self.in_queue_order(held)

    def in_training(self) -> int:
        return sum(len(self.batches[step]) + sum(self.copies.get(step, ())) for step in self.unpublished())

    def unpublished(self) -> list[int]:
        return [step for step in self.batches if step > self.published]

    def keep_rate(self) -> float:
        if self.replaces:
            return 1.0
        latest = self.verdicts[-4 * self.size :]
        kept = [group_id for group_id in latest if self.groups[group_id].verdict == "kept"]
        return max(0.1, (4 + len(kept)) / (4 + len(latest)))

    def run_ahead(self) -> float:
        if self.config.run_ahead != "auto":
            return self.config.run_ahead
        begins_with = min(2, (self.bound + 1) / 2)
        if not self.measured:
            return begins_with
        needed = min(max(m[1] for m in self.measured[-12:]), max(m[2] for m in self.measured[-12:]))
        least = begins_with if len(self.measured) < 4 else 0
        return min(self.bound, max(least, needed / self.size - 1 + 1 / 8))

    def admits(self) -> bool:
        if self.barrier and self.limited:
            held, before = [*self.in_state("queued"), *self.in_state("spare")], self.next_prompt()
            verdicts = sum(before is None or self.groups[group_id].prompt_id < before for group_id in held)
            if (
                verdicts + len(self.leases)
                >= self.filter.max_gen_batches * self.filter.gen_batch_multiplier * self.size
            ):
                return False
        ahead = self.in_training() + self.num_ready() + self.keep_rate() * len(self.leases)
        return ahead < (self.run_ahead() + 1) * self.size

    def lease_version(self, lease: TrueLease) -> int:
        """The oldest that a token of it can have."""
        own = self.loaded[lease.worker] if lease.started_version is None else lease.started_version
        return min(own, self.partials[lease.prompt_id].min_version) if lease.prompt_id in self.partials else own

    def held_back(self) -> bool:
        """Whether a cut would have to wait for running leases."""
        if self.barrier:
            return bool(self.leases)
        early = self.num_cut > self.published and not self.at_limit
        late = [lease for lease in self.leases.values() if not self.fits(self.lease_version(lease), self.next_step + 1)]
        if self.config.on_stale == "auto" and not early:
            lost = self.num_dropped() + len(late)
            biased = 100 * lost > lost + len(self.verdicts)
            return bool(late) and (biased or self.num_since_due < len(late))
        return (early or self.config.on_stale == "wait") and bool(late)

    def num_dropped(self) -> int:
        """Groups and leases that ended since they missed the bound."""
        return len(self.in_state("expired")) + len(self.withdrawn_stale)

    def cut_is_due(self) -> bool:
        return self.at_limit or (self.wanted == self.next_step and self.num_ready() >= self.size)

    def able_workers(self) -> list[int]:
        """Workers with a credit and weights for the next batch (for the one after it, if its cut is held back)."""
        step = self.next_step + self.cut_is_due()
        return [w for w in self.loaded if self.credits[w] > 0 and self.fits(self.loaded[w], step)]

    # ------------------------------------------------------------------------------------------------------ events

    def see_event(self, event: core.Event) -> bool:
        """Returns whether the event answers a running lease."""
        self.num_events += 1
        match event:
            case core.WorkerJoined():
                self.loaded[event.worker], self.credits[event.worker] = event.loaded_version, 0
                self.continuing = (self.continuing - {event.worker}) | ({event.worker} if event.continues else set())
            case core.WorkerLost() | core.WorkerDrained():
                del self.loaded[event.worker], self.credits[event.worker]
            case core.Ready():
                self.credits[event.worker] = event.credits
            case core.WeightsLoaded():
                self.loaded[event.worker] = event.version
            case core.SamplingBegan() if event.lease_id in self.leases:
                self.leases[event.lease_id].started_version = event.version
            case core.GroupArrived() if event.lease_id in self.leases:
                prompt_id = self.leases[event.lease_id].prompt_id
                self.groups[event.lease_id] = TrueGroup(
                    prompt_id,
                    event.min_version,
                    event.max_version,
                    self._verdict(event),
                    arrived=self.num_events,
                    step=self.next_step,
                )
                if self.fits(event.min_version, self.next_step):
                    early = self.num_cut > self.published and not self.at_limit
                    self.num_since_due += self.cut_is_due() and not early
                    self.count_verdict(event.lease_id, self.next_step)
                return True
            case core.LeaseFailed() | core.LeaseLost():
                return event.lease_id in self.leases
            case core.BatchWanted():
                self.wanted = max(self.wanted, event.step)
            case core.Trained():
                self.trained.add(event.step)
            case core.Published():
                self.published = max(self.published, event.version)
            case core.RunEnded():
                self.over = True
        return False

    def _verdict(self, event: core.GroupArrived) -> str:
        if not self.filter.enabled:
            return "kept"
        if not event.num_loss_tokens:
            return "masked"
        values = sorted(event.metrics[self.filter.metric])
        return "kept" if values[-1] - values[0] > 1e-6 else "constant"

    def count_verdict(self, group_id: int, step: int) -> None:
        self.verdicts.append(group_id)
        if self.gen_batch_verdicts == 0:
            self.gen_batches_of_step += 1
            self.gen_batch_step, self.gen_batch_number = step, self.gen_batches_of_step
        self.gen_batch_verdicts += 1
