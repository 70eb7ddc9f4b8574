"""Pretrain a GPT on one rank, or on several that deepspeed, torchrun, srun or mpirun starts.

Exit codes: 0 finished, or stopped by SIGTERM, SIGINT, SIGUSR1 or SIGHUP with a checkpoint saved (a script that has to
tell the two apart asks for --stopped-code); 1 failed; 2 the user has to mend something, said in one line: the
configuration, the data, a checkpoint, the disk, the memory, or a run that has diverged.
"""

from __future__ import annotations

import argparse
import dataclasses
import traceback
from pathlib import Path

from megalibi.cli.command import RankCommand, add_run
from megalibi.config import Config, load_config
from megalibi.config.checks import refuse
from megalibi.errors import ShortageError
from megalibi.runtime.environment import set_environment
from megalibi.runtime.ranks import Place
from megalibi.runtime.shortage import find_shortage
from megalibi.train.start import start_job

EXAMPLES = """examples:
  {command} --config configs/quickstart.yaml
  deepspeed --num_gpus 8 {deepspeed} --config configs/gpt_1.3b_alibi_1024.yaml parallel.tensor_parallel_size=2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_run(parser, "YAML file of the run, for example configs/quickstart.yaml")
    parser.add_argument(
        "--stopped-code",
        type=int,
        choices=range(256),
        default=0,
        metavar="CODE",
        help="exit code of rank 0 where a signal ended the run before its last step, as launch/slurm/pretrain.sbatch "
        "asks for to put the job back into the queue (default: 0)",
    )
    parser.add_argument(
        "--failures-file",
        type=Path,
        metavar="FILE",
        help="file that rank 0 deletes when a checkpoint of new steps is complete; launch/slurm's scripts count in it "
        "how often the job has failed without one",
    )


def run(arguments: argparse.Namespace, place: Place) -> int:
    """Check everything, set up the device and torch.distributed, and train; return this rank's exit code."""
    config = load_config(arguments.config, arguments.overrides)
    set_environment(config)
    failures_file = arguments.failures_file
    if failures_file is not None and place.rank == 0 and not failures_file.parent.is_dir():
        refuse("--failures-file", failures_file, "be in a folder that rank 0 sees, also from within a container")
    try:
        job = dataclasses.replace(start_job(config, place), failures_file=failures_file)

        from megalibi.train.loop import train  # not before the device is set up

        is_done = train(job)
    except Exception as error:
        _explain_shortage(error, config, place)
        raise
    # Of rank 0 alone, whose checkpoint is whole: a launcher that sees a rank end with a code kills the others, which
    # have nothing left to do.
    return 0 if is_done or place.rank > 0 else arguments.stopped_code


def _explain_shortage(error: Exception, config: Config, place: Place) -> None:
    """If the memory ran out, say what the plan has for this run.

    Raises:
        ShortageError: The memory of this rank ran out.
    """
    shortage = find_shortage(error)
    if shortage is None:
        return
    traceback.clear_frames(error.__traceback__)  # whose tensors fill the memory, of which the plan needs some

    import torch

    from megalibi.plan.shortage import explain_shortage

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    raise ShortageError(explain_shortage(shortage, config, place.world_size, device_type)) from error


COMMAND = RankCommand(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
