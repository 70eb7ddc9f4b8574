"""Saving a DeepSpeed engine's state so that a crash at any moment leaves the last checkpoint loadable.

A save has two parts. Every rank writes its files into ``step_00000100.partial`` and syncs them; when all have done so,
rank 0 writes the manifest and renames the folder. In the background both parts run in a thread of each rank, on a copy
in host memory. Such a thread calls no collective, for the training calls them meanwhile on the same groups: the ranks
tell each other how far they are where all of them ask, between two steps.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from megalibi.checkpoint.folder import checkpoint_name, commit
from megalibi.checkpoint.manifest import FileEntry, Manifest
from megalibi.checkpoint.writing.attempt import Attempt, attempt
from megalibi.checkpoint.writing.description import SavedRun, describe_checkpoint
from megalibi.checkpoint.writing.host_memory import explain_lack
from megalibi.checkpoint.writing.rank_files import RankFiles, list_rank_files, write_rank_files
from megalibi.checkpoint.writing.snapshot import Snapshot, count_snapshot_bytes
from megalibi.checkpoint.writing.task import BackgroundTask
from megalibi.config import Config, Derived
from megalibi.data.tokens.identity import DataIdentity
from megalibi.engine.masters import find_masters
from megalibi.errors import FileError
from megalibi.files import make_folder
from megalibi.metrics.records import RollbackRecord
from megalibi.parallel import ProcessGroups, all_reduce_raw, gather_objects
from megalibi.partial import PARTIAL_SUFFIX


@dataclass(kw_only=True)
class _Pending:
    step: int
    partial: Path
    draft: Manifest
    task: BackgroundTask[Attempt[dict[str, FileEntry]]]
    committing: BackgroundTask[Attempt[Path]] | None = None
    """Of rank 0, once all ranks have written; the others wait for it to be done."""
    error: str | None = None
    """Why rank 0 could not begin to commit."""
    is_written: bool = False


class CheckpointSaver:
    """Writes the checkpoints of a run. Every rank calls each method at the same place; none deletes another checkpoint.

    Args:
        run: What the checkpoints are made of.
    """

    def __init__(self, run: SavedRun) -> None:
        self._run = run
        self._snapshot = Snapshot()
        self._pending: _Pending | None = None

    @property
    def pending_step(self) -> int | None:
        """The step that is being saved in the background; None: no save is in flight."""
        return None if self._pending is None else self._pending.step

    def note_rollbacks(self, rollbacks: tuple[RollbackRecord, ...]) -> None:
        """Let the checkpoints from here on say which loss spikes took the run back; no save is in flight."""
        assert self._pending is None
        self._run = dataclasses.replace(self._run, rollbacks=rollbacks)

    def explain_lack_of_memory(self) -> str | None:
        """Return why no copy of the ranks' files should be made in the hosts' memory, or None if there is room."""
        size, error = attempt(lambda: count_snapshot_bytes(self._list_files()), self._run.folder)
        self._raise_together(error, None)
        assert size is not None
        return explain_lack(size, self._run.groups.world)

    def save(self, step: int) -> Path:
        """Write a checkpoint while the training waits, and return its folder.

        Args:
            step: The number of optimizer steps done.

        Raises:
            FileError: On every rank, if a rank could not write or ``latest`` cannot be used; the checkpoints before
                are whole.
        """
        assert self._pending is None
        run, partial = self._run, self._make_partial(step)
        written, error = attempt(
            lambda: (describe_checkpoint(run, step), write_rank_files(partial, self._list_files())), partial
        )
        draft, entries = written or (None, {})
        manifest = self._complete(draft, entries, error, partial)
        error = attempt(lambda: _commit(partial, manifest), partial).error if self._is_first else None
        self._raise_together(error, partial)
        return run.folder / checkpoint_name(step)

    def begin(self, step: int) -> None:
        """Copy what the checkpoint will hold to host memory, and write it in the background.

        Args:
            step: The number of optimizer steps done.

        Raises:
            FileError: On every rank, if a rank has no room for the copy, or the folder cannot be made.
        """
        assert self._pending is None
        run, partial = self._run, self._make_partial(step)

        def begin_writing() -> _Pending:
            draft, files = describe_checkpoint(run, step), self._snapshot.copy(self._list_files())
            task = BackgroundTask(lambda: attempt(lambda: write_rank_files(partial, files), partial))
            return _Pending(step=step, partial=partial, draft=draft, task=task)

        pending, error = attempt(begin_writing, partial)
        errors = gather_objects(error, run.groups.world)
        if any(errors):
            self._wait_for_writers(pending)
        self._raise_first(errors, partial, "; checkpoint.asynchronous=false needs no memory for a copy")
        self._pending = pending

    def poll(self, *, wait: bool = False) -> int | None:
        """Go on with the save in flight if all ranks are done with its present part.

        Args:
            wait: Wait for this rank's work, and for the other ranks.

        Returns:
            The step, if its checkpoint is complete now; None: it is not yet, or there is no save in flight.

        Raises:
            FileError: On every rank, if a rank could not write; the checkpoints before are whole.
        """
        pending = self._pending
        if pending is None:
            return None
        task = pending.committing if pending.is_written else pending.task
        if wait and task is not None:
            task.result()
        if not self._all_ranks(task is None or task.is_done):
            return None
        try:
            return self._end_part(pending)
        except BaseException:
            self._pending = None
            raise

    def finish(self) -> int | None:
        """Wait for the save in flight; return its step, or None if there is none.

        Raises:
            FileError: On every rank, if a rank could not write; the checkpoints before are whole.
        """
        step = None
        while self._pending is not None:
            step = self.poll(wait=True)
        return step

    def abandon(self) -> bool:
        """Give up the save in flight, unless it is being committed already; return whether one was given up."""
        pending = self._pending
        if pending is None or pending.is_written:
            return False
        self._wait_for_writers(pending)
        self._pending = None
        if self._is_first:
            shutil.rmtree(pending.partial, ignore_errors=True)
        return True

    def _wait_for_writers(self, pending: _Pending | None) -> None:
        """Wait until no rank writes into the folder any more."""
        if pending is not None:
            pending.task.result()
        gather_objects(None, self._run.groups.world)

    def _end_part(self, pending: _Pending) -> int | None:
        """Begin the second part of a save where the first is done, and return the step where the second is."""
        if not pending.is_written:
            entries, error = pending.task.result()
            manifest = self._complete(pending.draft, entries, error, pending.partial)
            pending.is_written = True
            if self._is_first:
                partial = pending.partial
                pending.committing, pending.error = attempt(
                    lambda: BackgroundTask(lambda: attempt(lambda: _commit(partial, manifest), partial)), partial
                )
            return None
        error = pending.error if pending.committing is None else pending.committing.result().error
        self._raise_together(error, pending.partial)
        self._pending = None
        return pending.step

    @property
    def _is_first(self) -> bool:
        return self._run.groups.world.rank == 0

    def _make_partial(self, step: int) -> Path:
        """Make an empty folder to write into; all ranks leave this when it is there."""
        partial = self._run.folder / (checkpoint_name(step) + PARTIAL_SUFFIX)
        error = attempt(lambda: _make_empty(partial), partial)[1] if self._is_first else None
        self._raise_together(error, partial)
        return partial

    def _list_files(self) -> RankFiles:
        run = self._run
        masters = find_masters(run.engine, run.config.optimizer.kind)
        return list_rank_files(masters, run.config.zero.stage, run.groups)

    def _complete(
        self, draft: Manifest | None, entries: dict[str, FileEntry] | None, error: str | None, partial: Path
    ) -> Manifest:
        """Return the manifest with the files of all ranks, if all have written theirs."""
        by_rank = gather_objects((entries or {}, error), self._run.groups.world)
        self._raise_first([error for _, error in by_rank], partial)
        assert draft is not None
        files = dict(sorted(item for files, _ in by_rank for item in files.items()))
        return dataclasses.replace(draft, files=files)

    def _all_ranks(self, is_done: bool) -> bool:
        """Return whether something is done on all ranks; it costs a number's all-reduce."""
        waiting = torch.tensor(int(not is_done), device=self._run.engine.device)
        return int(all_reduce_raw(waiting, self._run.groups.world, dist.ReduceOp.MAX)) == 0

    def _raise_together(self, error: str | None, partial: Path | None, advice: str = "") -> None:
        """Raise on every rank what any rank met, and remove the half-written folder."""
        self._raise_first(gather_objects(error, self._run.groups.world), partial, advice)

    def _raise_first(self, errors: list[str | None], partial: Path | None, advice: str = "") -> None:
        met = [error for error in errors if error is not None]
        if met:
            if self._is_first and partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            raise FileError(f"checkpoint not written, the one before it stays: {met[0]}{advice}")


def save_checkpoint(
    engine: DeepSpeedEngine,
    config: Config,
    derived: Derived,
    data: DataIdentity,
    groups: ProcessGroups,
    *,
    folder: Path,
    step: int,
    run_id: str,
) -> Path:
    """Write one checkpoint, and return its folder; the arguments are those of SavedRun.

    Raises:
        FileError: In the cases in which CheckpointSaver.save raises it.
    """
    run = SavedRun(
        engine=engine, config=config, derived=derived, data=data, groups=groups, folder=folder, run_id=run_id
    )
    return CheckpointSaver(run).save(step)


def _make_empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)


def _commit(partial: Path, manifest: Manifest) -> Path:
    """Turn a folder into the checkpoint that the manifest describes, and return its new path."""
    for name, entry in manifest.files.items():
        path = partial / name
        if not path.is_file() or path.stat().st_size != entry.size_bytes:
            place = "put train.output_dir on a disk of all hosts"
            raise FileError(f"{path}: rank 0 does not see what another rank wrote; {place}")
    return commit(partial, manifest)
