from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import megalibi.data.preprocess as preprocess_module
import megalibi.data.text.documents as text_module
from megalibi.data.preprocess import preprocess
from megalibi.data.text.documents import DocumentReader, Piece
from megalibi.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megalibi.data.tokenizer.words import WordTokenizer, count_words
from megalibi.data.tokens.token_file import TokenFile
from megalibi.errors import ConfigError, DataError, FileError

# As WikiText-103: lines of words between spaces, blank lines, <unk> in place.
TEXT = " \n = Lobster = \n \n The lobster is a <unk> . The lobster , the \n sea 3 @.@ 5 – a \n"
IN_FILE = """\
<s> 0
<pad> 0
</s> 5
<unk> 1
The 2
a 2
lobster 2
, 1
. 1
3 1
5 1
= 2
""".splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    (folder / "wiki.tokens").write_text(TEXT)
    count_words(DocumentReader([str(folder / "wiki.tokens")], keep_empty=True), folder / "wiki.words")
    return folder


@pytest.fixture(scope="module")
def words(folder: Path) -> WordTokenizer:
    return WordTokenizer(folder / "wiki.words")


def token_file_of(text: str, words: WordTokenizer) -> list[int]:
    """Ids by the plainest means: line after line, each with an end."""
    lines = text.removesuffix("\n").split("\n")
    return [token for line in lines for token in [*words.encode(line), words.end_of_document_id]]


def test_the_vocabulary_is_sorted_by_falling_frequency_behind_four_special_tokens(folder: Path) -> None:
    lines = (folder / "wiki.words").read_text().splitlines()
    assert lines[:4] == IN_FILE[:4]
    assert lines[4:8] == ["= 2", "The 2", "a 2", "lobster 2"]  # equally frequent: in the order of their characters
    assert sorted(line for line in lines if line.endswith(" 1")) == sorted(
        ["<unk> 1", ", 1", ". 1", "3 1", "5 1", "@.@ 1", "Lobster 1", "is 1", "sea 1", "the 1", "– 1"]
    )
    assert len(lines) == 24  # 18 entries, up to a multiple of 8
    assert lines[18:] == [f"madeupword000{number} 0" for number in range(6)]


def test_a_line_is_its_words_and_an_end(words: WordTokenizer) -> None:
    ids = words.encode("The lobster\n\n is  new <unk>")
    lobster, the = words.encode("lobster")[0], words.encode("The")[0]
    assert ids == [the, lobster, 2, 2, words.encode("is")[0], 3, 3]
    assert words.encode_batch(["The", ""]) == [[the], []]
    assert words.decode(ids) == "The lobster\n\nis <unk> <unk>"
    assert (words.end_of_document("x"), words.end_of_document("x\n")) == ([2], [])
    assert not words.is_exact


def test_every_format_gives_the_same_tokens(folder: Path, words: WordTokenizer, tmp_path: Path) -> None:
    """A file of lines, its lines as documents, and rows as ``datasets`` has them, blank lines as empty texts."""
    rows = [line if line.strip() else "" for line in TEXT.splitlines(keepends=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    expected = token_file_of(TEXT, words)
    assert len(expected) == len(TEXT.split()) + TEXT.count("\n")
    for source, unit in ((folder / "wiki.tokens", "document"), (folder / "wiki.tokens", "line"),
                         (tmp_path / "rows.jsonl", "document")):  # fmt: skip
        preprocess([str(source)], tokenizer_path=words.path, output=str(tmp_path / "out"), text_unit=unit,
                   overwrite=True)  # fmt: skip
        tokens = TokenFile(str(tmp_path / "out"))
        assert tokens.read(0, tokens.num_tokens).tolist() == expected
        assert tokens.num_documents == (1 if (source.suffix, unit) == (".tokens", "document") else len(rows))
    count_words(DocumentReader([str(tmp_path / "rows.jsonl")], keep_empty=True), tmp_path / "rows.words")
    assert WordTokenizer(tmp_path / "rows.words").fingerprint == words.fingerprint


def test_long_documents_are_cut_where_that_changes_nothing(
    folder: Path, words: WordTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "long.txt").write_text(TEXT * 40)
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 50)
    pieces = list(DocumentReader([str(tmp_path / "long.txt")]))
    assert len(pieces) > 40
    monkeypatch.setattr(preprocess_module, "_worker_tokenizer", words)
    ids = preprocess_module._encode_task(pieces).tokens.tolist()
    assert ids == token_file_of(TEXT * 40, words)


@given(st.text(st.sampled_from("ab <unk>\n\t\r\u00a0\u2028\x85")))
def test_words_are_what_split_gives_whatever_the_space(words_of_letters: WordTokenizer, text: str) -> None:
    ids = [*words_of_letters.encode(text), *words_of_letters.end_of_document(text)]
    lines = text.removesuffix("\n").split("\n")
    assert ids.count(2) == len(lines)
    assert len(ids) == len(text.split()) + len(lines)


@pytest.fixture(scope="module")
def words_of_letters(tmp_path_factory: pytest.TempPathFactory) -> WordTokenizer:
    folder = tmp_path_factory.mktemp("letters")
    (folder / "a.txt").write_text("a b ab\n")
    count_words(DocumentReader([str(folder / "a.txt")]), folder / "a.words")
    return WordTokenizer(folder / "a.words")


def test_a_smaller_vocabulary_leaves_the_rare_words_unknown(folder: Path, tmp_path: Path) -> None:
    pieces = list(DocumentReader([str(folder / "wiki.tokens")]))
    count_words(pieces, tmp_path / "few.words", vocab_size=7)
    few = WordTokenizer(tmp_path / "few.words")
    assert few.vocab_size == 7
    assert few.encode("= The a lobster") == [4, 5, 6, 3]
    for size in (4, 19):
        with pytest.raises(ConfigError, match=f"--vocab-size={size}: must be from 5 to 18 for this text"):
            count_words(pieces, tmp_path / "other.words", vocab_size=size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.words"]
    with pytest.raises(DataError, match="there are no words"):
        count_words([], tmp_path / "none.words")


SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
MADE_UP = [f"madeupword{number:04d}" for number in range(12)]


def fairseq_dictionary(text: str) -> list[tuple[str, int]]:
    """Words and counts by fairseq's Dictionary, step by step: add_symbol, finalize, pad_to_multiple_."""
    symbols, counts = list(SPECIAL), [0] * len(SPECIAL)

    def add_symbol(word: str, count: int) -> None:
        if word in symbols:
            counts[symbols.index(word)] += count
        else:
            symbols.append(word)
            counts.append(count)

    for line in text.removesuffix("\n").split("\n"):
        for word in [*line.split(), "</s>"]:
            add_symbol(word, 1)
    found = sorted(zip(symbols[4:], counts[4:], strict=True))
    found.sort(key=lambda entry: entry[1], reverse=True)
    symbols, counts = [*SPECIAL, *(word for word, _ in found)], [*counts[:4], *(count for _, count in found)]
    number = 0
    while len(symbols) % 8:
        add_symbol(f"madeupword{number:04d}", 0)
        number += 1
    return list(zip(symbols, counts, strict=True))


@given(
    st.lists(
        st.one_of(st.sampled_from([*SPECIAL, *MADE_UP, "a", "\n"]), st.text(), st.text("madeupwor0123456789")),
        max_size=40,
    )
)
def test_any_text_gives_a_vocabulary_that_loads_and_is_fairseqs(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    text = " ".join(["word", *parts])
    path = tmp_path_factory.mktemp("any") / "a.words"
    count_words([Piece(text, True)], path)
    expected = fairseq_dictionary(text)
    assert path.read_bytes().decode() == "".join(f"{word} {count}\n" for word, count in expected)
    words = WordTokenizer(path)
    ids = {word: token for token, (word, _) in enumerate(expected)}
    assert words.vocab_size == len(ids) == len(expected)
    for word in set(text.split()):
        assert words.encode(word) == [ids[word]]
        assert words.decode([ids[word]]) == ("\n" if word == "</s>" else word)
    plain = [word for word in text.split() if word != "</s>"]
    assert words.decode(words.encode(" ".join(plain))) == " ".join(plain)


def test_words_of_the_text_keep_their_names_and_made_up_ones_step_aside(tmp_path: Path) -> None:
    count_words([Piece("a <s> b </s> <unk> madeupword0001 <pad> a\n", True)], tmp_path / "a.words")
    assert (tmp_path / "a.words").read_text().split("\n") == [
        "<s> 1", "<pad> 1", "</s> 2", "<unk> 1", "a 2", "b 1", "madeupword0001 1", "madeupword0000 0", ""
    ]  # fmt: skip
    count_words([Piece("madeupword0000", True)], tmp_path / "b.words")
    assert (tmp_path / "b.words").read_text().split("\n")[4:] == [
        "madeupword0000 1", "madeupword0001 0", "madeupword0002 0", "madeupword0003 0", ""
    ]  # fmt: skip


def test_a_vocabulary_that_cannot_be_written_is_kept_among_the_temporary_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    expected = r"file/below/a\.words cannot be written: Not a directory; what was made is kept as (\S+a\.words)$"
    with pytest.raises(FileError, match=expected) as error:
        count_words(DocumentReader([str(folder / "wiki.tokens")]), tmp_path / "file" / "below" / "a.words")
    count_words(DocumentReader([str(folder / "wiki.tokens")]), tmp_path / "again.words")
    assert Path(str(error.value).split()[-1]).read_bytes() == (tmp_path / "again.words").read_bytes()
    (tmp_path / "temporary").rename(tmp_path / "gone")
    with pytest.raises(FileError, match=r"a\.words cannot be written: Not a directory$"):
        count_words(DocumentReader([str(folder / "wiki.tokens")]), tmp_path / "file" / "below" / "a.words")


def test_the_suffix_tells_the_kind(folder: Path, tokenizer_path: Path) -> None:
    assert isinstance(load_tokenizer(folder / "wiki.words"), WordTokenizer)
    assert isinstance(load_tokenizer(tokenizer_path), Tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such vocabulary; make one with megalibi tokenizer"),
        ("", "not a vocabulary, which has a word and its count in each line"),
        ("a 1\nb\n", "not a vocabulary, which has a word and its count in each line"),
        ("a one\n", "not a vocabulary, which has a word and its count in each line"),
        ("a 1\nb 2\n", "not a vocabulary, which begins with <s> <pad> </s> <unk>"),
        ("<s> 0\n<pad> 0\n</s> 0\n<unk> 0\na 1\na 2\n", "repeats no word"),
    ],
)
def test_what_is_no_vocabulary_is_refused_in_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.words").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        WordTokenizer(tmp_path / "a.words")
    assert "\n" not in str(error.value)


def test_pieces_join_to_lines_in_any_cut(words: WordTokenizer) -> None:
    """Ids of pieces that are cut before spaces are those of the whole."""
    places = [place for place in range(1, len(TEXT)) if TEXT[place] == " " and TEXT[place - 1] != " "]
    for first, second in itertools.combinations(places, 2):
        parts = (TEXT[:first], TEXT[first:second], TEXT[second:])
        assert [token for part in parts for token in words.encode(part)] == words.encode(TEXT)
