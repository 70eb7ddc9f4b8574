"""From text to a token file: several worker processes encode, this one reads and writes, in the order of the input."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megalibi.data.provenance import check_replaceable, describe_token_file, provenance_path, to_json
from megalibi.data.text.documents import DocumentReader, Piece, TextUnit, join_pieces
from megalibi.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megalibi.data.tokenizer.words import WordTokenizer
from megalibi.data.tokens.token_file import TokenFileWriter, token_dtype
from megalibi.errors import ConfigError, DataError, FileError, JobError
from megalibi.files import make_folder, write_aside
from megalibi.log import get_logger

_LOGGER = get_logger(__name__)
_TASK_CHARACTERS = 262_144  # large enough that sending it costs little, small enough that workers end together
_MAX_WORKERS = 1_024
_TASKS_PER_WORKER = 4  # being encoded or waiting: this bounds the memory


class Written(NamedTuple):
    """How much has been written so far."""

    documents: int
    """The number of documents in the token file."""
    tokens: int
    """The number of tokens in the token file."""
    text_bytes: int
    """The number of UTF-8 bytes of text that were read for it."""
    characters: int = 0
    """The number of characters that were read for it."""
    lost_characters: int = 0
    """The number of characters for which the tokenizer has no id."""


class _Encoded(NamedTuple):
    tokens: npt.NDArray[np.integer[Any]]
    document_ends: list[int]
    text_bytes: int
    characters: int
    lost_characters: int


def preprocess(
    inputs: Sequence[str],
    *,
    tokenizer_path: str,
    output: str,
    text_key: str = "text",
    text_unit: TextUnit = "document",
    workers: int = 1,
    overwrite: bool = False,
    skip_bad_records: bool = False,
    report: Callable[[Written], None] = lambda progress: None,
) -> Written:
    """Encode documents, each ended as the tokenizer ends one, into OUTPUT.bin and OUTPUT.idx; OUTPUT.json says how.

    The files do not depend on the number of workers, and appear only when they are complete. What was left out of the
    text, and what the tokenizer could not represent, is said at the end.

    Args:
        inputs: See megalibi.data.text.documents.DocumentReader, as for text_key, text_unit and skip_bad_records.
        tokenizer_path: A sentencepiece model, or a word-level vocabulary (.words).
        output: PREFIX of the token file.
        text_key: The field that holds the text.
        text_unit: What is one document in a .txt or .tokens file.
        workers: Number of encoding processes.
        overwrite: Whether an existing token file may be replaced.
        skip_bad_records: Whether records whose text cannot be had are counted and left out.
        report: Called with the state whenever some documents have been written.

    Returns:
        The final state.

    Raises:
        ConfigError: If the output exists, or the number of workers is out of its range.
        DataError: If an input or the tokenizer cannot be read, or there is no text.
        FileError: If the output cannot be written.
        JobError: If a worker died.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    _check_output(output, overwrite)
    if not 1 <= workers <= _MAX_WORKERS:
        raise ConfigError(f"--workers={workers}: must be from 1 to {_MAX_WORKERS}")
    reader = DocumentReader(
        inputs,
        text_key=text_key,
        text_unit=text_unit,
        keep_empty=tokenizer.counts_lines,
        skip_bad_records=skip_bad_records,
        cut=tokenizer.cut,
    )
    tasks = _tasks(reader if tokenizer.can_cut else join_pieces(reader))
    try:
        make_folder(Path(output).parent)
        with TokenFileWriter(output, tokenizer.vocab_size) as writer:
            _check_output(output, overwrite)  # another run may have ended meanwhile; none can while we write
            progress = _write(writer, _encode_tasks(tasks, tokenizer_path, workers), report)
            if progress.documents == 0:
                raise DataError(f"{', '.join(inputs)}: there is no text in what was read")
        provenance = describe_token_file(
            output,
            tokenizer,
            reader,
            options={"text_key": text_key, "text_unit": text_unit},
            characters=progress.characters,
            lost_characters=progress.lost_characters,
        )
        write_aside(provenance_path(output), to_json(provenance))
    except OSError as error:
        raise FileError(f"{output}: cannot be written: {error.strerror or error}") from error
    except BrokenProcessPool as error:
        raise JobError("a worker process died, most likely for want of memory; use fewer --workers") from error
    _warn(reader, tokenizer, progress)
    return progress


def _warn(reader: DocumentReader, tokenizer: Tokenizer | WordTokenizer, progress: Written) -> None:
    """Say what of the text is not in the tokens."""
    if left_out := reader.describe_left_out():
        _LOGGER.warning("%s", left_out)
    if progress.lost_characters:
        _LOGGER.warning(
            "%s cannot represent %.3g%% of the characters, %s of %s: they are lost",
            tokenizer.path,
            100 * progress.lost_characters / progress.characters,
            f"{progress.lost_characters:,}",
            f"{progress.characters:,}",
        )


def _check_output(output: str, overwrite: bool) -> None:
    for suffix in (".bin", ".idx"):
        if Path(output + suffix).exists() and not overwrite:
            raise ConfigError(f"{output}{suffix} exists; choose another --output, or replace it with --overwrite")
    check_replaceable(output)


def _tasks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    task: list[Piece] = []
    characters = 0
    for piece in pieces:
        task.append(piece)
        characters += len(piece.text)
        if characters >= _TASK_CHARACTERS:
            yield task
            task, characters = [], 0
    if task:
        yield task


def _encode_tasks(tasks: Iterable[list[Piece]], tokenizer_path: str, workers: int) -> Iterator[_Encoded]:
    _start_resource_tracker()
    # spawn: reading the input may have started threads, which a forked process would inherit half alive.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(tokenizer_path,))
    pending: deque[Future[_Encoded]] = deque()
    try:
        for task in tasks:
            pending.append(executor.submit(_encode_task, task))
            if len(pending) >= _TASKS_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _start_resource_tracker() -> None:
    """Start the process that tidies up after multiprocessing so that the end of the terminal leaves it to its work.

    It ignores Ctrl-C and SIGTERM by itself; what is ignored when a process starts, it goes on to ignore.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        resource_tracker.ensure_running()
    finally:
        signal.signal(signal.SIGHUP, before)


def _write(writer: TokenFileWriter, results: Iterable[_Encoded], report: Callable[[Written], None]) -> Written:
    progress = Written(0, 0, 0)
    for encoded in results:
        start = 0
        for end in encoded.document_ends:
            writer.add_document(encoded.tokens[start:end])
            start = end
        writer.add_tokens(encoded.tokens[start:])
        progress = Written(
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            text_bytes=progress.text_bytes + encoded.text_bytes,
            characters=progress.characters + encoded.characters,
            lost_characters=progress.lost_characters + encoded.lost_characters,
        )
        report(progress)
    return progress


_worker_tokenizer: Tokenizer | WordTokenizer | None = None  # one a process: tasks must not carry it


def _start_worker(tokenizer_path: str) -> None:
    global _worker_tokenizer
    for number in (signal.SIGINT, signal.SIGHUP):  # they reach the whole group; the parent ends us in order
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_tokenizer = load_tokenizer(tokenizer_path)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the parent was killed: nobody wants our results


def _encode_task(pieces: list[Piece]) -> _Encoded:
    tokenizer = _worker_tokenizer
    assert tokenizer is not None
    texts = [piece.text for piece in pieces]
    encoded = tokenizer.encode_batch(texts)
    lost_characters = sum(map(tokenizer.count_lost, texts, encoded))
    document_ends = []
    length = 0
    for ids, piece in zip(encoded, pieces, strict=True):
        if piece.ends_document:
            ids += tokenizer.end_of_document(piece.text)
        length += len(ids)
        if piece.ends_document:
            document_ends.append(length)
    return _Encoded(
        tokens=np.fromiter(chain.from_iterable(encoded), token_dtype(tokenizer.vocab_size), length),
        document_ends=document_ends,
        text_bytes=sum(len(text.encode()) for text in texts),
        characters=sum(map(len, texts)),
        lost_characters=lost_characters,
    )
