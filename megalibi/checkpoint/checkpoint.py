"""A checkpoint as one object, which every reader opens: its manifest, its configuration, and its verified weights."""

from __future__ import annotations

import dataclasses
import hashlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from megalibi.checkpoint.folder import get_checkpoint
from megalibi.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from megalibi.checkpoint.parameters import ParameterEntry, build_without_memory, describe_parameters
from megalibi.checkpoint.tensors.saved_state import RankSlice, SavedState
from megalibi.checkpoint.tensors.state_file import WEIGHT
from megalibi.config import Config, config_from_dict, padded_vocab_size
from megalibi.errors import CheckpointError
from megalibi.model import DTYPES, GPT
from megalibi.parallel import (
    ALONE,
    Group,
    Layout,
    ProcessGroups,
    gather_objects,
    get_shard_spec,
    refusing_together,
    single_process_groups,
)

USE_ANOTHER = "; use another checkpoint"
_HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, of a run on any topology. Its files are read when their content is asked for."""

    path: Path
    """The folder of its step."""
    manifest: Manifest
    """What it says of itself."""

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open what a user names: a step's folder, or the latest checkpoint of a run's folder or its ``checkpoints``.

        Raises:
            CheckpointError: There is none, or its manifest is damaged or of a later version.
            FileError: Its manifest may not be read.
        """
        folder = get_checkpoint(path)
        return cls(folder, read_manifest(folder))

    @cached_property
    def config(self) -> Config:
        """The configuration of the run that wrote it; a field that is newer than the checkpoint has its default."""
        return config_from_dict(self.manifest.config)

    @cached_property
    def parameters(self) -> dict[str, ParameterEntry]:
        """Every parameter by name, in the order of the model."""
        if self.manifest.format_version > 1:
            return self.manifest.parameters
        model = build_without_memory(
            self.config,
            padded_vocab_size=self.manifest.derived["padded_vocab_size"],
            tensor_parallel_size=self.manifest.topology["tensor_parallel_size"],
        )
        return describe_parameters(model, DTYPES[self.config.train.precision])

    def verify(self, world: Group = ALONE, advice: str = USE_ANOTHER, *, host: str | None = None) -> None:
        """Compare every file with the manifest. The ranks of one host share the work: it reads each file once.

        Every rank must call it. Each host reads all files, for it may have a copy of its own.

        Args:
            world: All ranks. They must have opened the same checkpoint, by whatever path.
            advice: What the user can do about a damaged file, put after what is wrong.
            host: The name of this rank's host; None: what the system calls it.

        Raises:
            CheckpointError: On every rank, with the same line: the ranks opened different checkpoints, and both are
                named; or a file is missing or damaged, and named with the host.
            FileError: On every rank: a file may not be read.
        """
        host = host or socket.gethostname()
        opened = gather_objects((self.manifest.step, self.manifest.checksum, str(self.path), host), world)
        _check_same_checkpoint(opened)
        neighbours = [rank for rank, (*_, theirs) in enumerate(opened) if theirs == host]
        with refusing_together(world, self.path, advice):
            for damage in self.find_damage(part=neighbours.index(world.rank), parts=len(neighbours)):
                raise CheckpointError(damage)

    def find_damage(self, *, part: int = 0, parts: int = 1) -> Iterator[str]:
        """Read files and yield what is wrong, one line each; nothing if they are as they were written.

        Args:
            part: Which share of the files to read.
            parts: The number of shares; they are of about equal size.
        """
        pool = ThreadPoolExecutor(2)  # hashlib lets other threads run meanwhile
        try:
            yield from filter(None, pool.map(self.find_damage_of, _share_files(self.manifest, parts)[part]))
        finally:
            pool.shutdown(cancel_futures=True)  # the caller may want the first damage alone

    def find_damage_of(self, name: str) -> str | None:
        """Read one file, and return what is wrong with it in a line; None if it is as it was written.

        Args:
            name: The file, as the manifest names it.

        Raises:
            OSError: The file may not be read.
        """
        entry, path = self.manifest.files[name], self.path / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry.size_bytes:
            return f"{path} has {path.stat().st_size} bytes instead of {entry.size_bytes}"
        if hash_file(path) != entry.sha256:
            return f"{path} is damaged: its checksum is not the one in {MANIFEST}"
        return None

    def read_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Verify every file; then yield every parameter with its name, one after the other.

        A parameter is whole, without padding, on the CPU, and in the precision in which the model computes. One with
        several names has the first of them: a tied output layer is ``embedding.weight``.

        Raises:
            CheckpointError: A file is missing, damaged, would run code, or does not hold what the manifest says.
            FileError: A file may not be read.
        """
        self.verify()
        saved = self.read_state()
        for name, entry in self.parameters.items():
            yield name, saved.read_whole(name).to(entry.torch_dtype)

    def read_state(self) -> SavedState:
        """Return the tensors of the checkpoint, which are read when they are asked for; nothing is verified.

        Raises:
            CheckpointError: A file cannot be loaded, or would run code.
            FileError: A file may not be read.
        """
        return SavedState(self.path, self.manifest, self.parameters)

    def check_parameters(self, model: nn.Module) -> None:
        """Check that a model has the parameters of the checkpoint; how they are cut does not matter.

        Args:
            model: The slices of one tensor rank; ZeRO 3 may have cut them further.

        Raises:
            CheckpointError: It has others.
        """
        needed = {name: entry.shape for name, entry in describe_parameters(model, torch.float32).items()}
        if needed != {name: entry.shape for name, entry in self.parameters.items()}:
            raise CheckpointError(f"{self.path / MANIFEST} has parameters that are not those of its configuration")

    def load_model(
        self, device: torch.device, groups: ProcessGroups | None = None, *, is_verified: bool = False
    ) -> GPT:
        """Verify every file, and return the model, in the precision of its run, ready to be evaluated.

        Args:
            device: Where the model will compute.
            groups: The ranks that load it together, every one of which must call it: those of ``groups.tensor`` share
                the layers, and those of ``groups.world`` on one host the verification. None: this process is alone.
            is_verified: Whether the caller has called ``verify`` already, which reads every file.

        Raises:
            CheckpointError: On every rank, with the same line: the ranks opened different checkpoints, or a file is
                missing, damaged, would run code, or does not hold what the manifest says.
            FileError: On every rank: a file may not be read.
        """
        groups = groups or single_process_groups()
        if not is_verified:
            self.verify(groups.world)
        with refusing_together(groups.world, self.path):
            return self._fill_model(device, groups.tensor)

    def _fill_model(self, device: torch.device, group: Group) -> GPT:
        # Which kernels can run is a matter of this machine, not of the one that trained.
        model_config = dataclasses.replace(self.config.model, attention_backend="auto")
        dtype = DTYPES[self.config.train.precision]
        rows = model_config.vocab_size if group.size == 1 else padded_vocab_size(model_config.vocab_size, group.size)
        with device:
            model = GPT(model_config, padded_vocab_size=rows, layout=Layout(group), compute_dtype=dtype)
        model.to(dtype).requires_grad_(False).eval()
        self.check_parameters(model)
        saved = self.read_state()
        for name, parameter in model.named_parameters():
            cut = RankSlice(get_shard_spec(parameter), group.rank, group.size)
            parameter.copy_(saved.read_stretch(name, WEIGHT, 0, parameter.numel(), cut).view_as(parameter))
        return model


def _check_same_checkpoint(opened: list[tuple[int, str, str, str]]) -> None:
    """Check that all ranks have the step and the checksum of rank 0; of each rank these, the path and the host."""
    for rank, (step, checksum, path, host) in enumerate(opened):
        first_step, first_checksum, first_path, first_host = opened[0]
        if (step, checksum) != (first_step, first_checksum):
            raise CheckpointError(
                f"the ranks opened different checkpoints: {first_path} (step {first_step}, manifest sha256 "
                f"{first_checksum[:12]}) on rank 0 (host {first_host}) and {path} (step {step}, manifest sha256 "
                f"{checksum[:12]}) on rank {rank} (host {host}); give the folder of one step, and all hosts the same "
                "copy of it"
            )


def _share_files(manifest: Manifest, parts: int) -> list[list[str]]:
    """Return the names of the files in shares of about equal size: the largest first, each to the smallest share."""
    shares: list[list[str]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for name, entry in sorted(manifest.files.items(), key=lambda item: (-item[1].size_bytes, item[0])):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(name)
        sizes[smallest] += entry.size_bytes
    return shares


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
