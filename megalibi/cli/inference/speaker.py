"""From a prompt's text to the text after it: one at a time as it is generated, or many together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megalibi import log
from megalibi.config import ModelConfig
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.errors import DataError
from megalibi.generate.decoder import Decoder
from megalibi.generate.run import TextRow, check_prompt, check_room, describe_generation, generate
from megalibi.generate.sampling import Sampler, Sampling
from megalibi.generate.stream import TextStream
from megalibi.model import GPT

_LOGGER = log.get_logger("generate")


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
    batch_size: int = 1
    """How many texts of ``speak_each`` grow together; more than one are not printed as they grow."""

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

        def take(piece: str) -> None:
            if self.shows:
                print(piece, end="", flush=True)

        row = self._begin(prompt, number, lambda token: take(stream.push(token)))
        stream = TextStream(self.tokenizer, row.prompt)
        try:
            next(generate([row]))
        finally:
            take(stream.finish())
            if self.shows:
                print(flush=True)
        if self.shows:
            _LOGGER.info("%s", describe_generation(row))
        return self._answer(prompt, row)

    def speak_each(self, prompts: Mapping[int, str]) -> Iterator[dict[str, Any]]:
        """Generate the texts after prompts; yield in their order what --output holds of each.

        Args:
            prompts: The texts before, by number.
        """
        if self.batch_size == 1:
            for number, prompt in prompts.items():
                if self.shows:
                    print(prompt, end="", flush=True)
                yield self.speak(prompt, number)
            return
        expected, answers = deque(prompts), dict[int, dict[str, Any]]()
        rows = (self._begin(prompt, number) for number, prompt in prompts.items())
        for row in generate(rows, batch_size=self.batch_size):
            number = row.sampler.number
            answers[number] = self._answer(prompts[number], row)
            while expected and expected[0] in answers:
                yield answers.pop(expected.popleft())

    def _begin(self, prompt: str, number: int, show: Callable[[int], None] = lambda token: None) -> TextRow:
        return TextRow(
            Decoder(self.model, horizon_eps=self.horizon_eps),
            self.encode(prompt),
            Sampler(self.sampling, number),
            max_tokens=self.max_tokens,
            num_tokens=self.tokenizer.vocab_size,
            # A line end of a word-level text is a token, and no end of the text.
            end_of_document_id=-1 if self.tokenizer.counts_lines else self.tokenizer.end_of_document_id,
            show=show,
        )

    def _answer(self, prompt: str, row: TextRow) -> dict[str, Any]:
        stream = TextStream(self.tokenizer, row.prompt)
        return {
            "prompt": prompt,
            "text": "".join([*map(stream.push, row.tokens), stream.finish()]),
            "prompt_tokens": list(row.prompt),
            "tokens": row.tokens,
            "ended": row.ended,
            "cache_rebuilds": row.decoder.num_rebuilds,
        }
