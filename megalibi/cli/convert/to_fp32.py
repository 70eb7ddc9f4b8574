"""Write the weights alone, whole and in fp32, as safetensors by our own names.

They are the fp32 weights that the optimizer steps on, without the padding of the vocabulary, in one file or, above
--max-shard-size, several and an index; a tied weight is stored once, and the tie recorded. config.yaml and
certificate.json stand beside them.
"""

from __future__ import annotations

import argparse

from megalibi.cli.command import Command
from megalibi.cli.convert.output import CHECKPOINT_HELP, add_paths, add_shard_size, check_new, showing_tensors

EXAMPLES = """examples:
  {command} runs/big big_fp32
  {command} runs/big/checkpoints/step_00000100 step_100_fp32 --max-shard-size 1GB
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action's options."""
    add_paths(parser, input_help=CHECKPOINT_HELP, output_help="the new folder")
    add_shard_size(parser)


def run(arguments: argparse.Namespace) -> None:
    """Open the checkpoint, and write its weights."""
    check_new(arguments.output)
    from megalibi.checkpoint import Checkpoint
    from megalibi.export.fp32 import convert_to_fp32

    checkpoint = Checkpoint.open(arguments.input)
    what = f"{checkpoint.path} (step {checkpoint.manifest.step:,}): {len(checkpoint.parameters):,} tensors in fp32"
    if arguments.dry_run:
        print(f"{what}; it can be done")
        return
    with showing_tensors("to-fp32", arguments.output) as show:
        convert_to_fp32(checkpoint, arguments.output, max_shard_bytes=arguments.max_shard_size, show=show)
    print(f"{what}, in {arguments.output}, each read back from there with the same bits")


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
