"""What reads input of others: each target writes an input to a folder and reads it as megalibi does.

A hostfile is read by DeepSpeed alone, and is none of these.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.fuzz.mutations import dump_json, dump_yaml, mutated_bytes, mutated_values

ROOT = Path(__file__).parents[2]
OLD_CHECKPOINT = ROOT / "tests" / "checkpoint" / "e4f2636" / "step_00000003"
TEXT = "the quick brown fox\njumps  over\tthe lazy dog; na\u00efve \u65e5\u672c \U0001f600"


@dataclass(frozen=True)
class Target:
    """A parser."""

    inputs: st.SearchStrategy[bytes]
    """What it is given."""
    read: Callable[[bytes, Path], object]
    """Reads one of them, by way of a folder; a UserError is how it refuses."""


def _mutate(seeds: list[bytes], dump: Callable[[Any], bytes] | None = None) -> st.SearchStrategy[bytes]:
    if dump is None:
        return mutated_bytes(seeds)
    return st.one_of(mutated_bytes(seeds), mutated_values(seeds, dump), mutated_values(seeds, dump))


def make_config_target(folder: Path) -> Target:
    """The configuration of a run."""
    from megalibi.config import derive, load_config

    def read(content: bytes, folder: Path) -> None:
        (folder / "c.yaml").write_bytes(content)
        derive(load_config(folder / "c.yaml"), 8)

    return Target(_mutate([path.read_bytes() for path in (ROOT / "configs").glob("*.yaml")], dump_yaml), read)


def make_override_target(folder: Path) -> Target:
    """Values on the command line."""
    from megalibi.config import load_config

    seeds = [
        b"train.steps=5", b"model.adaptive_cutoffs=[100,200]", b"data.train=[{prefix: a, weight: 0.5}, b]",
        b"checkpoint.resume=null", b"optimizer.learning_rate=1e-4", b"train.output_dir='a b'",
    ]  # fmt: skip

    def read(content: bytes, folder: Path) -> None:
        load_config(ROOT / "configs" / "quickstart.yaml", [content.decode(errors="surrogateescape")])

    return Target(_mutate(seeds), read)


def _write_tokens(folder: Path) -> Path:
    from megalibi.data.tokens.token_file import TokenFileWriter

    with TokenFileWriter(str(folder / "seed"), 500) as writer:
        for length in (5, 0, 17, 40):
            writer.add_document(np.arange(length))
    return folder / "seed"


def make_token_index_target(folder: Path) -> Target:
    """The index of a token file, beside its .bin."""
    from megalibi.data.tokens.token_file import TokenFile, check_token_ids

    seed = _write_tokens(folder)

    def read(content: bytes, folder: Path) -> None:
        (folder / "t.idx").write_bytes(content)
        shutil.copy(f"{seed}.bin", folder / "t.bin")
        opened = TokenFile(folder / "t")
        starts = opened.document_starts_between(0, opened.num_tokens)
        assert (np.diff(starts) >= 0).all()
        check_token_ids(opened, 500)

    return Target(_mutate([Path(f"{seed}.idx").read_bytes()]), read)


def make_provenance_target(folder: Path) -> Target:
    """What stands beside a token file."""
    from megalibi.data.provenance import read_provenance
    from megalibi.data.tokens.token_file import TokenFile

    opened = TokenFile(_write_tokens(folder))
    fields = {
        "format": "megalibi token file, 1",
        "identity": {"tokens": 62, "documents": 4, "idx_sha256": "0" * 64, "bin_sha256": "0" * 64},
        "tokenizer": {"sha256": "0" * 64, "vocab_size": 500, "path": "t.model"},
    }

    def read(content: bytes, folder: Path) -> None:
        Path(f"{opened.prefix}.json").write_bytes(content)
        read_provenance(opened)

    return Target(_mutate([json.dumps(fields).encode()], dump_json), read)


def _make_checkpoint(folder: Path) -> Path:
    from tests.support.conversions import configure_model, write_random

    checkpoint, _ = write_random(folder / "checkpoint", configure_model("mpt"))
    return checkpoint.path


def make_manifest_target(folder: Path) -> Target:
    """The manifest of a checkpoint, with its checksum made to fit."""
    from megalibi.checkpoint import Checkpoint
    from megalibi.checkpoint.resume import check_resumable, describe_changes, find_refusals
    from megalibi.config import load_config
    from megalibi.data.tokens.identity import DataIdentity

    path = _make_checkpoint(folder)
    seeds = [(place / "manifest.json").read_bytes() for place in (path, OLD_CHECKPOINT)]
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    data = DataIdentity(train=(), valid=(), tokenizer_sha256=None)

    def read(content: bytes, folder: Path) -> None:
        (path / "manifest.json").write_bytes(content)
        (path / "manifest.sha256").write_text(hashlib.sha256(content).hexdigest())
        checkpoint = Checkpoint.open(path)
        assert checkpoint.config
        assert checkpoint.parameters
        list(checkpoint.find_damage())
        saved = checkpoint.read_state()
        saved.read_progress()
        for name in list(checkpoint.parameters)[:2]:
            saved.read_whole(name)
        list(find_refusals(path, checkpoint.manifest, config))
        list(describe_changes(check_resumable(path, checkpoint.config, data), checkpoint.config, data, 1))

    return Target(_mutate(seeds, dump_json), read)


def make_state_file_target(folder: Path) -> Target:
    """A file of weights of ours."""
    from megalibi.checkpoint.tensors.state_file import list_stretches

    seeds = [path.read_bytes()[:6000] for path in _make_checkpoint(folder).glob("*.safetensors")]

    def read(content: bytes, folder: Path) -> None:
        (folder / "w.safetensors").write_bytes(content)
        for stretch in list_stretches(folder / "w.safetensors")[1].values():
            stretch.read(stretch.start, stretch.start + min(stretch.length, 10))

    return Target(_mutate(seeds), read)


def make_tokenizer_target(folder: Path) -> Target:
    """A sentencepiece model."""
    from megalibi.data.tokenizer.tokenizer import load_tokenizer
    from megalibi.data.tokenizer.training import train_tokenizer

    train_tokenizer([(ROOT / "docs" / "house.md").read_text()], 400, folder / "seed.model")
    return Target(_mutate([(folder / "seed.model").read_bytes()]), partial(_use_tokenizer, load_tokenizer, "t.model"))


def make_vocabulary_target(folder: Path) -> Target:
    """A word-level vocabulary."""
    from megalibi.data.tokenizer.tokenizer import load_tokenizer

    seed = "<s> 0\n<pad> 0\n</s> 3\n<unk> 1\nthe 9\nquick 2\nna\u00efve 1\nmadeupword0000 0\n"
    return Target(_mutate([seed.encode()]), partial(_use_tokenizer, load_tokenizer, "t.words"))


def _use_tokenizer(load: Callable[[Path], Any], name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    tokenizer = load(folder / name)
    ids = tokenizer.encode(TEXT)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    tokenizer.decode(ids)
    tokenizer.end_of_document(TEXT)


def make_hf_config_target(folder: Path) -> Target:
    """The config.json and the index of a folder of others."""
    from megalibi.export.hf.incoming.read import plan_import
    from megalibi.export.hf.write import convert_to_hf
    from tests.support.conversions import configure_model, plan, write_random

    seeds = []
    for kind in ("mpt", "bloom", "falcon"):
        checkpoint, _ = write_random(folder / kind, configure_model(kind))
        convert_to_hf(checkpoint, folder / f"{kind}_hf", plan(checkpoint, kind, compare=False))
        seeds.append((folder / f"{kind}_hf" / "config.json").read_bytes())

    def read(content: bytes, inner: Path) -> None:
        (folder / "mpt_hf" / "config.json").write_bytes(content)
        plan_import(folder / "mpt_hf", config=None, tensor_parallel_size=1, accept_rounded_bias=True)

    return Target(_mutate(seeds, dump_json), read)


def make_metrics_target(folder: Path) -> Target:
    """The records of a run, which the report reads."""
    from megalibi.metrics.records import read_metrics

    lines = (ROOT / "results" / "books_24m_alibi" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    seeds = [b"".join(lines[:6]), b"".join(lines[-3:])]

    def read(content: bytes, folder: Path) -> None:
        (folder / "metrics.jsonl").write_bytes(content)
        read_metrics(folder)

    return Target(_mutate(seeds), read)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "config": make_config_target,
    "override": make_override_target,
    "token_index": make_token_index_target,
    "provenance": make_provenance_target,
    "manifest": make_manifest_target,
    "state_file": make_state_file_target,
    "tokenizer": make_tokenizer_target,
    "vocabulary": make_vocabulary_target,
    "hf_config": make_hf_config_target,
    "metrics": make_metrics_target,
}
"""What makes each target, with the seeds of its inputs, in an empty folder."""
