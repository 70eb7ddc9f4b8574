"""What of a checkpoint does not fit a run is refused by the field, and what may differ is accepted."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalibi.checkpoint import check_resumable, describe_changes, save_checkpoint
from megalibi.config import Config, derive
from megalibi.data.tokens.token_file import TokenFile, TokenFileWriter
from megalibi.errors import ConfigError
from tests.support.ranks import run_on_ranks
from tests.support.runs import VOCAB_SIZE, build, identify, make_config, write_tokens


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def save_alone(config: Config, folder: str) -> str:
    engine, groups = build(config)
    checkpoint = save_checkpoint(
        engine, config, derive(config, 1), identify(config), groups, folder=Path(folder), step=1, run_id="a"
    )
    engine.destroy()
    return str(checkpoint)


@pytest.fixture(scope="module")
def checkpoint(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    return Path(run_on_ranks(1, save_alone, make_config(prefix), str(folder))[0])


def replace(config: Config, section: str, **values: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "num_layers", 3),
        ("model", "hidden_size", 96),
        ("model", "num_attention_heads", 2),
        ("model", "vocab_size", 510),
        ("model", "position_method", "sinusoidal"),
        ("model", "bias", True),
        ("model", "tie_embeddings", False),
        ("data", "seq_length", 32),
        ("train", "global_batch_size", 16),
        ("train", "seed", 1),
        ("train", "precision", "bf16"),
        ("optimizer", "weight_decay", 0.2),
        ("optimizer", "clip_grad_norm", 2.0),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_the_field(
    prefix: str, checkpoint: Path, section: str, name: str, value: Any
) -> None:
    config = replace(make_config(prefix), section, **{name: value})
    with pytest.raises(ConfigError) as refusal:
        check_resumable(checkpoint, config, identify(config))
    message = str(refusal.value)
    ours = getattr(getattr(make_config(prefix), section), name)
    assert message.startswith(f"{section}.{name}={value}: must be {ours}, the value in the checkpoint {checkpoint};")
    assert "\n" not in message


def test_another_topology_is_said(prefix: str, checkpoint: Path) -> None:
    config = make_config(prefix, parallel={"tensor_parallel_size": 2}, zero={"stage": 3}, train={"micro_batch_size": 1})
    manifest = check_resumable(checkpoint, config, identify(config))
    assert list(describe_changes(manifest, config, identify(config), 4)) == [
        "goes on with other values than before: ranks 1 -> 4, train.micro_batch_size 2 -> 1, "
        "parallel.tensor_parallel_size 1 -> 2, zero.stage 1 -> 3"
    ]


def copy_tokens(prefix: str, folder: Path) -> str:
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix + suffix, folder / f"moved{suffix}")
    return str(folder / "moved")


def change_a_token(prefix: str) -> None:
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[-2] ^= 1
    Path(f"{prefix}.bin").write_bytes(content)


def append_a_document(prefix: str) -> None:
    tokens = TokenFile(prefix)
    whole = tokens.read(0, tokens.num_tokens).copy()
    starts = [*tokens.document_starts_between(0, tokens.num_tokens).tolist(), tokens.num_tokens]
    with TokenFileWriter(prefix, VOCAB_SIZE) as writer:
        for start, stop in itertools.pairwise(starts):
            writer.add_document(whole[start:stop])
        writer.add_document([1, 2, 3])


def move_a_boundary(prefix: str) -> None:
    tokens = TokenFile(prefix)
    whole = tokens.read(0, tokens.num_tokens).copy()
    with TokenFileWriter(prefix, VOCAB_SIZE) as writer:
        for start in range(0, len(whole), 998):
            writer.add_document(whole[start : start + 998])


@pytest.mark.parametrize("change", [change_a_token, append_a_document, move_a_boundary])
def test_data_that_moved_is_accepted_and_data_that_changed_is_refused(
    prefix: str, checkpoint: Path, tmp_path: Path, change: Callable[[str], None]
) -> None:
    """All are read by path, and what a run was trained on is known by its content."""
    moved = make_config(copy_tokens(prefix, tmp_path))
    assert check_resumable(checkpoint, moved, identify(moved)).step == 1
    change(moved.data.train[0].prefix)
    with pytest.raises(ConfigError) as refusal:
        check_resumable(checkpoint, moved, identify(moved))
    message = str(refusal.value)
    assert message.startswith(f"data.train={moved.data.train[0].prefix} (")
    assert (
        f"): must be the text that the checkpoint {checkpoint} was trained on (40,000 tokens in 41 documents" in message
    )
    assert "\n" not in message


def test_another_blend_is_refused(prefix: str, checkpoint: Path) -> None:
    blend = make_config(prefix, data={"train": [{"prefix": prefix, "weight": 0.5}, {"prefix": prefix, "weight": 0.5}]})
    with pytest.raises(
        ConfigError, match=r"data\.train has the weights \[0\.5, 0\.5\]: must be \[1\.0\], those in the checkpoint "
    ):
        check_resumable(checkpoint, blend, identify(blend))


def test_other_validation_data_is_said(prefix: str, checkpoint: Path) -> None:
    config = make_config(prefix, data={"valid": prefix})
    manifest = check_resumable(checkpoint, config, identify(config))
    assert list(describe_changes(manifest, config, identify(config), 1)) == [
        "data.valid is not that of the checkpoint: validation losses before and after do not compare"
    ]


def test_a_checkpoint_that_is_older_than_the_identity_of_data_knows_it_by_its_path(
    prefix: str, checkpoint: Path, tmp_path: Path
) -> None:
    old = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, old)
    fields = json.loads((old / "manifest.json").read_text())
    del fields["data"]
    (old / "manifest.json").write_text(json.dumps(fields))
    (old / "manifest.sha256").write_text(hashlib.sha256((old / "manifest.json").read_bytes()).hexdigest())
    assert check_resumable(old, make_config(prefix), identify(make_config(prefix))).step == 1
    moved = make_config(copy_tokens(prefix, tmp_path))
    with pytest.raises(ConfigError, match=r"^data\.train="):
        check_resumable(old, moved, identify(moved))


def test_what_does_not_change_the_meaning_of_a_checkpoint_may_change(prefix: str, checkpoint: Path) -> None:
    config = make_config(prefix)
    for section, values in (
        ("model", {"dropout": 0.1, "attention_backend": "reference", "recompute": "full"}),
        ("train", {"steps": 99, "micro_batch_size": 1, "output_dir": "elsewhere"}),
        ("optimizer", {"learning_rate": 1e-4}),
        ("checkpoint", {"every_steps": 7, "keep": 1}),
    ):
        config = replace(config, section, **values)
    assert check_resumable(checkpoint, config, identify(config)).step == 1
