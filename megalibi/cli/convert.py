"""Write a checkpoint anew: for another topology.

``reshard`` writes it for another number of tensor and data ranks, or another ZeRO stage, with every bit of the weights
and of the optimizer. A run resumes on another topology without it, too, but reads a converted checkpoint in larger
pieces. The checkpoint may be of an older megalibi, whose files DeepSpeed wrote.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megalibi.cli.command import Command
from megalibi.console import Progress
from megalibi.errors import ConfigError, FileError, describe_os_error
from megalibi.runtime.outputs import check_folder

EXAMPLES = """examples:
  {command} reshard runs/big step_on_4 --tensor-parallel-size 4
  {command} reshard runs/big/checkpoints/step_00000100 step_on_16 --tensor-parallel-size 2 --data-parallel-size 8
  {command} reshard runs/big step_on_4 --tensor-parallel-size 4 --dry-run
A run goes on from it with checkpoint.resume=step_on_4 and a train.output_dir of its own.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("action", choices=["reshard"], help="what to do")
    parser.add_argument(
        "input", type=Path, metavar="IN", help="a step's folder, or a run's, whose latest checkpoint is taken"
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="the new checkpoint's folder, which must not exist")
    parser.add_argument("--tensor-parallel-size", type=int, metavar="N", help="ranks that share each layer (as it was)")
    parser.add_argument("--data-parallel-size", type=int, metavar="M", help="data ranks (as it was)")
    parser.add_argument("--zero-stage", type=int, choices=range(4), help="stage of ZeRO (as it was)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, from the manifest alone")


def run(arguments: argparse.Namespace) -> None:
    """Open the checkpoint, and write it anew."""
    if os.path.lexists(arguments.output):
        raise ConfigError(f"OUT={arguments.output}: must not exist; give another folder, or move that one")
    for name in ("tensor_parallel_size", "data_parallel_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={value}: must be at least 1")
    check_folder(arguments.output, "OUT")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is computed here, and DeepSpeed warns of no GPU
    from megalibi.checkpoint import Checkpoint, spell_topology
    from megalibi.checkpoint.reshard import plan_reshard, reshard

    checkpoint = Checkpoint.open(arguments.input)
    old = checkpoint.manifest.topology
    new = {
        name: old[name] if getattr(arguments, name) is None else getattr(arguments, name)
        for name in ("tensor_parallel_size", "data_parallel_size", "zero_stage")
    }
    what = f"{checkpoint.path} (step {checkpoint.manifest.step:,}): {spell_topology(old)} -> {spell_topology(new)}"
    plan = plan_reshard(checkpoint, **new)
    if arguments.dry_run:
        print(f"{what}; it can be done")
        return
    with Progress() as progress:
        try:
            reshard(
                checkpoint,
                arguments.output,
                plan,
                show=lambda name, done, total: progress.show("reshard", name, done=done, total=total),
            )
        except OSError as error:
            raise FileError(describe_os_error(error, arguments.output)) from error
    print(f"{what}, in {arguments.output}; a run goes on from it with checkpoint.resume={arguments.output}")


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
