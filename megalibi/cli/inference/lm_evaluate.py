"""Evaluate a checkpoint on tasks of lm-evaluation-harness (pip install 'megalibi[lm-eval]').

Tasks of your own are YAML files in the harness's format, in the folder --include-path. The harness's own tasks load
their texts from Hugging Face's hub, unless these are on this machine already.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megalibi.cli.command import Command
from megalibi.config.checks import check_option
from megalibi.data.tokenizer.tokenizer import load_tokenizer
from megalibi.errors import ConfigError
from megalibi.evaluate.run import check_lengths, check_same_tokenizer
from megalibi.files import write_json
from megalibi.metrics.provenance import describe_run
from megalibi.runtime.device import set_up_device
from megalibi.runtime.outputs import check_outputs
from megalibi.runtime.ranks import find_place

EXAMPLES = """examples:
  {command} --checkpoint runs/quickstart --tasks lambada_openai,hellaswag \\
      --output runs/quickstart/tasks.json
  {command} --checkpoint runs/quickstart --tasks my_task --include-path my_tasks --offline \\
      --output runs/quickstart/my_task.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a step's folder, or a run's: its latest step"
    )
    parser.add_argument("--tasks", required=True, metavar="NAMES", help="names of tasks, groups or tags: a,b")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="a folder with task files of your own")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .json to write")
    parser.add_argument(
        "--tokenizer", metavar="T.model", help="the model's tokenizer (default: data.tokenizer of the checkpoint)"
    )
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens the model sees at once (default: its training length)"
    )
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each task (default: all)")
    parser.add_argument("--offline", action="store_true", help="do not ask the hub for anything")


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that cannot be used, before the work."""
    check_outputs({"--output": arguments.output})
    check_option("--max-length", arguments.max_length, 1)
    check_option("--num-fewshot", arguments.num_fewshot, 0)
    check_option("--limit", arguments.limit, 1)


def check_model(arguments: argparse.Namespace) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return what loads the checkpoint as a model of the harness, and what the output says of it."""
    place = find_place({})  # alone: the harness is not told of other ranks
    device = set_up_device(place)
    from megalibi.checkpoint import Checkpoint  # after the device: it imports DeepSpeed
    from megalibi.evaluate.lm_harness import HarnessModel

    checkpoint = Checkpoint.open(arguments.checkpoint)
    config, manifest = checkpoint.config, checkpoint.manifest
    max_length = config.data.seq_length if arguments.max_length is None else arguments.max_length
    check_lengths(config, [max_length], "--max-length")
    path = arguments.tokenizer or config.data.tokenizer
    if path is None:
        raise ConfigError("--tokenizer is missing: the checkpoint names none; give --tokenizer T.model")
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"--tokenizer={path}: must have at most model.vocab_size={config.model.vocab_size} pieces, and has "
            f"{tokenizer.vocab_size}"
        )
    check_same_tokenizer(manifest.data, None, tokenizer)

    def load() -> HarnessModel:
        return HarnessModel(checkpoint.load_model(device), tokenizer, max_length=max_length, device=device)

    facts = {"checkpoint": str(checkpoint.path), "step": manifest.step, "train_seq_length": config.data.seq_length}
    return load, {**facts, "max_length": max_length, "tokenizer": path}


def format_figures(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each task and metric, with its standard error where the harness has one."""
    for task, figures in results.items():
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")  # such as acc,none
            if not filtered or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{filtered}")
            spread = f" +- {error:.4f}" if isinstance(error, float) else ""
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            yield f"{task}: {name} {value:.4f}{spread}"


def run(arguments: argparse.Namespace) -> None:
    """Check everything, ask the tasks' questions, write the results and print them."""
    check_options(arguments)
    if arguments.offline:  # read when the packages are imported
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    from megalibi.evaluate.lm_harness import simple_evaluate  # here: it says if the harness is missing
    from megalibi.evaluate.lm_tasks import open_tasks, prepare_tasks

    names = arguments.tasks.split(",")
    manager = open_tasks(names, arguments.include_path)
    load, facts = check_model(arguments)
    tasks = prepare_tasks(manager, names, num_fewshot=arguments.num_fewshot, limit=arguments.limit)
    model = load()
    results = simple_evaluate(
        model,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        log_samples=False,
    )
    assert results is not None  # as on any rank but 0
    kept = ("results", "groups", "n-shot", "n-samples", "higher_is_better")
    fields = {**facts, "tasks": names, **{name: results[name] for name in kept if name in results}}
    write_json({**fields, **describe_run(str(model.device), ("torch", "lm_eval"))}, arguments.output)
    for line in format_figures(results["results"]):
        print(line)


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
