"""The compiled C++ kernel: found in the user's cache, or compiled into it.

It is compiled once per machine, in seconds, by the C++ compiler found there; without one the other back ends do the
work. The library lies in the cache that PyTorch has for its own extensions (TORCH_EXTENSIONS_DIR names another folder),
under a name made of its source, the compiler and the processor, and gets there by a rename: ranks that start together
may each compile it, and none ever waits for another.

Mapping a library that a full disk or an interruption cut short would end the process without a message. So the library
is on the disk before it has its name, its size and checksum lie beside it, and one that does not match them is compiled
again.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_LOGGER = logging.getLogger("alibi_attention")
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.cpp", "native_tile.h"))
# No -ffast-math: the exponential rounds by adding and subtracting a large number.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")


@cache
def load_library() -> tuple[ctypes.CDLL | None, str]:
    """Return the compiled kernel, or None and why there is none; the first call compiles it if need be."""
    try:
        # How PyTorch finds the user's compiler and cache for its own extensions; this import needs setuptools.
        with _muted("torch.utils.cpp_extension"):  # it warns where CUDA's compiler is and no GPU
            from torch.utils.cpp_extension import get_cxx_compiler, get_default_build_root

        compiler = shutil.which(get_cxx_compiler())
        if compiler is None:
            return None, f"no C++ compiler is found ({get_cxx_compiler()}, by CXX or by default)"
        # The macros say which version the compiler has, and what the processor can do.
        macros = _run_compiler(compiler, *_FLAGS, "-x", "c++", "-dM", "-E", os.devnull)
        key = hashlib.sha256(
            "\0".join((macros, *_FLAGS, *(source.read_text() for source in _SOURCES))).encode()
        ).hexdigest()[:16]
        root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
        return _open(compiler, Path(root) / "alibi_attention" / f"native-{key}.so"), ""
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"the C++ kernel cannot be had: {error}"


@contextlib.contextmanager
def _muted(name: str) -> Iterator[None]:
    """Let a logger report errors only, for a while."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _open(compiler: str, library: Path) -> ctypes.CDLL:
    """Return the library, compiled anew unless it lies in the cache as it was written."""
    if _is_whole(library):
        return ctypes.CDLL(str(library))
    _LOGGER.info("compiling %s with %s into %s (once per machine)", _SOURCES[0].name, compiler, library.parent)
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / library.name
        _run_compiler(compiler, *_FLAGS, "-fPIC", "-shared", str(_SOURCES[0]), "-o", str(built))
        try:
            _keep(built, library)
        except OSError as error:
            _LOGGER.warning(
                "the compiled kernel cannot be kept in %s, so that every start compiles it again: %s; "
                "TORCH_EXTENSIONS_DIR names another folder",
                library.parent,
                error,
            )
            return ctypes.CDLL(str(built))  # what is mapped stays when its name goes
    return ctypes.CDLL(str(library))


def _is_whole(library: Path) -> bool:
    """Return whether a library lies in the cache with the size and the checksum that it was written with."""
    try:
        if not library.exists():
            return False
        found, recorded = _describe(library), _record_of(library).read_text(errors="replace")
    except OSError as error:
        _LOGGER.warning("the compiled kernel in the cache is not used: %s", error)
        return False
    if found != recorded:
        _LOGGER.warning("the compiled kernel in the cache is damaged and not used: %s", library)
    return found == recorded


def _keep(built: Path, library: Path) -> None:
    """Put a library into the cache, on the disk before it has its name there, and its record beside it.

    Other processes may do the same at the same time. The compiler gives all of them the same bytes; if it did not, the
    record of one beside the library of another would cost the next process a compilation, and no more.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as aside:
        copy = Path(shutil.copy(built, aside))
        record = _record_of(copy)
        record.write_text(_describe(built))
        for path in (copy, record):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if _describe(copy) != record.read_text():
            raise OSError(f"{copy} is not what was written")
        record.replace(_record_of(library))  # first: whoever finds the library finds its record
        copy.replace(library)


def _record_of(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


def _describe(library: Path) -> str:
    """Return the size in bytes and the checksum of a file, as they lie beside it."""
    content = library.read_bytes()
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}\n"


def _run_compiler(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{command[0]}: {errors[0]}")
    return done.stdout
