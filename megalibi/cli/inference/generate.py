"""Generate text from a checkpoint: after one prompt, after each prompt of a file, or after those that you type.

Text appears as it is generated; with --batch-size, when it is complete. Typed prompts end with Ctrl-D; Ctrl-C stops an
answer. A head with ALiBi forgets keys that provably hold no more than --horizon-eps of its attention.

Ranks (started by torchrun, deepspeed or srun) share the model; with more ranks than --tensor-parallel-size they share
the prompts of a file, too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, BinaryIO

from megalibi import log
from megalibi.cli.command import RankCommand
from megalibi.cli.inference.prompts import iterate_typed, read_prompts
from megalibi.cli.inference.speaker import Speaker
from megalibi.config.checks import check_option, refuse
from megalibi.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.errors import ConfigError, DataError, UserError
from megalibi.evaluate.run import check_same_tokenizer, check_tensor_parallel_size
from megalibi.files import lock_file, sync_file
from megalibi.generate.decoder import DEFAULT_HORIZON_EPS
from megalibi.generate.sampling import Sampling
from megalibi.parallel import ProcessGroups, gather_objects, refusing_together
from megalibi.runtime.device import set_up_device
from megalibi.runtime.outputs import check_outputs
from megalibi.runtime.ranks import Place, join_ranks

EXAMPLES = """examples:
  {command} --checkpoint runs/quickstart --prompt "Once upon a time" --temperature 0.8 --top-p 0.95
  {command} --checkpoint runs/quickstart
  torchrun --nproc_per_node 4 {torchrun} --checkpoint runs/large --prompts prompts.txt --max-tokens 500 \\
      --tensor-parallel-size 2 --output texts.jsonl --batch-size 16
"""
_LOGGER = log.get_logger("generate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a step's folder, or a run's: its latest step"
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="continue this text (default: those that you type)")
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="continue each line of a text file")
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="with --prompts: continue so many together (default: 1)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="with --prompts: write a line for each, too")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens a text (default: 256)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0 takes the likeliest token (default: 1)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens (default: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest with this probability together"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument(
        "--horizon-eps",
        type=float,
        default=DEFAULT_HORIZON_EPS,
        metavar="E",
        help="most attention that forgotten keys may hold in an ALiBi head; 0 keeps all keys (default: 2^-24)",
    )
    parser.add_argument(
        "--tokenizer", metavar="T.model", help="tokenizer of the text (default: data.tokenizer of the checkpoint)"
    )
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks that share one model (default: 1)"
    )


def converse(speaker: Speaker) -> None:
    """Read prompts from the terminal, or from a pipe, up to its end, and answer each.

    Raises:
        DataError: A prompt of a pipe was refused; the others were answered.
    """
    num_refused = 0
    for number, prompt in enumerate(iterate_typed()):
        try:
            if prompt is None:
                raise DataError("it must be UTF-8 text")
            speaker.speak(prompt, number)
        except UserError as error:
            num_refused += 1
            print(f"error: prompt {number + 1}: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            _LOGGER.info("stopped; Ctrl-D ends")
    if num_refused and not sys.stdin.isatty():
        raise DataError(f"{num_refused} of the prompts on standard input were refused, as said above: mend those lines")


def check_given_prompt(speaker: Speaker, prompt: str, name: str) -> None:
    """Refuse a prompt before the work; the message begins with its name."""
    try:
        speaker.encode(prompt)
    except UserError as error:
        raise type(error)(f"{name}: {error}") from error


def speak_all(speaker: Speaker, prompts: list[str], groups: ProcessGroups, source: Path, output: Path | None) -> None:
    """Answer the prompts of a file, shared by the data ranks, and print and write one of each a round, in order."""
    for number, prompt in enumerate(prompts):  # every rank refuses what one would refuse
        check_given_prompt(speaker, prompt, f"--prompts={source}: prompt {number + 1}")
    is_first, file = groups.world.rank == 0, None
    with contextlib.ExitStack() as stack:
        with refusing_together(groups.world, output or source):
            if is_first and output is not None:
                file = stack.enter_context(open(output, "ab"))
                lock_file(file.fileno(), output)
                file.truncate(0)
        own = range(groups.data.rank, len(prompts), groups.data.size)
        own_answers = speaker.speak_each({number: prompts[number] for number in own})
        for _ in range(0, len(prompts), groups.data.size):
            with refusing_together(groups.world, output or source):
                answer = next(own_answers, None)
            answers = gather_objects(answer if groups.tensor.rank == 0 else None, groups.world)
            with refusing_together(groups.world, output or source):
                if is_first:
                    keep_answers([answer for answer in answers if answer is not None], file, shown=speaker.shows)


def keep_answers(answers: list[dict[str, Any]], file: BinaryIO | None, *, shown: bool) -> None:
    """Print the answers that are not yet shown, and put them on the disk: an interruption keeps them."""
    for answer in answers:
        if not shown:
            print(answer["prompt"] + answer["text"], flush=True)
        if file is not None:
            file.write((json.dumps(answer, ensure_ascii=False) + "\n").encode())
    if file is not None:
        sync_file(file)


def check_generate_options(arguments: argparse.Namespace, place: Place) -> Sampling:
    """Refuse options that cannot be used, before the work, and return how tokens are chosen."""
    check_option("--max-tokens", arguments.max_tokens, 1)
    check_option("--batch-size", arguments.batch_size, 1)
    if not 0.0 <= arguments.horizon_eps < 1.0:
        refuse("--horizon-eps", arguments.horizon_eps, "be at least 0 and below 1")
    if arguments.output is not None and arguments.prompts is None:
        refuse("--output", arguments.output, "stand beside --prompts")
    if arguments.batch_size > 1 and arguments.prompts is None:
        refuse("--batch-size", arguments.batch_size, "be 1, or stand beside --prompts")
    if arguments.prompts is None and place.world_size != arguments.tensor_parallel_size:
        size = arguments.tensor_parallel_size
        refuse("--tensor-parallel-size", size, f"be {place.world_size}, the number of ranks, for a single prompt")
    if arguments.prompts is None and arguments.prompt is None and place.world_size > 1:
        raise ConfigError(f"{place.world_size} ranks cannot share a keyboard: give --prompt or --prompts")
    check_outputs({"--output": arguments.output})
    fields = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Sampling)}
    return Sampling(**fields)


def open_model_tokenizer(given: str | None, of_checkpoint: str | None) -> Tokenizer | WordTokenizer:
    """Return the tokenizer that --tokenizer or the checkpoint names.

    Raises:
        ConfigError: Neither does.
        DataError: It is not there, or is none.
    """
    path = given or of_checkpoint
    if path is None:
        raise ConfigError("the checkpoint has no data.tokenizer: name the tokenizer of its text with --tokenizer")
    if given is None and not Path(path).is_file():
        raise ConfigError(f"data.tokenizer={path} of the checkpoint is not there: name it with --tokenizer")
    return load_tokenizer(path)


def run(arguments: argparse.Namespace, place: Place) -> None:
    """Check everything, load the model, and generate."""
    sampling = check_generate_options(arguments, place)
    prompts = None if arguments.prompts is None else read_prompts(arguments.prompts)
    device = set_up_device(place)
    # After the device: it imports DeepSpeed.
    from megalibi.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(arguments.checkpoint)
    config = checkpoint.config
    check_tensor_parallel_size(config, arguments.tensor_parallel_size, place.world_size)
    tokenizer = open_model_tokenizer(arguments.tokenizer, config.data.tokenizer)
    check_same_tokenizer(checkpoint.manifest.data, None, tokenizer)
    groups = join_ranks(place, device, arguments.tensor_parallel_size, config.parallel.timeout_minutes)
    speaker = Speaker(
        model=checkpoint.load_model(device, groups),
        config=config.model,
        tokenizer=tokenizer,
        sampling=sampling,
        max_tokens=arguments.max_tokens,
        horizon_eps=arguments.horizon_eps,
        shows=place.rank == 0 and groups.data.size == 1 and arguments.batch_size == 1,
        batch_size=arguments.batch_size,
    )
    if prompts is not None:
        speak_all(speaker, prompts, groups, arguments.prompts, arguments.output)
    elif arguments.prompt is not None:
        check_given_prompt(speaker, arguments.prompt, "--prompt")
        if speaker.shows:
            print(arguments.prompt, end="", flush=True)
        speaker.speak(arguments.prompt)
    else:
        converse(speaker)


COMMAND = RankCommand(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
