from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megalibi.runtime.exit import run_tool
from tests.support.in_process import load_tool

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "benchmark_attention.py"
TINY = ["--device", "cpu", "--lengths", "32,48", "--heads", "2", "--head-dim", "16", "--repeats", "2"]
TINY += ["--dtype", "float32", "--backends", "sdpa,reference", "--peers", "sdpa_dense,flex"]
MEASURED, SKIPPED = ("plain", "sdpa", "reference", "sdpa_dense"), ("flex",)


class Done:
    """What came of a run of the tool."""

    def __init__(self, returncode, stdout, stderr):
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the tool in this process: starting one and importing torch takes longer than what is tested."""
    tool = load_tool(TOOL)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_tool(tool.main)
        return Done(ended.value.code or 0, *capsys.readouterr())

    return run


def test_end_to_end_and_resumed(run, tmp_path):
    output, picture = tmp_path / "new" / "out.json", tmp_path / "new" / "out.png"
    command = [sys.executable, str(TOOL), *TINY, "--output", str(output), "--picture", str(picture)]
    # As many threads as in this process, where the second run will be: a record is of one machine and one setting.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["command"].startswith("python ")
    assert {"commit", "date", "hardware", "versions", "flop", "notes", "settings"} <= set(record)
    keys = {(row["length"], row["mode"], row["name"]) for row in record["rows"]}
    modes = ("forward", "forward_backward")
    assert keys == {(length, mode, name) for length in (32, 48) for mode in modes for name in MEASURED + SKIPPED}
    assert len(record["rows"]) == len(keys)
    for row in record["rows"]:
        if row["name"] in SKIPPED:
            assert row["skipped"] == "it does not run on cpu"
        else:
            assert row["seconds"]["median"] > 0
            assert row["memory_bytes"] >= 0
            assert len(row["ratio_to_plain"]["repeats"]) == 2
        assert record["what"][row["name"]]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert done.stdout.count("x plain") == len(modes) * 2 * len(MEASURED)
    assert done.stdout.count("not measured: it does not run on cpu") == 1

    # What was lost is measured again, what is there is not.
    record["rows"] = [row for row in record["rows"] if (row["length"], row["name"]) != (48, "sdpa")]
    output.write_text(json.dumps(record))
    again = run(*TINY, "--output", output)
    assert again.returncode == 0, again.stderr
    resumed = json.loads(output.read_text())
    assert again.stdout.count("x plain") == len(modes)
    assert resumed["rows"][: len(record["rows"])] == record["rows"]
    assert {(row["length"], row["mode"], row["name"]) for row in resumed["rows"]} == keys
    assert [run["command"] for run in resumed["earlier"]] == [record["command"]]


def test_a_record_of_other_settings_is_refused(run, tmp_path):
    output = tmp_path / "out.json"
    short = ["--device", "cpu", "--lengths", "32", "--heads", "2", "--head-dim", "16", "--repeats", "1"]
    short += ["--dtype", "float32", "--backends", "none", "--peers", "none", "--modes", "forward", "--output", output]
    assert run(*short).returncode == 0
    done = run(*short, "--batch", 2)
    assert done.returncode == 2
    assert done.stderr == f"error: --output={output}: must hold rows of batch=2, and holds some of 1\n"


def test_without_a_ratio_there_is_no_picture_and_no_traceback(run, tmp_path):
    picture = tmp_path / "out.png"
    done = run("--device", "cpu", "--lengths", 32, "--heads", 2, "--head-dim", 16, "--repeats", 1, "--dtype", "float32",
               "--backends", "none", "--peers", "none", "--modes", "forward", "--picture", picture)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{picture}: nothing to draw, only plain attention was measured"
    assert not picture.exists()


def test_q_and_k_from_a_file(run, tmp_path):
    torch.save(dict(zip("qk", torch.randn(2, 1, 64, 2, 16), strict=True)), tmp_path / "qk.pt")
    done = run(*TINY, "--qk", tmp_path / "qk.pt", "--modes", "forward", "--output", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["settings"]["qk"] == str(tmp_path / "qk.pt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "512,many"], "error: --lengths=512,many: must be whole numbers above 0, as in 512,1024"),
        (
            ["--backends", "flahs"],
            "error: --backends=flahs: must be names of native, triton, flash, folded, sdpa, reference, unfused, and "
            "'flahs' is none of them",
        ),
        (["--peers", "torch"], "error: --peers=torch: must be names of .*, and 'torch' is none of them"),
        (
            ["--dtype", "int8"],
            "error: --dtype=int8: must be names of float32, bfloat16, float16, and 'int8' is none of them",
        ),
        (["--repeats", "0"], "error: --repeats=0: must be at least 1"),
        (["--picture", "a.xyz"], "error: --picture=a.xyz: must end in one of .eps"),
        (["--picture", str(ROOT)], f"error: --picture={ROOT}: must be the name of a file, and is a folder"),
        (["--output", str(ROOT)], f"error: --output={ROOT}: must be the name of a file, and is a folder"),
        (["--output", str(TOOL / "a")], f"error: --output={TOOL / 'a'} cannot be written: {TOOL} is no folder"),
        (
            ["--device", "cpu", "--cuda-graph"],
            "error: --cuda-graph: must stand beside --device cuda, and the device is cpu",
        ),
        (["--device", "cpu", "--qk", "no_such_file.pt"], "error: --qk: no_such_file.pt cannot be read as q and k"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, message):
    done = run("--lengths", "32", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.match(message, done.stderr)
    assert done.stderr.count("\n") == 1


def test_help_has_examples(run):
    done = run("--help")
    assert done.returncode == 0
    assert "python tools/benchmark_attention.py --output results/" in done.stdout
