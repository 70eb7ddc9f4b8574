from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.support.device import ON_GPU
from tests.support.processes import CONTEXT
from tests.support.ranks import run_on_ranks
from tests.support.warm_python import warm_python

pytestmark = pytest.mark.skipif(ON_GPU, reason="a process of CUDA is not forked")


def tell_modules(connection: Connection) -> None:
    connection.send(set(sys.modules))


def test_a_process_has_its_imports_when_it_starts() -> None:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=tell_modules, args=(theirs,))
    process.start()
    assert {"megalibi.train.loop", "deepspeed.runtime.engine", "torch.utils.cpp_extension"} <= ours.recv()
    process.join()


def _scheduler() -> int:
    return os.sched_getscheduler(0)


def test_ranks_do_not_interrupt_each_other() -> None:
    assert run_on_ranks(2, _scheduler) == [os.SCHED_BATCH] * 2


SCRIPT = """
import os, sys
assert "megalibi.train.loop" in sys.modules
print(sys.argv[1:], os.getcwd(), os.environ["A_NAME"], sys.stdin.read(), __name__, __file__)
sys.stderr.write("an error\\n")
sys.exit(int(sys.argv[1]))
"""


def test_a_warm_python_is_python(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [warm_python(), str(script), "7", "b c"]
    done = subprocess.run(
        command,
        input="what is asked",
        env={"A_NAME": "a value", "PATH": "/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (7, "an error\n")
    assert done.stdout == f"['7', 'b c'] {tmp_path} a value what is asked __main__ {script}\n"


def test_what_a_warm_python_runs_ends_with_who_asked(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    with subprocess.Popen([warm_python(), str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        process.kill()
        assert process.stdout.read() == ""  # its end closes the pipe
    assert not Path(f"/proc/{number}/exe").exists()


def test_a_module_of_the_folder_and_an_error_that_nobody_catches(tmp_path: Path) -> None:
    (tmp_path / "a_module.py").write_text("raise ValueError('of the module')\n")
    done = subprocess.run([warm_python(), "-m", "a_module"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: of the module\n")


def test_signals_are_passed_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
        "print('ready', flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([warm_python(), str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(60) == 9


def test_a_program_on_the_command_line_gets_a_new_python() -> None:
    program = "import sys; print('torch' in sys.modules)"
    done = subprocess.run([warm_python(), "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
