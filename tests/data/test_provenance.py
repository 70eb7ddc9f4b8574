from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megalibi.data.preprocess import preprocess
from megalibi.data.provenance import check_tokenizer, identify_data, read_provenance, say_unrecorded
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.training import train_tokenizer
from megalibi.data.tokens.token_file import TokenFile, TokenFileWriter
from megalibi.errors import DataError


@pytest.fixture(scope="module")
def other_path(tmp_path_factory, english) -> Path:
    path = tmp_path_factory.mktemp("other") / "other.model"
    train_tokenizer(english[5:], 2000, path)
    return path


def tokenize(folder: Path, name: str, texts: list[str], tokenizer_path: Path) -> TokenFile:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess(
        [str(folder / f"{name}.jsonl")], tokenizer_path=str(tokenizer_path), output=str(folder / name), overwrite=True
    )
    return TokenFile(folder / name)


def test_what_is_said_of_a_token_file(tmp_path, english, tokenizer_path):
    texts = [*english[:3], "", None, 7]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess(
        [str(tmp_path / "a.jsonl")],
        tokenizer_path=str(tokenizer_path),
        output=str(tmp_path / "out"),
        skip_bad_records=True,
    )
    fields = json.loads((tmp_path / "out.json").read_text())
    tokenizer = Tokenizer(tokenizer_path)
    assert fields["tokenizer"] == {"path": str(tokenizer_path), "sha256": tokenizer.fingerprint, "vocab_size": 2000}
    assert fields["sources"] == [
        {
            "name": str(tmp_path / "a.jsonl"),
            "size_bytes": (tmp_path / "a.jsonl").stat().st_size,
            "documents": 3,
            "empty": 2,
            "num_bad_records": 1,
            "bad_records": ["line 6: text is a number, not text"],
        }
    ]
    assert fields["options"] == {"text_key": "text", "text_unit": "document"}
    assert fields["characters"] == sum(map(len, english[:3]))
    assert fields["lost_characters"] == 0
    token_file = TokenFile(tmp_path / "out")
    assert fields["identity"]["tokens"] == token_file.num_tokens
    assert fields["identity"]["documents"] == 3
    assert set(fields["versions"]) == {"megalibi", "sentencepiece"}
    provenance = read_provenance(token_file)
    assert provenance is not None
    assert provenance.identity == token_file.identity


def test_identities_differ_by_content_and_not_by_place(tmp_path, english, tokenizer_path, other_path):
    first = tokenize(tmp_path, "a", english[:4], tokenizer_path).identity
    assert tokenize(tmp_path, "b", english[:4], tokenizer_path).identity == first
    assert tokenize(tmp_path, "c", english[:5], tokenizer_path).identity != first
    assert tokenize(tmp_path, "d", english[1:5], tokenizer_path).identity != first
    assert tokenize(tmp_path, "e", english[:4], other_path).identity != first


def test_a_large_file_is_known_by_its_beginning_its_end_and_places_between(tmp_path):
    """Larger than what is read of it; a change in any of the places, and of the size, gives another identity."""
    num_tokens = 40_000_000

    def write(changes: dict[int, int]) -> TokenFile:
        tokens = (np.arange(num_tokens) % 60_000).astype(np.uint16)
        for place, token in changes.items():
            tokens[place] = token
        with TokenFileWriter(tmp_path / "large", 60_000) as writer:
            writer.add_document(tokens)
        return TokenFile(tmp_path / "large")

    identity = write({}).identity
    assert write({}).identity == identity
    step = (2 * num_tokens - (1 << 16)) / 255 / 2
    for place in (0, num_tokens - 1, *(int(number * step) + 100 for number in (1, 128, 254))):
        assert write({place: 60_001}).identity != identity


def test_a_token_file_that_was_made_again_beside_an_old_record_is_refused(tmp_path, english, tokenizer_path):
    tokenize(tmp_path, "a", english[:4], tokenizer_path)
    tokenize(tmp_path, "b", english[:5], tokenizer_path)
    shutil.copy(tmp_path / "a.json", tmp_path / "b.json")
    with pytest.raises(DataError, match=r"b\.json describes another token file than the one beside it: make"):
        read_provenance(TokenFile(tmp_path / "b"))


@pytest.mark.parametrize(
    "change",
    [
        {"identity": {}},
        {"tokenizer": {}},
        {"tokenizer": {"sha256": 7, "path": "", "vocab_size": 1}},
        {"tokenizer": {"sha256": "", "vocab_size": 1}},
        {"more": 1},
    ],
)
def test_a_damaged_record_is_refused(tmp_path, english, tokenizer_path, change):
    token_file = tokenize(tmp_path, "a", english[:4], tokenizer_path)
    fields = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(DataError, match=r"a\.json: damaged"):
        read_provenance(token_file)


def test_a_truncated_record_is_refused_and_may_be_made_again(tmp_path, english, tokenizer_path):
    token_file = tokenize(tmp_path, "a", english[:4], tokenizer_path)
    content = (tmp_path / "a.json").read_bytes()
    (tmp_path / "a.json").write_bytes(content[:200])
    with pytest.raises(DataError, match=r"a\.json: damaged"):
        read_provenance(token_file)
    tokenize(tmp_path, "a", english[:4], tokenizer_path)
    assert (tmp_path / "a.json").read_bytes() == content


def test_text_that_is_called_like_the_record_is_not_written_over(tmp_path, english, tokenizer_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": english[0]}]))
    before = (tmp_path / "a.json").read_bytes()
    with pytest.raises(DataError, match=r"a\.json exists and does not describe a token file"):
        preprocess(
            [str(tmp_path / "a.json")], tokenizer_path=str(tokenizer_path), output=str(tmp_path / "a"), overwrite=True
        )
    assert (tmp_path / "a.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json"]


def test_one_tokenizer_made_all_data_of_a_run(tmp_path, english, tokenizer_path, other_path):
    one = tokenize(tmp_path, "one", english[:4], tokenizer_path)
    two = tokenize(tmp_path, "two", english[4:8], tokenizer_path)
    foreign = tokenize(tmp_path, "foreign", english[:4], other_path)
    tokenizer, other = Tokenizer(tokenizer_path), Tokenizer(other_path)
    assert check_tokenizer([one, two], tokenizer, "data.tokenizer") == tokenizer.fingerprint
    assert check_tokenizer([one, two], None, "data.tokenizer") == tokenizer.fingerprint
    with pytest.raises(DataError) as error:
        check_tokenizer([one, two], other, "data.tokenizer")
    assert str(error.value).startswith(
        f"{one.prefix} was made with another tokenizer: data.tokenizer={other_path} (sha"
    )
    for given in (tokenizer, None):
        with pytest.raises(DataError) as error:
            identify_data([one], [foreign], given)
        assert str(error.value).startswith(f"{foreign.prefix} was made with another tokenizer: ")
        assert f"is not {other_path} in {foreign.prefix}.json (sha256 {other.fingerprint[:12]})" in str(error.value)


def test_data_without_a_record_is_taken_and_said(tmp_path, english, tokenizer_path, caplog):
    token_file = tokenize(tmp_path, "a", english[:4], tokenizer_path)
    (tmp_path / "a.json").unlink()
    tokenizer = Tokenizer(tokenizer_path)
    assert check_tokenizer([token_file], tokenizer, "data.tokenizer") == tokenizer.fingerprint
    assert check_tokenizer([token_file], None, "data.tokenizer") is None
    with caplog.at_level("WARNING", "megalibi"):
        say_unrecorded([token_file.prefix])
    assert f"it is not known which tokenizer made {token_file.prefix}: " in caplog.text


def test_a_tokenizer_that_is_too_small_for_the_ids_is_refused(tmp_path, english, tokenizer_path):
    """Even without a record."""
    token_file = tokenize(tmp_path, "a", english[:4], tokenizer_path)
    (tmp_path / "a.json").unlink()
    train_tokenizer(english, 400, tmp_path / "small.model")
    with pytest.raises(DataError, match=r"past vocab_size=400; the file was made with another tokenizer"):
        identify_data([token_file], [], Tokenizer(tmp_path / "small.model"))
