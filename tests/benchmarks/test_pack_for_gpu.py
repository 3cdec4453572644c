"""Packages to be carried: which ones, and that what is unpacked is what was packed."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks import pack_for_gpu
from benchmarks.pack_for_gpu import carried, fill, main, pack, read_have, register

PLUGINS = "vllm.general_plugins"


def install(name: str, version: str, *requires: str) -> dict[str, object]:
    """As pip reports it."""
    return {"metadata": {"name": name, "version": version, "requires_dist": list(requires)}}


INSTALLS = [
    install("big_engine", "1.0", "numpy>=2", "torch==2.11.0", "cuda-python", "old>=5; python_version < '3.0'"),
    install("numpy", "2.6.0"),
    install("torch", "2.11.0", "nvidia-nccl-cu13"),
    install("nvidia-nccl-cu13", "2.29"),
    install("cuda-python", "13.0"),
    install("other", "3.0", "numpy<2.5", "old"),
    install("old", "4.0"),
]


def test_what_the_machine_has_in_a_version_that_will_do_is_left_out_and_what_comes_with_cuda() -> None:
    assert carried(INSTALLS, {}) == ["big-engine==1.0", "numpy==2.6.0", "old==4.0", "other==3.0"]
    assert carried(INSTALLS, {"numpy": "2.4.1", "old": "1.0"}) == ["big-engine==1.0", "other==3.0"]
    assert "numpy==2.6.0" in carried(INSTALLS, {"numpy": "2.5.2"}), "another package refuses it"


def test_what_a_machine_has_is_read_from_the_lines_that_name_a_version(tmp_path: Path) -> None:
    file = tmp_path / "freeze.txt"
    file.write_text("Big_Engine==1.0\n# a comment\n-e .\nnumpy==2.5.2\n")
    assert read_have(file) == {"big-engine": "1.0", "numpy": "2.5.2"}
    assert read_have(None) == {}


def test_what_is_unpacked_is_what_was_packed(tmp_path: Path, capsys) -> None:
    site, out, there = tmp_path / "site", tmp_path / "out", tmp_path / "there"
    for file, text in {
        "a.py": "A = 1\n",
        "vllm/_moe_C.so": "large",
        "vllm/tests/x.py": "",
        "b/data": "x" * 9000,
    }.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)
    fill(site, [])
    out.mkdir()
    chunks = pack(site, "base", out, 100)
    assert len(chunks) > 1
    assert all(chunk.stat().st_size <= 100 for chunk in chunks)
    (out / "unpack.sh").write_text(pack_for_gpu.UNPACK)
    done = subprocess.run(["sh", str(out / "unpack.sh"), str(there)], capture_output=True, text=True, check=True)
    assert done.stdout == f"export PYTHONPATH={there}\n"
    assert {file.relative_to(there).as_posix() for file in there.rglob("*") if file.is_file()} == {"a.py", "b/data"}
    assert (there / "b" / "data").read_text() == "x" * 9000


def test_vllm_finds_our_plugin_where_asyncdapo_runs_from_its_clone(tmp_path: Path) -> None:
    register(tmp_path)
    [ours] = metadata.distributions(path=[str(tmp_path)])
    installed = metadata.distribution("asyncdapo")
    assert (ours.metadata["Name"], ours.version) == ("asyncdapo", installed.version)
    points = [[(one.name, one.value) for one in each.entry_points.select(group=PLUGINS)] for each in (ours, installed)]
    assert points[0] == points[1] != []


def test_the_groups_are_said_without_a_network(capsys) -> None:
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["base", "ray", "vllm"]


@pytest.mark.soak
def test_a_small_package_is_fetched_for_the_other_python(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(pack_for_gpu, "GROUPS", {"small": ["msgspec"]})
    assert main(["--out", str(tmp_path / "out"), "--only", "small"]) == 0
    assert "small: 1 packages (msgspec==" in capsys.readouterr().out
    there = tmp_path / "there"
    subprocess.run(["sh", str(tmp_path / "out" / "unpack.sh"), str(there)], check=True)
    assert list(there.glob("msgspec/*cpython-312-x86_64-linux-gnu.so"))
