# ruff: noqa: T201 - printing is what this file is for
"""``python -m alibi_attention``: the back ends of this installation and their measured errors."""

from __future__ import annotations

from dataclasses import fields

import torch

from alibi_attention import alibi_slopes, attention, backends
from alibi_attention.capability import Call, Capability

_SEQ_LENGTH, _NUM_HEADS, _HEAD_DIM = 513, 12, 64


def main() -> None:
    """Print a paragraph for each back end, then its errors on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for capability in backends():
        _print_capability(capability)
        for dtype in capability.dtypes:
            if capability.find_refusal(Call(device, dtype, _HEAD_DIM)) is None:
                _print_errors(capability.name, device, dtype)
        print()
    print(f"error: largest |difference| from fp64 on {device}, {_SEQ_LENGTH} tokens, {_NUM_HEADS} heads x {_HEAD_DIM}")


def _print_capability(capability: Capability) -> None:
    for field in fields(capability):
        value = getattr(capability, field.name)
        if isinstance(value, tuple):
            value = ", ".join(str(item).removeprefix("torch.") for item in value)
        if value not in ("", None):
            print(f"{field.name:<12}{'yes' if value is True else 'no' if value is False else value}")


def _print_errors(name: str, device: str, dtype: torch.dtype) -> None:
    """Print how far output and gradients are from the equation in fp64 on the same rounded inputs."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, _SEQ_LENGTH, _NUM_HEADS, _HEAD_DIM)
    q, k, v, upstream = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    results = _output_and_gradients(q, k, v, upstream, name)
    exact = _output_and_gradients(q.double(), k.double(), v.double(), upstream.double(), "reference")
    errors = [(x.double() - y).abs().max().item() for x, y in zip(results, exact, strict=True)]
    print(
        f"error {str(dtype).removeprefix('torch.'):<10}"
        + "  ".join(f"{label} {error:.1e}" for label, error in zip(("output", "dq", "dk", "dv"), errors, strict=True))
    )


def _output_and_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, upstream: torch.Tensor, backend: str
) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    output = attention(*inputs, alibi_slopes=alibi_slopes(_NUM_HEADS).to(q.device), backend=backend)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


if __name__ == "__main__":
    main()
