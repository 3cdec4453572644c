"""Messages of an evaluation: held-out prompts on their way to rollout workers, and the judged answers back.

    controller ──EvalRequest (a Ray call)──▶ replay ──EvalRequest──▶ rollout
               ◀──EvalAnswer──                      ◀──EvalDone──, ──EvalAck──▶

The rules of `messages` hold: one msgpack header, then raw frames. Nothing here is journaled or trained on. `Sampling`
holds for training, too, but only an evaluation sends it along.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from msgspec import Struct, field

from asyncdapo.messages import FinishReason, Message, Prompt, Runs


class Sampling(Struct, frozen=True, kw_only=True):
    """How tokens are drawn: from all, or of the `top_k` most likely ones those that reach the share `top_p`;
    temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 128


class EvalRequest(Message):
    """replay -> rollout. Sample these prompts, at most `group_size` completions in all. Not a lease; never trained
    on."""

    request_id: int
    seed: int
    """Seed of the evaluation. A completion uses `eval_seed(seed, prompt_id, sample)`, whatever else is requested."""
    sampling: Sampling
    prompts: list[Prompt]
    samples: list[int] = field(default_factory=lambda: [0])
    """Numbers of the completions to sample of each prompt."""
    number: int = 0
    """As in `Lease`; 0 until the request is given to a worker."""

    @property
    def num_sequences(self) -> int:
        """Completions asked for."""
        return len(self.prompts) * len(self.samples)


class EvalAnswer(Struct, frozen=True, kw_only=True):
    """The result of one evaluated completion."""

    prompt_id: int
    sample: int = 0
    """Number of the completion among the prompt's."""
    acc: float
    failure: str = ""
    """Why there is no verdict: the reward function's error. `acc` is 0 then."""
    pred: str | None = None
    """As in `Score`; maj@k counts it."""
    num_tokens: int
    finish_reason: FinishReason
    version_min: int
    version_max: int
    response: str = ""
    """Its text without special tokens; of an episode the whole exchange."""
    metrics: dict[str, float] = {}
    """Of an episode: its environment's own numbers."""
    sampled: Runs = []
    """Whose the characters of an episode's `response` are: run lengths, one for each response of the model (1) and each
    observation (0). Empty for a single response, which is the model's."""

    @property
    def parts(self) -> list[tuple[int, str]]:
        """The response as pairs of 1, the model's, or 0, the environment's, and text."""
        if not self.sampled:
            return [(1, self.response)]
        ends = list(accumulate((length for _, length in self.sampled), initial=0))
        texts = (self.response[begin:end] for begin, end in pairwise(ends))
        return [(whose, text) for (whose, _), text in zip(self.sampled, texts, strict=True)]

    @property
    def num_turns(self) -> int:
        """Responses of the model."""
        return sum(whose for whose, _ in self.sampled) or 1

    @property
    def failed(self) -> bool:
        """Whether it could not be judged."""
        return bool(self.failure)


class EvalDone(Message):
    """rollout -> replay, with one frame: the responses as UTF-8, one after the other. (They don't fit a header: it has
    room for 8 MiB, and a long response takes 80 kB.) Sent again until acknowledged."""

    request_id: int
    answers: list[EvalAnswer]
    """Prompt after prompt, each with its samples in order; without the responses."""
    response_bytes: list[int]
    """Length of each response in the frame (`payload.pack_answers`)."""


class EvalAck(Message):
    """replay -> rollout."""

    request_id: int
