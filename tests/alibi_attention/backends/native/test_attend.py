from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import alibi_attention
from alibi_attention import alibi_slopes, attention
from alibi_attention.backends.native import native
from alibi_attention.backends.native.native import _BLOCK
from tests.support.permissions import NOT_ABOVE_PERMISSIONS

FP32_ROUNDING = 2.0**-24  # relative, of one number
FP32_ATOL = 1e-5  # output and gradients of standard normal inputs, against fp64

attend = partial(attention, backend="native")


def visited_blocks(output):
    """Number of key blocks that each block of queries visited, [heads, query blocks]; query 0 stands at key 0."""
    saved = dict(zip(output.grad_fn.names, output.grad_fn.saved_tensors, strict=True))
    first_block_HN = saved["first_block"]
    return torch.arange(1, first_block_HN.shape[1] + 1) - first_block_HN


def test_it_runs_wherever_the_suite_runs():
    """A machine without a compiler must not pass in silence."""
    capability = next(capability for capability in alibi_attention.backends() if capability.name == "native")
    assert capability.usable, capability.reason


def test_a_steep_head_visits_a_constant_number_of_blocks(make_inputs):
    q, k, v, _ = make_inputs(1, 2048, 8, 64)
    visited_HN = visited_blocks(attend(q.requires_grad_(), k, v, alibi_slopes=alibi_slopes(8)))
    assert visited_HN[0].max() <= 3  # slope 1/2: no key past 100 tokens or so
    assert (visited_HN[:4].max(dim=1).values <= 16).all()
    assert torch.equal(visited_HN[7], torch.arange(1, 33))  # slope 1/256: all of them


def test_eps_0_visits_every_block(make_inputs):
    q, k, v, _ = make_inputs(1, 1024, 8, 64)
    visited_HN = visited_blocks(attend(q.requires_grad_(), k, v, alibi_slopes=alibi_slopes(8), horizon_eps=0.0))
    assert (visited_HN == torch.arange(1, 17)).all()


@pytest.mark.parametrize("slope", [0.0, -0.5])
def test_a_slope_that_does_not_fall_has_no_horizon(make_inputs, slope):
    q, k, v, _ = make_inputs(1, 512, 1, 16)
    output = attend(q.requires_grad_(), k, v, alibi_slopes=torch.tensor([slope]))
    assert (visited_blocks(output) == torch.arange(1, 9)).all()
    exact = attention(*(x.double() for x in (q, k, v)), alibi_slopes=torch.tensor([slope]), backend="reference")
    # The far keys count, whose bias is 256: fp32 rounds their scores by 2^-24 of that, and their weights with it.
    rounding = FP32_ROUNDING * abs(slope) * 512
    assert (output - exact).abs().max() <= FP32_ATOL + 2 * rounding * v.abs().max()


@pytest.mark.parametrize("which", ["q", "k"])
def test_a_nan_is_never_past_the_horizon(make_inputs, which):
    q, k, v, _ = make_inputs(1, 1024, 2, 16)
    {"q": q, "k": k}[which][0, 3, 0, 5] = torch.nan
    output = attend(q, k, v, alibi_slopes=torch.tensor([2.0, 2.0]))
    lost = output.isnan().any(dim=-1)[0]
    assert not lost[:3].any()
    assert not lost[:, 1].any()
    assert lost[3:, 0].all() if which == "k" else lost[3, 0]


def test_backward_skips_what_forward_skipped(make_inputs):
    """A key that no query visited gets a gradient of exactly 0 from it; with eps 0.5 that is most of them."""
    q, k, v, _ = make_inputs(1, 1024, 1, 16)
    k, v = k.requires_grad_(), v.requires_grad_()
    output = attend(q, k, v, alibi_slopes=torch.tensor([0.5]), horizon_eps=0.5)
    visited = visited_blocks(output)[0, -1].item()
    assert visited < 4
    grad_k, grad_v = torch.autograd.grad(output[:, -_BLOCK:].sum(), (k, v))
    seen = 1024 - visited * _BLOCK
    assert grad_k[:, :seen].abs().max() == grad_v[:, :seen].abs().max() == 0.0
    assert (grad_v[:, seen:].abs().sum(dim=(0, 2, 3)) > 0).all()


def test_the_same_bits_on_any_number_of_threads_and_again(make_inputs, forward_backward):
    inputs = make_inputs(2, 333, 5, 24)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            results.append(forward_backward(partial(attend, alibi_slopes=alibi_slopes(5)), inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_a_chunk_far_beyond_the_keys_loses_no_digits(make_inputs, forward_backward):
    """A bias of -2^20 / 2 for every key is a shift of the row; left in, it would leave scores two digits."""
    inputs = make_inputs(1, 70, 2, 16, keys=200)
    arguments = {"alibi_slopes": torch.tensor([0.5, 0.01]), "query_offset": 2**20}
    results = forward_backward(partial(attend, **arguments), inputs)
    exact = forward_backward(partial(attention, backend="reference", **arguments), inputs, torch.float64)
    assert max((x - y).abs().max() for x, y in zip(results, exact, strict=True)) < FP32_ATOL


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags name x86-64 processors")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_older_processors_get_the_same_attention(tmp_path, monkeypatch, make_inputs, forward_backward, processor):
    """Vectors of 4 and of 8 lanes; this machine's own width is what every other test runs on."""
    flags = [f"-march={processor}" if flag.startswith("-march") else flag for flag in native._FLAGS]
    library = tmp_path / "native.so"
    subprocess.run(["c++", *flags, "-fPIC", "-shared", native._SOURCES[0], "-o", library], check=True)
    inputs = make_inputs(2, 150, 3, 40)
    exact = forward_backward(
        partial(attention, alibi_slopes=alibi_slopes(3), backend="reference"), inputs, torch.float64
    )
    monkeypatch.setattr(native, "_load", lambda: (ctypes.CDLL(str(library)), ""))
    results = forward_backward(partial(attend, alibi_slopes=alibi_slopes(3)), inputs)
    assert max((x - y).abs().max() for x, y in zip(results, exact, strict=True)) < FP32_ATOL


KERNEL_CHECK = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from alibi_attention import alibi_slopes, attention, resolve_backend
from alibi_attention.backends.native import native

capability = native.capability()
print(capability.usable)
print(capability.reason)
print(resolve_backend("auto", "cpu", torch.float32, 64))
if capability.usable:
    q, k, v = torch.randn(3, 1, 97, 4, 24, generator=torch.Generator().manual_seed(0)).unbind(0)
    ours, exact = (attention(q, k, v, alibi_slopes=alibi_slopes(4), backend=name) for name in ("native", "reference"))
    print((ours - exact).abs().max().item())
"""


def start_fresh(*before: str, **environment: str) -> subprocess.Popen[str]:
    """Start a process that loads the kernel, and computes attention with it if it can."""
    return subprocess.Popen(
        [*before, sys.executable, "-c", KERNEL_CHECK],
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
