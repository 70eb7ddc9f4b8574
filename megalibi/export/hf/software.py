"""Runs transformers' own classes, if they are installed: the one place that imports them. Nothing is downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalibi.config import ModelConfig
from megalibi.errors import FileError, UserError, spell_line
from megalibi.export.hf.formats import HfFormat

try:
    import transformers

    TRANSFORMERS_VERSION: str | None = transformers.__version__
except ImportError:
    TRANSFORMERS_VERSION = None

_MAX_REASON = 300
WHY_NOT = "transformers is not installed: pip install 'megalibi[hf]'"
"""Why nothing can be run."""


def compute_their_slopes(known: HfFormat, num_heads: int, head_dim: int) -> Tensor:
    """Return the slopes that the class's own function computes, [heads]: what a distance of 1 takes from a score.

    Args:
        known: The architecture.
        num_heads: The number of heads.
        head_dim: The width of a head; Falcon scales the bias by 1/sqrt of it.
    """
    modeling = _import_modeling(known)
    if known.name == "mpt":
        return -modeling.build_mpt_alibi_tensor(num_heads, 2)[:, 0, 0].float()
    mask = torch.ones(1, 2, dtype=torch.long)
    slopes_H: Tensor = modeling.build_alibi_tensor(mask, num_heads, torch.float32)[:, 0, 1]
    return slopes_H / head_dim**0.5 if known.name == "falcon" else slopes_H


def find_their_slopes(known: HfFormat, model: ModelConfig) -> Tensor | None:
    """Return the slopes that the class computes for a model, [heads]; None: it is not installed."""
    if not TRANSFORMERS_VERSION:
        return None
    return compute_their_slopes(known, model.num_attention_heads, model.head_dim)


@contextmanager
def unrounded_bias(known: HfFormat) -> Iterator[None]:
    """Let Falcon's class compute its bias in fp32, by the function of Bloom's, the same but for the rounding."""
    modeling = _import_modeling(known)
    rounding = modeling.build_alibi_tensor
    modeling.build_alibi_tensor = importlib.import_module("transformers.models.bloom.modeling_bloom").build_alibi_tensor
    try:
        yield
    finally:
        modeling.build_alibi_tensor = rounding


def load_hf_model(known: HfFormat, folder: Path, name: Path | None = None) -> nn.Module:
    """Return a folder's model in fp32, ready to be evaluated, as ``from_pretrained`` loads it.

    Args:
        known: The architecture.
        folder: A folder with config.json and safetensors.
        name: What errors call it; None: its own name.

    Raises:
        FileError: The class does not find every tensor, or finds others, or fails.
    """
    name = name or folder
    with _naming_failures(known.architecture, name), _saying_nothing():
        model, info = _get_class(known).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation=_name_attention(known),
            output_loading_info=True,
        )
    wrong = {kind: sorted(names) for kind, names in info.items() if names}
    if wrong:
        raise FileError(f"{name}: {known.architecture} does not load it as it is: {wrong}")
    loaded: nn.Module = model.eval()
    return loaded


def build_hf_model(
    known: HfFormat, folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """Return a model in fp32 of tensors that were read already: of a file that is no safetensors.

    Args:
        known: The architecture.
        folder: Where config.json and the tensors are from, for errors.
        fields: What config.json says.
        tensors: Every tensor by name in fp32; one that is tied to another may be left out.

    Raises:
        FileError: The class does not take the tensors, or fails.
    """
    with _naming_failures(known.architecture, folder), _saying_nothing():
        kind = _get_class(known)
        config = kind.config_class.from_dict(dict(fields))
        config._attn_implementation = _name_attention(known)
        model: Any = kind(config)
        missing, unexpected = model.load_state_dict(dict(tensors), strict=False, assign=True)
        model.tie_weights()
    if unexpected or not set(missing) <= {"lm_head.weight"}:
        raise FileError(f"{folder}: {known.architecture} does not load it as it is: {missing}, {unexpected}")
    loaded: nn.Module = model.eval()
    return loaded


@contextmanager
def _naming_failures(what: str, folder: Path) -> Iterator[None]:
    """Turn what a class raises about a folder of others, which can be anything, into one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = spell_line(str(error))[:_MAX_REASON] or "no reason given"
        raise FileError(
            f"{folder}: {what} of transformers {TRANSFORMERS_VERSION} fails on it: {type(error).__name__}: {reason}"
        ) from error


def _name_attention(known: HfFormat) -> str:
    """Return transformers' attention for a class, never what a foreign config.json names: that could be code of a hub.

    It is what a user gets who asks for none. In transformers 5.24 Falcon's "eager" adds its bias twice.
    """
    return "sdpa" if known.name == "falcon" else "eager"


@torch.no_grad()
def compute_their_logits(known: HfFormat, folder: Path, model: nn.Module, tokens_S: Tensor) -> Tensor:
    """Return the logits of every position of a text, fp32 [S, V]; MPT has a cap on its length, which is set to it.

    Args:
        known: The architecture.
        folder: Where the model is from, for errors.
        model: The model.
        tokens_S: Token ids.

    Raises:
        FileError: The class fails.
    """
    config: Any = model.config
    with _naming_failures(known.architecture, folder):
        if hasattr(config, "max_seq_len"):
            config.max_seq_len = len(tokens_S)  # read anew in every forward pass, which makes a bias of that length
        logits_SV: Tensor = model(input_ids=tokens_S[None], use_cache=False, return_dict=True).logits[0]
    return logits_SV.float()


def tokenize_with_transformers(folder: Path, texts: Sequence[str], name: Path) -> list[list[int]]:
    """Return the ids of texts by the tokenizer of a folder, as AutoTokenizer loads it.

    Args:
        folder: The folder.
        texts: The texts.
        name: What errors call the folder.

    Raises:
        FileError: It is not loaded.
    """
    with _naming_failures("AutoTokenizer", name), _saying_nothing():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@contextmanager
def _saying_nothing() -> Iterator[None]:
    """Keep transformers from drawing a bar of its own, and from warnings about what is checked here."""
    logging = transformers.utils.logging
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def _import_modeling(known: HfFormat) -> Any:
    return importlib.import_module(f"transformers.models.{known.name}.modeling_{known.name}")


def _get_class(known: HfFormat) -> Any:
    return getattr(_import_modeling(known), known.architecture)
