from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import alibi_attention
from tests.support.permissions import NOT_ABOVE_PERMISSIONS
from tests.support.warm_python import warm_python

FP32_ATOL = 1e-5  # output and gradients of standard normal inputs, against fp64
CHECK = Path(__file__).with_name("check_library.py")


def start_fresh(*before: str, **environment: str) -> subprocess.Popen[str]:
    """Start a process that loads the kernel, and computes attention with it if it can."""
    python = sys.executable if before else warm_python()  # whose processes are not the children of what stands before
    return subprocess.Popen(
        [*before, python, str(CHECK)],
        cwd=Path(alibi_attention.__file__).parents[1],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_right(process: subprocess.Popen[str]) -> str:
    """Check that a process had the kernel and its values were right; return what it warned of."""
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    usable, reason, chosen, error = output.splitlines()
    assert (usable, reason, chosen) == ("True", "", "native")
    assert float(error) <= FP32_ATOL
    return errors


def test_ranks_that_start_together_compile_without_waiting_for_each_other(tmp_path):
    for warnings in [assert_right(rank) for rank in [start_fresh(XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]]:
        assert warnings == ""
    # One library with its record, and nothing half made.
    names = sorted(path.name for path in tmp_path.glob("*/alibi_attention/*"))
    assert len(names) == 2
    assert names[1] == names[0] + ".sha256"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A folder with the compiled kernel, where TORCH_EXTENSIONS_DIR wants it."""
    folder = tmp_path_factory.mktemp("cache")
    assert assert_right(start_fresh(TORCH_EXTENSIONS_DIR=str(folder), XDG_CACHE_HOME="/dev/null/none")) == ""
    return folder


def find_library(folder: Path) -> Path:
    (library,) = (folder / "alibi_attention").glob("native-*.so")
    return library


def truncate(library: Path) -> None:
    os.truncate(library, library.stat().st_size // 2)


def empty(library: Path) -> None:
    os.truncate(library, 0)


def flip(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def remove_record(library: Path) -> None:
    library.with_name(library.name + ".sha256").unlink()


def empty_record(library: Path) -> None:
    library.with_name(library.name + ".sha256").write_text("")


@pytest.mark.parametrize("harm", [truncate, empty, flip, remove_record, empty_record])
def test_a_library_that_is_not_as_it_was_written_is_compiled_again(cache, tmp_path, harm):
    """A truncated one, mapped, would end the process with SIGBUS and no word."""
    shutil.copytree(cache, tmp_path / "cache")
    library = find_library(tmp_path / "cache")
    before = library.stat().st_mtime_ns
    harm(library)
    for warnings in (1, 0):
        said = assert_right(start_fresh(TORCH_EXTENSIONS_DIR=str(tmp_path / "cache")))
        assert len(said.splitlines()) == warnings, said
        assert (str(library) in said) == bool(warnings)
    assert library.read_bytes() == find_library(cache).read_bytes()
    assert library.stat().st_mtime_ns > before


def test_a_whole_library_is_not_compiled_again(cache):
    """With a compiler that tells its macros and compiles nothing."""
    compiler = cache / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-shared*) exit 1;; *) exec c++ "$@";; esac\n')
    compiler.chmod(0o755)
    assert assert_right(start_fresh(TORCH_EXTENSIONS_DIR=str(cache), CXX=str(compiler))) == ""


def test_without_a_compiler_auto_goes_on_and_the_reason_is_said(tmp_path):
    output, _ = start_fresh(XDG_CACHE_HOME=str(tmp_path), CXX="no-such-compiler").communicate()
    usable, reason, chosen = output.splitlines()
    assert usable == "False"
    assert reason == "no C++ compiler is found (no-such-compiler, by CXX or by default)"
    assert chosen != "native"


def assert_not_kept(process: subprocess.Popen[str], why: str) -> None:
    """The kernel works, and one line says that it was compiled for this process alone."""
    (line,) = assert_right(process).splitlines()
    assert line.startswith("WARNING the compiled kernel cannot be kept in ")
    assert why in line
    assert line.endswith("TORCH_EXTENSIONS_DIR names another folder")


def test_a_cache_that_cannot_be_written_costs_a_compilation_and_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    assert_not_kept(start_fresh(TORCH_EXTENSIONS_DIR=str(tmp_path / "file")), "Not a directory")
    (tmp_path / "closed").mkdir(mode=0o500)
    closed = start_fresh(*NOT_ABOVE_PERMISSIONS, TORCH_EXTENSIONS_DIR=str(tmp_path / "closed"))
    assert_not_kept(closed, "Permission denied")
    assert list((tmp_path / "closed").iterdir()) == []


def test_a_cache_that_may_not_be_read_costs_a_compilation_and_a_warning(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    find_library(tmp_path / "cache").chmod(0o000)
    said = assert_right(start_fresh(*NOT_ABOVE_PERMISSIONS, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache")))
    assert "Permission denied" in said
    # The folder is ours, so that the next process has one that it may read.
    assert assert_right(start_fresh(*NOT_ABOVE_PERMISSIONS, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))) == ""


def test_a_cache_on_a_full_disk_costs_a_compilation_and_a_warning(tmp_path):
    """A real one: a tmpfs of one page in a mount namespace of its own."""
    mount = 'mount -t tmpfs -o size=4k tmpfs "$0" && exec "$@"'
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", mount, str(tmp_path)]
    assert_not_kept(start_fresh(*namespace, TORCH_EXTENSIONS_DIR=str(tmp_path)), "No space left on device")
