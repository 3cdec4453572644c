"""Where a config is: a path, or a name that is looked up in a few folders.

In: what the user wrote. Out: the path of a YAML file. Does not own: what is in it (`config`), paths inside it.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from asyncdapo.errors import UserError


def config_dirs() -> list[Path]:
    """Folders searched for a config by name: the working directory's, then the ones that come with the package."""
    package = Path(__file__).resolve().parents[1]
    return [Path("configs"), package / "configs", package.parent / "configs"]


def config_names() -> list[str]:
    return sorted({path.stem for folder in config_dirs() if folder.is_dir() for path in folder.glob("*.yaml")})


def find_config(name_or_path: str, beside: Path = Path()) -> Path:
    """A path relative to `beside`, or a name looked up in `configs/`. Raises UserError that lists the names."""
    path = beside / name_or_path
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    for folder in config_dirs():
        if (folder / f"{name_or_path}.yaml").is_file():
            return folder / f"{name_or_path}.yaml"
    near = difflib.get_close_matches(name_or_path, config_names(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"names: {', '.join(config_names())}"
    raise UserError(f"{name_or_path}: no such config ({hint})")
