"""The tensors of a folder that others wrote: safetensors, or the old .bin files of torch.save; one or several files.

Nothing that could run code is loaded, and nothing outside of the folder: an index names files in it, by name alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalibi.errors import CheckpointError, FileError, describe_os_error, spell_line
from megalibi.files import read_json_object

_KINDS = (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
_FLOATING = (torch.float32, torch.bfloat16, torch.float16)
_PREFIX = "transformer."
_T = TypeVar("_T")


class ForeignTensors:
    """The tensors of a folder, read when they are asked for.

    Args:
        folder: The folder.

    Raises:
        CheckpointError: It has no weights, or a file is damaged, would run code, or is not what the index says.
        FileError: A file may not be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[str] = []
        """The names of the files that hold tensors."""
        self.index_file: str | None = None
        """The name of the file that says which of them holds what; None: there is one alone."""
        self._where: dict[str, tuple[str, str]] = {}
        self._opened: tuple[str, Mapping[str, Any]] | None = None
        expected = self._find_files()
        for file in self.files:
            for name in self._list_names(file):
                full = name if name.startswith((_PREFIX, "lm_head.")) else _PREFIX + name  # of the model without head
                if full in self._where:
                    raise CheckpointError(f"{folder / file} holds {name}, which {self._where[full][0]} holds too")
                if expected is not None and expected.get(name) != file:
                    where = f"in {expected[name]}" if name in expected else "nowhere"
                    raise CheckpointError(f"{folder / file} holds {name}, which by the index is {where}")
                self._where[full] = (file, name)
            if expected is not None:
                absent = [name for name, place in expected.items() if place == file and not self._has(name)]
                if absent:
                    raise CheckpointError(f"{folder / file} does not hold {absent[0]}, which by the index is there")

    @property
    def all_files(self) -> list[str]:
        """The names of all files that decided what is read."""
        return self.files if self.index_file is None else [self.index_file, *self.files]

    @property
    def names(self) -> set[str]:
        """The names of all tensors, as the class with an output layer has them."""
        return set(self._where)

    @property
    def are_safetensors(self) -> bool:
        """Whether the files are safetensors."""
        return self.files[0].endswith(".safetensors")

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored, on the CPU.

        Args:
            name: One of ``names``.

        Raises:
            CheckpointError: It cannot be read, or is not of fp32, bf16 or fp16.
        """
        file, stored = self._where[name]
        if self.are_safetensors:
            values: Tensor = self._ask(file, lambda opened: opened.get_tensor(stored))
        else:
            values = self._open_pickle(file)[stored]
        if values.dtype not in _FLOATING:
            raise CheckpointError(f"{self.folder / file}: {stored} is of {values.dtype}: must be fp32, bf16 or fp16")
        return values

    def read_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading its numbers; the arguments and errors are those of ``read``."""
        file, stored = self._where[name]
        if not self.are_safetensors:
            return tuple(self._open_pickle(file)[stored].shape)
        return tuple(self._ask(file, lambda opened: opened.get_slice(stored).get_shape()))

    def _ask(self, file: str, question: Callable[[Any], _T]) -> _T:
        """Return what the library of safetensors says of a file."""
        try:
            with safe_open(self.folder / file, framework="pt") as opened:
                return question(opened)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file} cannot be loaded: {spell_line(str(error))}") from error

    def _has(self, name: str) -> bool:
        return name in self._where or _PREFIX + name in self._where

    def _find_files(self) -> dict[str, str] | None:
        """Find which files hold tensors; return where the index says that each is, if there is one."""
        for single, index in _KINDS:
            if (self.folder / single).is_file():  # which transformers takes before an index
                self.files = [single]
                return None
            if (self.folder / index).is_file():
                places = read_json_object(self.folder / index).get("weight_map")
                if not isinstance(places, dict) or not places:
                    raise CheckpointError(f"{self.folder / index}: weight_map must say which file holds each tensor")
                for name, file in places.items():
                    if not isinstance(file, str) or Path(file).name != file or file in ("", "..", "."):
                        raise CheckpointError(
                            f"{self.folder / index}: {name} is in {file!r}: must be the name of a file in the folder"
                        )
                self.files, self.index_file = sorted(set(places.values())), index
                suffix = Path(single).suffix
                for file in self.files:
                    if not file.endswith(suffix):
                        raise CheckpointError(f"{self.folder / index} names {file}: must end in {suffix}")
                    if not (self.folder / file).is_file():
                        raise CheckpointError(f"{self.folder / index} names {file}, which is missing")
                return places
        raise CheckpointError(
            f"{self.folder} has no weights: must have {_KINDS[0][0]} or {_KINDS[1][0]}, or their index"
        )

    def _list_names(self, file: str) -> list[str]:
        if not file.endswith(".safetensors"):
            return list(self._open_pickle(file))
        return self._ask(file, lambda opened: list(opened.keys()))

    def _open_pickle(self, file: str) -> Mapping[str, Any]:
        if self._opened is None or self._opened[0] != file:
            self._opened = (file, _load_pickle(self.folder / file))
        return self._opened[1]


def _load_pickle(path: Path) -> Mapping[str, Any]:
    """Return the tensors of a file of torch.save; they stay in it until they are used, if its format allows."""
    try:
        try:
            states = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            states = torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except OSError as error:
        raise FileError(describe_os_error(error, path)) from error
    except Exception as error:  # a forged pickle can raise anything
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(f"{path} would run code when loaded, for it names {named[1]}") from error
        raise CheckpointError(f"{path} cannot be loaded as tensors alone: {type(error).__name__}") from error
    if not isinstance(states, dict) or not all(map(_is_plain, states, states.values())):
        raise CheckpointError(f"{path} holds other things than dense tensors by name: it is no file of weights")
    return states


def _is_plain(name: object, values: object) -> bool:
    """Return whether an entry is a dense tensor with its numbers, by a name: no sparse, quantized or empty shell."""
    return (
        isinstance(name, str)
        and isinstance(values, Tensor)
        and values.layout == torch.strided
        and not values.is_quantized
        and values.device.type == "cpu"
        and not values.is_neg()  # views that torch computes when they are used
        and not values.is_conj()
    )
