from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megalibi.checkpoint import Checkpoint, save_checkpoint
from megalibi.cli.command import spell_script
from megalibi.cli.inference import evaluate as evaluate_command
from megalibi.config import Config, derive
from megalibi.data.preprocess import preprocess
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.training import train_tokenizer
from megalibi.data.tokens.token_file import TokenFile, TokenFileWriter
from megalibi.errors import ConfigError
from megalibi.evaluate.result import EvaluationResult, read_evaluation
from megalibi.evaluate.run import check_lengths
from megalibi.runtime.exit import run_tool
from megalibi.runtime.ranks import Place
from tests.support.jobs import ScriptJob, torchrun_environment
from tests.support.ranks import run_on_ranks
from tests.support.runs import CPU, identify, iterate_ours, make_config, process_groups
from tests.support.terminal import read_terminal
from tests.support.warm_python import warm_python

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "evaluate.py"
STEPS = 6
SEQ_LENGTH = 33
"""Of the training, which tests.support.runs.make_config has."""
HEADS = 4
LOSS_RELATIVE_BOUND = 1e-5  # fp32; other sums than in a batch of windows

ALONE = {"rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1, "master_address": "", "master_port": 0}
SAME_SUMS_RELATIVE_BOUND = 1e-13
"""Of fp64 sums of the same fp32 losses in another order."""

ONLY_THE_BACK_END = (
    r"\S+ WARNING it is not known which tokenizer made \S+: [^\n]+\n\S+ INFO attention back end for [^\n]+\n"
)
"""All that is said beside the results: that these token files have no .json, and which back end the model took."""


def train_and_save(config: Config) -> None:
    for step, (engine, _) in enumerate(iterate_ours(config, STEPS), start=1):
        if step == STEPS:
            groups = process_groups(config.parallel.tensor_parallel_size)
            derived = derive(config, groups.world.size)
            folder = Path(config.train.output_dir) / "checkpoints"
            save_checkpoint(engine, config, derived, identify(config), groups, folder=folder, step=STEPS, run_id="a")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on real text, with a tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    texts = [path.read_text() for path in sorted((ROOT / "megalibi").rglob("*.py"))]
    train_tokenizer(texts, 500, folder / "t.model")
    tokenizer = Tokenizer(folder / "t.model")
    with TokenFileWriter(folder / "text", tokenizer.vocab_size) as writer:
        for text in ["naïve 日本 ▁ 🎉\n", *texts]:
            writer.add_document([*tokenizer.encode(text), tokenizer.end_of_document_id])
    with TokenFileWriter(folder / "foreign", 600) as writer:
        writer.add_document([5] * 200 + [509] + [5] * 100)
    train_tokenizer(texts[: len(texts) // 2], 500, folder / "other.model")
    assert Tokenizer(folder / "other.model").fingerprint != tokenizer.fingerprint
    (folder / "some.txt").write_text(texts[0])
    for name in ("t", "other"):
        tokens = {"tokenizer_path": str(folder / f"{name}.model"), "output": str(folder / f"some_by_{name}")}
        preprocess([str(folder / "some.txt")], **tokens)
    config = make_config(
        str(folder / "text"),
        model={"vocab_size": 509, "num_attention_heads": HEADS},
        data={"tokenizer": str(folder / "t.model")},
        parallel={"tensor_parallel_size": 2},
        train={"output_dir": str(folder)},
    )
    run_on_ranks(2, train_and_save, config)
    return folder


def arguments(run_dir: Path, **options: object) -> list[str]:
    defaults = {"checkpoint": run_dir, "data": run_dir / "text", "lengths": "16,32", "output": run_dir / "out.json"}
    return [str(part) for name, value in {**defaults, **options}.items() for part in (f"--{name}", value)]


def evaluate(run_dir: Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [warm_python(), str(TOOL), *arguments(run_dir, **options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@torch.no_grad()
def losses_ref(run_dir: Path, num_tokens: int, length: int, stride: int, slope_scale: float = 1.0) -> list[float]:
    """Return the loss of each token but the first, each from the window that the protocol gives it, one by one."""
    torch.set_num_threads(1)  # so small that threads only wait for each other
    model = Checkpoint.open(run_dir / "checkpoints" / f"step_{STEPS:08d}").load_model(CPU)
    model.scale_slopes(slope_scale)
    tokens = torch.from_numpy(TokenFile(run_dir / "text").read(0, num_tokens).astype("int64"))
    losses = []
    for place in range(1, num_tokens):
        stop = next(stop for stop in itertools.count(length, stride) if stop >= place)  # the first window that has it
        stop, start = min(stop, num_tokens - 1), stop - length
        if stride < length:
            start = max(0, stop - length)
        window = tokens[start : place + 1]
        losses.append(model(window[None, :-1], window[None, 1:])[0, -1].item())
    return losses


def check(result: EvaluationResult, losses: list[float], num_bytes: int) -> None:
    assert result.tokens == len(losses)
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=LOSS_RELATIVE_BOUND, abs=0.0)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(result.loss * len(losses) / math.log(2) / num_bytes)
    assert result.tokens_per_second is not None
    assert result.tokens_per_second > 0


def test_every_number_is_what_a_token_by_token_reading_gives(run_dir: Path) -> None:
    num_tokens = 130
    tokens = TokenFile(run_dir / "text").read(0, num_tokens).tolist()
    tokenizer = Tokenizer(run_dir / "t.model")
    assert tokens[0] == tokenizer.encode("n")[0]
    num_bytes = len(tokenizer.decode(tokens).encode()) - 1  # the first token is not scored
    done = evaluate(run_dir, tokens=num_tokens)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(ONLY_THE_BACK_END, done.stderr), done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["length 16", "length 32"]
    evaluation = read_evaluation(run_dir / "out.json")
    assert (evaluation.step, evaluation.train_seq_length, evaluation.stride) == (STEPS, SEQ_LENGTH, None)
    assert evaluation.protocol == "nonoverlapping"
    for result in evaluation.results:
        check(result, losses_ref(run_dir, num_tokens, result.length, result.length), num_bytes)
        assert f"length {result.length}: loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, " in done.stdout
    fields = json.loads((run_dir / "out.json").read_text())
    assert fields["checkpoint"] == str(run_dir / "checkpoints" / f"step_{STEPS:08d}")
    assert fields["command"].startswith("python ")
    assert set(fields["versions"]) == {"megalibi", "torch", "python"}
    assert fields.keys() >= {"commit", "date", "device", "hardware"}
    assert (fields["ranks"], fields["tensor_parallel_size"]) == (1, 1)

    output = run_dir / "new" / "sliding.json"
    folder = run_dir / "checkpoints"
    done = evaluate(run_dir, checkpoint=folder, protocol="sliding", stride=5, tokens=num_tokens, output=output)
    assert done.returncode == 0, done.stderr
    evaluation = read_evaluation(output)
    assert (evaluation.protocol, evaluation.stride) == ("sliding", 5)
    for result in evaluation.results:
        check(result, losses_ref(run_dir, num_tokens, result.length, 5), num_bytes)
    assert list(output.parent.iterdir()) == [output]


def evaluate_on_ranks(run_dir: Path, world_size: int, **options: object) -> tuple[dict[str, Any], str]:
    """Run the tool on ranks, as deepspeed starts it; return what it wrote, and what rank 0 printed."""
    output = run_dir / f"ranks{world_size}.json"
    command = [*arguments(run_dir, lengths="16,64", tokens=30_000, output=output, **options), "--by-position"]
    job = ScriptJob(TOOL, [[*command, "--local_rank=0"]] * world_size, run_dir, torchrun_environment(world_size))
    job.succeed()
    assert not any(job.read_log(rank) for rank in range(1, world_size)), job.output
    return json.loads(output.read_text()), job.read_log(0)


def test_ranks_that_open_different_checkpoints_score_nothing(run_dir: Path, tmp_path: Path) -> None:
    """As where hosts have copies of their own, or ``latest`` moves while the job starts."""
    checkpoint = Checkpoint.open(run_dir).path
    other = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, other)
    manifest = (other / "manifest.json").read_text().replace('"run_id": "a"', '"run_id": "b"')
    (other / "manifest.json").write_text(manifest)
    (other / "manifest.sha256").write_text(hashlib.sha256(manifest.encode()).hexdigest())
    output = tmp_path / "out.json"
    by_rank = [arguments(run_dir, checkpoint=path, output=output) for path in (checkpoint, other)]
    job = ScriptJob(TOOL, by_rank, tmp_path, torchrun_environment(2))
    assert job.wait() == [2, 2], job.output
    (line,) = (line for line in job.output.splitlines() if line.startswith("error: "))
    assert line.startswith(
        f"error: the ranks opened different checkpoints: {checkpoint} (step {STEPS}, manifest sha256 "
    )
    assert (
        f") and {other} (step {STEPS}, manifest sha256 {hashlib.sha256(manifest.encode()).hexdigest()[:12]}) on" in line
    )
    assert not output.exists()


@pytest.mark.parametrize(("world_size", "tensor", "protocol"), [(2, 1, "sliding"), (4, 2, "nonoverlapping")])
def test_any_number_of_ranks_gives_the_numbers_of_one(
    run_dir: Path, world_size: int, tensor: int, protocol: str
) -> None:
    """The checkpoint is cut over 2 tensor ranks; it is read by as many, or by one."""
    options = {"protocol": protocol, "slope-scale": "interpolate" if tensor > 1 else "none"}
    one, _ = evaluate_on_ranks(run_dir, 1, **options)
    many, printed = evaluate_on_ranks(run_dir, world_size, **options, **{"tensor-parallel-size": tensor})
    assert (many["ranks"], many["tensor_parallel_size"]) == (world_size, tensor)
    bound = SAME_SUMS_RELATIVE_BOUND if tensor == 1 else LOSS_RELATIVE_BOUND
    for result, expected in zip(many["results"], one["results"], strict=True):
        assert result["tokens"] == expected["tokens"] == 29_999
        for name in ("loss", "perplexity", "bits_per_byte"):
            assert result[name] == pytest.approx(expected[name], rel=bound, abs=0.0)
        assert result["by_position"]["tokens"] == expected["by_position"]["tokens"]
        assert result["by_position"]["loss"] == pytest.approx(expected["by_position"]["loss"], rel=1e-5, abs=0.0)
        scale = min(1.0, SEQ_LENGTH / result["length"]) if tensor > 1 else None
        assert result.get("slope_scale") == expected.get("slope_scale") == scale
        scaled = "" if scale is None else f", slopes x {scale:.4g}"
        assert f"length {result['length']}{scaled}: loss {result['loss']:.4f}" in printed


@pytest.mark.parametrize(("asked", "factors"), [("interpolate", (1.0, 1.0, SEQ_LENGTH / 64)), ("0.25", (0.25,) * 3)])
def test_scaled_slopes_give_the_losses_of_a_model_with_those_slopes(
    run_dir: Path, asked: str, factors: tuple[float, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    options = arguments(run_dir, tokens=70, lengths=f"16,{SEQ_LENGTH},64")
    command = evaluate_command.COMMAND
    results = {}
    for scale in ("none", asked):
        parsed = command.parse([*options, f"--slope-scale={scale}"], spell_script(str(TOOL)))
        command.run(parsed, Place(**ALONE))
        results[scale] = read_evaluation(run_dir / "out.json").results
    assert capsys.readouterr().out.count("slopes x ") == 3
    for plain, scaled, factor in zip(results["none"], results[asked], factors, strict=True):
        assert (plain.slope_scale, scaled.slope_scale) == (None, factor)
        assert (scaled.loss == plain.loss) == (factor == 1.0)  # in every bit
        losses = losses_ref(run_dir, 70, scaled.length, scaled.length, factor)
        assert scaled.loss == pytest.approx(sum(losses) / len(losses), rel=LOSS_RELATIVE_BOUND, abs=0.0)


def test_by_position_tells_the_loss_of_every_number_of_tokens_seen(run_dir: Path) -> None:
    num_tokens, length, stride = 300, 16, 6
    picture = run_dir / "positions.png"
    command = [*arguments(run_dir, tokens=num_tokens, protocol="sliding", stride=stride, picture=picture)]
    done = subprocess.run([warm_python(), str(TOOL), *command, "--by-position"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = [min(place, length) if place <= length else 0 for place in range(1, num_tokens)]
    for place in range(length + 1, num_tokens):  # the first window that has it, counted from its end
        stop = min(next(stop for stop in itertools.count(length, stride) if stop >= place), num_tokens - 1)
        seen[place - 1] = length - (stop - place)
    losses = losses_ref(run_dir, num_tokens, length, stride)
    row = json.loads((run_dir / "out.json").read_text())["results"][0]["by_position"]
    assert row["seen"] == sorted(set(seen))
    for tokens_seen, loss, tokens in zip(row["seen"], row["loss"], row["tokens"], strict=True):
        expected = [loss for loss, number in zip(losses, seen, strict=True) if number == tokens_seen]
        assert tokens == len(expected)
        assert loss == pytest.approx(sum(expected) / len(expected), rel=LOSS_RELATIVE_BOUND, abs=0.0)
    assert re.search(r"^tokens seen +16 +32$", done.stdout, re.MULTILINE)
    assert re.search(r"^9 to 16( +\d+\.\d{4}){2}$", done.stdout, re.MULTILINE)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_length_past_what_the_model_has_learned_is_refused(run_dir: Path) -> None:
    config = make_config(str(run_dir / "text"), model={"position_method": "learned", "max_position_embeddings": 64})
    check_lengths(config, [16, 64])
    limit = "model.max_position_embeddings=64 of the checkpoint, whose model.position_method=learned"
    with pytest.raises(ConfigError, match=f"--lengths=65: must be at most {limit} has learned no positions beyond"):
        check_lengths(config, [16, 65])


def test_a_long_window_needs_no_memory_for_all_its_scores(run_dir: Path) -> None:
    """10,000 tokens at once, on a terminal; all scores of a layer in fp32 would take 1.6 GB."""
    output = run_dir / "long.json"
    checkpoint = run_dir / "checkpoints" / f"step_{STEPS:08d}"
    options = arguments(run_dir, checkpoint=checkpoint, lengths="64,10000", tokens=10_100, output=output)
    terminal, end = pty.openpty()
    with subprocess.Popen(
        [sys.executable, str(TOOL), *options],
        stderr=end,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    ) as process:
        os.close(end)
        shown = read_terminal(terminal)
    assert process.returncode == 0, shown
    assert "length 10000" in shown
    assert "tokens/s" in shown
    short, long = read_evaluation(output).results
    assert long.tokens == short.tokens == 10_099
    assert long.loss == pytest.approx(short.loss, rel=0.5)
    assert long.memory_bytes is not None
    assert short.memory_bytes is not None
    assert long.memory_bytes - short.memory_bytes < HEADS * 10_000**2 * 4 / 8


def test_bits_per_byte_are_left_out_where_the_tokenizer_is_missing(run_dir: Path) -> None:
    os.rename(run_dir / "t.model", run_dir / "elsewhere.model")
    try:
        done = evaluate(run_dir, tokens=40, lengths=16)
        assert done.returncode == 0, done.stderr
        assert (
            f"bits per byte are left out: the checkpoint's tokenizer, {run_dir / 't.model'}, is not there"
            in done.stderr
        )
        assert read_evaluation(run_dir / "out.json").results[0].bits_per_byte is None
        done = evaluate(run_dir, tokens=40, lengths=16, tokenizer=run_dir / "elsewhere.model")
        assert re.fullmatch(ONLY_THE_BACK_END, done.stderr), done.stderr
        assert read_evaluation(run_dir / "out.json").results[0].bits_per_byte is not None
    finally:
        os.rename(run_dir / "elsewhere.model", run_dir / "t.model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": "16,x"}, "--lengths=16,x: must be whole numbers above 0, as in 512,1024"),
        ({"lengths": "0"}, "--lengths=0: must be whole numbers above 0"),
        ({"stride": 4}, "--stride=4: must not stand beside --protocol nonoverlapping; leave it out, or choose sliding"),
        ({"protocol": "sliding", "stride": 17}, "--stride=17: must be from 1 to 16, the shortest of --lengths"),
        ({"lengths": "16,400", "tokens": 400}, "--lengths=400: must be below the --tokens=400 of "),
        ({"data": "none"}, "none.idx: no such token file"),
        ({"checkpoint": "none"}, "none is no checkpoint and has none: give a step's folder, a run's folder"),
        ({"data": "foreign"}, "foreign.bin: token 200 is id 509, past vocab_size=509"),
        ({"output": "."}, "--output=.: must be the name of a file, and is a folder"),
        ({"tokenizer": "none.model"}, "none.model: no such tokenizer"),
        ({"tokenizer": "other.model"}, "--tokenizer=other.model (sha256 "),
        ({"tokenizer": "other.model"}, ") is not the tokenizer that the checkpoint was trained with (sha256 "),
        ({"data": "some_by_other"}, "some_by_other was made with another tokenizer: "),
        ({"data": "some_by_other", "tokenizer": "other.model"}, "is not the tokenizer that the checkpoint was trained"),
        ({"tensor-parallel-size": 0}, "--tensor-parallel-size=0: must be at least 1"),
        ({"tensor-parallel-size": 2}, "--tensor-parallel-size=2: must divide the number of ranks=1"),
        ({"picture": "."}, "--picture=.: must be the name of a file, and is a folder"),
        ({"picture": "a.xyz"}, "--picture=a.xyz: must end in one of .eps"),
        ({"picture": "new/a"}, "--picture=new/a: must end in one of .eps"),
        (
            {"picture": "a.png", "output": "./a.png"},
            "--picture=a.png: must be another file than that of",
        ),
        ({"picture": "t.model/a.png"}, "--picture=t.model/a.png cannot be written: t.model is no folder"),
        ({"output": "t.model/a.json"}, "--output=t.model/a.json cannot be written: t.model is no folder"),
        ({"tokens": 0}, "--tokens=0: must be at least 1"),
        ({"tokens": -7}, "--tokens=-7: must be at least 1"),
        ({"slope-scale": "yes"}, "--slope-scale=yes: must be none, interpolate or a number from 1e-06 to 1e+06"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run_dir: Path,
    options: dict[str, object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run_dir)
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments(run_dir, **options)])
    command = evaluate_command.COMMAND
    with pytest.raises(SystemExit) as end:
        run_tool(lambda: command.run(command.parse(sys.argv[1:], spell_script(str(TOOL))), Place(**ALONE)))
    assert end.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_text_by_the_models_own_tokenizer_is_taken_without_a_word(run_dir: Path) -> None:
    done = evaluate(run_dir, data=run_dir / "some_by_t", tokens=40, lengths=16)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\S+ INFO attention back end for [^\n]+\n", done.stderr), done.stderr


def test_text_of_an_unknown_tokenizer_is_refused_even_if_the_models_is_not_at_hand(run_dir: Path) -> None:
    """By what the checkpoint and the text remember."""
    os.rename(run_dir / "t.model", run_dir / "elsewhere.model")
    try:
        done = evaluate(run_dir, data=run_dir / "some_by_other")
    finally:
        os.rename(run_dir / "elsewhere.model", run_dir / "t.model")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: the tokenizer of {run_dir / 'some_by_other'} (sha256 ")
    assert "is not the tokenizer that the checkpoint was trained with" in last


def test_a_damaged_checkpoint_is_one_line_and_exit_code_2(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / f"step_{STEPS:08d}" / "weights_tensor_01_data_0000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        done = evaluate(run_dir)
    finally:
        path.write_bytes(content)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {path} is damaged")
    assert done.stderr.count("\n") == 1


def test_help_has_an_example() -> None:
    done = subprocess.run([warm_python(), "tools/evaluate.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "python tools/evaluate.py --checkpoint runs/quickstart" in done.stdout
