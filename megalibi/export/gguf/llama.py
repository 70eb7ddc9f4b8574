"""Runs llama.cpp, if llama-cpp-python is installed: the one place that imports it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megalibi.errors import FileError

try:
    import llama_cpp

    LLAMA_VERSION: str | None = llama_cpp.__version__
except ImportError:
    LLAMA_VERSION = None

WHY_NOT_LLAMA = "llama-cpp-python is not installed: pip install llama-cpp-python"
"""Why nothing can be run."""


def compute_llama_logits(file: Path, tokens_S: Tensor) -> Tensor:
    """Return the logits of every position of a text by llama.cpp on the CPU, fp32 [S, V].

    Its keys and values are kept in fp32 and not in its default, half precision, and in one pass.

    Args:
        file: The GGUF file.
        tokens_S: Token ids, int64 [S].

    Raises:
        FileError: llama.cpp does not load the file.
    """
    length = len(tokens_S)
    try:
        llama = llama_cpp.Llama(
            str(file),
            n_ctx=length,
            n_batch=length,
            n_ubatch=length,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
            verbose=False,
        )
    except ValueError as error:
        raise FileError(f"{file}: llama.cpp {LLAMA_VERSION} does not load it: {error}") from error
    try:
        llama.eval(tokens_S.tolist())
        return torch.from_numpy(np.array(llama.scores[:length]))
    finally:
        llama.close()


def tokenize_with_llama(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts by the tokenizer of a GGUF file; control tokens in them are text.

    Args:
        file: The GGUF file.
        texts: The texts.

    Raises:
        FileError: llama.cpp does not load the file.
    """
    try:
        llama = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    except ValueError as error:
        raise FileError(f"{file}: llama.cpp {LLAMA_VERSION} does not load it: {error}") from error
    try:
        return [llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    finally:
        llama.close()
