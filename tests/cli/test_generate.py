from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalibi.checkpoint import Checkpoint, save_checkpoint
from megalibi.cli.command import spell_script
from megalibi.cli.inference import generate as generate_command
from megalibi.config import Config, derive
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.training import train_tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.data.tokens.token_file import TokenFileWriter
from megalibi.errors import CheckpointError, UserError
from megalibi.generate.run import TextRow
from megalibi.generate.sampling import Sampling
from megalibi.runtime.ranks import Place
from tests.support.jobs import ScriptJob, torchrun_environment
from tests.support.ranks import run_on_ranks
from tests.support.runs import CPU, identify, iterate_ours, make_config, process_groups

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "generate.py"
ALONE = {"rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1, "master_address": "", "master_port": 0}
TERMINAL_TIMEOUT_SECONDS = 30.0
PROMPTS = ["def run(", "import 日本", "x"]


def train_and_save(config: Config) -> None:
    (engine, _), groups = next(iter(iterate_ours(config, 1))), process_groups(1)
    folder, derived = Path(config.train.output_dir) / "checkpoints", derive(config, groups.world.size)
    save_checkpoint(engine, config, derived, identify(config), groups, folder=folder, step=1, run_id="a")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, with a tokenizer, and a file of prompts."""
    folder = tmp_path_factory.mktemp("run")
    texts = [path.read_text() for path in sorted((ROOT / "megalibi" / "model").rglob("*.py"))]
    train_tokenizer(texts, 400, folder / "t.model")
    train_tokenizer(texts, 410, folder / "other.model")
    tokenizer = Tokenizer(folder / "t.model")
    with TokenFileWriter(folder / "text", tokenizer.vocab_size) as writer:
        for text in texts:
            writer.add_document([*tokenizer.encode(text), tokenizer.end_of_document_id])
    config = make_config(
        str(folder / "text"),
        model={"vocab_size": tokenizer.vocab_size, "init_std": 0.2},
        data={"tokenizer": str(folder / "t.model")},
        train={"output_dir": str(folder / "run")},
        optimizer={"learning_rate": 1e-4},
    )
    run_on_ranks(1, train_and_save, config)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\n \n" + PROMPTS[2])
    return folder


def parse(run_dir: Path, *words: str) -> argparse.Namespace:
    words = ("--checkpoint", str(run_dir / "run"), "--max-tokens", "12", *words)
    return generate_command.COMMAND.parse(words, spell_script("generate.py"))


def run(run_dir: Path, *words: str, **place: Any) -> None:
    generate_command.COMMAND.run(parse(run_dir, *words), Place(**{**ALONE, **place}))


def make_speaker(run_dir: Path, groups: Any) -> generate_command.Speaker:
    checkpoint = Checkpoint.open(run_dir / "run")
    return generate_command.Speaker(
        model=checkpoint.load_model(CPU, groups),
        config=checkpoint.config.model,
        tokenizer=Tokenizer(run_dir / "t.model"),
        sampling=Sampling(seed=5),
        max_tokens=12,
        horizon_eps=0.0,
        shows=False,
    )


def speak_on_a_data_rank(run_dir: Path, batch_size: int) -> None:
    groups = process_groups(1)
    speaker = dataclasses.replace(make_speaker(run_dir, groups), batch_size=batch_size)
    generate_command.speak_all(speaker, PROMPTS, groups, run_dir, run_dir / "shared.jsonl")


def fail_on_the_second_data_rank(run_dir: Path) -> str:
    groups = process_groups(1)
    speaker = make_speaker(run_dir, groups)
    if groups.data.rank == 1:
        with torch.no_grad():
            speaker.model.embedding.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError) as refused:
        generate_command.speak_all(speaker, PROMPTS, groups, run_dir, None)
    return str(refused.value)


def test_prompts_of_a_file_are_answered_alike_on_any_ranks(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(run_dir, "--prompts", str(run_dir / "prompts.txt"), "--seed", "5", "--output", str(run_dir / "alone.jsonl"))
    shown = capsys.readouterr().out
    answers = [json.loads(line) for line in (run_dir / "alone.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == PROMPTS
    tokenizer = Tokenizer(run_dir / "t.model")
    for answer in answers:
        assert 0 < len(answer["tokens"]) <= 12
        assert tokenizer.decode(answer["prompt_tokens"] + answer["tokens"]) == answer["prompt"] + answer["text"]
    assert shown == "".join(answer["prompt"] + answer["text"] + "\n" for answer in answers)

    assert make_speaker(run_dir, None).encode("") == [tokenizer.end_of_document_id]
    run(run_dir, "--prompt", PROMPTS[0], "--seed", "5")
    assert capsys.readouterr().out == answers[0]["prompt"] + answers[0]["text"] + "\n"

    words = ["--prompts", str(run_dir / "prompts.txt"), "--seed", "5", "--batch-size", "2"]
    run(run_dir, *words, "--output", str(run_dir / "together.jsonl"))
    assert capsys.readouterr().out == shown
    assert (run_dir / "together.jsonl").read_text() == (run_dir / "alone.jsonl").read_text()

    for batch_size in (1, 2):
        run_on_ranks(2, speak_on_a_data_rank, run_dir, batch_size)
        assert (run_dir / "shared.jsonl").read_text() == (run_dir / "alone.jsonl").read_text()

    for message in run_on_ranks(2, fail_on_the_second_data_rank, run_dir):
        assert "the model gives NaN" in message
        assert "(rank 1 on" in message

    words = ["--checkpoint", str(run_dir / "run"), "--prompts", str(run_dir / "prompts.txt"), "--max-tokens", "12"]
    words += [
        "--seed",
        "5",
        "--batch-size",
        "3",
        "--tensor-parallel-size",
        "2",
        "--output",
        str(run_dir / "tensor.jsonl"),
    ]
    (run_dir / "job").mkdir()
    ScriptJob(TOOL, [words] * 2, run_dir / "job", torchrun_environment(2)).succeed()
    assert (run_dir / "tensor.jsonl").read_text() == (run_dir / "alone.jsonl").read_text()


def test_what_cannot_be_used_is_one_line(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "empty.txt").write_text("\n \n")
    (run_dir / "latin.txt").write_bytes(b"caf\xe9\n")
    two = {"world_size": 2, "local_world_size": 2}
    prompt = ("--prompt", "x")
    for words, place, message in [
        ((*prompt, "--max-tokens", "0"), {}, "--max-tokens=0: must be at least 1"),
        ((*prompt, "--horizon-eps", "1"), {}, "--horizon-eps=1.0: must be at least 0 and below 1"),
        ((*prompt, "--top-p", "2"), {}, "--top-p=2.0: must be above 0 and at most 1"),
        ((*prompt, "--batch-size", "0"), {}, "--batch-size=0: must be at least 1"),
        ((*prompt, "--batch-size", "2"), {}, "--batch-size=2: must be 1, or stand beside --prompts"),
        ((*prompt, "--output", "x.jsonl"), {}, "--output=x.jsonl: must stand beside --prompts"),
        (("--prompts", "nowhere.txt"), {}, "--prompts: nowhere.txt: No such file"),
        (("--prompts", f"{run_dir}/empty.txt"), {}, "empty.txt: must have a line that is not empty"),
        (
            ("--prompts", f"{run_dir}/latin.txt"),
            {},
            "latin.txt: must be UTF-8 text: invalid continuation byte at byte 3",
        ),
        (prompt, two, "--tensor-parallel-size=1: must be 2, the number of ranks, for a single prompt"),
        (("--tensor-parallel-size", "2"), two, "2 ranks cannot share a keyboard: give --prompt or --prompts"),
        (
            (*prompt, "--tokenizer", f"{run_dir}/other.model"),
            {},
            "is not the tokenizer that the checkpoint was trained",
        ),
        (("--prompt", "caf\udce9"), {}, "--prompt: the prompt 'caf\\udce9' must be UTF-8 text"),
    ]:
        with pytest.raises(UserError) as refused:
            run(run_dir, *words, **place)
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    with pytest.raises(SystemExit, match="2"):
        parse(run_dir, "--prompt", "x", "--prompts", "y")
    moved = run_dir / "t.moved"
    shutil.move(run_dir / "t.model", moved)
    with pytest.raises(UserError, match=r"data.tokenizer=.*t.model of the checkpoint is not there: name it with"):
        run(run_dir, *prompt)
    shutil.move(moved, run_dir / "t.model")


def test_a_line_of_a_pipe_that_is_no_text_costs_no_other(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(run_dir, "--prompts", str(run_dir / "prompts.txt"), "--output", str(run_dir / "of_file.jsonl"))
    answers = [json.loads(line) for line in (run_dir / "of_file.jsonl").read_text().splitlines()]
    capsys.readouterr()
    lines = [PROMPTS[0].encode(), b"caf\xe9", PROMPTS[2].encode()]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines))))
    with pytest.raises(UserError, match="1 of the prompts on standard input were refused"):
        run(run_dir)
    shown = capsys.readouterr()
    assert shown.out == answers[0]["text"] + "\n" + answers[2]["text"] + "\n"
    assert "error: prompt 2: it must be UTF-8 text" in shown.err


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_an_interruption_keeps_the_answers_before_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, batch_size: str
) -> None:
    read_prompt = TextRow.read_prompt

    def stop_at_third(row: TextRow) -> torch.Tensor:
        if row.sampler.number == 2:
            raise KeyboardInterrupt
        return read_prompt(row)

    monkeypatch.setattr(TextRow, "read_prompt", stop_at_third)
    output, prompts = run_dir / "stopped.jsonl", run_dir / "prompts.txt"
    with pytest.raises(KeyboardInterrupt):
        run(run_dir, "--prompts", str(prompts), "--output", str(output), "--batch-size", batch_size)
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == PROMPTS[:2]


def test_answers_come_in_the_order_of_the_prompts_and_not_of_their_ends(run_dir: Path) -> None:
    speaker = make_speaker(run_dir, None)
    first, second = (speaker.speak(prompt, number)["tokens"] for number, prompt in enumerate(PROMPTS[:2]))
    # A token of the second text alone ends a document.
    speaker.tokenizer.end_of_document_id = next(token for token in second if token not in first)
    prompts = dict(enumerate(PROMPTS))
    alone = list(speaker.speak_each(prompts))
    assert [answer["prompt"] for answer in alone] == PROMPTS
    assert [answer["ended"] for answer in alone[:2]] == [False, True]
    assert list(dataclasses.replace(speaker, batch_size=2).speak_each(prompts)) == alone


def test_word_level_text_goes_on_after_a_line(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "t.words").write_text("".join(f"{word} 1\n" for word in ("<s>", "<pad>", "</s>", "<unk>", "x")))
    words = WordTokenizer(tmp_path / "t.words")
    speaker = dataclasses.replace(
        make_speaker(run_dir, None), tokenizer=words, max_tokens=60, sampling=Sampling(temperature=50.0)
    )
    answer = speaker.speak("x")
    assert len(answer["tokens"]) == 60
    assert words.end_of_document_id in answer["tokens"]
    assert max(answer["tokens"]) < words.vocab_size


def test_typed_prompts_are_answered_until_the_end(run_dir: Path) -> None:
    """On a terminal: two answers that Ctrl-C stops, and Ctrl-D."""
    ours, theirs = pty.openpty()
    words = [TOOL, "--checkpoint", run_dir / "run", "--max-tokens", "100000", "--temperature", "0"]
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "PYTHONUTF8": "1"}, cwd=ROOT,
    )  # fmt: skip
    os.close(theirs)

    def read_until(is_there: Callable[[str], bool]) -> None:
        shown = ""
        while not is_there(shown):
            assert select.select([ours], [], [], TERMINAL_TIMEOUT_SECONDS)[0], shown
            shown += os.read(ours, 4096).decode(errors="replace")

    try:
        read_until(lambda shown: shown.endswith("> "))
        for _ in range(2):
            os.write(ours, b"def run(\n")
            read_until(lambda shown: len(shown) > 100)  # the answer has begun
            os.kill(process.pid, signal.SIGINT)
            read_until(lambda shown: "stopped; Ctrl-D ends" in shown and shown.endswith("> "))
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(ours)
