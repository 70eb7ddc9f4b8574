from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from megalibi.config import ConfigError
from megalibi.data.tokenizer import Tokenizer
from megalibi.data.tokenizer_training import train_tokenizer

# Text that looks like text, and text that looks like trouble.
texts = st.text(
    st.one_of(
        st.sampled_from(" \n\t\r▁.abcdefXYZ019</s>éß日𝄞\u00a0\u200b\ufeff\x00"),
        st.characters(exclude_categories=["Cs"]),
    )
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return Tokenizer(tokenizer_path)


@given(texts)
@example("")
@example("  two\n\n  spaces  \n")
@example("</s><unk><0x0A>▁ ▁▁x▁")
@example("def f(x):\r\n\treturn x  # ﬁn\n")
def test_decoding_gives_back_every_text(tokenizer_path, text):
    tokenizer = Tokenizer(tokenizer_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts)
@example("</s>▁ ▁x\n")
def test_the_bytes_of_every_text(tokenizer_path, text):
    tokenizer = Tokenizer(tokenizer_path)
    assert tokenizer.is_exact
    ids = np.array(tokenizer.encode(text), np.int64)
    assert tokenizer.text_bytes[ids].sum() == len(text.encode())
    assert tokenizer.text_bytes[tokenizer.end_of_document_id] == 0


def test_long_texts_are_encoded_as_sentencepiece_does_at_once(tokenizer, tokenizer_path, english):
    bare = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    text = "\n".join(english) + " " * 3000 + "a" * 3000 + "\n    x" * 900
    assert tokenizer.can_cut
    assert tokenizer.encode(text) == bare.encode(text)


def test_encode_batch_is_encode_of_each(tokenizer, english):
    batch = [english[0], "", "▁", english[1][:50]]
    assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]


def test_end_of_document_is_no_text(tokenizer):
    assert 0 <= tokenizer.end_of_document_id < tokenizer.vocab_size == 2000
    assert tokenizer.decode([*tokenizer.encode("a b"), tokenizer.end_of_document_id]) == "a b"
    assert tokenizer.end_of_document_id not in tokenizer.encode("</s>")


def test_fingerprint(tokenizer, tokenizer_path):
    assert tokenizer.fingerprint == hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()


def test_training_is_deterministic(tmp_path, english):
    for name in ("a", "b"):
        train_tokenizer(iter(english), 600, tmp_path / name, max_sentences=200)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("vocab_size", [262, 50_000])
def test_a_vocabulary_that_the_text_does_not_give(tmp_path, english, vocab_size):
    with pytest.raises(
        ConfigError, match=f"vocab_size={vocab_size} cannot be trained on this text: .*ocabulary"
    ) as error:
        train_tokenizer(english[:3], vocab_size, tmp_path / "a")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0 is not allowed: more than 258 is"),
        ({"vocab_size": 258}, "vocab_size=258 is not allowed"),
        ({"character_coverage": 2.0}, "character_coverage=2.0 is not allowed: a share from 0.98 to 1 is"),
        ({"character_coverage": 0.0}, "character_coverage=0.0 is not allowed"),
        ({"character_coverage": float("nan")}, "character_coverage=nan is not allowed"),
        ({"max_sentences": 0}, "max_sentences=0 is not allowed: 1 or more is"),
    ],
)
def test_arguments_that_are_not_allowed(tmp_path, english, arguments, message):
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(english[:3], **{"vocab_size": 400, "output": tmp_path / "a", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_no_text(tmp_path):
    with pytest.raises(ConfigError, match="there is no text"):
        train_tokenizer([], 600, tmp_path / "a")


def test_missing_model(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.model: no such tokenizer; train one with"):
        Tokenizer(tmp_path / "none.model")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no model", b"\x00" * 100])
def test_foreign_model(tmp_path, content):
    (tmp_path / "a.model").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.model: not a sentencepiece model"):
        Tokenizer(tmp_path / "a.model")


def train_foreign(english, **options) -> bytes:
    model = io.BytesIO()
    sentences = (line for text in english for line in text.splitlines() if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, vocab_size=600, minloglevel=2, **options
    )
    return model.getvalue()


def test_a_model_without_an_end_is_refused(tmp_path, english):
    (tmp_path / "a.model").write_bytes(train_foreign(english, eos_id=-1))
    with pytest.raises(ConfigError, match="has no eos token"):
        Tokenizer(tmp_path / "a.model")


@pytest.mark.parametrize(
    "options",
    [
        {},  # a dummy space at the front, spaces made one
        {
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "split_by_whitespace": False,
            "model_type": "bpe",
        },
        {  # as LLaMA's: a dummy space at the front, which decoding takes off again
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "byte_fallback": True,
            "model_type": "bpe",
        },
    ],
)
def test_models_that_cannot_be_cut_are_not(tmp_path, english, options):
    (tmp_path / "a.model").write_bytes(train_foreign(english, **options))
    tokenizer = Tokenizer(tmp_path / "a.model")
    bare = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
    assert not tokenizer.can_cut
    text = "\n".join(english)[:20_000]
    assert tokenizer.encode(text) == bare.encode(text)
