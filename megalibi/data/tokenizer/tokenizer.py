"""The tokenizer: a sentencepiece model (or words: words.py)."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2

from megalibi.data.text.cutting import cut_at_spaces
from megalibi.data.tokenizer.words import SUFFIX, WordTokenizer
from megalibi.errors import DataError

_SPACE = "\u2581"  # how sentencepiece writes a space within a piece
_SPACE_BYTES = ("<0xE2>", "<0x96>", "<0x81>")
# sentencepiece's time per character grows with the length of the text; about this length is fastest.
_CUT_CHARACTERS = 1_000


class Tokenizer:
    """A sentencepiece model.

    Args:
        path: The ``.model`` file.

    Raises:
        DataError: If the file is missing, is no sentencepiece model, or has no end-of-document (eos) token.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if not Path(path).is_file():
            raise DataError(f"{self.path}: no such tokenizer; train one with megalibi tokenizer")
        model = Path(path).read_bytes()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(model) and self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, UnicodeDecodeError):  # the second of an entry that is not UTF-8
            loaded = False
        if not loaded:
            raise DataError(f"{self.path}: not a sentencepiece model; train one with megalibi tokenizer")
        self.vocab_size: int = self._processor.vocab_size()
        self.end_of_document_id: int = self._processor.eos_id()
        if self.end_of_document_id < 0:
            raise DataError(f"{self.path}: the model has no eos token, which ends documents; train one that has")
        try:
            pieces = [self._processor.id_to_piece(token) for token in range(self.vocab_size)]
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: damaged, an entry is not UTF-8 text; copy it or train it again") from error
        self.text_bytes: npt.NDArray[np.int64] = np.array([self._count_bytes(i, p) for i, p in enumerate(pieces)])
        """Bytes of UTF-8 text that each id stands for, [vocab_size]; control tokens stand for none."""
        probe = "  a b\n\n c "
        ids = self._processor.encode(probe)
        # A space put before every text is taken off by decode, and shows in the bytes alone.
        keeps_whitespace = self.decode(ids) == probe and self.text_bytes[ids].sum() == len(probe)
        byte_tokens = [self._processor.piece_to_id(piece) for piece in _SPACE_BYTES]
        has_bytes = all(self._processor.is_byte(token) for token in byte_tokens)
        try:
            proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
        except DecodeError as error:  # Python's reader of the format is stricter than sentencepiece's own
            raise DataError(f"{self.path}: damaged, {error}; copy it or train it again") from error
        normalizes = bool(proto.normalizer_spec.precompiled_charsmap)  # as NFKC, which writes fi for a ligature
        self._space_tokens = byte_tokens if keeps_whitespace and has_bytes and not normalizes else None
        self.is_exact = self._space_tokens is not None
        """Whether the texts of ids, ``text_bytes`` long and joined, are the text they were made from."""
        self.can_cut = keeps_whitespace and not any(_SPACE in piece.lstrip(_SPACE) for piece in pieces)
        """Whether the pieces that ``cut`` makes of a text have, joined, the text's ids."""
        merges = proto.trainer_spec.model_type in (proto.trainer_spec.UNIGRAM, proto.trainer_spec.BPE)
        self._pairs = _neighbours(pieces) if self.can_cut and self.is_exact and merges else None
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
            strings.extend(self.cut(text, _CUT_CHARACTERS) if self.can_cut else [text])
            counts.append(len(strings) - before)
        encoded = iter(self._encode_strings(strings))
        results = []
        for count in counts:
            ids: list[int] = []
            for _ in range(count):
                ids += next(encoded)
            results.append(ids)
        return results

    def cut(self, text: str, max_characters: int) -> Iterator[str]:
        """Cut a text before spaces, or between two characters that stand side by side in no piece of the vocabulary.

        No piece reaches across either, so that the two sides are encoded as they are within the text.
        """
        return cut_at_spaces(text, max_characters, None if self._pairs is None else self._find_cut)

    def count_lost(self, text: str, ids: Sequence[int]) -> int:
        """Return how many characters of a text its ids do not give back: letters without an id, spaces made one.

        Each character is counted by itself, wherever it stands.
        """
        decoded = text if self.is_exact else self.decode(ids)
        return 0 if decoded == text else sum((Counter(text) - Counter(decoded)).values())

    def _find_cut(self, text: str, start: int, stop: int) -> int:
        assert self._pairs is not None
        places = (place for place in range(stop, start, -1) if text[place - 1 : place + 1] not in self._pairs)
        return next(places, start)

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


def _neighbours(pieces: Sequence[str]) -> set[str]:
    """Return the pairs of characters that stand side by side in a piece.

    Between others a text may be cut: a merge of a byte-pair encoding, or a path of a unigram model, across two
    characters goes through a piece that holds both. A normalizer could join characters before that: such models are
    not exact.
    """
    texts = (piece.replace(_SPACE, " ") for piece in pieces)
    return {text[place : place + 2] for text in texts for place in range(len(text) - 1)}


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | WordTokenizer:
    """Return the word-level vocabulary of a ``.words`` file, or the sentencepiece model of any other.

    Raises:
        DataError: If the file is missing or is not what its name says.
    """
    return WordTokenizer(path) if os.fspath(path).endswith(SUFFIX) else Tokenizer(path)
