from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from megalibi.config import DatasetConfig, load_config, save_config
from megalibi.errors import ConfigError, FileError

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
        ("train.steps=ten", "train.steps='ten': must be a whole number"),
        ("train.steps=1.5", "train.steps=1.5: must be a whole number"),
        ("train.steps=true", "train.steps=True: must be a whole number"),
        ("train.steps=0", "train.steps=0: must be at least 1"),
        ("runtime.hang_timeout_seconds=0.5", "runtime.hang_timeout_seconds=0.5: must be at least 1, or 0 to end no"),
        ("runtime.slow_rank_ratio=1", "runtime.slow_rank_ratio=1.0: must be above 1, or 0 to name no rank"),
        ("runtime.hang_timeout_seconds=1e8", "runtime.hang_timeout_seconds=100000000.0: must be at most 31,536,000"),
        ("train.precision=fp8", "train.precision=fp8: must be one of fp32, bf16, fp16"),
        ("zero.stage=4", "zero.stage=4: must be one of 0, 1, 2, 3"),
        ("model.num_attention_heads=5", "model.num_attention_heads=5: must divide model.hidden_size=64"),
        ("model.dropout=1", "model.dropout=1.0: must be at least 0 and below 1"),
        ("model=3", "model=3: must be a mapping with num_layers"),
        ("data.train=[{prefix: a, wieght: 1}]", "data.train[0].wieght is unknown: did you mean data.train[0].weight?"),
        ("data.train=[{prefix: a, weight: -1}]", "weight=-1.0: must be above 0 (in the entry with prefix=a)"),
        ("data.train=[]", "data.train=[]: must be a PREFIX or a list of {prefix, weight}"),
        (
            "optimizer.min_learning_rate=1",
            "optimizer.min_learning_rate=1.0: must be at most optimizer.learning_rate=0.001",
        ),
        ("parallel.context_parallel_size=2", "parallel.context_parallel_size=2: must be 1"),
        (
            "model.padded_vocab_size=10",
            "model.padded_vocab_size=10: must be 0, which computes it, or at least model.vocab_size=1000",
        ),
        ("steps", "override 'steps': must be section.field=value"),
        ("=3", "override '=3': must be section.field=value"),
        ("train..steps=3", "override 'train..steps=3': must be section.field=value"),
        ("train.steps=[1", "override 'train.steps=[1' cannot be read: while parsing a flow sequence, expected"),
        ("train.steps=!!set {a}", "override 'train.steps=!!set {a}' cannot be read: the tag !!set must be left out"),
        (
            "train.steps=" + "[" * 3000,
            "characters) cannot be read: values must be nested at most 32 levels deep",
        ),
        ("train.steps=???", "train.steps=???: must be a value"),
        ("train.output_dir=???", "train.output_dir=???: must be a value"),
        ("data.valid=???", "data.valid=???: must be a value"),
        ("train={steps: '???'}", "train=???: must be a value"),
        ("train.steps=", "train.steps=null: must be a whole number"),
        ("train.output_dir=", "train.output_dir=null: must be text"),
        ("train.output_dir=[a]", "train.output_dir=['a']: must be text"),
        ('train.output_dir="a\\0b"', "train.output_dir='a\\x00b': must be text without NUL characters"),
        ("train=null", "train=null: must be a mapping with steps"),
        ('train.steps="7"', "train.steps='7': must be a whole number"),
        ("train.steps=1e3", "train.steps=1000.0: must be a whole number"),
        (
            "train.steps=9223372036854775808",
            "train.steps=9223372036854775808: must be a whole number of at most 6",
        ),
        ("train.steps=" + "7" * 5001, "777... (5,001 characters): must be a whole number of at most 64 bits"),
        (
            "train.steps=0x" + "f" * 5001,
            "fff... (5,003 characters): must be a whole number of at most 64 bits",
        ),
        ("optimizer.beta1=.nan", "optimizer.beta1=.nan: must be a finite number"),
        ("optimizer.weight_decay=.inf", "optimizer.weight_decay=.inf: must be a finite number"),
        ("optimizer.weight_decay=1e999", "optimizer.weight_decay=1e999: must be a finite number"),
        ("optimizer.weight_decay=" + "7" * 400, "777... (400 characters): must be a finite number"),
        ("model.tie_embeddings='yes'", "model.tie_embeddings='yes': must be true or false"),
        ("data.train=[a, {prefix: b, weight: .inf}]", "data.train[1].weight=.inf: must be a finite number"),
        ("train.output_dir=${train.nothing}", "Interpolation key 'train.nothing' not found"),
        ("train.output_dir=${train.output_dir}", "Recursive interpolation detected"),
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
    with pytest.raises(FileError, match="cannot be read"):
        load_config(tmp_path / "no.yaml")
    path.write_text("model: [")
    with pytest.raises(ConfigError, match="not a valid configuration") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    path.write_text("[3]")
    with pytest.raises(ConfigError, match="not a configuration"):
        load_config(path)


SPELLINGS = (
    "1e5", "007", "1.10", "1e-3", "2026_11_26", "2026-11-26", "12:30", "0x10", "yes", "off", "true", ".inf", "1_000",
    "+1", "=", "<<", "null", "~", "1" * 5001,
)  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_text_is_what_was_typed(path: Path, tmp_path: Path, spelling: str) -> None:
    path.write_text(MINIMAL.replace("runs/x", spelling).replace("train: corpus", f"train: [{{prefix: {spelling}}}]"))
    in_file = load_config(path)
    path.write_text(MINIMAL)
    overrides = [f"train.output_dir={spelling}", f"checkpoint.resume={spelling}", f"data.tokenizer='{spelling}'"]
    given = load_config(path, [*overrides, f"data.valid=[{spelling}, {spelling}]"])
    assert in_file.train.output_dir == given.train.output_dir == given.checkpoint.resume == spelling
    assert in_file.data.train == (DatasetConfig(prefix=spelling),)
    assert given.data.valid == (DatasetConfig(prefix=spelling),) * 2
    assert given.data.tokenizer == spelling
    if spelling not in ("null", "~"):  # none: the field is optional
        assert load_config(path, [f"data.train={spelling}"]).data.train == in_file.data.train
        assert load_config(path, [f"data.tokenizer={spelling}"]).data.tokenizer == spelling
    save_config(in_file, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == in_file


def test_a_text_keeps_what_yaml_would_cut_off_and_loses_its_quotes(path: Path) -> None:
    for text, name in {"run #3": "run #3", "'run #3'": "run #3", '""': "", "a'b": "a'b", "  a b ": "a b"}.items():
        assert load_config(path, [f"checkpoint.resume={text}"]).checkpoint.resume == name


def test_numbers_booleans_lists_and_nothing_are_read_as_before(path: Path) -> None:
    values = {
        "train.steps": {"1_000": 1000, "0x10": 16, "7 # of them": 7, "!!int '9'": 9, "9223372036854775807": 2**63 - 1},
        "optimizer.learning_rate": {"1": 1.0, "1E-3": 0.001, ".5": 0.5, "1_0.5": 10.5, "+1e-3": 0.001},
        "model.tie_embeddings": {"yes": True, "off": False, "True": True},
        "model.attention_dropout": {"null": None, "~": None, "": None, "0.25": 0.25},
        "model.adaptive_cutoffs": {"[0x10, 20]": (16, 20), "[]": ()},
        "data.valid": {"null": (), "[]": ()},
        "data.tokenizer": {"null": None, "": None},
    }
    for name, cases in values.items():
        section, field = name.split(".")
        for text, value in cases.items():
            found = getattr(getattr(load_config(path, [f"{name}={text}"]), section), field)
            assert found == value
            assert type(found) is type(value)


def test_an_interpolation_gives_a_text_its_spelling_and_a_number_its_value(path: Path) -> None:
    overrides = ["train.output_dir=runs/${optimizer.learning_rate}/${train.seed}", "train.seed=007"]
    config = load_config(path, [*overrides, "train.steps=${train.seed}", "checkpoint.resume=${train.seed}"])
    assert config.train.output_dir == "runs/1e-3/007"
    assert (config.train.seed, config.train.steps, config.checkpoint.resume) == (7, 7, "007")
    assert load_config(path, ["train.steps=${oc.decode:'12'}"]).train.steps == 12


@pytest.mark.parametrize(
    "text", ["${x}", "\\${x}", "a\\\\${b}c${d}", "$", "a${", "\\", "#x", "- a", " a ", "a: b", "a\nb"]
)
def test_a_text_that_looks_like_yaml_is_saved_as_it_is(path: Path, tmp_path: Path, text: str) -> None:
    config = load_config(path)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, output_dir=text))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_what_is_missing_in_a_file_can_be_given_and_must(path: Path) -> None:
    path.write_text(MINIMAL.replace("steps: 10", "steps: '???'").replace("train: corpus", "train: ['???']"))
    given = ["train.steps=3", "data.train=a"]
    assert load_config(path, given).train.steps == 3
    for left, name in ((given[:1], "data.train[0]"), (given[1:], "train.steps")):
        message = f"{name} is missing, its value is ???: give it in the file or as {name}=VALUE"
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_config(path, left)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: it must be a mapping of model, data"),
        ("# nothing\n", "is empty: it must be a mapping of model, data"),
        ("5\n", "is not a configuration: it must be a mapping of model, data"),
        (MINIMAL + "zero: !!set {a}\n", "is not a valid configuration: line 6: the tag !!set must be left out"),
        (MINIMAL + "zero: {stage: 1}\nzero: {stage: 2}\n", "is not a valid configuration: line 7: zero stands twice"),
        (MINIMAL + f"zero: '{'${' * 500}x{'}' * 500}'\n", "is not a valid configuration: it is nested too deeply"),
    ],
)
def test_a_file_that_is_no_configuration_is_named_in_one_line(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"{path} {message}")) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_an_empty_section_is_none(path: Path) -> None:
    path.write_text(MINIMAL + "zero:\n")
    with pytest.raises(ConfigError, match="zero=null: must be a mapping with stage, bucket_elements"):
        load_config(path)
    assert load_config(path, ["zero.stage=3"]).zero.stage == 3
