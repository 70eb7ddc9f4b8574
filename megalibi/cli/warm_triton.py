"""Compile the Triton kernels of attention on all cores, before a GPU waits for them one by one.

The compiled kernels go into Triton's cache, TRITON_CACHE_DIR or ~/.triton, where later processes find them. No GPU is
used, and none has to be there.
"""

from __future__ import annotations

import argparse
import os
import time

from alibi_attention.backends.triton.warm import compile_calls, find_target, plan_calls
from megalibi.cli.command import Command
from megalibi.errors import ConfigError

EXAMPLES = """examples:
  {command}
  {command} --capability 90 --dtype bfloat16 --workers 4      (for an H100, from anywhere)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--capability",
        type=int,
        metavar="N",
        help="compute capability of the GPU, 90 for an H100 (default: that of the GPU here)",
    )
    parser.add_argument("--dtype", metavar="TYPE", help="bfloat16, float16 or float32 (default: all)")
    parser.add_argument("--head-dim", type=int, metavar="N", help="head dimension (default: all that models have)")
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="processes (default: the cores)")


def run(arguments: argparse.Namespace) -> int:
    """Compile, and say what each call took."""
    if arguments.workers < 1:
        raise ConfigError(f"--workers={arguments.workers}: must be at least 1")
    chosen = {"dtype": arguments.dtype, "head_dim": arguments.head_dim}
    calls = [c for c in plan_calls() if all(value in (None, getattr(c, name)) for name, value in chosen.items())]
    if not calls:
        raise ConfigError(
            f"--dtype={arguments.dtype} with --head-dim={arguments.head_dim}: must be a type and a head dimension of a "
            "kernel"
        )
    try:
        target = find_target(arguments.capability)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    os.environ.pop("TRITON_INTERPRET", None)  # with it Triton would compile nothing
    began, failures = time.monotonic(), 0
    for call, found in compile_calls(calls, target, arguments.workers):
        failures += isinstance(found, str)
        print(f"{call}: {found if isinstance(found, str) else f'{found:.1f} s'}", flush=True)
    print(f"{len(calls) - failures} of {len(calls)} calls compiled in {time.monotonic() - began:.0f} s")
    return 1 if failures else 0


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
