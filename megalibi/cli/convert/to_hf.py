"""Write a checkpoint as a folder that transformers' own classes load, offline and without remote code.

mpt is the format of a model without biases, bloom of one with biases, an embedding norm and the GELU by tanh, falcon of
one whose slopes are divided by sqrt(head dimension), as Falcon-RW's. What a format cannot hold is refused with the
reason. The weights are the fp32 weights that the optimizer steps on. Where transformers is installed, both models are
run on a text of twice the training length, and a difference of logits above 1e-4 ends the conversion
(or, on long texts, above what fp32 leaves of the biases that the class adds).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megalibi.cli.command import Command
from megalibi.cli.convert.output import (
    CHECKPOINT_HELP,
    add_compare,
    add_paths,
    add_shard_size,
    check_new,
    describe_certificate,
    showing_tensors,
)

EXAMPLES = """examples:
  {command} runs/big big_mpt --format mpt
  {command} runs/big big_mpt --format mpt --dtype bfloat16 --tokenizer data/t.model
  {command} runs/big big_bloom --format bloom --dry-run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action's options."""
    add_paths(parser, input_help=CHECKPOINT_HELP, output_help="the new folder")
    parser.add_argument("--format", choices=("mpt", "bloom", "falcon"), required=True, help="the architecture")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="type of the weights (%(default)s, which has every bit)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="T.model", help="the run's tokenizer, if it has moved since (data.tokenizer)"
    )
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="most tokens of config.json, in tokens (16 x data.seq_length)"
    )
    parser.add_argument(
        "--accept-rounded-bias",
        action="store_true",
        help="falcon: write it although transformers' class computes the bias in bfloat16",
    )
    add_shard_size(parser)
    add_compare(parser)


def run(arguments: argparse.Namespace) -> None:
    """Open the checkpoint, and write it as a folder of Hugging Face."""
    check_new(arguments.output)
    from megalibi.checkpoint import Checkpoint
    from megalibi.export.hf.formats import get_format
    from megalibi.export.hf.plan import plan_hf
    from megalibi.export.hf.write import convert_to_hf
    from megalibi.export.portable_tokenizer import find_tokenizer

    checkpoint = Checkpoint.open(arguments.input)
    plan = plan_hf(
        checkpoint,
        get_format(arguments.format),
        find_tokenizer(checkpoint, arguments.tokenizer),
        dtype=arguments.dtype,
        max_length=arguments.max_length,
        accept_rounded_bias=arguments.accept_rounded_bias,
        compare=not arguments.no_compare,
    )
    what = f"{checkpoint.path} (step {checkpoint.manifest.step:,}) as {plan.known.architecture} in {plan.dtype}"
    if arguments.dry_run:
        print("\n".join([f"{what}; it can be done", *plan.notes]))
        return
    with showing_tensors("to-hf", arguments.output) as show:
        certificate = convert_to_hf(
            checkpoint,
            arguments.output,
            plan,
            max_shard_bytes=arguments.max_shard_size,
            show=show,
        )
    print(f"{what}, in {arguments.output}; {describe_certificate(certificate)}")
    for note in certificate.notes:
        print(note)


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
