"""The word-level vocabulary: for text whose words stand between spaces already, as WikiText-103's do.

Its ids are those of fairseq-preprocess, which the paper used: four special tokens, then the words by falling frequency
(equally frequent ones in the order of their characters), then unused entries up to a multiple of 8. A line end is a
token, so a text that ends without one gets it, and an empty document is an empty line. A text may have the special
tokens as words: they are those tokens, </s> a line end, and are counted as such.

The file is text, an id a line: the word, a space, how often it was seen.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import tempfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

from megalibi.data.text.cutting import cut_at_spaces
from megalibi.data.text.documents import Piece
from megalibi.errors import ConfigError, DataError, FileError
from megalibi.files import make_folder, write_aside

SUFFIX = ".words"
"""How the name of a vocabulary file ends, which tells it from a sentencepiece model."""
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
_LINE_END = _SPECIAL.index("</s>")
_UNKNOWN = _SPECIAL.index("<unk>")
_MULTIPLE = 8


class WordTokenizer:
    """A word-level vocabulary, with the methods of a Tokenizer.

    Args:
        path: The ``.words`` file.

    Raises:
        DataError: If the file is missing or is no such vocabulary.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if not Path(path).is_file():
            raise DataError(f"{self.path}: no such vocabulary; make one with megalibi tokenizer")
        content = Path(path).read_bytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        try:
            lines = content.decode().removesuffix("\n").split("\n")
            self._words = [word for word, count in (line.split(" ") for line in lines) if int(count) >= 0]
        except ValueError as error:
            raise DataError(
                f"{self.path}: not a vocabulary, which has a word and its count in each line: {error}"
            ) from error
        self._ids = {word: token for token, word in enumerate(self._words)}
        if tuple(self._words[: len(_SPECIAL)]) != _SPECIAL or len(self._ids) < len(self._words):
            raise DataError(
                f"{self.path}: not a vocabulary, which begins with {' '.join(_SPECIAL)} and repeats no word"
            )
        self.vocab_size = len(self._words)
        self.end_of_document_id = _LINE_END
        self.is_exact = False
        """Spaces and unknown words of the original text are lost, so its bytes cannot be counted."""
        self.can_cut = True
        self.counts_lines = True

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text: its words, and a token for each line end that is in it."""
        ids: list[int] = []
        for number, line in enumerate(text.split("\n")):
            if number > 0:
                ids.append(_LINE_END)
            ids.extend(self._ids.get(word, _UNKNOWN) for word in line.split())
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts."""
        return [self.encode(text) for text in texts]

    def cut(self, text: str, max_characters: int) -> Iterator[str]:
        """Cut a text before spaces, where words end."""
        return cut_at_spaces(text, max_characters)

    def count_lost(self, text: str, ids: Sequence[int]) -> int:
        """Return how many characters stand in words that are not in the vocabulary."""
        if _UNKNOWN not in ids:
            return 0
        return sum(len(word) for word in text.split() if word not in self._ids)

    def end_of_document(self, text: str) -> list[int]:
        """Return the ids that follow the text at the end of a document: a line end, unless it ends with one."""
        return [] if text.endswith("\n") else [_LINE_END]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the words between spaces, and the line ends."""
        lines = " ".join("\n" if token == _LINE_END else self._words[token] for token in ids)
        return lines.replace(" \n", "\n").replace("\n ", "\n")


def count_words(pieces: Iterable[Piece], output: str | os.PathLike[str], *, vocab_size: int | None = None) -> None:
    """Count the words of documents and write their vocabulary, aside and then renamed.

    Args:
        pieces: From a ``DocumentReader`` that keeps empty documents.
        output: The ``.words`` file.
        vocab_size: Number of ids, the special ones included; None: all words, and unused ids up to a multiple of 8.

    Raises:
        ConfigError: If there are fewer words than ``vocab_size``.
        DataError: If there is no text.
        FileError: If the file cannot be written.
    """
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(piece.text.split())
        counts["</s>"] += piece.text.count("\n") + (piece.ends_document and not piece.text.endswith("\n"))
    special = [(word, counts.pop(word, 0)) for word in _SPECIAL]
    if not counts:
        raise DataError("there are no words in the text")
    num_all = len(special) + len(counts)
    size = vocab_size or math.ceil(num_all / _MULTIPLE) * _MULTIPLE
    if vocab_size is not None and not len(special) < vocab_size <= num_all:
        raise ConfigError(f"--vocab-size={vocab_size}: must be from {len(special) + 1} to {num_all} for this text")
    words = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[: size - len(special)]
    unused = [(word, 0) for word in itertools.islice(_made_up(dict(words)), size - len(special) - len(words))]
    write_vocabulary(output, "".join(f"{word} {count}\n" for word, count in (*special, *words, *unused)))


def _made_up(taken: Container[str]) -> Iterator[str]:
    """Yield names for unused ids; a text that has such a word itself keeps it, and the name is passed over."""
    return (name for name in map("madeupword{:04d}".format, itertools.count()) if name not in taken)


def write_vocabulary(output: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a tokenizer's file, aside and then renamed; its folder is made if it does not exist.

    Raises:
        FileError: If it cannot be written there; if it can be among the temporary files, the error names that place,
            for it took long to make.
    """
    try:
        make_folder(Path(output).parent)
        write_aside(output, content)
    except OSError as error:
        rescued = Path(tempfile.gettempdir(), f"{os.getpid()}-{Path(output).name}")
        try:
            write_aside(rescued, content)
        except OSError:
            where = ""
        else:
            where = f"; what was made is kept as {rescued}"
        raise FileError(f"{os.fspath(output)} cannot be written: {error.strerror}{where}") from error
