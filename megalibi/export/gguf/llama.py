"""Runs llama.cpp, if llama-cpp-python is installed: the one place that imports it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalibi.errors import FileError

try:
    import llama_cpp

    LLAMA_VERSION: str | None = llama_cpp.__version__
    WHY_NOT_LLAMA = ""
    """Why nothing can be run; empty: it can."""
except ImportError:
    LLAMA_VERSION, WHY_NOT_LLAMA = None, "llama-cpp-python is not installed: pip install llama-cpp-python"
except (OSError, RuntimeError) as error:  # its library is for another machine, or lacks another library
    LLAMA_VERSION, WHY_NOT_LLAMA = None, f"llama-cpp-python does not load: {str(error).splitlines()[0]}"


def compute_llama_logits(file: Path, tokens_S: Tensor) -> Tensor:
    """Return the logits of every position of a text by llama.cpp on the CPU, fp32 [S, V].

    Its keys and values are kept in fp32 and not in its default, half precision, and in one pass.

    Args:
        file: The GGUF file.
        tokens_S: Token ids, int64 [S].

    Raises:
        FileError: llama.cpp does not load the file, or fails.
    """
    length = len(tokens_S)
    with _loading(
        file,
        n_ctx=length,
        n_batch=length,
        n_ubatch=length,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
    ) as llama:
        llama.eval(tokens_S.tolist())
        return torch.from_numpy(np.array(llama.scores[:length]))


def tokenize_with_llama(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts by the tokenizer of a GGUF file; control tokens in them are text.

    Args:
        file: The GGUF file.
        texts: The texts.

    Raises:
        FileError: llama.cpp does not load the file, or fails.
    """
    with _loading(file, vocab_only=True) as llama:
        return [llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]


@contextmanager
def _loading(file: Path, **options: Any) -> Iterator[Any]:
    """Give a file's model; what llama.cpp refuses, to load or to compute, becomes one line."""
    try:
        llama = llama_cpp.Llama(str(file), verbose=False, **options)
        try:
            yield llama
        finally:
            llama.close()
    except (ValueError, RuntimeError) as error:
        raise FileError(f"{file}: llama.cpp {LLAMA_VERSION} fails on it: {error}") from error
