"""Make a checkpoint of a folder of Hugging Face: MPT, Bloom, or Falcon with ALiBi.

Safetensors and the old .bin files are read tensor by tensor, one file or several with an index; nothing that could run
code is loaded. The checkpoint is at step 0: it can be evaluated, generated from, resharded and exported again. With
--config FILE it is made for a run, which begins from it with checkpoint.resume=OUT. Where transformers is installed,
both models are run on a text of twice the training length, and a difference of logits above 1e-4 ends the conversion
(or, on long texts, above what fp32 leaves of the biases that the class adds).
"""

from __future__ import annotations

import argparse

from megalibi.cli.command import Command
from megalibi.cli.convert.output import (
    add_compare,
    add_paths,
    check_new_checkpoint,
    describe_certificate,
    showing_tensors,
)
from megalibi.errors import ConfigError

EXAMPLES = """examples:
  {command} mpt-7b mpt_7b_checkpoint --tensor-parallel-size 4
  {command} bloom-560m bloom_checkpoint --config configs/fine_tune.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action's options."""
    add_paths(parser, input_help="a folder with config.json and weights", output_help="the new checkpoint's folder")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks that share each layer (%(default)s)"
    )
    parser.add_argument("--config", metavar="FILE", help="the run that will go on from the checkpoint")
    parser.add_argument(
        "--accept-rounded-bias",
        action="store_true",
        help="falcon: read it although transformers' class computes the bias in bfloat16, and ours does not",
    )
    add_compare(parser)


def run(arguments: argparse.Namespace) -> None:
    """Open the folder, and write a checkpoint."""
    check_new_checkpoint(arguments.output)
    if arguments.tensor_parallel_size < 1:
        raise ConfigError(f"--tensor-parallel-size={arguments.tensor_parallel_size}: must be at least 1")
    from megalibi.config import load_config
    from megalibi.export.hf.incoming.read import convert_from_hf, plan_import

    plan = plan_import(
        arguments.input,
        config=None if arguments.config is None else load_config(arguments.config),
        tensor_parallel_size=arguments.tensor_parallel_size,
        accept_rounded_bias=arguments.accept_rounded_bias,
        compare=not arguments.no_compare,
    )
    what = f"{arguments.input} ({plan.foreign.known.architecture}) as a checkpoint"
    if arguments.dry_run:
        print("\n".join([f"{what}; it can be done", *plan.notes]))
        return
    with showing_tensors("from-hf", arguments.output) as show:
        certificate = convert_from_hf(plan, arguments.output, show=show)
    print(f"{what}, in {arguments.output}; {describe_certificate(certificate)}")
    for note in certificate.notes:
        print(note)


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
