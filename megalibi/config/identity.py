"""What each field means to a run that goes on with another value of it: the one place that says so.

docs/resume.md has the same as a table for users; a test holds the two together, and to the fields that there are.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from megalibi.config.load import config_to_dict
from megalibi.config.schema import Config


class OnResume(Enum):
    """What happens when a run goes on from a checkpoint with another value of a field."""

    FREE = "may change"
    """No number of the run depends on it."""
    SAID = "may change, and a line says so"
    """Losses change, in the last digits or by more, and that is what the user asks for."""
    FIXED = "may not change"
    """The state of the optimizer, the order of the data or the model is another one."""


_FREE, _SAID, _FIXED = OnResume.FREE, OnResume.SAID, OnResume.FIXED

ON_RESUME: dict[str, OnResume] = {
    "model.num_layers": _FIXED,
    "model.hidden_size": _FIXED,
    "model.num_attention_heads": _FIXED,
    "model.ffn_hidden_size": _FIXED,
    "model.vocab_size": _FIXED,
    "model.padded_vocab_size": _FIXED,
    "model.position_method": _FIXED,
    "model.max_position_embeddings": _FIXED,
    "model.t5_num_buckets": _FIXED,
    "model.t5_max_distance": _FIXED,
    "model.activation": _FIXED,
    "model.bias": _FIXED,
    "model.tie_embeddings": _FIXED,
    "model.adaptive_cutoffs": _FIXED,
    "model.adaptive_factor": _FIXED,
    "model.final_norm": _FIXED,
    "model.dropout": _SAID,
    "model.attention_dropout": _SAID,
    "model.activation_dropout": _SAID,
    "model.adaptive_softmax_dropout": _SAID,
    "model.attention_backend": _SAID,
    "model.layer_norm_epsilon": _FIXED,
    "model.init_std": _FIXED,
    "model.recompute": _FREE,
    "data.train": _FIXED,
    "data.valid": _SAID,
    "data.tokenizer": _FIXED,
    "data.seq_length": _FIXED,
    "data.document_mask": _FIXED,
    "optimizer.kind": _FIXED,
    "optimizer.learning_rate": _SAID,
    "optimizer.min_learning_rate": _SAID,
    "optimizer.warmup_steps": _SAID,
    "optimizer.warmup_init_learning_rate": _SAID,
    "optimizer.decay_steps": _SAID,
    # DeepSpeed and torch take these from the checkpoint: a changed value would be ignored without a word.
    "optimizer.weight_decay": _FIXED,
    "optimizer.beta1": _FIXED,
    "optimizer.beta2": _FIXED,
    "optimizer.epsilon": _FIXED,
    "optimizer.momentum": _FIXED,
    "optimizer.clip_grad_norm": _FIXED,
    "train.steps": _SAID,
    "train.global_batch_size": _FIXED,
    "train.micro_batch_size": _SAID,
    "train.output_dir": _FREE,
    "train.seed": _FIXED,
    "train.precision": _FIXED,
    "train.deterministic": _SAID,
    "train.log_every_steps": _FREE,
    "train.eval_every_steps": _FREE,
    "train.eval_samples": _SAID,
    "parallel.tensor_parallel_size": _FIXED,
    "parallel.sequence_parallel": _SAID,
    "parallel.context_parallel_size": _FIXED,
    "parallel.timeout_minutes": _FREE,
    "zero.stage": _FIXED,
    "zero.bucket_elements": _SAID,
    "checkpoint.every_steps": _FREE,
    "checkpoint.keep": _FREE,
    "checkpoint.resume": _FREE,
    "checkpoint.accept_other_data": _FREE,
}
"""By section.field."""

BY_CONTENT = frozenset({"data.train", "data.valid", "data.tokenizer"})
"""Fields that name files: what the files hold is compared, and where they stand is free."""

NO_WEIGHT_DEPENDS_ON = frozenset(name for name, on_resume in ON_RESUME.items() if on_resume is OnResume.FREE) | {
    "data.valid",
    "data.tokenizer",
    "train.eval_samples",
}
"""Fields that leave every weight as it is."""


def find_changes(theirs: Config, ours: Config) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ, by section.field, with both values; fields that name files are left out."""
    theirs_flat, ours_flat = flatten_config(theirs), flatten_config(ours)
    return {
        name: (theirs_flat[name], value)
        for name, value in ours_flat.items()
        if name not in BY_CONTENT and value != theirs_flat[name]
    }


def flatten_config(config: Config) -> dict[str, Any]:
    """Return every value of a configuration by section.field."""
    tree = config_to_dict(config)
    return {f"{section}.{name}": value for section, fields in tree.items() for name, value in fields.items()}
