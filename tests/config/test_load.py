from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from megalibi.config import ConfigError, DatasetConfig, load_config, save_config

MINIMAL = """
model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4, ffn_hidden_size: 256, vocab_size: 1000}
data: {train: corpus, seq_length: 128}
optimizer: {learning_rate: 1e-3}
train: {steps: 10, global_batch_size: 8, micro_batch_size: 2, output_dir: runs/x}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_file_and_overrides(path: Path) -> None:
    config = load_config(path, ["train.steps=20", "zero.stage=3", "optimizer.learning_rate=5e-4"])
    assert config.train.steps == 20
    assert config.zero.stage == 3
    assert config.optimizer.learning_rate == 5e-4
    assert config.data.train == (DatasetConfig(prefix="corpus"),)


def test_blend(path: Path) -> None:
    config = load_config(path, ["data.train=[{prefix: a, weight: 0.25}, {prefix: b, weight: 3}]"])
    assert config.data.train == (DatasetConfig(prefix="a", weight=0.25), DatasetConfig(prefix="b", weight=3.0))


def test_saved_config_loads_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["data.valid=[{prefix: a, weight: 2}]", "data.tokenizer=t.model"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_config_is_frozen(path: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(path).train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layer=3", "model.num_layer is unknown: did you mean model.num_layers?"),
        ("modle.num_layers=3", "modle is unknown: did you mean model?"),
        ("train.steps=ten", "train.steps='ten' is not allowed: a whole number is"),
        ("train.steps=1.5", "train.steps=1.5 is not allowed: a whole number is"),
        ("train.steps=true", "train.steps=True is not allowed: a whole number is"),
        ("train.steps=0", "train.steps=0 is not allowed: a number of at least 1 is"),
        ("train.precision=fp8", "train.precision=fp8 is not allowed: one of fp32, bf16, fp16 is"),
        ("zero.stage=4", "zero.stage=4 is not allowed: one of 0, 1, 2, 3 is"),
        ("model.num_attention_heads=5", "model.num_attention_heads=5 does not divide model.hidden_size=64"),
        ("model.dropout=1", "model.dropout=1.0 is not allowed: a number from 0 up to, but not, 1 is"),
        ("model=3", "model=3 is not allowed: a mapping with num_layers"),
        ("data.train=[{prefix: a, wieght: 1}]", "data.train[0].wieght is unknown: did you mean data.train[0].weight?"),
        ("data.train=[{prefix: a, weight: -1}]", "data weight -1.0 of a is not allowed"),
        ("data.train=[]", "data.train is empty"),
        ("optimizer.min_learning_rate=1", "optimizer.min_learning_rate=1.0 is above optimizer.learning_rate=0.001"),
        ("parallel.context_parallel_size=2", "parallel.context_parallel_size=2 is not allowed: one of 1 is"),
        ("model.padded_vocab_size=10", "model.padded_vocab_size=10 is below model.vocab_size=1000"),
        ("steps", "override 'steps' is not allowed: section.field=value is"),
    ],
)
def test_bad_value_is_one_line_with_field_value_and_what_is_allowed(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(path, [override])
    assert "\n" not in str(caught.value)


def test_missing_key_and_missing_file(path: Path, tmp_path: Path) -> None:
    path.write_text(MINIMAL.replace("seq_length: 128", ""))
    with pytest.raises(ConfigError, match=r"data\.seq_length is missing"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "no.yaml")
    path.write_text("model: [")
    with pytest.raises(ConfigError, match="not a valid configuration") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    path.write_text("[3]")
    with pytest.raises(ConfigError, match="not a configuration"):
        load_config(path)
