"""Inputs: finds the files of the source that the user named, by split.

In: the name of a published data set, a file, a directory, or an id on the Hugging Face hub. Out: the files of each
split on this machine, in a fixed order. Files of the hub are downloaded into the Hugging Face cache; when the hub can't
be reached, cached ones are used. Raises UserError for a source that is none of these, and for a choice that the user
has to make. Does not own: reading the files.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import dataset_info, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] (httpx or httpx2, by the hub's version)
    OfflineModeIsEnabled,
)

from asyncdapo.errors import UserError
from asyncdapo.prompts.prepare.published import PUBLISHED, Published

HUB_ERRORS = (OSError, ValueError, HTTPError)
"""No such repository or id, no network, or offline mode."""
ANSWER_S = 10.0
"""Longest wait for the hub's list of files."""
SUFFIXES = (".jsonl", ".parquet")
CONVERTED = "refs/convert/parquet"
"""Revision in which the hub keeps a parquet copy of data sets of other formats."""
SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)}|dev)(?![a-z])")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Files by split."""

    name: str
    """Source of rows that don't name theirs."""
    splits: dict[str, list[Path]]
    published: Published | None = None
    revision: str | None = None
    """Commit on the hub."""


def find_inputs(source: str, split: str | None, subset: str | None) -> Inputs:
    """The files of `source`: of all its splits, or of one. A single file, and a source whose file names tell no split,
    count as the split asked for, or as `train`."""
    path = Path(source).expanduser()
    if source in PUBLISHED and not path.exists():
        return _published(source, PUBLISHED[source], split, subset)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{source}: must end in {' or '.join(SUFFIXES)}")
        return Inputs(name=path.name, splits={split or "train": [path]})
    if path.is_dir():
        chosen = _by_split(source, _files_below(path), split, subset)
        splits = {of: [path / name for name in files] for of, files in chosen.items()}
        return Inputs(name=path.resolve().name, splits=splits)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        near = difflib.get_close_matches(source, PUBLISHED, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known by name: {', '.join(PUBLISHED)}"
        raise UserError(f"{source}: no such file or directory ({hint})")
    return _from_hub(source, split, subset)


def _published(name: str, known: Published, split: str | None, subset: str | None) -> Inputs:
    if subset:
        raise UserError(f"--subset {subset}: {name} is one already (name its repository, {known.repository}, instead)")
    if split and split not in known.files:
        raise UserError(f"--split {split}: {name} has {', '.join(known.files)}")
    patterns = {split: known.files[split]} if split else known.files
    root = _download(known.repository, list(patterns.values()))
    splits = {of: sorted(root.glob(pattern)) for of, pattern in patterns.items()}
    if missing := [patterns[of] for of, files in splits.items() if not files]:
        raise UserError(f"{known.repository}: has no {', '.join(missing)} in the Hugging Face cache or on the hub")
    return Inputs(name=known.source, splits=splits, published=known, revision=root.name)


def _from_hub(repository: str, split: str | None, subset: str | None) -> Inputs:
    """Downloads only the files that are asked for."""
    revision, names = None, _list_files(repository, None)
    if not any(_is_data(name) for name in names):
        revision, names = CONVERTED, _list_files(repository, CONVERTED)
    chosen = _by_split(repository, names, split, subset)
    root = _download(repository, [str(name) for files in chosen.values() for name in files], revision)
    splits = {of: [root / name for name in files] for of, files in chosen.items()}
    return Inputs(name=repository.rpartition("/")[2], splits=splits, revision=root.name)


def _list_files(repository: str, revision: str | None) -> list[Path]:
    """All files of a repository; those in the cache if the hub can't be asked."""
    try:
        info = dataset_info(repository, revision=revision, timeout=ANSWER_S)  # list_repo_files would retry for 20 s
        return [Path(file.rfilename) for file in info.siblings or ()]
    except HUB_ERRORS as error:
        try:
            cached = snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True)
        except HUB_ERRORS:
            raise _unavailable(repository, error) from error
        return _files_below(Path(cached))


def _download(repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    try:
        return Path(
            snapshot_download(repository, repo_type="dataset", allow_patterns=list(patterns), revision=revision)
        )
    except HUB_ERRORS as error:
        raise _unavailable(repository, error) from error


def _unavailable(repository: str, error: BaseException) -> UserError:
    """The error for a repository that isn't in the cache: the hub's answer, or why there is none."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for answer in chain:
        if isinstance(answer, HFValidationError) or (
            isinstance(answer, HfHubHTTPError) and answer.response.status_code < 500
        ):
            problem = "neither a file here nor a data set in the Hugging Face cache or on the hub"
            return UserError(f"{repository}: {problem} ({_first_line(answer)})")
    if not any(isinstance(cause, (HTTPError, OfflineModeIsEnabled)) for cause in chain):  # for example a full disk
        return UserError(f"{repository}: can't be downloaded ({_first_line(error)})")
    offline = any(isinstance(cause, OfflineModeIsEnabled) for cause in chain)
    reason = "HF_HUB_OFFLINE is set" if offline else _first_line(chain[-1])
    fix = "download it where there is a network, and give its directory"
    return UserError(f"{repository}: the hub can't be reached ({reason}), and it isn't in the cache, HF_HOME ({fix})")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------- files of a folder


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _files_below(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


def _by_split(source: str, names: Sequence[Path], split: str | None, subset: str | None) -> dict[str, list[Path]]:
    """The data files among `names`, by split. `names` are relative to the root of the source."""
    files = sorted(name for name in names if _is_data(name) and (not subset or name.is_relative_to(subset)))
    if not files:
        within = f" below {subset}" if subset else ""
        raise UserError(f"{source}: has no {' or '.join(SUFFIXES)} file{within}")
    folders = {path.parts[0] for path in files if len(path.parts) > 1}
    subsets = {name for name in folders if name != "data" and _split_of(Path(name)) is None}
    if not subset and len(subsets) > 1:
        raise UserError(f"{source}: has several subsets (choose one of --subset {', '.join(sorted(subsets))})")
    found: dict[str | None, list[Path]] = defaultdict(list)
    for path in files:
        found[_split_of(path)].append(path)
    if set(found) == {None}:
        return {split or "train": files}
    if split and split not in found:
        raise UserError(f"--split {split}: {source} has {', '.join(sorted(filter(None, found)))}")
    if None in found and not split:
        unclear = found[None][0]
        raise UserError(f"{source}: the name of {unclear} tells no split (--split reads a single one by file name)")
    return {of: found[of] for of in ([split] if split else sorted(filter(None, found), reverse=True))}


def _split_of(path: Path) -> str | None:
    """The split that the name of the file or of its folder tells, if any."""
    for part in reversed(path.parts):
        if words := SPLIT_WORD.findall(part.lower()):
            return SPLITS.get(words[-1], "validation")
    return None
