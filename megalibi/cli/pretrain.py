"""Pretrain a GPT. The same script runs under deepspeed, torchrun, srun, or alone as one process.

Example:
    deepspeed --num_gpus 8 launch/pretrain.py --config configs/gpt_1.3b_alibi_1024.yaml parallel.tensor_parallel_size=2

Exit codes: 0 finished, or stopped by SIGTERM, SIGINT, SIGUSR1 or SIGHUP with a checkpoint saved; 1 failed; 2 the
configuration, the data, a checkpoint, the disk or the memory cannot be used, said in one line.
"""

from __future__ import annotations

import argparse

from megalibi.config import Config, load_config
from megalibi.runtime.cuda_environment import set_cuda_environment
from megalibi.runtime.exit import run_rank
from megalibi.runtime.ranks import Place
from megalibi.train.start import start_job


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run, for example configs/quickstart.yaml")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher adds it; LOCAL_RANK says it too
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="values that win over the file")
    return parser.parse_intermixed_args()  # overrides may stand anywhere


def run(config: Config, place: Place) -> None:
    """Check everything, set up the device and torch.distributed, and train."""
    set_cuda_environment(config)
    job = start_job(config, place)

    from megalibi.train.loop import train  # not before the device is set up

    train(job)


if __name__ == "__main__":
    arguments = parse_arguments()
    run_rank(lambda place: run(load_config(arguments.config, arguments.overrides), place))
