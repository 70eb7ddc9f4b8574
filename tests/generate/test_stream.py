from __future__ import annotations

import pytest

from megalibi.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megalibi.data.tokenizer.training import train_tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.generate.stream import TextStream

TEXT = "  the cat \n\n sat  on 日本 the mat 🎉 naïve ▁ end "


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer | WordTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    train_tokenizer(["the cat sat on the mat and the dog lay down\n" * 20], 290, folder / "t.model")
    words = "".join(f"{word} 1\n" for word in ("<s>", "<pad>", "</s>", "<unk>", "the", "cat", "sat"))
    (folder / "t.words").write_text(words)
    return [load_tokenizer(folder / name) for name in ("t.model", "t.words")]


@pytest.mark.parametrize("start", [0, 1, 7, 20])
def test_the_pieces_are_the_text(tokenizers: list[Tokenizer | WordTokenizer], start: int) -> None:
    pieces_tokenizer, words_tokenizer = tokenizers
    for tokenizer, text in ((pieces_tokenizer, TEXT), (words_tokenizer, "the cat\nsat the sat\ncat the " * 4 + "\n")):
        tokens = tokenizer.encode(text)
        stream = TextStream(tokenizer, tokens[:start])
        pieces = [stream.push(token) for token in tokens[start:]]
        assert all("\ufffd" not in piece for piece in pieces)
        assert tokenizer.decode(tokens) == tokenizer.decode(tokens[:start]) + "".join(pieces) + stream.finish()
        assert sum(map(bool, pieces)) > len(pieces) // 2  # as they come, and not at the end


def test_bytes_that_are_no_character_do_not_wait_for_ever(tokenizers: list[Tokenizer | WordTokenizer]) -> None:
    tokenizer = tokenizers[0]
    broken = tokenizer.encode("🎉")[-1]  # a byte that no character begins with
    stream = TextStream(tokenizer, tokenizer.encode("the"))
    assert [stream.push(broken) for _ in range(6)] == ["", "", "", "\ufffd", "\ufffd", "\ufffd"]
    assert stream.finish() == "\ufffd" * 3
    assert stream.finish() == ""
    *_, first, second, third, fourth = tokenizer.encode("🎉")
    tokens = [broken, broken, broken, first, second, third, fourth]
    assert "".join([*map(stream.push, tokens), stream.finish()]) == tokenizer.decode(tokens) == "\ufffd" * 3 + "🎉"
