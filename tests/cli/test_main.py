"""The command line as users start it: what it lists, what it refuses, and what it does not import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megalibi import __version__
from megalibi.cli.main import COMMANDS, load_command
from tests.support.warm_python import warm_python

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "launch/pretrain.py": "pretrain",
    "tools/compare_1p3b.py": "study compare-1p3b",
    "tools/convert_checkpoint.py": "convert",
    "tools/evaluate.py": "evaluate",
    "tools/extrapolate.py": "study extrapolate",
    "tools/generate.py": "generate",
    "tools/lm_evaluate.py": "lm-eval",
    "tools/measure_device.py": "study measure-device",
    "tools/measure_gpu.py": "study measure-gpu",
    "tools/plan_run.py": "plan",
    "tools/preprocess_data.py": "preprocess",
    "tools/report.py": "report",
    "tools/train_tokenizer.py": "tokenizer",
    "tools/warm_triton.py": "warm-triton",
}
"""Paths that were promised, and the commands that they stand for."""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)


def test_help_lists_every_command_and_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from megalibi.cli.main import start\n"
        "try:\n"
        "    start(['--help'])\n"
        "finally:\n"
        "    assert not {'torch', 'deepspeed', 'datasets', 'matplotlib'} & set(sys.modules)\n"
    )
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    listed = re.findall(r"^  ([a-z0-9 -]+?)  +\S", done.stdout, re.MULTILINE)
    assert listed == list(COMMANDS)


def test_help_of_a_group_lists_its_commands() -> None:
    done = run("-m", "megalibi", "study", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: megalibi study COMMAND ...\n")
    listed = re.findall(r"^  ([a-z0-9-]+)  +\S", done.stdout, re.MULTILINE)
    assert [f"study {name}" for name in listed] == [name for name in COMMANDS if name.startswith("study ")]


def test_the_version_is_the_packages() -> None:
    assert run("-m", "megalibi", "--version").stdout == f"megalibi {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "megalibi: COMMAND is missing; give one of these"),
        (["study"], "megalibi study: COMMAND is missing; give one of these"),
        (["evalute"], "COMMAND=evalute: must be a command of megalibi; did you mean megalibi evaluate?"),
        (["xyzzy", "--help"], "COMMAND=xyzzy: must be a command of megalibi; megalibi --help lists them"),
        (
            ["study", "extrapolat", "x.yaml"],
            "COMMAND=study extrapolat: must be a command of megalibi; did you mean megalibi study extrapolate?",
        ),
    ],
)
def test_what_is_no_command_is_one_line(words: list[str], message: str) -> None:
    done = run("-m", "megalibi", *words)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_shows_itself_as_it_was_typed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from megalibi.cli.command import spell_command, spell_script

    for spelling in (spell_command(name), spell_script("somewhere/script.py")):
        with pytest.raises(SystemExit) as end:
            load_command(name).parse(["--help"], spelling)
        assert end.value.code == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: {spelling.command} ")
        examples = re.split(r"^examples?:", shown, flags=re.MULTILINE)[1]
        assert spelling.command in examples
        others = {"megalibi ", "python ", "tools/", "launch/"} - {word for word in ("megalibi ", "python ")
                                                                  if word in f"{spelling.command} "}  # fmt: skip
        assert not [word for word in others if word in examples]


def test_a_script_stands_for_every_promised_path() -> None:
    paths = [path for folder in ("launch", "tools") for path in (ROOT / folder).glob("*.py")]
    found = {}
    for path in paths:
        named = re.findall(r'^    start_script\("(.+)"\)$', path.read_text(encoding="utf-8"), re.MULTILINE)
        if named:
            (found[path.relative_to(ROOT).as_posix()],) = named
    assert found == SCRIPTS
    assert set(SCRIPTS.values()) <= set(COMMANDS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs(script: str) -> None:
    def run_script(word: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([warm_python(), ROOT / script, word], capture_output=True, text=True, check=False)

    done = run_script("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python {ROOT / script} ")
    done = run_script("--no-such-option")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"python {ROOT / script}: error: " in done.stderr


def test_a_script_shows_the_path_that_was_typed() -> None:
    def run_warm(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([warm_python(), *words], cwd=ROOT, capture_output=True, text=True, check=False)

    done = run_warm("tools/plan_run.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "python tools/plan_run.py configs/gpt_1.3b_alibi_1024.yaml --gpu H100 --ranks 8\n" in done.stdout
    done = run_warm("launch/pretrain.py", "--help")
    assert "deepspeed --num_gpus 8 launch/pretrain.py --config configs/gpt_1.3b_alibi_1024.yaml" in done.stdout
    done = run_warm("-m", "megalibi", "pretrain", "--help")
    assert "deepspeed --num_gpus 8 --module megalibi pretrain --config configs/" in done.stdout
