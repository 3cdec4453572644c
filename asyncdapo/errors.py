"""The errors that a user can fix: each names the key or file, its value, and the fix.

    UserError                 ends a command with one line and exit code 2, before anything is sampled if possible
      ConfigError             a key of the configuration
      SeveralKeysError            several of them, a line each
    RunError                  ends a run with its cause in the last lines and exit code 1
      StalenessError          a group past `replay.max_staleness` reached the learner; never trained
      WeightsError            a weight transfer failed, timed out, or arrived changed
      RanksError              a rank of the learner lost the others; the controller restarts all ranks
      BatchError              a batch that was cut can't be read back; the controller rolls back to the checkpoint
      EngineError             the inference engine failed
      RewardError             the reward function raised, or killed its process; the worker reports a failed group
      VerdictError            the reward function returned something that isn't a verdict; the worker isn't restarted
      EpisodeError            an environment failed on an episode; the worker reports a failed group
      DiskError               the disk is full or broken; the write was not done

Any other error that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

EXIT_INTERRUPTED = 130
"""Exit code of a command that Ctrl-C or SIGTERM ended."""


class UserError(Exception):
    """Something outside the code is wrong. The message tells the user how to fix it."""


class ConfigError(UserError):
    """A key of the configuration has a value that can't work.

    Reads `replay.max_staleness: must be at least 0, got -1 (use 0 for synchronous training)`.
    """

    where = ""
    """Place in a file, such as `mine.yaml, line 4, column 3`. The message starts with it."""

    def __init__(
        self, key: str, problem: str, value: object = None, fix: str = "", example: Sequence[str] = ()
    ) -> None:
        """`example`: lines for the user to copy, shown below the message."""
        self.key, self.problem, self.value, self.fix, self.example = key, problem, value, fix, example
        got = "" if value is None else f", got {value!r}"
        said = f"{key}: {problem}{got}" + (f" ({fix})" if fix else "")
        super().__init__("\n    ".join((said, *example)))

    @property
    def problems(self) -> Sequence[ConfigError]:
        """This error alone, so that it reads like a `SeveralKeysError`."""
        return (self,)

    def __str__(self) -> str:
        return f"{self.where}: {self.args[0]}" if self.where else self.args[0]

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, str, object, str, Sequence[str]], dict[str, str]]:
        """Pickle it by its parts: Ray sends errors between processes."""
        return ConfigError, (self.key, self.problem, self.value, self.fix, self.example), {"where": self.where}


class SeveralKeysError(UserError):
    """Several keys have problems, a line each."""

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        return f"{len(self.problems)} keys can't stay as they are\n{lines}"


def raise_all(problems: Sequence[ConfigError]) -> None:
    """Raise a single problem as it is, several as one error. Do nothing if there are none."""
    if problems:
        raise problems[0] if len(problems) == 1 else SeveralKeysError(problems)


class RunError(Exception):
    """The run can't continue; the message is the cause."""


class StalenessError(RunError):
    """A group is staler than the bound that the configuration promises."""


class WeightsError(RunError):
    """A weight transfer failed, timed out, or arrived changed."""


class RanksError(RunError):
    """A rank of the learner waited for others that are gone or too slow."""


class BatchError(RunError):
    """Groups of a batch that was cut can't be read back. After a rollback it is cut again without them."""


class EngineError(RunError):
    """The inference engine failed."""


class RewardError(RunError):
    """The reward function raised, or killed its process twice on one completion."""


class VerdictError(RunError):
    """The reward function returned something that isn't a verdict, and would do so again."""


class EpisodeError(RunError):
    """An environment raised, killed its process or broke its contract, as often as it may on one episode."""


class EpisodeOver(Exception):  # noqa: N818 - an end, not an error
    """The environment, or a limit, ends an episode where it stands. It is scored like any other."""

    def __init__(self, finish_reason: Literal["time", "length", "turns"], reward: float = 0.0) -> None:
        """`reward`: of the step that ended it."""
        super().__init__(finish_reason)
        self.finish_reason: Literal["time", "length", "turns"] = finish_reason
        self.reward = reward


class DiskError(RunError):
    """A file of the run can't be written: the disk is full or broken."""


def first_of(errors: BaseExceptionGroup) -> BaseException:
    """The first failure: the others are its consequences."""
    first: BaseException = errors
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
