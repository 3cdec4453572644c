"""Packages for a machine without a network, as files to copy there: compressed folders in chunks, and a script that
unpacks them.

    python benchmarks/pack_for_gpu.py --out DIR [--only base ray vllm] [--have freeze.txt] [--chunk-mib 56] [--list]

    base    what asyncdapo needs besides torch and transformers      ray    Ray      vllm    vLLM for torch 2.11

Each group is resolved with pip for the machine's Python and platform. CUDA packages are left out, and so are those that
the machine has in a suitable version (`--have`: lines of `name==version`, as the check `environment` of
`first_gpu_hour.py` writes them there). DIR/GROUP.tar.xz.00, .01, … are at most `--chunk-mib` each. Copy some or all
groups with DIR/unpack.sh; on the machine `sh unpack.sh FOLDER` prints the PYTHONPATH to set.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from asyncdapo import __version__

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {
    "base": ["msgspec", "pyzmq", "psutil", "omegaconf>=2.3,<3", "wandb", "math-verify", "pytest-timeout", "hypothesis"],
    "ray": ["ray>=2.52,<3"],
    "vllm": ["vllm==0.25.0"],
}
NEVER = ("torch", "torchvision", "torchaudio", "triton", "nvidia-*", "cuda-*", "flashinfer-*", "setuptools")
"""Comes with the machine's torch, or is for kernels that no check uses."""
PRUNED = (
    "vllm/*moe*.so",
    "vllm/*deep_gemm*",
    "vllm/*flashmla*",
    "vllm/*qutlass*",
    "vllm/vllm_flash_attn/_vllm_fa2*.so",
    "vllm/*rust*",
    "*/__pycache__/*",
    "*/tests/*",
)
"""Large objects that no dense model on a Hopper GPU loads, and what nobody imports."""
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
UNPACK = """#!/bin/sh
# sh unpack.sh FOLDER: unpacks the chunks next to this script into FOLDER
set -e
mkdir -p "$1"
for first in "$(dirname "$0")"/*.tar.xz.00; do cat "${first%.00}".?? | tar -xJf - -C "$1"; done
echo "export PYTHONPATH=$(cd "$1" && pwd)"
"""


def resolved(group: str, have: Mapping[str, str], folder: Path) -> list[str]:
    """`name==version` of every package of a group that has to be copied. Writes only pip's report to the folder."""
    report = folder.with_suffix(".json")
    _install(folder, "--dry-run", "--ignore-installed", "--report", str(report), *GROUPS[group])
    return carried(json.loads(report.read_text())["install"], have)


def carried(installs: Sequence[Mapping[str, Any]], have: Mapping[str, str]) -> list[str]:
    """The packages of pip's report that the machine lacks, or has in a version that another package refuses."""
    found = {canonicalize_name(one["metadata"]["name"]): one["metadata"] for one in installs}
    wanted = [Requirement(text) for one in found.values() for text in one.get("requires_dist", [])]
    pins = []
    for name, metadata in sorted(found.items()):
        limits = [one.specifier for one in wanted if canonicalize_name(one.name) == name and _applies(one)]
        will_do = name in have and all(limit.contains(have[name], prereleases=True) for limit in limits)
        if not will_do and not any(fnmatch.fnmatch(name, pattern) for pattern in NEVER):
            pins.append(f"{name}=={metadata['version']}")
    return pins


def _applies(requirement: Requirement) -> bool:
    """Whether a requirement applies on the machine, without any extra."""
    there = {"python_version": PYTHON, "sys_platform": "linux", "platform_machine": "x86_64", "extra": ""}
    return requirement.marker is None or requirement.marker.evaluate(there)


def fill(folder: Path, pins: Sequence[str]) -> None:
    """Install these into the folder, and remove what is never loaded."""
    if pins:
        _install(folder, "--no-deps", "--no-compile", *pins)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in PRUNED):
            path.unlink()


def register(folder: Path) -> None:
    """Write the metadata of an installed asyncdapo, by which vLLM finds its plugin: there it runs from a clone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name']}-{__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {__version__}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def pack(folder: Path, name: str, out: Path, chunk_bytes: int) -> list[Path]:
    """The folder's files as `name.tar.xz.00` and so on."""
    with tempfile.TemporaryFile() as packed:
        with lzma.open(packed, "wb", preset=9) as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name)
        packed.seek(0)
        chunks = []
        while data := packed.read(chunk_bytes):
            chunks.append(out / f"{name}.tar.xz.{len(chunks):02}")
            chunks[-1].write_bytes(data)
    return chunks


def read_have(path: Path | None) -> dict[str, str]:
    """Name -> version, from lines `name==version`; other lines are ignored."""
    lines = path.read_text().splitlines() if path else []
    pairs = (line.strip().split("==") for line in lines if line.count("==") == 1)
    return {canonicalize_name(name): version for name, version in pairs}


def _install(folder: Path, *args: str) -> None:
    """Run pip for the other machine. Raises CalledProcessError; pip has printed the reason."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    machine = ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON, *platforms]
    command = [sys.executable, "-m", "pip", "--quiet", "install", "--target", str(folder), *machine, *args]
    subprocess.run(command, check=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for the chunks")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--have", type=Path, help="what the machine has, name==version a line")
    parser.add_argument("--chunk-mib", type=int, default=56)
    parser.add_argument("--list", action="store_true", help="say what the groups are made of, and end")
    args = parser.parse_args(argv)
    if args.list or not args.out:
        print("\n".join(f"{group:6} {' '.join(GROUPS[group])}" for group in args.only))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "unpack.sh").write_text(UNPACK)
    for group in args.only:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "site"
            folder.mkdir()
            pins = resolved(group, read_have(args.have), folder)
            fill(folder, pins)
            if group == "base":
                register(folder)
            chunks = pack(folder, group, args.out, args.chunk_mib << 20)
        sizes = ", ".join(f"{chunk.name} {chunk.stat().st_size / 2**20:.1f} MiB" for chunk in chunks)
        print(f"{group}: {len(pins)} packages ({' '.join(pins)}); {sizes}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
