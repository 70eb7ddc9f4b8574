"""From prompts to texts, a token of each at a time.

Shapes: B batch of rows, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from megalibi.config import ModelConfig
from megalibi.config.checks import refuse
from megalibi.errors import DataError
from megalibi.generate.decoder import Decoder, feed_each
from megalibi.generate.sampling import Sampler
from megalibi.parallel import all_reduce_raw


class TextRow:
    """A text that grows behind its prompt, as one row of a batch.

    Args:
        decoder: The model, with an empty cache.
        prompt: One token or more.
        sampler: Chooses each token.
        max_tokens: Most tokens to generate.
        num_tokens: How many tokens the tokenizer has; the model may have more, which are no text and never chosen.
        end_of_document_id: The token that ends the text; -1: none does.
        show: Called with each token as soon as it is known.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: Sequence[int],
        sampler: Sampler,
        *,
        max_tokens: int,
        num_tokens: int,
        end_of_document_id: int,
        show: Callable[[int], None] = lambda token: None,
    ) -> None:
        self.decoder, self.prompt, self.sampler, self.show = decoder, prompt, sampler, show
        self.max_tokens, self.num_tokens, self.end_of_document_id = max_tokens, num_tokens, end_of_document_id
        self.tokens: list[int] = []
        """The generated tokens, without the one that ended the document."""
        self.ended = False
        """Whether the model ended the document, before ``max_tokens`` were generated."""
        self.prompt_seconds = self.seconds = 0.0
        """How long the prompt took, up to the probabilities of the first token, and the generated tokens after that."""

    @property
    def is_done(self) -> bool:
        """Whether there is nothing more to generate."""
        return self.ended or len(self.tokens) == self.max_tokens

    def read_prompt(self) -> Tensor:
        """Return the log-probabilities of the first token, [V]."""
        start = time.perf_counter()
        log_probs_V = self.decoder.feed(self.prompt)
        self._after_prompt = time.perf_counter()
        self.prompt_seconds = self._after_prompt - start
        return log_probs_V

    def take(self, token: int) -> None:
        """Go on with a token that was chosen."""
        self.ended = token == self.end_of_document_id
        if not self.ended:
            self.tokens.append(token)
            self.show(token)
        self.seconds = time.perf_counter() - self._after_prompt


def check_room(model: ModelConfig, num_prompt_tokens: int, max_tokens: int) -> None:
    """Check before the work that the model has a position for every token.

    The last token that is generated is not read by the model, and needs none.

    Raises:
        ConfigError: It has learned fewer.
    """
    cap = model.max_position_embeddings
    if cap and num_prompt_tokens + max_tokens - 1 > cap:
        left = cap - num_prompt_tokens + 1
        room = f"be at most {left}" if left > 0 else "stand beside a shorter prompt"
        refuse(
            "--max-tokens",
            max_tokens,
            f"{room}: the prompt has {num_prompt_tokens} tokens, and model.position_method={model.position_method} of "
            f"the checkpoint has learned model.max_position_embeddings={cap} positions",
        )


def check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    """Check before the work that the model knows every token of a prompt.

    Raises:
        DataError: It does not.
    """
    if max(prompt) >= vocab_size:
        raise DataError(
            f"the prompt has the token {max(prompt)}: must be below model.vocab_size={vocab_size} of the checkpoint; "
            "name its own tokenizer with --tokenizer"
        )


def generate(rows: Iterable[TextRow], *, batch_size: int = 1) -> Iterator[TextRow]:
    """Generate texts up to their ends, so many at a time, and return each as soon as it has ended.

    The next row takes the place of one that has ended; while its prompt is read, the others wait. Every rank of the
    model's tensor group iterates over it, with the same rows; the first one chooses for all.

    Args:
        rows: The texts, of one model; each is asked for when there is a place for it.
        batch_size: How many grow together.
    """
    coming, batch = iter(rows), list[TextRow]()
    log_probs: list[Tensor] = []
    while True:
        for row in itertools.islice(coming, batch_size - len(batch)):
            batch.append(row)
            log_probs.append(row.read_prompt())
        if not batch:
            return
        for row, token in zip(batch, _choose_together(batch, log_probs), strict=True):
            row.take(token)
        yield from (row for row in batch if row.is_done)
        batch = [row for row in batch if not row.is_done]
        log_probs = list(feed_each([row.decoder for row in batch], [row.tokens[-1] for row in batch])) if batch else []


def describe_generation(row: TextRow) -> str:
    """Return in one line what a text took."""
    decoder = row.decoder
    kept = [tokens for layer in decoder.cache.kept_tokens() for tokens in layer]
    share = sum(kept) / (len(kept) * max(1, decoder.cache.num_tokens))
    whose = "cache" if decoder.model.layout.tensor.size == 1 else "cache of this rank's heads"
    rate = (len(row.tokens) - 1) / row.seconds if len(row.tokens) > 1 else 0.0
    return (
        f"{len(row.prompt):,} tokens of the prompt in {row.prompt_seconds:.2f} s, {len(row.tokens):,} generated at "
        f"{rate:,.1f} tokens/s; the {whose} has {decoder.cache.memory_bytes() / 1e6:.1f} MB and keeps {share:.0%} of "
        f"all keys, rebuilt {decoder.num_rebuilds} times"
    )


def _choose_together(batch: Sequence[TextRow], log_probs: Sequence[Tensor]) -> list[int]:
    """Return the token of each row that the tensor group's first rank chooses: on other devices last bits may differ.

    Args:
        batch: The rows.
        log_probs: The log-probabilities of each row's next token, [V].
    """
    group = batch[0].decoder.model.layout.tensor
    tokens = [
        row.sampler.choose(log_probs_V[: row.num_tokens]) for row, log_probs_V in zip(batch, log_probs, strict=True)
    ]
    if group.size == 1:
        return tokens
    of_first = torch.tensor(tokens if group.rank == 0 else [0] * len(tokens), device=log_probs[0].device)
    return all_reduce_raw(of_first, group).tolist()
