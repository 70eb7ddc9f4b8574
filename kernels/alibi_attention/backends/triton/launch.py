"""A Triton kernel launched many times at one shape: by way of its tuner once, and then without it.

At every launch Triton builds the tuner's key, binds some forty arguments, asks each what the kernel may be specialised
for, and asks the driver whose each address is. It takes longer than a GPU needs for a short sequence. For one device,
type and shape all of it has one answer, but for the addresses. Needs no Triton of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

_ALIGNED_BYTES = 16
"""What Triton specialises addresses for."""


class Launch:
    """A launch of a kernel, of which everything is fixed but the addresses of its tensors."""

    def __init__(self, kernel: Any, count_programs: Callable[[Mapping[str, Any]], int], arguments: Mapping[str, Any]):
        """Take what is the same at each launch.

        Args:
            kernel: Of Triton, tuned or not. Its tensors come first.
            count_programs: Gives their number for the arguments by name, a tile's sizes among them.
            arguments: What follows the tensors, by name; a tuner adds the sizes of its tiles.
        """
        self._kernel, self._count_programs, self._arguments = kernel, count_programs, arguments
        self._launch_again: Callable[..., None] | None = None
        self._later_arguments: tuple[Any, ...] = ()

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Launch on the current device.

        Args:
            tensors: In the kernel's order; of the same device, types and strides, and None in the same places, each
                time.
        """
        # As numbers, and not as tensors: Triton would ask the driver about each, and they are known to be the device's.
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
