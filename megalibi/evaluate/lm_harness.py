"""A checkpoint as a language model of lm-evaluation-harness (the package lm_eval).

The harness asks three questions: how likely a continuation is, how likely a whole text is, and what the model would
write. There is no cache of keys and values: each written token costs a forward pass over what stands before it.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.errors import ConfigError
from megalibi.model import GPT

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise ConfigError(f"lm-evaluation-harness is not installed ({error}): pip install 'megalibi[lm-eval]'") from error

__all__ = ["ConfigurableTask", "HarnessModel", "TaskManager", "read_writing_options", "simple_evaluate"]

BATCH_TOKENS = 2048
"""Tokens of one forward pass, if there are several texts: their log-probabilities exist at once."""
MAX_NEW_TOKENS = 256
"""Written where a task does not say how many; the harness's own value."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A text of which the last tokens are scored."""

    tokens: list[int]
    """All of it; the first token is only read."""
    num_scored: int
    """Tokens at the end that are scored."""


def read_writing_options(options: Mapping[str, Any]) -> tuple[list[str], int]:
    """Return the stop strings of a task's generation_kwargs, and the most tokens to write.

    Raises:
        ConfigError: The task wants tokens to be drawn at random, or options that cannot be read.
    """
    try:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), MAX_NEW_TOKENS))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"generation_kwargs={options} is not allowed: {error}") from error
    if kwargs["do_sample"]:
        raise ConfigError(f"generation_kwargs={options} draws at random: do_sample: false is allowed")
    return list(kwargs["until"]), kwargs["max_gen_toks"]


class HarnessModel(TemplateLM):
    """Answers the harness's questions with a GPT.

    Args:
        model: On its device; alone in its tensor group, or the same calls are made on every rank of it.
        tokenizer: Of the model.
        max_length: Tokens the model sees at once; of a longer text it sees the last.
        device: Of the model.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer | WordTokenizer, *, max_length: int, device: torch.device
    ) -> None:
        super().__init__()
        self.model = model
        self.max_length = max_length
        self._tokens = tokenizer  # self.tokenizer would be asked for a chat template
        self._device = device

    @property
    def eot_token_id(self) -> int:
        """The end of a document, which also stands before a text without context."""
        return self._tokens.end_of_document_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text; there are no special tokens to add."""
        return self._tokens.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return for each context and continuation its log-likelihood, and whether it is what the model would write.

        Nothing is certain to follow anything, which the harness has no tokens for.
        """
        asked = [bool(self.tok_encode(continuation)) for _, continuation in (request.args for request in requests)]
        some = [request for request, is_asked in zip(requests, asked, strict=True) if is_asked]
        answers = iter(super().loglikelihood(some, disable_tqdm=disable_tqdm))
        return [next(answers) if is_asked else (0.0, True) for is_asked in asked]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows that do not overlap but for a longer last one."""
        results = []
        for (text,) in tqdm([request.args for request in requests], "rolling", disable=disable_tqdm):
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length, 1)
            scored = [Scored(tokens=c + t, num_scored=len(t)) for c, t in map(make_disjoint_window, windows)]
            results.append(-sum(losses.double().sum().item() for losses in self._losses(scored)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return for each context and continuation its log-likelihood, and whether it is what the model would write."""
        scored = []
        for (_text, continuation), context_ids, ids in requests:
            if len(ids) > self.max_length:
                raise ConfigError(
                    f"--max-length={self.max_length} is below the {len(ids)} tokens of {continuation[:40]!r}..."
                )
            tokens = (context_ids or [self.eot_token_id]) + ids  # of spaces alone the harness leaves no context
            scored.append(Scored(tokens=tokens[-self.max_length - 1 :], num_scored=len(ids)))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(scored)
        with tqdm(total=len(scored), desc="loglikelihood", disable=disable_tqdm) as progress:
            for indices in self._batches([len(text.tokens) - 1 for text in scored]):
                answers = self._score([scored[index] for index in indices])
                for index, answer in zip(indices, answers, strict=True):
                    results[index] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                progress.update(len(indices))
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context: the likeliest token each time, up to a stop string.

        Raises:
            ConfigError: The task wants tokens to be drawn at random.
        """
        results = []
        for context, options in tqdm([request.args for request in requests], "writing", disable=disable_tqdm):
            results.append(self._write(context, *read_writing_options(options)))
            self.cache_hook.add_partial("generate_until", (context, options), results[-1])
        return results

    def _write(self, context: str, stops: list[str], max_new_tokens: int) -> str:
        tokens, text = self.tok_encode(context) or [self.eot_token_id], ""
        start = len(tokens)
        while len(tokens) - start < max_new_tokens:
            seen = tokens[-self.max_length :]
            log_probs = self.model.log_probs(self._tensor([seen]), first=len(seen) - 1)
            token = int(log_probs[0, -1, : self._tokens.vocab_size].argmax())  # an id past it stands for no text
            if token == self.eot_token_id:
                break
            tokens.append(token)
            text = self._tokens.decode(tokens[start:])
            if any(stop and stop in text for stop in stops):
                break
        return postprocess_generated_text(text, stops, None)

    def _losses(self, texts: Sequence[Scored]) -> Iterator[Tensor]:
        """Yield the losses of the scored tokens of each text, without the memory of log-probabilities."""
        for text in texts:
            stream_BS = self._tensor([text.tokens])
            with torch.no_grad():  # the harness does not say so
                losses_BS = self.model(stream_BS[:, :-1], stream_BS[:, 1:])
            yield losses_BS[0, -text.num_scored :]

    def _score(self, texts: Sequence[Scored]) -> Iterator[tuple[float, bool]]:
        """Yield the log-likelihood of each text, and whether every scored token is the likeliest; one forward pass."""
        longest = max(len(text.tokens) for text in texts)
        # Padding stands behind a text, where no token of it looks.
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
        """Yield the indices of texts of about one length that fit into a forward pass; long ones first, alone."""
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
