"""Generate text from a checkpoint: after one prompt, after each prompt of a file, or after those that you type.

Text appears as it is generated. Typed prompts end with Ctrl-D; Ctrl-C stops an answer. A head with ALiBi forgets keys
that provably hold no more than --horizon-eps of its attention.

Ranks (started by torchrun, deepspeed or srun) share the model; with more ranks than --tensor-parallel-size they share
the prompts of a file, too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megalibi import log
from megalibi.cli.command import RankCommand
from megalibi.cli.inference.prompts import iterate_typed, read_prompts
from megalibi.config import ModelConfig
from megalibi.config.checks import check_option, refuse
from megalibi.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.errors import ConfigError, DataError, UserError
from megalibi.evaluate.run import check_same_tokenizer, check_tensor_parallel_size
from megalibi.files import lock_file, sync_file
from megalibi.generate.decoder import DEFAULT_HORIZON_EPS, Decoder
from megalibi.generate.run import check_prompt, check_room, describe_generation, generate
from megalibi.generate.sampling import Sampler, Sampling
from megalibi.generate.stream import TextStream
from megalibi.model import GPT
from megalibi.parallel import ProcessGroups, gather_objects, refusing_together
from megalibi.runtime.device import set_up_device
from megalibi.runtime.outputs import check_outputs
from megalibi.runtime.ranks import Place, join_ranks

EXAMPLES = """examples:
  {command} --checkpoint runs/quickstart --prompt "Once upon a time" --temperature 0.8 --top-p 0.95
  {command} --checkpoint runs/quickstart
  torchrun --nproc_per_node 4 {torchrun} --checkpoint runs/large --prompts prompts.txt --max-tokens 500 \\
      --tensor-parallel-size 2 --output texts.jsonl
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


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """What stays the same from one prompt to the next."""

    model: GPT
    """The model of the checkpoint, with this rank's slices of its parameters."""
    config: ModelConfig
    """The network, as the checkpoint describes it."""
    tokenizer: Tokenizer | WordTokenizer
    """From text to the model's tokens and back."""
    sampling: Sampling
    """How the next token is chosen."""
    max_tokens: int
    """Most tokens to generate after a prompt."""
    horizon_eps: float
    """Most of a head's attention that forgotten keys may hold."""
    shows: bool
    """Whether this rank prints the text as it is generated."""

    def encode(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt; those of an empty one are the end of the document before.

        Raises:
            UserError: The prompt is no text, has a token that the model does not know, or leaves it no room.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the prompt {prompt[:40]!a} must be UTF-8 text: give it in that encoding") from error
        tokens = self.tokenizer.encode(prompt) or [self.tokenizer.end_of_document_id]
        check_prompt(tokens, self.config.vocab_size)
        check_room(self.config, len(tokens), self.max_tokens)
        return tokens

    def speak(self, prompt: str, number: int = 0) -> dict[str, Any]:
        """Generate the text after a prompt, and print it; return what --output holds of it.

        Args:
            prompt: The text before.
            number: The number of the prompt, which has draws of its own.
        """
        tokens = self.encode(prompt)
        stream, pieces = TextStream(self.tokenizer, tokens), []

        def show(token: int) -> None:
            take(stream.push(token))

        def take(piece: str) -> None:
            pieces.append(piece)
            if self.shows:
                print(piece, end="", flush=True)

        decoder = Decoder(self.model, horizon_eps=self.horizon_eps)
        # A line end of a word-level text is a token, and no end of the text.
        end = -1 if self.tokenizer.counts_lines else self.tokenizer.end_of_document_id
        try:
            done = generate(
                decoder,
                tokens,
                Sampler(self.sampling, number),
                max_tokens=self.max_tokens,
                num_tokens=self.tokenizer.vocab_size,
                end_of_document_id=end,
                show=show,
            )
        finally:
            take(stream.finish())
            if self.shows:
                print(flush=True)
        if self.shows:
            _LOGGER.info("%s", describe_generation(done, decoder, len(tokens)))
        return {
            "prompt": prompt,
            "text": "".join(pieces),
            "prompt_tokens": tokens,
            "tokens": list(done.tokens),
            "ended": done.ended,
            "cache_rebuilds": decoder.num_rebuilds,
        }


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
    """Answer the prompts of a file, one for each data rank a round, and print and write each round in order."""
    for number, prompt in enumerate(prompts):  # every rank refuses what one would refuse
        check_given_prompt(speaker, prompt, f"--prompts={source}: prompt {number + 1}")
    is_first, file = groups.world.rank == 0, None
    with contextlib.ExitStack() as stack:
        with refusing_together(groups.world, output or source):
            if is_first and output is not None:
                file = stack.enter_context(open(output, "ab"))
                lock_file(file.fileno(), output)
                file.truncate(0)
        for start in range(0, len(prompts), groups.data.size):
            number, answer = start + groups.data.rank, None
            with refusing_together(groups.world, output or source):
                if number < len(prompts):
                    if speaker.shows:
                        print(prompts[number], end="", flush=True)
                    answer = speaker.speak(prompts[number], number)
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
    if not 0.0 <= arguments.horizon_eps < 1.0:
        refuse("--horizon-eps", arguments.horizon_eps, "be at least 0 and below 1")
    if arguments.output is not None and arguments.prompts is None:
        refuse("--output", arguments.output, "stand beside --prompts")
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
        shows=place.rank == 0 and groups.data.size == 1,
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
