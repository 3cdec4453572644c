"""Published data sets that `asyncdapo data prepare` knows by name: where their files are and what their rows mean.

Counted in the repositories themselves: DAPO-Math-17k (arXiv 2503.14476) has 1,791,700 rows, 17,917 distinct ones, with
17,398 distinct prompts. AIME-2024 has 30 problems, each 32 times. GSM8K (arXiv 2110.14168) has 7,473 problems for
training and 1,319 for the test, each with a solution that ends in `#### ` and a number.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FROM_MESSAGES = "{prompt}"
"""The rows contain their own instruction."""
REASON = "{prompt}\n\nReason step by step. The last line of your response must be "
TEMPLATES = {
    "answer": REASON + "`Answer: ` followed by the answer alone.",
    "dapo": REASON + "`Answer: ` followed by the answer alone.",
    "gsm8k": REASON + "`#### ` followed by the number.",
    "math_verify": "{prompt}\n\nReason step by step, and put the final answer into \\boxed{}.",
}
"""By verifier: the template that asks for the line that the verifier looks for."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A data set on the Hugging Face hub."""

    repository: str
    files: dict[str, str]
    """File pattern of each split."""
    prompt_column: str
    answer_column: str
    verifier: str
    template: str
    source: str
    """Source of rows that don't name theirs."""
    answer_after: str | None = field(default=None)
    """The answer is the number after the last such mark; None: the whole column."""


PUBLISHED = {
    "dapo-math-17k": Published(
        repository="BytedTsinghua-SIA/DAPO-Math-17k",
        files={"train": "data/dapo-math-17k.parquet"},
        prompt_column="prompt",
        answer_column="reward_model.ground_truth",
        verifier="dapo",
        template=FROM_MESSAGES,
        source="dapo-math-17k",
    ),
    "aime-2024": Published(
        repository="BytedTsinghua-SIA/AIME-2024",
        files={"test": "data/aime-2024.parquet"},
        prompt_column="prompt",
        answer_column="reward_model.ground_truth",
        verifier="dapo",
        template=FROM_MESSAGES,
        source="aime-2024",
    ),
    "gsm8k": Published(
        repository="openai/gsm8k",
        files={"train": "main/train-*.parquet", "test": "main/test-*.parquet"},
        prompt_column="question",
        answer_column="answer",
        verifier="gsm8k",
        template=TEMPLATES["gsm8k"],
        source="gsm8k",
        answer_after="####",
    ),
}
