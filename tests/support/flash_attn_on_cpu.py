"""flash-attn without a GPU: the Triton kernels in its package, which are made for AMD, run by Triton's interpreter.

Imported for its effect, before alibi_attention: by conftest.py, and by the test files whose functions run in ranks.
With TEST_DEVICE=cuda it has none.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from tests.support.device import ON_GPU

OPERATORS = (
    "_flash_attn_forward",
    "_flash_attn_backward",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_backward",
)


def _run_on_cpu() -> None:
    """Let flash-attn's operators take CPU tensors, in this process and in those that it starts and that import this."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["FLASH_ATTENTION_TRITON_AMD_ENABLE"] = "TRUE"
    try:
        from flash_attn import flash_attn_interface
        from flash_attn.flash_attn_triton_amd.utils import MetaData
    except ImportError:
        return  # what is tested on it fails, and says that it is missing
    for name in OPERATORS:
        operator = getattr(flash_attn_interface, name)
        operator.register_kernel("cpu")(operator._init_fn)
    MetaData.need_alibi = _need_alibi
    _repair_bf16()
    _patch_once()
    _leave_out_unread_checks()
    _find_types_when_asked()


def _need_alibi(self: Any, alibi_slopes: torch.Tensor, batch: int, num_heads: int) -> None:
    """MetaData.need_alibi of flash-attn 2.8.3 without its assertion that the slopes are on a GPU."""
    assert alibi_slopes.shape == (batch, num_heads)
    self.alibi_slopes = alibi_slopes


def _repair_bf16() -> None:
    """Mend Triton 3.6's interpreter: its dot multiplies the bits of bf16 numbers, its cast to bf16 does not round."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, *rest)

    def cast_by_rounding(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            return TensorHandle(torch.tensor(source.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, dtype)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot_of_numbers, cast_by_rounding


def _patch_once() -> None:
    """Spare Triton 3.6's interpreter a search of its language in each call of a kernel's helper: a fifth of the time.

    It puts functions of its own there, which the launch of the kernel or an earlier helper has done.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_what_is_not(function: Any) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        is_patched = languages and not any(tl.core.is_builtin(language.load) for language in languages)
        return interpreter._LangPatchScope() if is_patched else patch(function)

    interpreter._patch_lang = patch_what_is_not


def _leave_out_unread_checks() -> None:
    """Spare Triton 3.6's interpreter what it computes of overflows: it would look at it with debug=True alone."""
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _find_types_when_asked() -> None:
    """Spare Triton 3.6's interpreter the type of each tuple, spelt out whenever a shape is made, that few ask for."""
    import triton.language as tl

    def keep_values(self: Any, args: Any, type: Any = None) -> None:
        self.values, self.given_type = list(args), type

    def find_type(self: Any) -> Any:
        if self.given_type is None:
            return tl.core._type_for_tuple_values(self.values)
        return self.given_type if isinstance(self.given_type, tl.tuple_type) else tl.tuple_type(self.given_type)

    tl.tuple.__init__, tl.tuple.type = keep_values, property(find_type)


if not ON_GPU:
    _run_on_cpu()
