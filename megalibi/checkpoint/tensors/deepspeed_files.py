"""The files of checkpoints of formats 1 and 2, which DeepSpeed wrote: where they hold weights and optimizer states.

T being the tensor rank and D the data rank:

- ZeRO 0: ``mp_rank_T_model_states.pt`` holds the tensors under ``module``, and the optimizer's states by the number of
  the parameter, matrices first.
- ZeRO 1 and 2: ``zero_pp_rank_D_mp_rank_T_optim_states.pt`` holds a part of each group's flat tensor, and says which
  parameter lies where in it (``param_slice_mappings``). The parts of a parameter follow each other by data rank.
- ZeRO 3: each parameter of a rank is flattened, padded to a multiple of the data ranks and cut into as many parts of
  equal size. The same file holds the D-th part of every parameter one after the other; the order is in ``param_shapes``
  of ``zero_pp_rank_D_mp_rank_T_model_states.pt`` (``deepspeed/utils/zero_to_fp32.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalibi.checkpoint.manifest import MANIFEST, Manifest
from megalibi.checkpoint.parameters import ParameterEntry
from megalibi.checkpoint.tensors.pickles import open_states
from megalibi.checkpoint.tensors.state_file import WEIGHT, StoredPieces
from megalibi.engine.masters import OptimizerProgress, read_good_steps
from megalibi.errors import CheckpointError


class MappedPiece(NamedTuple):
    """Elements of a flattened slice, in a file that is mapped."""

    start: int
    """The first of the elements."""
    values: Tensor
    """[n], of any floating type."""

    @property
    def length(self) -> int:
        """The number of elements."""
        return self.values.numel()

    def read(self, first: int, last: int) -> Tensor:
        """Return the elements from ``first`` up to ``last`` of the slice, [last - first], in fp32: numbers alone.

        DeepSpeed's files at ZeRO 0 have parameters, which want gradients.
        """
        return self.values.detach()[first - self.start : last - self.start].float()


_Found = Iterator[tuple[str, str, MappedPiece]]


class DeepSpeedFiles:
    """The files of a checkpoint, each opened once and mapped: what is read of them is what is asked for.

    Args:
        folder: The checkpoint's folder.
        manifest: Its manifest.

    Raises:
        CheckpointError: A file cannot be loaded, or would run code.
        FileError: A file may not be read.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._topology = manifest.topology
        # Those that are not needed, too: none may have code in it.
        self._states = {name: open_states(folder / name) for name in manifest.files}

    def index(self, parameters: Mapping[str, ParameterEntry]) -> StoredPieces:
        """Return what the files hold, by kind, parameter and tensor rank.

        Args:
            parameters: What is said of each of the checkpoint's parameters, by name, in the order of the model.

        Raises:
            CheckpointError: A file does not hold what the manifest says.
        """
        pieces: StoredPieces = {}
        stage = self._topology["zero_stage"]
        for rank in range(self._topology["tensor_parallel_size"]):
            suffix = f"mp_rank_{rank:02d}"
            try:
                if stage == 0:
                    found = _iterate_whole(self._get(f"{suffix}_model_states.pt"), parameters)
                elif stage < 3:
                    found = self._iterate_parts(suffix)
                else:
                    found = self._iterate_cut(suffix)
                for kind, name, piece in found:
                    pieces.setdefault((kind, name, rank), []).append(piece)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise self._refusal(error) from error
        return pieces

    def read_progress(self) -> OptimizerProgress:
        """Return what the optimizer has done, from the files of the first rank.

        Raises:
            CheckpointError: A file does not hold what DeepSpeed writes.
        """
        stage = self._topology["zero_stage"]
        try:
            if stage == 0:
                optimizer = self._get("mp_rank_00_model_states.pt")["optimizer"]
                kept, scale, good_steps = optimizer["state"], optimizer["loss_scale"], optimizer["good_steps"]
                good_steps += good_steps > 0  # the loss scale doubled a step earlier then
            else:
                optimizer = self._get_optimizer(0, "mp_rank_00")
                kept = optimizer["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]["state"]
                scaler: Any = optimizer.get("loss_scaler")
                scale, good_steps = 1.0, 0
                if getattr(scaler, "dynamic", False):
                    scale, good_steps = float(scaler.cur_scale), read_good_steps(scaler)
            updates = max((int(states["step"]) for states in kept.values() if "step" in states), default=0)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._refusal(error) from error
        return OptimizerProgress(updates=updates, loss_scale=scale, good_steps=good_steps)

    def _iterate_parts(self, suffix: str) -> _Found:
        reached: dict[str, int] = {}
        for data_rank in range(self._topology["data_parallel_size"]):
            optimizer = self._get_optimizer(data_rank, suffix)
            kept_states = optimizer["base_optimizer_state"]["state"]
            for group, addresses in enumerate(optimizer["param_slice_mappings"]):
                flats = {WEIGHT: optimizer["single_partition_of_fp32_groups"][group]}
                flats |= dict(_element_states(kept_states.get(group, {})))
                for name, address in addresses.items():
                    start = reached.get(name, 0)
                    for kind, flat in flats.items():
                        yield kind, name, MappedPiece(start, flat[address.start : address.start + address.numel])
                    reached[name] = start + address.numel

    def _iterate_cut(self, suffix: str) -> _Found:
        data_size = self._topology["data_parallel_size"]
        for data_rank in range(data_size):
            prefix = f"zero_pp_rank_{data_rank}_{suffix}"
            shapes = self._get(f"{prefix}_model_states.pt")["param_shapes"]
            optimizer = self._get_optimizer(data_rank, suffix)
            kept_states = optimizer["optimizer_state_dict"]["state"]
            groups = iter(enumerate(optimizer["fp32_flat_groups"]))
            group, weights = next(groups)
            offset = 0
            for name, shape in (item for shapes_of_group in shapes for item in shapes_of_group.items()):
                while offset == weights.numel():  # no part spans two groups
                    group, weights = next(groups)
                    offset = 0
                length = math.ceil(shape.numel() / data_size)
                start = data_rank * length
                used = max(0, min(length, shape.numel() - start))  # the last parts end in padding
                for kind, flat in [(WEIGHT, weights), *_element_states(kept_states.get(group, {}))]:
                    if used:
                        yield kind, name, MappedPiece(start, flat[offset : offset + used])
                offset += length

    def _get_optimizer(self, data_rank: int, suffix: str) -> dict[str, Any]:
        optimizer: dict[str, Any] = self._get(f"zero_pp_rank_{data_rank}_{suffix}_optim_states.pt")[
            "optimizer_state_dict"
        ]
        return optimizer

    def _get(self, ending: str) -> dict[str, Any]:
        """Return what a file holds; DeepSpeed puts ``bf16_`` before some of the names."""
        for name in (ending, f"bf16_{ending}"):
            if name in self._states:
                return self._states[name]
        raise CheckpointError(f"{self._folder / ending} is not in {MANIFEST}, which lists the files of the checkpoint")

    def _refusal(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self._folder} does not hold the optimizer as DeepSpeed writes it: {type(error).__name__}: {error}"
        )


def _iterate_whole(states: dict[str, Any], parameters: Mapping[str, ParameterEntry]) -> _Found:
    for name in parameters:
        yield WEIGHT, name, MappedPiece(0, states["module"][name].flatten())
    matrices = [name for name, entry in parameters.items() if len(entry.shape) > 1]
    vectors = [name for name, entry in parameters.items() if len(entry.shape) == 1]
    for number, kept in states["optimizer"]["state"].items():
        for kind, tensor in _element_states(kept):
            yield kind, [*matrices, *vectors][number], MappedPiece(0, tensor.flatten())


def _element_states(kept: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the states that have a value for each element: not the number of steps."""
    return ((kind, value) for kind, value in kept.items() if torch.is_tensor(value) and value.dim() > 0)
