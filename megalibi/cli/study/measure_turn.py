"""Time a few steps of a run and measure their memory, in processes of their own; no checkpoint is written.

tools/compare_1p3b.py starts it for each of its turns. It runs under deepspeed, torchrun, srun, or alone as one process.

Example:
    python launch/measure_turn.py --config configs/books_24m_alibi.yaml --output turn.json train.steps=4
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megalibi.config import Config, load_config
from megalibi.runtime.cuda_environment import set_cuda_environment
from megalibi.runtime.exit import run_rank
from megalibi.runtime.ranks import Place
from megalibi.train.start import start_job


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run; its train.steps are timed")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .json to write")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher adds it; LOCAL_RANK says it too
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="values that win over the file")
    return parser.parse_intermixed_args()  # overrides may stand anywhere


def run(config: Config, place: Place, output: Path) -> None:
    """Check everything, set up the device and torch.distributed, and measure."""
    set_cuda_environment(config)
    from megalibi.metrics.outputs import check_outputs

    check_outputs({"--output": output})
    job = start_job(config, place)

    from megalibi.measure.turn import measure_turn  # not before the device is set up

    measure_turn(job, output)


if __name__ == "__main__":
    arguments = parse_arguments()
    run_rank(lambda place: run(load_config(arguments.config, arguments.overrides), place, arguments.output))
