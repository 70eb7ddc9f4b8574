"""The tokenizer: sentencepiece, trained such that decoding gives back every text exactly (or words: words.py)."""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from megalibi.config import ConfigError
from megalibi.data.text import cut_at_spaces
from megalibi.data.words import SUFFIX, WordTokenizer, write_vocabulary

_SPACE = "\u2581"  # how sentencepiece writes a space within a piece
_SPACE_BYTES = ("<0xE2>", "<0x96>", "<0x81>")
# sentencepiece's time per character grows with the length of the text; about this length is fastest.
_CUT_CHARACTERS = 1_000
_TRAINING_CHARACTERS = 1_000
_TRAINING_THREADS = 4  # fixed, because the model records it, and its fingerprint must not depend on the machine


class Tokenizer:
    """A sentencepiece model.

    Args:
        path: The ``.model`` file.

    Raises:
        ConfigError: If the file is missing, is no sentencepiece model, or has no end-of-document (eos) token.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if not Path(path).is_file():
            raise ConfigError(f"{self.path}: no such tokenizer; train one with tools/train_tokenizer.py")
        model = Path(path).read_bytes()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(model) and self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            loaded = False
        if not loaded:
            raise ConfigError(f"{self.path}: not a sentencepiece model; train one with tools/train_tokenizer.py")
        self.vocab_size: int = self._processor.vocab_size()
        self.end_of_document_id: int = self._processor.eos_id()
        if self.end_of_document_id < 0:
            raise ConfigError(f"{self.path}: the model has no eos token, which ends documents; train one that has")
        pieces = [self._processor.id_to_piece(token) for token in range(self.vocab_size)]
        self.text_bytes: npt.NDArray[np.int64] = np.array([self._count_bytes(i, p) for i, p in enumerate(pieces)])
        """Bytes of UTF-8 text that each id stands for, [vocab_size]; control tokens stand for none."""
        probe = "  a b\n\n c "
        ids = self._processor.encode(probe)
        # A space put before every text is taken off by decode, and shows in the bytes alone.
        keeps_whitespace = self.decode(ids) == probe and self.text_bytes[ids].sum() == len(probe)
        byte_tokens = [self._processor.piece_to_id(piece) for piece in _SPACE_BYTES]
        has_bytes = all(self._processor.is_byte(token) for token in byte_tokens)
        self._space_tokens = byte_tokens if keeps_whitespace and has_bytes else None
        self.is_exact = self._space_tokens is not None
        """Whether the texts of ids, ``text_bytes`` long and joined, are the text they were made from."""
        self.can_cut = keeps_whitespace and not any(_SPACE in piece.lstrip(_SPACE) for piece in pieces)
        """Whether a text may be cut by ``cut_at_spaces`` and the ids of its pieces joined."""
        self.counts_lines = False
        """Whether line ends are tokens, so that even an empty document is a line."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without an end-of-document token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts; long ones are cut where that changes nothing, which is faster."""
        strings: list[str] = []
        counts = []
        for text in texts:
            before = len(strings)
            strings.extend(cut_at_spaces(text, _CUT_CHARACTERS) if self.can_cut else [text])
            counts.append(len(strings) - before)
        encoded = iter(self._encode_strings(strings))
        results = []
        for count in counts:
            ids: list[int] = []
            for _ in range(count):
                ids += next(encoded)
            results.append(ids)
        return results

    def end_of_document(self, text: str) -> list[int]:
        """Return the ids that follow the text at the end of a document."""
        return [self.end_of_document_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; the end-of-document token is no text."""
        return self._processor.decode(list(ids))

    def _count_bytes(self, token: int, piece: str) -> int:
        if self._processor.is_byte(token):
            return 1
        return 0 if self._processor.is_control(token) else len(piece.replace(_SPACE, " ").encode())

    def _encode_strings(self, strings: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._processor.encode(strings, out_type=int, num_threads=1)
        if self._space_tokens is not None:
            for index, string in enumerate(strings):
                if _SPACE in string:
                    encoded[index] = self._encode_with_space_signs(string)
        return encoded

    def _encode_with_space_signs(self, string: str) -> list[int]:
        """Write the sign U+2581 as bytes, for sentencepiece would take it for a space."""
        assert self._space_tokens is not None
        first, *others = self._processor.encode(string.split(_SPACE), out_type=int, num_threads=1)
        return [*first, *(token for part in others for token in (*self._space_tokens, *part))]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | WordTokenizer:
    """Return the word-level vocabulary of a ``.words`` file, or the sentencepiece model of any other.

    Raises:
        ConfigError: If the file is missing or is not what its name says.
    """
    return WordTokenizer(path) if os.fspath(path).endswith(SUFFIX) else Tokenizer(path)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    output: str | os.PathLike[str],
    *,
    character_coverage: float = 0.9999,
    max_sentences: int = 200_000,
) -> None:
    """Train a byte-pair encoding and write it, aside and then renamed. The same texts give the same bytes.

    Characters that are left out of the vocabulary are written as UTF-8 bytes, whitespace is kept as it is, and digits
    stand alone (as in LLaMA, arXiv:2302.13971, section 2.1).

    Args:
        texts: Any text; it is cut into sentences of about 1,000 characters, line ends included.
        vocab_size: Number of ids, with 256 bytes, ``<unk>`` (0) and ``</s>`` (1), the end of a document.
        output: The ``.model`` file.
        character_coverage: Share of the characters that get an id of their own.
        max_sentences: Sentences that are learned from, drawn at random from all: this bounds the memory.

    Raises:
        ConfigError: If there is no text, or too little or too much of it for the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample(_sentences(texts), max_sentences)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,  # bytes; longer sentences are left out
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or "there is no text"
        raise ConfigError(f"vocab_size={vocab_size} cannot be trained on this text: {reason}") from error
    write_vocabulary(output, model.getvalue())


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from cut_at_spaces(text, _TRAINING_CHARACTERS)


def _sample(sentences: Iterable[str], count: int) -> list[str]:
    """Draw sentences at random, the same ones every time, as sentencepiece's own sampling does not (algorithm R)."""
    generator = random.Random(1)
    sample: list[str] = []
    for index, sentence in enumerate(sentences):
        if index < count:
            sample.append(sentence)
        elif (place := generator.randrange(index + 1)) < count:
            sample[place] = sentence
    return sample
