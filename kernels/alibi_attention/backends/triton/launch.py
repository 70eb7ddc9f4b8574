"""A Triton kernel launched many times at one shape: through its tuner once, and then directly.

At every launch Triton builds the tuner's key, binds some forty arguments, asks each what the kernel may be specialised
for, and asks the driver which device each address belongs to. That takes longer than a GPU needs for a short sequence.
For one device, type and shape only the addresses change. This module needs no Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

_ALIGNED_BYTES = 16
"""The alignment of addresses that Triton specialises kernels for."""


class Launch:
    """A launch of a kernel, of which everything is fixed but the addresses of its tensors."""

    def __init__(self, kernel: Any, count_programs: Callable[[Mapping[str, Any]], int], arguments: Mapping[str, Any]):
        """Take what is the same at each launch.

        Args:
            kernel: A kernel of Triton, tuned or not, whose tensors are its first arguments.
            count_programs: Returns the number of programs for the arguments by name, a tile's sizes among them.
            arguments: The arguments after the tensors, by name; a tuner adds the sizes of its tiles.
        """
        self._kernel, self._count_programs, self._arguments = kernel, count_programs, arguments
        self._launch_again: Callable[..., None] | None = None
        self._later_arguments: tuple[Any, ...] = ()

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Launch on the current device.

        Args:
            tensors: The kernel's tensors in its order. Each time they must have the same device, types and strides,
                and be None in the same places.
        """
        # As numbers, not as tensors: Triton would ask the driver about each, and their device is known.
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        for address in addresses:
            if address is not None and address % _ALIGNED_BYTES:
                self._launch_by_triton(tensors)
                return
        if self._launch_again is None:
            self._keep(*self._launch_by_triton(tensors), len(tensors))
        else:
            self._launch_again(*addresses, *self._later_arguments)

    def _launch_by_triton(self, tensors: tuple[torch.Tensor | None, ...]) -> tuple[Any, dict[str, Any]]:
        """Launch, and return the compiled kernel, None in the interpreter, and all of its arguments by name."""
        bound: dict[str, Any] = {}

        def find_grid(arguments: Mapping[str, Any]) -> tuple[int]:
            bound.update(arguments)  # of every tile that is timed, and at last of the one that is chosen
            return (self._count_programs(arguments),)

        return self._kernel[find_grid](*tensors, **self._arguments), bound

    def _keep(self, compiled: Any, bound: Mapping[str, Any], num_tensors: int) -> None:
        if compiled is None or torch.version.hip is not None:  # there a kernel is specialised for a tensor's size too
            return
        later_arguments = tuple(bound[name] for name in self._kernel.arg_names[num_tensors:])
        # In this order: another thread may be about to launch.
        self._later_arguments, self._launch_again = later_arguments, compiled[self._count_programs(bound), 1, 1]
