"""A checkpoint as a language model of lm-evaluation-harness (the package lm_eval).

The harness asks three questions: how likely a continuation is, how likely a whole text is, and what the model would
write. Keys and values are not cached: each written token costs a forward pass over all the text before it.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from megalibi.console import Progress
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.errors import ConfigError, DataError, UserError
from megalibi.model import GPT

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(f"lm-evaluation-harness is not installed ({error}): pip install 'megalibi[lm-eval]'") from error

__all__ = ["ConfigurableTask", "HarnessModel", "TaskManager", "read_writing_options", "simple_evaluate"]

_Request = TypeVar("_Request")
BATCH_TOKENS = 2048
"""Most tokens of a forward pass over several texts, because their log-probabilities are in memory at once."""
MAX_NEW_TOKENS = 256
"""Tokens to write where a task does not say how many; the value is the harness's own."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A text whose last tokens are scored."""

    tokens: list[int]
    """Tokens of the text; the first one is only read."""
    num_scored: int
    """Number of tokens that are scored, at the end of the text."""


def read_writing_options(options: Mapping[str, Any]) -> tuple[list[str], int]:
    """Return the stop strings of a task's generation_kwargs, and the largest number of tokens to write.

    Args:
        options: The task's generation_kwargs.

    Raises:
        DataError: The task asks for tokens drawn at random, or the options cannot be read.
    """
    try:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), MAX_NEW_TOKENS))
    except (TypeError, ValueError) as error:
        raise DataError(f"generation_kwargs={options}: {' '.join(str(error).split())}; mend the task file") from error
    if kwargs["do_sample"]:
        raise DataError(f"generation_kwargs={options}: must have do_sample: false, nothing is drawn at random here")
    return list(kwargs["until"]), kwargs["max_gen_toks"]


def _counted(requests: Sequence[_Request], task: str, quiet: bool) -> Iterator[_Request]:
    """Yield requests, and show how many of them are answered."""
    with Progress(Console(file=sys.stderr, quiet=quiet)) as progress:
        for number, request in enumerate(requests):
            progress.show(task, f"{number:,} of {len(requests):,} requests", done=number, total=len(requests))
            yield request


class HarnessModel(TemplateLM):
    """Answers the harness's questions with a GPT.

    Args:
        model: The model, on its device. If several ranks share it, every one of them must make the same calls.
        tokenizer: The tokenizer of the model.
        max_length: Number of tokens that the model sees at once; of a longer text it sees the last ones.
        device: The device of the model.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer | WordTokenizer, *, max_length: int, device: torch.device
    ) -> None:
        super().__init__()
        self.model = model
        self.max_length = max_length
        self._tokens = tokenizer  # not self.tokenizer, which the harness would ask for a chat template
        self._device = device

    @property
    def eot_token_id(self) -> int:
        """The id of the end of a document, which also stands before a text without context."""
        return self._tokens.end_of_document_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text; there are no special tokens to add."""
        return self._tokens.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation after its context, and whether the model would write it.

        An empty continuation is certain; it is answered here, because the harness has no tokens for it.
        """
        asked = [bool(self.tok_encode(continuation)) for _, continuation in (request.args for request in requests)]
        some = [request for request, is_asked in zip(requests, asked, strict=True) if is_asked]
        answers = iter(super().loglikelihood(some, disable_tqdm=disable_tqdm))
        return [next(answers) if is_asked else (0.0, True) for is_asked in asked]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows that do not overlap, except that the last one is full."""
        results = []
        for (text,) in _counted([request.args for request in requests], "rolling", disable_tqdm):
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length, 1)
            scored = [Scored(tokens=c + t, num_scored=len(t)) for c, t in map(make_disjoint_window, windows)]
            results.append(-sum(losses.double().sum().item() for losses in self._losses(scored)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation after its context, and whether the model would write it.

        Raises:
            ConfigError: A continuation is longer than the model can see.
        """
        scored = []
        for (_text, continuation), context_ids, ids in requests:
            if len(ids) > self.max_length:
                raise ConfigError(
                    f"--max-length={self.max_length}: must be at least the {len(ids)} tokens "
                    f"of {continuation[:40]!r}..."
                )
            tokens = (context_ids or [self.eot_token_id]) + ids  # the harness leaves nothing of a context of spaces
            scored.append(Scored(tokens=tokens[-self.max_length - 1 :], num_scored=len(ids)))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(scored)
        batches = list(self._batches([len(text.tokens) - 1 for text in scored]))
        order = [index for batch in batches for index in batch]
        answers = (answer for batch in batches for answer in self._score([scored[index] for index in batch]))
        for index in _counted(order, "loglikelihood", disable_tqdm):
            results[index] = next(answers)
            self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context: always the likeliest token, up to a stop string.

        Raises:
            DataError: The task asks for tokens drawn at random.
        """
        results = []
        for context, options in _counted([request.args for request in requests], "writing", disable_tqdm):
            results.append(self._write(context, *read_writing_options(options)))
            self.cache_hook.add_partial("generate_until", (context, options), results[-1])
        return results

    def _write(self, context: str, stops: list[str], max_new_tokens: int) -> str:
        tokens, text = self.tok_encode(context) or [self.eot_token_id], ""
        start = len(tokens)
        while len(tokens) - start < max_new_tokens:
            seen = tokens[-self.max_length :]
            log_probs = self.model.log_probs(self._tensor([seen]), first=len(seen) - 1)
            token = int(log_probs[0, -1, : self._tokens.vocab_size].argmax())  # the ids past it stand for no text
            if token == self.eot_token_id:
                break
            tokens.append(token)
            text = self._tokens.decode(tokens[start:])
            if any(stop and stop in text for stop in stops):
                break
        return postprocess_generated_text(text, stops, None)

    def _losses(self, texts: Sequence[Scored]) -> Iterator[Tensor]:
        """Yield the losses of the scored tokens of each text, without holding log-probabilities in memory."""
        for text in texts:
            stream_BS = self._tensor([text.tokens])
            with torch.no_grad():  # which the harness does not set
                losses_BS = self.model(stream_BS[:, :-1], stream_BS[:, 1:])
            yield losses_BS[0, -text.num_scored :]

    def _score(self, texts: Sequence[Scored]) -> Iterator[tuple[float, bool]]:
        """Yield the log-likelihood of each text, and whether every scored token is the likeliest; one forward pass."""
        longest = max(len(text.tokens) for text in texts)
        # Padding stands behind a text, where no token of the text attends to it.
        stream_BS = self._tensor([text.tokens + [0] * (longest - len(text.tokens)) for text in texts])
        first = min(len(text.tokens) - 1 - text.num_scored for text in texts)
        log_probs_BSV = self.model.log_probs(stream_BS[:, :-1], first=first)
        for row, text in enumerate(texts):
            stop = len(text.tokens) - 1 - first
            log_probs_SV = log_probs_BSV[row, stop - text.num_scored : stop]
            targets_S = stream_BS[row, len(text.tokens) - text.num_scored : len(text.tokens)]
            likelihood = log_probs_SV.gather(1, targets_S[:, None]).double().sum().item()
            written_S = log_probs_SV[:, : self._tokens.vocab_size].argmax(1)
            yield likelihood, bool((written_S == targets_S).all())

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the indices of texts of similar length that share a forward pass; the longest texts come first."""
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            if batch and lengths[batch[0]] * (len(batch) + 1) > BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self._device)
