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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megalibi.config import ConfigError
from megalibi.data.text import Piece, TextUnit, iterate_pieces
from megalibi.data.token_file import TokenFileWriter, token_dtype
from megalibi.data.tokenizer import Tokenizer, load_tokenizer
from megalibi.data.words import WordTokenizer

_TASK_CHARACTERS = 262_144  # large enough that sending it costs little, small enough that workers end together
_TASKS_PER_WORKER = 4  # being encoded or waiting: this bounds the memory


class Progress(NamedTuple):
    """What has been written so far."""

    documents: int
    tokens: int
    text_bytes: int


class _Encoded(NamedTuple):
    tokens: npt.NDArray[np.integer[Any]]
    document_ends: list[int]
    text_bytes: int


def preprocess(
    inputs: Sequence[str],
    *,
    tokenizer_path: str,
    output: str,
    text_key: str = "text",
    text_unit: TextUnit = "document",
    workers: int = 1,
    overwrite: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Encode documents, each ended as the tokenizer ends one, into OUTPUT.bin and OUTPUT.idx.

    The files do not depend on the number of workers, and appear only when they are complete.

    Args:
        inputs: See megalibi.data.text.iterate_pieces, as for text_key and text_unit.
        tokenizer_path: A sentencepiece model, or a word-level vocabulary (.words).
        output: PREFIX of the token file.
        text_key: The column that holds the text.
        text_unit: What is one document in a .txt or .tokens file.
        workers: Number of encoding processes.
        overwrite: Whether an existing token file may be replaced.
        report: Called with the state whenever some documents have been written.

    Returns:
        The final state.

    Raises:
        ConfigError: If the output exists, an input or the tokenizer cannot be read, there is no text, or no space.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    _check_output(output, overwrite)
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least 1 process is needed")
    pieces = iterate_pieces(inputs, text_key=text_key, text_unit=text_unit, keep_empty=tokenizer.counts_lines)
    tasks = _tasks(pieces if tokenizer.can_cut else _join(pieces))
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        with TokenFileWriter(output, tokenizer.vocab_size) as writer:
            progress = _write(writer, _encode_tasks(tasks, tokenizer_path, workers), report)
            if progress.documents == 0:
                raise ConfigError(f"{', '.join(inputs)}: no text in there")
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror or error}") from error
    except BrokenProcessPool as error:
        raise ConfigError("a worker process died, most likely for want of memory; use fewer --workers") from error
    return progress


def _check_output(output: str, overwrite: bool) -> None:
    for suffix in (".bin", ".idx"):
        if Path(output + suffix).exists() and not overwrite:
            raise ConfigError(f"{output}{suffix} exists; choose another --output, or replace it with --overwrite")


def _join(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Put documents together again, for a tokenizer whose pieces reach across spaces."""
    texts: list[str] = []
    for piece in pieces:
        texts.append(piece.text)
        if piece.ends_document:
            yield Piece("".join(texts), True)
            texts = []


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


def _write(writer: TokenFileWriter, results: Iterable[_Encoded], report: Callable[[Progress], None]) -> Progress:
    progress = Progress(0, 0, 0)
    for tokens, document_ends, text_bytes in results:
        start = 0
        for end in document_ends:
            writer.add_document(tokens[start:end])
            start = end
        writer.add_tokens(tokens[start:])
        progress = Progress(writer.num_documents, writer.num_tokens, progress.text_bytes + text_bytes)
        report(progress)
    return progress


_worker_tokenizer: Tokenizer | WordTokenizer | None = None  # one a process: tasks must not carry it


def _start_worker(tokenizer_path: str) -> None:
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us in order
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_tokenizer = load_tokenizer(tokenizer_path)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the parent was killed: nobody wants our results


def _encode_task(pieces: list[Piece]) -> _Encoded:
    assert _worker_tokenizer is not None
    encoded = _worker_tokenizer.encode_batch([piece.text for piece in pieces])
    document_ends = []
    length = 0
    for ids, piece in zip(encoded, pieces, strict=True):
        if piece.ends_document:
            ids += _worker_tokenizer.end_of_document(piece.text)
        length += len(ids)
        if piece.ends_document:
            document_ends.append(length)
    tokens = np.fromiter(chain.from_iterable(encoded), token_dtype(_worker_tokenizer.vocab_size), length)
    return _Encoded(tokens, document_ends, sum(len(piece.text.encode()) for piece in pieces))
