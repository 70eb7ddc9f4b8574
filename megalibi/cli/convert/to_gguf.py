"""Write the weights as a GGUF file, which llama.cpp runs.

A model without an embedding norm becomes one of the architecture mpt, one with it a bloom. What llama.cpp cannot
compute is refused. OUT.certificate.json says what came out, and how far llama.cpp's probabilities are from those of the
checkpoint where llama-cpp-python is installed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megalibi.cli.command import Command
from megalibi.cli.convert.output import (
    CHECKPOINT_HELP,
    add_compare,
    add_paths,
    check_new,
    describe_certificate,
    showing_tensors,
)
from megalibi.errors import ConfigError

EXAMPLES = """examples:
  {command} runs/quickstart quickstart.gguf
  {command} runs/quickstart quickstart_q8.gguf --type q8_0
  {command} runs/quickstart quickstart.gguf --dry-run
"""
_TYPES = ("f32", "f16", "q8_0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action's options."""
    add_paths(parser, input_help=CHECKPOINT_HELP, output_help="the new file")
    parser.add_argument("--type", choices=_TYPES, default="f16", help="type of the matrices (%(default)s)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="the model's tokenizer (where its run had it)")
    add_compare(parser)


def run(arguments: argparse.Namespace) -> None:
    """Open the checkpoint, and write it as a file of llama.cpp."""
    check_new(arguments.output)
    try:
        from megalibi.export.gguf.llama import WHY_NOT_LLAMA
        from megalibi.export.gguf.write import check_gguf, convert_to_gguf, name_certificate
    except ModuleNotFoundError as error:
        raise ConfigError(f"to-gguf needs the package {error.name}: pip install 'megalibi[gguf]'") from error
    from megalibi.checkpoint import Checkpoint
    from megalibi.export.comparison import check_comparison_memory
    from megalibi.export.portable_tokenizer import check_portable, find_tokenizer

    check_new(name_certificate(arguments.output))
    checkpoint = Checkpoint.open(arguments.input)
    check_gguf(checkpoint.config.model, arguments.type)
    found = find_tokenizer(checkpoint, arguments.tokenizer)
    if found.tokenizer is None:
        raise ConfigError(f"a GGUF file has the model and its tokenizer: give --tokenizer FILE, for {found.reason}")
    check_comparison_memory(checkpoint.config, compare=not arguments.no_compare and not WHY_NOT_LLAMA)
    portable = check_portable(found.tokenizer, "a GGUF file")
    what = f"{checkpoint.path} (step {checkpoint.manifest.step:,}) -> GGUF, {arguments.type}"
    if arguments.dry_run:
        print(f"{what}; it can be done")
        return
    with showing_tensors("to-gguf", arguments.output) as show:
        certificate = convert_to_gguf(
            checkpoint,
            arguments.output,
            portable,
            kind=arguments.type,
            compare=not arguments.no_compare,
            show=show,
        )
    print(f"{what}, in {arguments.output}: {describe_certificate(certificate)}")


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
