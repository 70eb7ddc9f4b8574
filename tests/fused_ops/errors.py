"""How far the fused kernels may be from fp64: twice as far as PyTorch's operations in the same type."""

from __future__ import annotations

from torch import Tensor

ERROR_FACTOR = 2.0


def assert_within_plain_error(results: list[Tensor], plain: list[Tensor], exact: list[Tensor], what: str) -> None:
    """Relative errors by the norm, each result beside the same one of PyTorch."""
    for index, (x, x_plain, x_exact) in enumerate(zip(results, plain, exact, strict=True)):
        assert x.shape == x_exact.shape
        error, plain_error = (((y.double() - x_exact).norm() / x_exact.norm()).item() for y in (x, x_plain))
        assert error <= ERROR_FACTOR * plain_error, f"{what}, result {index}: {error:.2e} against {plain_error:.2e}"
