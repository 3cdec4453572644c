"""Options of the learner's bench. Invariant: a wrong one is refused before any process starts. No torch here."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from asyncdapo.config.field_docs import field_docs
from asyncdapo.config.found import config_dirs
from asyncdapo.errors import ConfigError
from benchmarks.learner_step.shapes import SHAPES
from benchmarks.learner_step.variants import CHECKPOINTING, DEFAULT, DTYPES

QUICKSTART_MODEL = Path("models") / "chain_start"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, on what. Fields are options of the command line, dashes for underscores."""

    model: str | None = None
    """Directory of a model in Hugging Face format; the quickstart's unless given."""
    shape: str | None = None
    """Random weights of a known shape in its place."""
    lengths: str = "quickstart"
    """quickstart, mixed, mixed:MEAN or fixed:N (tokens a sequence)."""
    groups: int = 16
    """Groups of the batch."""
    group_size: int = 16
    """Responses to each group's prompt."""
    tokens_per_microbatch: int = 4096
    """Tokens of a forward pass of ours."""
    padded_tokens: int = 0
    """The padded step's, whose logits take far more memory; 0: as many as ours."""
    threads: int = 2
    """CPU threads of each process."""
    device: str = "auto"
    """cpu, cuda or auto."""
    dtype: str = "auto"
    """float32, bfloat16 or auto: bfloat16 on a GPU."""
    compile: bool = False
    """Compile the blocks of our model."""
    activation_checkpointing: str = "none"
    """none, selective or full, of ours."""
    variants: str = DEFAULT
    """Rows: ours, padded, trl, with changes such as ours+compile+full; all for every one of ours."""
    repeats: int = 5
    """Timed steps of each."""
    warmup: int = 2
    """Steps before them."""
    lr: float = 2e-4
    """Learning rate of AdamW."""
    seed: int = 0
    """Of lengths, tokens and random weights."""
    trl_python: str | None = None
    """Python of an environment with trl==1.16.0 and datasets."""
    json: str | None = None
    """File for all figures."""

    def __post_init__(self) -> None:
        for name in ("groups", "group_size", "tokens_per_microbatch", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(_flag(name), "must be at least 1", getattr(self, name))
        if self.padded_tokens < 0:
            raise ConfigError("--padded-tokens", "must be at least 0", self.padded_tokens)
        if self.group_size < 2:
            raise ConfigError(
                "--group-size", "must be at least 2, since a group of one has no advantage", self.group_size
            )
        if self.warmup < 1:
            raise ConfigError("--warmup", "must be at least 1", self.warmup)
        for name, known in (
            ("device", ("auto", "cpu", "cuda")),
            ("dtype", ("auto", *DTYPES)),
            ("activation_checkpointing", CHECKPOINTING),
            ("shape", (None, *SHAPES)),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(_flag(name), "must be " + _listed(known), getattr(self, name))
        if self.model and self.shape:
            raise ConfigError("--shape", "is in the place of --model", self.shape, "give one of them")
        if self.model and not (Path(self.model) / "config.json").is_file():
            raise ConfigError("--model", "no such directory, or it has no config.json", self.model)
        if self.trl_python and not Path(self.trl_python).is_file():
            raise ConfigError("--trl-python", "no such file", self.trl_python, "ENVIRONMENT/bin/python")

    @property
    def model_directory(self) -> Path:
        """Of --model, or the quickstart's."""
        return Path(self.model) if self.model else quickstart_model()


def quickstart_model() -> Path:
    """The model that comes with the package."""
    found = [folder / QUICKSTART_MODEL for folder in config_dirs() if (folder / QUICKSTART_MODEL).is_dir()]
    if not found:
        raise ConfigError("--model", "the quickstart's model is not here", str(QUICKSTART_MODEL), "give a directory")
    return found[0].resolve()


def add_to(parser: argparse.ArgumentParser) -> None:
    """Every field of Options as an option."""
    docs = _docs()
    for field in fields(Options):
        kind = {"int": int, "float": float}.get(str(field.type), str)
        if field.type == "bool":
            parser.add_argument(_flag(field.name), action="store_true", help=docs[field.name])
        else:
            parser.add_argument(_flag(field.name), type=kind, default=field.default, help=docs[field.name])


def from_args(args: argparse.Namespace) -> Options:
    """Raises ConfigError for an option with a value that can't work."""
    return Options(**{field.name: getattr(args, field.name) for field in fields(Options)})


def _docs() -> dict[str, str]:
    return {name: " ".join(text.split()) for name, text in field_docs(Options).items()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _listed(values: tuple[str | None, ...]) -> str:
    return ", ".join(value for value in values if value)
