"""Show what a checkpoint holds, or verify that it is whole and sound.

``show`` reads the manifest alone; with ``--config`` it says whether a run with that configuration can go on from the
checkpoint, and why not. ``verify`` reads every file and compares its checksum with the manifest's; then it looks at the
numbers, which must be finite, and the same on all tensor ranks that hold the same. What is wrong is named, with exit
code 2.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megalibi.cli.command import Command, add_overrides
from megalibi.console import Progress
from megalibi.errors import CheckpointError, ConfigError, FileError
from megalibi.files import write_json
from megalibi.runtime.outputs import check_outputs
from megalibi.units import format_bytes

if TYPE_CHECKING:
    from megalibi.checkpoint import Checkpoint

EXAMPLES = """examples:
  {command} show runs/quickstart
  {command} show runs/quickstart/checkpoints/step_00000100 --json checkpoint.json
  {command} show runs/quickstart --config configs/quickstart.yaml zero.stage=3
  {command} verify runs/quickstart
"""
TABLE_WIDTH = 120
_CHECKSUM_DIGITS = 12
_MAX_WRONG = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("action", choices=["show", "verify"], help="what to do")
    parser.add_argument(
        "checkpoint", type=Path, metavar="DIR", help="a step's folder, or a run's, whose latest checkpoint is taken"
    )
    parser.add_argument("--config", metavar="FILE", help="show: say whether a run with this configuration can go on")
    add_overrides(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="show: write it to a file, too")


def read_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the manifest says of a checkpoint; parameters are counted whole, without padding."""
    manifest = checkpoint.manifest
    return {
        "path": str(checkpoint.path),
        "step": manifest.step,
        "samples_consumed": manifest.samples_consumed,
        "format_version": manifest.format_version,
        "run_id": manifest.run_id,
        "topology": manifest.topology,
        "precision": checkpoint.config.train.precision,
        "parameter_tensors": len(checkpoint.parameters),
        "parameters": sum(math.prod(entry.shape) for entry in checkpoint.parameters.values()),
        "data": manifest.data,
        "files": {name: entry.size_bytes for name, entry in manifest.files.items()},
        "file_bytes": sum(entry.size_bytes for entry in manifest.files.values()),
        "versions": manifest.versions,
    }


def make_table(facts: dict[str, Any]) -> Table:
    """Return the facts as a table."""
    from megalibi.checkpoint import spell_topology

    table = Table("", "", box=None, show_header=False, pad_edge=False)
    topology = facts["topology"]
    rows = {
        "checkpoint": facts["path"],
        "step": f"{facts['step']:,} ({facts['samples_consumed']:,} samples)",
        "format": str(facts["format_version"]),
        "run": facts["run_id"] or "unknown",
        "ranks": f"{topology['world_size']} = {spell_topology(topology)}",
        "precision": facts["precision"],
        "parameters": f"{facts['parameters']:,} in {facts['parameter_tensors']:,} tensors, without padding",
        "files": f"{len(facts['files']):,}, {format_bytes(facts['file_bytes'])}",
        "versions": ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for name, value in _describe_text(facts["data"]):
        table.add_row(name, value)
    return table


def _describe_text(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a row for the tokenizer and for each token file."""
    if not data:
        return [("data", "unknown: the checkpoint is older than this field")]
    tokenizer = data["tokenizer_sha256"]
    rows = [("tokenizer", f"sha256 {tokenizer[:_CHECKSUM_DIGITS]}" if tokenizer else "unknown")]
    for part in ("train", "valid"):
        for file in data[part]:
            size = f"{file['tokens']:,} tokens in {file['documents']:,} documents"
            rows.append((f"data.{part}", f"{size}, sha256 {file['bin_sha256'][:_CHECKSUM_DIGITS]}"))
    return rows


def verify(checkpoint: Checkpoint) -> None:
    """Read every file, and print that all are whole.

    Raises:
        CheckpointError: Files are missing or damaged; the message names them all.
        FileError: A file may not be read.
    """
    files = checkpoint.manifest.files
    total, done, damage = sum(entry.size_bytes for entry in files.values()), 0, []
    with Progress() as progress:
        for number, (name, entry) in enumerate(files.items()):
            progress.show("verify", f"{number} of {len(files)} files, {name}", done=done, total=total)
            try:
                damage.append(checkpoint.find_damage_of(name))
            except OSError as error:
                raise FileError(f"{checkpoint.path / name} cannot be read: {error.strerror}") from error
            done += entry.size_bytes
    found = [line for line in damage if line is not None]
    if found:
        raise CheckpointError(f"{len(found)} of {len(files)} files: {'; '.join(found)}; use another checkpoint")
    print(f"{checkpoint.path}: {len(files):,} files, {format_bytes(total)}, all as they were written")
    verify_numbers(checkpoint)
    verify_model(checkpoint)


def verify_numbers(checkpoint: Checkpoint) -> None:
    """Look at every number, and print that all are sound.

    Raises:
        CheckpointError: Some are not finite, or differ between tensor ranks; the message names the parameters.
        FileError: A file may not be read.
    """
    state, names = checkpoint.read_state(), list(checkpoint.parameters)
    found: list[str] = []
    with Progress() as progress:
        for number, name in enumerate(names):
            progress.show("numbers", name, done=number, total=len(names))
            found += state.find_wrong_values(name)
    if found:
        shown = "; ".join(found[:_MAX_WRONG]) + (f"; and {len(found) - _MAX_WRONG} more" * (len(found) > _MAX_WRONG))
        raise CheckpointError(f"{checkpoint.path}: {shown}; use another checkpoint")
    print(f"{len(names):,} parameters and what the optimizer keeps for them: finite, and the same on all tensor ranks")


def verify_model(checkpoint: Checkpoint) -> None:
    """Compare the parameters with those of the configuration, and print the slopes, which no file of it holds.

    Raises:
        CheckpointError: They are others.
    """
    from megalibi.checkpoint.parameters import build_without_memory
    from megalibi.model import model_slopes

    manifest, model = checkpoint.manifest, checkpoint.config.model
    rows, size = manifest.derived["padded_vocab_size"], manifest.topology["tensor_parallel_size"]
    checkpoint.check_parameters(
        build_without_memory(checkpoint.config, padded_vocab_size=rows, tensor_parallel_size=size)
    )
    said = f"{len(checkpoint.parameters):,} parameters: those of its configuration"
    if model.position_method == "alibi":
        slopes = model_slopes(model)
        said += f", from which its {len(slopes)} slopes follow, {slopes.max():.4g} to {slopes.min():.4g}"
    print(said)


def say_whether_it_loads(checkpoint: Checkpoint, path: str, overrides: list[str]) -> None:
    """Print that a run can go on from a checkpoint, and with what changes.

    Args:
        checkpoint: The checkpoint.
        path: The YAML file of the run.
        overrides: Values that win over the file.

    Raises:
        ConfigError: The run cannot go on from it; the message names every field.
    """
    from megalibi.checkpoint import find_refusals, find_said_changes
    from megalibi.config import load_config

    config = load_config(path, overrides)
    refusals = list(find_refusals(checkpoint.path, checkpoint.manifest, config))
    if refusals:
        raise ConfigError("; ".join(refusals))
    changes = find_said_changes(checkpoint.manifest, config)
    print(f"{path}: can go on from it" + (f", with other values than before: {', '.join(changes)}" if changes else ""))


def run(arguments: argparse.Namespace) -> None:
    """Open the checkpoint, and show or verify it."""
    if arguments.action == "verify" and arguments.json is not None:
        raise ConfigError(f"--json={arguments.json}: must be given to show; verify writes no file")
    if arguments.config is None and arguments.overrides:
        raise ConfigError(f"{arguments.overrides[0]}: must stand behind --config FILE, which it overrides")
    check_outputs({"--json": arguments.json})
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is computed here, and DeepSpeed warns of no GPU
    from megalibi.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(arguments.checkpoint)
    if arguments.action == "verify":
        verify(checkpoint)
        return
    facts = read_facts(checkpoint)
    Console(highlight=False, width=TABLE_WIDTH).print(make_table(facts))
    if arguments.json is not None:
        write_json(facts, arguments.json)
    if arguments.config is not None:
        say_whether_it_loads(checkpoint, arguments.config, arguments.overrides)


COMMAND = Command(description=__doc__, examples=EXAMPLES, add_arguments=add_arguments, run=run)
