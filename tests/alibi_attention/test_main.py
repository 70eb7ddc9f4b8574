from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alibi_attention import __main__, backends
from alibi_attention.backend import Call
from alibi_attention.backends import reference, sdpa
from alibi_attention.bench.contract import HEAD_DIM

QUICK = ["--backends", "sdpa,reference", "--lengths", "33"]
UNKNOWN = (
    "error: --backends=sdpa,flahs: each name must be one of native, triton, flash, folded, sdpa, reference, unfused, "
    "got 'flahs'"
)


def test_the_table_names_every_back_end_its_types_and_their_errors(capsys, monkeypatch):
    monkeypatch.setattr(__main__, "_QUICK_LENGTH", 33)  # test_contract.py measures the same at its own lengths
    monkeypatch.setattr(__main__, "INTERPRETED_LENGTHS", (17,))
    assert __main__.main([]) == 0
    text = capsys.readouterr().out
    table, rest = text.split("\n\n", 1)
    usable = [backend for backend in backends() if backend.usable]
    lines = table.splitlines()[1:]
    assert len(lines) == sum(len(backend.dtypes) for backend in usable)
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [backend.name for backend in usable]
    able = [b for b in usable for dtype in b.dtypes if b.find_refusal(Call("cpu", dtype, HEAD_DIM)) is None]
    assert sum("e-" in line for line in lines) == len(able)
    for backend in backends():
        assert f"\n{backend.name}: " in rest
        assert " ".join(backend.reason.split())[:60] in rest


def test_the_contract_is_printed_and_written_between_the_markers(capsys, monkeypatch, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{__main__.START}\nstale figures\n{__main__.END}\nafter\n")
    monkeypatch.setattr(__main__, "README", readme)
    assert __main__.main(["--contract", *QUICK, "--write-readme"]) == 0
    out, err = capsys.readouterr()
    text = readme.read_text()
    assert text.startswith(f"before\n{__main__.START}\nMeasured with `")
    assert text.endswith(f"\n{__main__.END}\nafter\n")
    assert "stale" not in text
    assert out.strip() in text
    assert "`sdpa` | bfloat16 | 33 |" in text
    assert "sdpa bfloat16 33 tokens: ratio" in err


def test_a_back_end_that_refuses_when_it_is_run_is_said_and_the_others_are_measured(capsys, caplog, monkeypatch):
    def attend(inputs):
        if inputs.q.dtype == torch.bfloat16:
            raise RuntimeError("this build has no bf16.\nException raised from somewhere")
        return reference.attend(inputs)

    monkeypatch.setattr(sdpa, "attend", attend)
    assert __main__.main(["--contract", *QUICK]) == 0
    text = capsys.readouterr().out
    assert "`sdpa` | bfloat16" not in text
    for row in ("`sdpa` | float32 | 33 |", "`reference` | bfloat16 | 33 |"):
        assert row in text
    assert caplog.messages == ["sdpa bfloat16 33 tokens is left out: this build has no bf16."]
    assert __main__.main(["--backends", "sdpa"]) == 0
    assert "refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "sdpa,flahs"], UNKNOWN),
        (["--contract", "--lengths", "97,many"], "error: --lengths=97,many: must be whole numbers above 0"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert __main__.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(message, err)
    assert err.count("\n") == 1


def test_a_readme_that_is_not_there_is_found_out_before_the_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(__main__, "README", tmp_path / "README.md")
    assert __main__.main(["--contract", "--write-readme"]) == 2
    readme = tmp_path / "README.md"
    assert capsys.readouterr().err == f"error: --write-readme: {readme} must have the line {__main__.START}\n"


def test_the_command_runs_as_a_module():
    command = [sys.executable, "-m", "alibi_attention", "--contract", *QUICK]
    source_root = Path(__main__.__file__).parents[1]
    done = subprocess.run(command, cwd=source_root, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Measured with `")
    assert "python -m alibi_attention --contract --backends sdpa,reference --lengths 33`" in done.stdout
