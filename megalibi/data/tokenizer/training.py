"""Training a sentencepiece tokenizer such that decoding gives back every text exactly."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import sentencepiece

from megalibi.data.text.cutting import cut_anywhere, cut_at_spaces
from megalibi.data.tokenizer.words import write_vocabulary
from megalibi.errors import ConfigError, DataError

_SENTENCE_CHARACTERS = 1_000
_LONGEST_SENTENCE_CHARACTERS = 2_048  # of text without spaces; sentencepiece would leave out those of a megabyte
_THREADS = 4  # fixed, because the model records it, and its fingerprint must not depend on the machine
_FIXED_IDS = 258
_MAX_IDS = 2**31 - 1
_MIN_COVERAGE = 0.98  # sentencepiece's own bound
_SPACE = "\u2581"  # as sentencepiece writes it
_RESERVED = "\u2585"  # sentencepiece's sign for what it does not know: it leaves out whole sentences that hold one


class TrainingText(NamedTuple):
    """How much text a tokenizer learned from."""

    sentences: int
    """The number of sentences in the text."""
    used: int
    """The number of sentences that were drawn and learned from."""
    reserved: int
    """The number of signs U+2585, which sentencepiece keeps for itself; the text is cut there."""

    def describe(self) -> str:
        """Return one line that says what was used and what was left out."""
        drawn = f"{self.used:,} of {self.sentences:,} sentences, drawn at random (--max-sentences)"
        used = f"all {self.sentences:,} sentences" if self.used == self.sentences else drawn
        reserved = f"; left out {self.reserved:,} signs U+2585, which sentencepiece keeps for itself"
        return f"learned from {used}{reserved if self.reserved else ''}"


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    output: str | os.PathLike[str],
    *,
    character_coverage: float = 0.9999,
    max_sentences: int = 200_000,
) -> TrainingText:
    """Train a byte-pair encoding and write it, aside and then renamed. The same texts give the same bytes.

    Characters that are left out of the vocabulary are written as UTF-8 bytes, whitespace is kept as it is, and digits
    stand alone (as in LLaMA, arXiv:2302.13971, section 2.1).

    Args:
        texts: Any text; it is cut into sentences of about 1,000 characters, line ends included,
            and of 2,048 at most where it has no spaces.
        vocab_size: Number of ids, with 256 bytes, ``<unk>`` (0) and ``</s>`` (1), the end of a document.
        output: The ``.model`` file.
        character_coverage: Share of the characters that get an id of their own.
        max_sentences: Sentences that are learned from, drawn at random from all: this bounds the memory.

    Returns:
        How much of the text it learned from.

    Raises:
        ConfigError: If an argument is out of its range, or the text is too short for the vocabulary.
        DataError: If there is no text.
    """
    _check_training(vocab_size, character_coverage, max_sentences)
    sample = _Sample(max_sentences)
    for text in texts:
        sample.add(text)
    if not sample.drawn:
        raise DataError("there is no text to train a tokenizer on")
    model = io.BytesIO()
    # Text with few spaces or none, as Chinese, would leave them without an id, and decoding would not give them back.
    num_spaces = sum(sentence.count(" ") for sentence in sample.drawn)
    spaces_are_rare = num_spaces <= (1.0 - character_coverage) * sum(map(len, sample.drawn))
    required: dict[str, Any] = {"required_chars": _SPACE} if spaces_are_rare else {}  # an empty one is recorded, too
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample.drawn),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            **required,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,  # bytes: more than any has
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise ConfigError(
            f"--vocab-size={vocab_size}: must fit the text, and sentencepiece says of it: {reason}"
        ) from error
    write_vocabulary(output, model.getvalue())
    return TrainingText(sentences=sample.num_sentences, used=len(sample.drawn), reserved=sample.num_reserved)


def _check_training(vocab_size: int, character_coverage: float, max_sentences: int) -> None:
    if not _FIXED_IDS < vocab_size <= _MAX_IDS:
        raise ConfigError(
            f"--vocab-size={vocab_size}: must be above {_FIXED_IDS}, the ids of 256 bytes, <unk> and </s>, "
            f"and at most {_MAX_IDS}"
        )
    if not _MIN_COVERAGE <= character_coverage <= 1.0:
        raise ConfigError(f"--character-coverage={character_coverage}: must be a share from {_MIN_COVERAGE} to 1")
    if max_sentences < 1:
        raise ConfigError(f"--max-sentences={max_sentences}: must be at least 1")


class _Sample:
    """Sentences drawn at random, the same ones every time, as sentencepiece's own sampling does not (algorithm R)."""

    def __init__(self, size: int) -> None:
        self.drawn: list[str] = []
        self.num_sentences = 0
        self.num_reserved = 0
        self._size = size
        self._generator = random.Random(1)

    def add(self, text: str) -> None:
        """Cut a text into sentences, short enough that sentencepiece leaves none out, and draw from them."""
        parts = text.split(_RESERVED)
        self.num_reserved += len(parts) - 1
        for part in parts:
            for sentence in cut_at_spaces(part, _SENTENCE_CHARACTERS):
                for short in cut_anywhere(sentence, _LONGEST_SENTENCE_CHARACTERS):
                    self._draw(short)

    def _draw(self, sentence: str) -> None:
        if self.num_sentences < self._size:
            self.drawn.append(sentence)
        elif (place := self._generator.randrange(self.num_sentences + 1)) < self._size:
            self.drawn[place] = sentence
        self.num_sentences += 1
