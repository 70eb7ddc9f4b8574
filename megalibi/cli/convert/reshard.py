"""Write a checkpoint anew for another number of tensor and data ranks, or another ZeRO stage.

It has every bit of the weights and of the optimizer. A run resumes on another topology without it, too, but reads a
converted checkpoint in larger pieces. The checkpoint may be of an older megalibi, whose files DeepSpeed wrote.
"""

from __future__ import annotations

import argparse
from functools import partial

from megalibi.cli.command import Command
from megalibi.cli.convert.output import CHECKPOINT_HELP, add_paths, check_new_checkpoint, showing_tensors
from megalibi.errors import ConfigError

EXAMPLES = """examples:
  {command} runs/big step_on_4 --tensor-parallel-size 4
  {command} runs/big/checkpoints/step_00000100 step_on_16 --tensor-parallel-size 2 --data-parallel-size 8
  {command} runs/big step_on_4 --tensor-parallel-size 4 --dry-run
A run goes on from it with checkpoint.resume=step_on_4 and a train.output_dir of its own.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action's options."""
    add_paths(parser, input_help=CHECKPOINT_HELP, output_help="the new checkpoint's folder")
    parser.add_argument("--tensor-parallel-size", type=int, metavar="N", help="ranks that share each layer (as it was)")
    parser.add_argument("--data-parallel-size", type=int, metavar="M", help="data ranks (as it was)")
    parser.add_argument("--zero-stage", type=int, choices=range(4), help="stage of ZeRO (as it was)")


def run(arguments: argparse.Namespace) -> None:
    """Open the checkpoint, and write it anew."""
    check_new_checkpoint(arguments.output)
    for name in ("tensor_parallel_size", "data_parallel_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={value}: must be at least 1")
    from megalibi.checkpoint import Checkpoint, spell_topology
    from megalibi.checkpoint.reshard import plan_reshard, reshard
    from megalibi.export.resharded import certify_reshard

    checkpoint = Checkpoint.open(arguments.input)
    old = checkpoint.manifest.topology
    new = {
        name: old[name] if getattr(arguments, name) is None else getattr(arguments, name)
        for name in ("tensor_parallel_size", "data_parallel_size", "zero_stage")
    }
    what = f"{checkpoint.path} (step {checkpoint.manifest.step:,}): {spell_topology(old)} -> {spell_topology(new)}"
    plan = plan_reshard(checkpoint, **new)
    sizes = [side.config.train.micro_batch_size for side in (checkpoint, plan)]
    if sizes[0] != sizes[1]:
        what += f", train.micro_batch_size {sizes[0]} -> {sizes[1]}"
    if arguments.dry_run:
        print(f"{what}; it can be done")
        return
    with showing_tensors("reshard", arguments.output) as show:
        certify = partial(certify_reshard, checkpoint, arguments.output)
        reshard(checkpoint, arguments.output, plan, show=show, certify=certify)
    print(f"{what}, in {arguments.output}; a run goes on from it with checkpoint.resume={arguments.output}")


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
