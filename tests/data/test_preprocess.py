from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import megalibi.data.preprocess as preprocess_module
from megalibi.data.preprocess import preprocess
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokens.token_file import TokenFile
from megalibi.errors import ConfigError, DataError, FileError


@pytest.fixture
def corpus(tmp_path, english) -> Path:
    """Short documents, an empty one, and one that is longer than a piece and than a task."""
    path = tmp_path / "corpus.jsonl"
    documents = [*english[:20], "", "\n".join(english[20:]) * 2, *english[20:30]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def read_documents(prefix: str) -> list[list[int]]:
    token_file = TokenFile(prefix)
    starts = [*token_file.document_starts_between(0, token_file.num_tokens).tolist(), token_file.num_tokens]
    return [token_file.read(a, b - a).tolist() for a, b in itertools.pairwise(starts)]


def test_output_holds_every_document_whatever_the_workers(tmp_path, corpus, tokenizer_path):
    reports = []
    for workers in (1, 3):
        final = preprocess(
            [str(corpus)],
            tokenizer_path=str(tokenizer_path),
            output=str(tmp_path / f"out{workers}"),
            workers=workers,
            report=reports.append,
        )
        assert reports[-1] == final
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out1{suffix}").read_bytes() == (tmp_path / f"out3{suffix}").read_bytes()
    tokenizer = Tokenizer(tokenizer_path)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    expected = [[*tokenizer.encode(text), tokenizer.end_of_document_id] for text in texts if text]
    assert read_documents(str(tmp_path / "out1")) == expected
    assert final.documents == len(expected)
    assert final.tokens == sum(map(len, expected))
    assert final.text_bytes == sum(len(text.encode()) for text in texts)


def test_documents_of_a_tokenizer_that_cannot_be_cut_stay_whole(tmp_path, corpus, english, monkeypatch):
    import sentencepiece

    model = str(tmp_path / "foreign")
    lines = [line for text in english for line in text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=model, vocab_size=600, minloglevel=2
    )
    tokenizer = Tokenizer(f"{model}.model")
    preprocess([str(corpus)], tokenizer_path=f"{model}.model", output=str(tmp_path / "out"), workers=2)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    expected = [[*tokenizer.encode(text), tokenizer.end_of_document_id] for text in texts if text]
    assert read_documents(str(tmp_path / "out")) == expected


def test_work_in_flight_is_bounded(tmp_path, corpus, tokenizer_path, monkeypatch):
    """The input is read no further ahead of the output than the tasks that are in flight."""
    monkeypatch.setattr(preprocess_module, "_TASK_CHARACTERS", 1)
    read, ahead = [], []
    reader = preprocess_module.DocumentReader

    class Counted(reader):
        def __iter__(self):
            for piece in super().__iter__():
                read.append(piece)
                yield piece

    monkeypatch.setattr(preprocess_module, "DocumentReader", Counted)
    written = []

    def report(progress):
        written.append(progress)
        ahead.append(len(read) - len(written))

    preprocess(
        [str(corpus)], tokenizer_path=str(tokenizer_path), output=str(tmp_path / "out"), workers=2, report=report
    )
    assert len(read) > 3 * 8
    assert max(ahead) <= 8


def test_existing_output_is_kept_unless_told(tmp_path, corpus, tokenizer_path):
    (tmp_path / "out.idx").write_text("precious")
    arguments = {"tokenizer_path": str(tokenizer_path), "output": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match=r"out\.idx exists; choose another --output, or replace it with --overwrite"):
        preprocess([str(corpus)], **arguments)
    assert (tmp_path / "out.idx").read_text() == "precious"
    preprocess([str(corpus)], **arguments, overwrite=True)
    assert TokenFile(tmp_path / "out").num_documents == 31


def test_what_another_run_finished_meanwhile_is_kept(tmp_path, corpus, tokenizer_path, monkeypatch):
    """It ends between the first look at the output and the lock."""
    arguments = {"tokenizer_path": str(tokenizer_path), "output": str(tmp_path / "out")}
    reader = preprocess_module.DocumentReader

    def slow_to_open(*args, **kwargs):
        monkeypatch.setattr(preprocess_module, "DocumentReader", reader)
        (tmp_path / "short.txt").write_text("short")
        preprocess([str(tmp_path / "short.txt")], **arguments)
        return reader(*args, **kwargs)

    monkeypatch.setattr(preprocess_module, "DocumentReader", slow_to_open)
    with pytest.raises(ConfigError, match=r"out\.bin exists; choose another --output"):
        preprocess([str(corpus)], **arguments)
    assert TokenFile(tmp_path / "out").num_documents == 1


def test_a_broken_input_leaves_nothing(tmp_path, corpus, tokenizer_path):
    with pytest.raises(DataError, match=r"gone\.txt: no such file"):
        preprocess(
            [str(corpus), str(tmp_path / "gone.txt")],
            tokenizer_path=str(tokenizer_path),
            output=str(tmp_path / "o" / "a"),
        )
    assert not (tmp_path / "o").exists()


def test_no_text(tmp_path, tokenizer_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty\.txt: there is no text in what was read"):
        preprocess([str(tmp_path / "empty.txt")], tokenizer_path=str(tokenizer_path), output=str(tmp_path / "a"))
    assert not list(tmp_path.glob("a.*"))


def test_no_workers(tmp_path, corpus, tokenizer_path):
    with pytest.raises(ConfigError, match="--workers=0: must be from 1 to "):
        preprocess([str(corpus)], tokenizer_path=str(tokenizer_path), output=str(tmp_path / "a"), workers=0)


def test_an_output_that_cannot_be_written(tmp_path, corpus, tokenizer_path):
    with pytest.raises(FileError, match="a: cannot be written: "):
        preprocess([str(corpus)], tokenizer_path=str(tokenizer_path), output=str(corpus / "a"))


def test_a_full_disk_is_one_line(tmp_path, corpus, tokenizer_path):
    """A file size limit stands for the full disk: the same OSError path, in a process of its own."""
    script = (
        "import resource, signal, sys\n"
        "from megalibi.data.preprocess import preprocess\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "    try:\n"
        "        preprocess([sys.argv[1]], tokenizer_path=sys.argv[2], output=sys.argv[3])\n"
        "    except Exception as error:\n"
        "        sys.exit(f'{type(error).__name__}: {error}')\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, str(tmp_path / "script.py"), str(corpus), str(tokenizer_path), str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.strip().endswith(f"FileError: {tmp_path / 'a'}: cannot be written: File too large")
    assert not list(tmp_path.glob("a.*"))


def test_workers_end_when_their_parent_is_killed(tmp_path, corpus, tokenizer_path):
    script = (
        "import sys, time\n"
        "from multiprocessing import active_children\n"
        "from megalibi.data.preprocess import preprocess\n"
        "def report(progress):\n"
        "    print(*[child.pid for child in active_children()], flush=True)\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    preprocess([sys.argv[1]], tokenizer_path=sys.argv[2], output=sys.argv[3], workers=2, report=report)\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, str(tmp_path / "script.py"), str(corpus), str(tokenizer_path), str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
