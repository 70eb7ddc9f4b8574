from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

from megalibi.config import (
    DECIDES,
    ON_RESUME,
    Config,
    Decides,
    OnResume,
    config_from_dict,
    find_changes,
    find_differences,
)
from megalibi.config.identity import BY_CONTENT, NO_WEIGHT_DEPENDS_ON

DOCS = Path(__file__).parents[2] / "docs" / "resume.md"
SMALL = {
    "model": {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "ffn_hidden_size": 96, "vocab_size": 509},
    "data": {"train": "tokens", "seq_length": 32},
    "optimizer": {"learning_rate": 1e-3},
    "train": {"steps": 3, "global_batch_size": 8, "micro_batch_size": 2, "output_dir": "run"},
}


def test_every_field_is_decided_once() -> None:
    hints = typing.get_type_hints(Config)
    fields = [f"{section}.{field.name}" for section, kind in hints.items() for field in dataclasses.fields(kind)]
    assert sorted(fields) == sorted(ON_RESUME)
    assert sorted(fields) == sorted(DECIDES)
    for kind in hints.values():
        for hint in typing.get_type_hints(kind, include_extras=True).values():
            marks = typing.get_args(hint)[1:]
            assert [type(mark) for mark in marks].count(OnResume) == 1
            assert [type(mark) for mark in marks].count(Decides) <= 1
    assert set(ON_RESUME) > BY_CONTENT
    assert set(ON_RESUME) > NO_WEIGHT_DEPENDS_ON


def test_the_table_in_the_docs_is_the_code() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?)(?: \(.*\))? \|$", DOCS.read_text(), re.MULTILINE)
    assert rows == [(name, on_resume.value) for name, on_resume in ON_RESUME.items()]


def test_what_decides_a_weight_may_not_change_without_a_word() -> None:
    free = {name for name, on_resume in ON_RESUME.items() if on_resume is OnResume.FREE}
    assert free <= NO_WEIGHT_DEPENDS_ON
    assert not {name for name in ON_RESUME if name.startswith("optimizer.")} & NO_WEIGHT_DEPENDS_ON


def test_what_each_field_decides() -> None:
    by_kind: dict[Decides, set[str]] = {kind: set() for kind in Decides}
    for name, decides in DECIDES.items():
        by_kind[decides].add(name)
    samples = {"data.train", "data.skip", "data.seq_length", "train.global_batch_size", "train.seed"}
    assert by_kind[Decides.SAMPLES] == samples
    assert by_kind[Decides.TOPOLOGY] == {
        "parallel.tensor_parallel_size",
        "parallel.sequence_parallel",
        "parallel.context_parallel_size",
        "zero.stage",
        "zero.bucket_elements",
        "train.micro_batch_size",
    }
    assert by_kind[Decides.NO_WEIGHT] == NO_WEIGHT_DEPENDS_ON


def test_a_weight_does_not_depend_on_what_is_only_measured_or_written() -> None:
    ours = config_from_dict(SMALL)
    train = SMALL["train"] | {"output_dir": "elsewhere", "eval_samples": 7, "steps": 4}
    tree = {**SMALL, "data": {"train": "moved", "valid": "other", "seq_length": 32}, "train": train}
    differences = find_differences(ours, config_from_dict(tree))
    assert {name: values for name, values in differences.items() if name not in NO_WEIGHT_DEPENDS_ON} == {
        "data.train": ([{"prefix": "tokens", "weight": 1.0}], [{"prefix": "moved", "weight": 1.0}]),
        "train.steps": (3, 4),
    }


def test_changes_are_named_with_both_values_and_files_are_left_to_their_content() -> None:
    ours = config_from_dict(SMALL)
    tree = {**SMALL, "data": {"train": "elsewhere", "seq_length": 64, "document_mask": True}}
    assert find_changes(ours, config_from_dict(tree)) == {
        "data.seq_length": (32, 64),
        "data.document_mask": (False, True),
    }
