from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from alibi_attention import alibi_slopes
from alibi_attention.bench.pruning import count_kept_pairs
from megalibi.runtime.exit import run_tool
from tests.support.in_process import load_tool

TOOL = Path(__file__).parents[2] / "tools" / "count_kept_pairs.py"


@pytest.fixture
def run(monkeypatch, capsys):
    tool = load_tool(TOOL)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_tool(tool.main)
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_the_pairs_of_a_trained_models_q_and_k_are_counted(run, tmp_path):
    q, k = torch.randn(2, 1, 50, 4, 8, generator=torch.Generator().manual_seed(1))
    torch.save({"q": q, "k": k}, tmp_path / "qk.pt")
    output = tmp_path / "new" / "out.json"
    shape = ["--heads", 4, "--head-dim", 8, "--lengths", "40,20", "--eps", "1e-3"]
    code, printed, _ = run("--qk", tmp_path / "qk.pt", *shape, "--output", output)
    assert code == 0
    record = json.loads(output.read_text())
    assert {"command", "commit", "date", "hardware", "versions", "settings", "notes"} <= set(record)
    assert [(row["length"], row["eps"]) for row in record["rows"]] == [(20, 1e-3), (40, 1e-3)]
    for row in record["rows"]:
        length = row["length"]
        expected = count_kept_pairs(q[:, :length], k[:, :length], alibi_slopes(4), horizon_eps=1e-3)
        assert row["pairs_by_head"] == expected._asdict()
        assert row["pairs"] == {name: sum(counts) for name, counts in expected._asdict().items()}
    share = row["pairs"]["needed"] / row["pairs"]["causal"]
    assert "    40 tokens, eps 1.0e-03: threshold " in printed
    assert f", needed {share:.3f} of the causal pairs\n" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0,5"], "--lengths=0,5: must be whole numbers above 0"),
        (["--heads", "0"], "--heads=0: must be at least 1"),
        (["--eps", "0,1e-3"], "--eps=0,1e-3: must be numbers between 0 and 1"),
        (["--eps", "x"], "--eps=x: must be numbers between 0 and 1"),
        (["--qk", "none.pt"], "--qk: none.pt cannot be read as q and k: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, message):
    code, printed, errors = run(*arguments)
    assert (code, printed) == (2, "")
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1
