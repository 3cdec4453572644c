"""A compiled library is kept for the next start: for the same everything, whole, and safe from other users."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from asyncdapo.native import c_library
from asyncdapo.native.c_library import CompilerError, compile_c

COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then cat {version}; exit; fi
echo compiled >> {calls}
for last; do :; done
cp {built} "$last"
"""
pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")


class Machine:
    """A compiler that counts its calls, and a cache of its own."""

    def __init__(self, tmp_path, monkeypatch, built) -> None:
        self.source, self.version, self.calls = tmp_path / "source.c", tmp_path / "version", tmp_path / "calls"
        self.source.write_text("int one;")
        self.cpuinfo, self.cache = tmp_path / "cpuinfo", tmp_path / "cache"
        self.headers = tmp_path / "headers"
        self.headers.mkdir()
        self.kept = self.cache / "asyncdapo"
        compiler = tmp_path / "compiler"
        compiler.write_text(COMPILER.format(version=self.version, calls=self.calls, built=built))
        compiler.chmod(0o700)
        self.version.write_text("12.2")
        self.cpuinfo.write_text("processor: 0\nflags: avx2\ncpu MHz: 1000\n")
        monkeypatch.setenv("CC", str(compiler))
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.cache))
        monkeypatch.setattr(c_library, "CPUINFO", self.cpuinfo)
        monkeypatch.setattr(c_library, "HEADERS", self.headers)

    def start(self, _=None) -> bool:
        """As a process would that starts. Whether it has the library."""
        return bool(compile_c(self.source, {"SIZE": 3}).forward)

    @property
    def num_compiled(self) -> int:
        return self.calls.read_text().count("compiled")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("built")
    source = directory / "empty.c"
    source.write_text("void forward(void) {} double sample(void) { return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(directory / "empty.so")], check=True)
    return directory / "empty.so"


@pytest.fixture
def machine(tmp_path, monkeypatch, built):
    return Machine(tmp_path, monkeypatch, built)


def test_later_starts_load_what_the_first_one_compiled(machine):
    assert all(machine.start() for _ in range(3))
    assert machine.num_compiled == 1
    [kept] = machine.kept.iterdir()
    assert kept.stat().st_mode & 0o077 == machine.kept.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("change", ["flags", "version", "source", "header"])
def test_another_processor_compiler_source_or_header_compiles_anew(machine, change):
    assert machine.start()
    if change == "flags":
        machine.cpuinfo.write_text("processor: 0\nflags: avx512f\n")
    elif change == "version":
        machine.version.write_text("12.3")
    elif change == "header":
        (machine.headers / "vectors.h").write_text("/* other */")
    else:
        machine.source.write_text("int other;")
    assert machine.start()
    assert (machine.num_compiled, len(list(machine.kept.iterdir()))) == (2, 2)


def test_the_clock_of_the_processor_does_not_matter(machine):
    assert machine.start()
    machine.cpuinfo.write_text("processor: 0\nflags: avx2\ncpu MHz: 3000\n")
    assert machine.start()
    assert machine.num_compiled == 1


@pytest.mark.parametrize("writable", ["file", "directory", "link"])
def test_what_others_could_have_written_is_not_loaded(machine, built, writable):
    assert machine.start()
    [kept] = machine.kept.iterdir()
    if writable == "link":
        kept.unlink()
        kept.symlink_to(built)
    else:
        (kept if writable == "file" else machine.kept).chmod(0o777)
    assert machine.start()
    assert machine.num_compiled == 2
    assert writable == "directory" or (kept.stat().st_mode & 0o777 == 0o600 and not kept.is_symlink())


def test_a_library_of_another_user_is_not_loaded(machine, monkeypatch):
    assert machine.start()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert machine.start()
    assert machine.num_compiled == 2


def test_a_damaged_library_is_compiled_again(machine):
    assert machine.start()
    [kept] = machine.kept.iterdir()
    kept.write_bytes(b"damaged")
    assert machine.start()
    assert machine.start()
    assert machine.num_compiled == 2


def test_what_the_compiler_says_is_in_the_error(machine, monkeypatch):
    monkeypatch.setenv("CC", "cc")
    machine.source.write_text("int one = two;")
    with pytest.raises(CompilerError, match="two"):
        machine.start()


def test_where_nothing_can_be_kept_each_start_compiles(machine):
    machine.cache.write_text("not a directory")
    assert machine.start()
    assert machine.start()
    assert machine.num_compiled == 2


def test_many_starts_at_once_leave_one_library(machine):
    with ThreadPoolExecutor(8) as starts:
        assert all(starts.map(machine.start, range(8)))
    assert len(list(machine.kept.iterdir())) == 1
