from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megalibi.checkpoint import check_resumable, describe_changes
from megalibi.config import DECIDES, ON_RESUME, Config, Decides, OnResume, config_to_dict
from megalibi.config.identity import BY_CONTENT
from megalibi.errors import ConfigError
from tests.support.checkpoints import write_checkpoint_without_tensors
from tests.support.runs import identify, make_config, open_loader, write_tokens

LEARNED = {"model.position_method": "learned", "model.max_position_embeddings": 64}
ADAPTIVE = {"model.adaptive_cutoffs": [41, 122]}
T5 = {"model.position_method": "t5_bias"}
SINUSOIDAL = {"model.position_method": "sinusoidal"}
OTHER_VALUES: dict[str, Any] = {
    "model.num_layers": 3,
    "model.hidden_size": 96,
    "model.num_attention_heads": 2,
    "model.ffn_hidden_size": 128,
    "model.vocab_size": 510,
    "model.padded_vocab_size": 1024,
    "model.position_method": "rotary",
    "model.scale_embedding": (SINUSOIDAL, True),
    "model.max_position_embeddings": (LEARNED, 128),
    "model.t5_num_buckets": (T5, 16),
    "model.t5_max_distance": (T5, 64),
    "model.t5_bias_scale": (T5, 4.0),
    "model.sinusoidal_amplitude": (SINUSOIDAL, 0.01),
    "model.activation": "relu",
    "model.bias": True,
    "model.norm_bias": True,
    "model.embedding_norm": True,
    "model.scale_alibi": True,
    "model.tie_embeddings": False,
    "model.adaptive_cutoffs": (ADAPTIVE, [41, 123]),
    "model.adaptive_factor": (ADAPTIVE, 2),
    "model.final_norm": False,
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "model.activation_dropout": 0.1,
    "model.adaptive_softmax_dropout": (ADAPTIVE, 0.1),
    "model.attention_backend": "reference",
    "model.layer_norm_epsilon": 1e-6,
    "model.init_std": 0.01,
    "model.recompute": "full",
    "data.seq_length": 32,
    "data.document_mask": True,
    "data.skip": ["2-3"],
    "optimizer.kind": "nesterov",
    "optimizer.learning_rate": 1e-3,
    "optimizer.min_learning_rate": 1e-4,
    "optimizer.warmup_steps": 4,
    "optimizer.warmup_init_learning_rate": 1e-5,
    "optimizer.decay_steps": 20,
    "optimizer.weight_decay": 0.2,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.9,
    "optimizer.epsilon": 1e-7,
    "optimizer.momentum": 0.9,
    "optimizer.clip_grad_norm": 2.0,
    "train.steps": 31,
    "train.global_batch_size": 16,
    "train.micro_batch_size": 1,
    "train.output_dir": "elsewhere",
    "train.seed": 1,
    "train.precision": "bf16",
    "train.deterministic": True,
    "train.log_every_steps": 3,
    "train.eval_every_steps": 3,
    "train.eval_samples": 3,
    "train.on_nonfinite": "skip",
    "train.max_consecutive_skips": 5,
    "train.on_spike": "rollback",
    "train.spike_deviations": 5.0,
    "train.spike_window": 50,
    "train.max_rollbacks": 2,
    "parallel.tensor_parallel_size": 2,
    "parallel.sequence_parallel": True,
    "parallel.timeout_minutes": 1.0,
    "zero.stage": 2,
    "zero.bucket_elements": 10_000,
    "checkpoint.every_steps": 3,
    "checkpoint.keep": 1,
    "checkpoint.asynchronous": False,
    "checkpoint.resume": "none",
    "checkpoint.accept_other_data": True,
    "runtime.hang_timeout_seconds": 60.0,
    "runtime.slow_rank_ratio": 2.0,
}
"""Of each field that can have another one; with what else the run needs for the field to mean something."""


def test_every_field_that_can_have_another_value_is_tried() -> None:
    assert set(OTHER_VALUES) == set(ON_RESUME) - BY_CONTENT - {"parallel.context_parallel_size"}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data"), num_tokens=10_000)


def configure(prefix: str, values: dict[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = value
    return make_config(prefix, **sections)


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_changed_field_is_refused_or_said_or_free_as_the_table_has_it(prefix: str, tmp_path: Path, name: str) -> None:
    entry = OTHER_VALUES[name]
    needed, value = entry if isinstance(entry, tuple) else ({}, entry)
    before, after = configure(prefix, needed), configure(prefix, needed | {name: value})
    checkpoint = write_checkpoint_without_tensors(tmp_path, before)
    manifest = check_resumable(checkpoint, before, identify(before))
    assert list(describe_changes(manifest, before, identify(before), 1)) == []
    section, field = name.split(".")
    was = config_to_dict(before)[section][field]
    if ON_RESUME[name] is OnResume.FIXED:
        with pytest.raises(ConfigError) as refused:
            check_resumable(checkpoint, after, identify(after))
        message = f"{name}={value}: must be {was}, the value in the checkpoint {checkpoint}; resume with it, or start"
        assert str(refused.value).startswith(message)
        return
    check_resumable(checkpoint, after, identify(after))
    lines = list(describe_changes(manifest, after, identify(after), 1))
    said = [f"goes on with other values than before: {name} {was} -> {value}"]
    assert lines[:1] == (said if ON_RESUME[name] is OnResume.SAID else [])


@pytest.mark.parametrize(
    ("was", "now", "expected"),
    [
        ({"train.steps": 20}, {"train.steps": 40}, "optimizer.decay_steps=20 keeps that schedule"),
        (
            {"optimizer.decay_steps": 25, "optimizer.warmup_steps": 5},
            {"optimizer.decay_steps": 30, "optimizer.warmup_steps": 8},
            "optimizer.warmup_steps=5 optimizer.decay_steps=25 keeps that schedule",
        ),
        ({"train.steps": 20}, {"train.steps": 40, "optimizer.decay_steps": 20}, None),
        ({"optimizer.learning_rate": 1e-3}, {}, "optimizer.learning_rate=0.001 optimizer.decay_steps=30 keeps that"),
    ],
)
def test_another_learning_rate_is_said_with_both_and_what_keeps_it(
    prefix: str, tmp_path: Path, was: dict[str, Any], now: dict[str, Any], expected: str | None
) -> None:
    before, after = configure(prefix, was), configure(prefix, now)
    checkpoint = write_checkpoint_without_tensors(tmp_path, before, step=20)
    manifest = check_resumable(checkpoint, after, identify(after))
    lines = [line for line in describe_changes(manifest, after, identify(after), 1) if "learning rate" in line]
    if expected is None:
        assert lines == []
    else:
        assert expected in lines[0]


def hash_first_step(config: Config) -> int:
    """Return the hash of the samples that the first step reads."""
    loader = open_loader(config, micro_batch_size=config.train.global_batch_size)
    (batch,) = loader.micro_batches(0)
    loader.close()
    return batch.sample_hash


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_the_samples_of_a_step_depend_on_the_fields_that_say_so(prefix: str, name: str) -> None:
    entry = OTHER_VALUES[name]
    needed, value = entry if isinstance(entry, tuple) else ({}, entry)
    before, after = (hash_first_step(configure(prefix, values)) for values in (needed, needed | {name: value}))
    assert (before != after) == (DECIDES[name] is Decides.SAMPLES)


@pytest.mark.parametrize(
    ("was", "now", "refused"),
    [
        ([], ["16-23"], ""),  # what lies ahead
        (["16-23"], [], ""),
        (["3"], ["3", "17"], ""),
        (["3"], ["3", "16"], "data.skip=[3,16]: must leave out [3] of the samples before 17"),  # the 16 are 0 to 16
        ([], ["15-20"], "data.skip=[15-20]: must leave out [] of the samples before 16"),
        (["3"], [], "data.skip=[]: must leave out [3] of the samples before 17"),
        (["8-15", "30"], ["12-15", "8-11"], ""),  # other words for the same
    ],
)
def test_samples_that_lie_ahead_can_be_left_out_and_the_past_stays(
    prefix: str, tmp_path: Path, was: list[str], now: list[str], refused: str
) -> None:
    before, after = configure(prefix, {"data.skip": was}), configure(prefix, {"data.skip": now})
    checkpoint = write_checkpoint_without_tensors(tmp_path, before, samples_consumed=16)
    if not refused:
        manifest = check_resumable(checkpoint, after, identify(after))
        assert any("data.skip" in line for line in describe_changes(manifest, after, identify(after), 1))
        return
    with pytest.raises(ConfigError) as error:
        check_resumable(checkpoint, after, identify(after))
    assert str(error.value).startswith(
        f"{refused}, which the checkpoint {checkpoint} has behind it; resume with it, or"
    )
