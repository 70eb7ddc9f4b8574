"""Checks of lm-evaluation-harness tasks before a model is loaded: files, data, templates, examples and labels.

No code of megalibi takes part while the harness loads a task or renders its documents. Whatever is raised then comes
from the task file, its data or the hub, and becomes an error of one line.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from megalibi.errors import ConfigError, DataError
from megalibi.evaluate.lm_harness import ConfigurableTask, TaskManager, read_writing_options

MAX_REASON = 300
"""Most characters of another package's message that an error repeats."""


def open_tasks(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """Return the harness's task manager, after a check that it knows the tasks.

    Args:
        names: The names of tasks, groups or tags.
        include_path: A folder with more task files; None: there is none.

    Raises:
        ConfigError: There is no such folder or task.
        DataError: The task files cannot be read.
    """
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include-path={include_path}: must be a folder, and there is none of that name")
    with _blame(f"--include-path={include_path} cannot be read"):
        if include_path is not None:
            # Its thousands of own tasks take the harness seconds to read; a group may name some of them.
            own = TaskManager(include_path=str(include_path), include_defaults=False)
            if set(names) <= set(own.all_subtasks):
                return own
        tasks = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in tasks.task_index:
            near = difflib.get_close_matches(name, tasks.task_index, n=1)
            hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists those of the harness"
            broken = None if include_path is None else find_broken_file(include_path)
            also = "" if broken is None else f"; and a task file cannot be read, {broken}"
            raise ConfigError(f"--tasks={name}: must be a task; {hint}{also}")
    return tasks


def prepare_tasks(
    manager: TaskManager, names: Sequence[str], *, num_fewshot: int | None, limit: int | None
) -> list[Any]:
    """Load tasks, and render every document that the model will be asked about.

    Args:
        manager: The harness's task manager.
        names: The names of tasks, groups or tags that it knows.
        num_fewshot: Number of examples before each question; None: each task decides.
        limit: Number of questions of each task; None: all of them.

    Returns:
        The harness's tasks and groups, for simple_evaluate.

    Raises:
        DataError: A task, its data, a template, a label or the number of examples cannot be used.
    """
    prepared: list[Any] = []
    for name in names:
        with _blame(f"--tasks={name} cannot be loaded"):
            loaded = manager.load([name])
        for task_name, task in loaded["tasks"].items():
            _set_num_fewshot(task, num_fewshot)
            _check_task(task_name, task, limit)
        groups = loaded["groups"]
        prepared.extend([groups[name]] if name in groups else loaded["tasks"].values())
    return prepared


def find_broken_file(folder: Path) -> str | None:
    """Return what is wrong with the first task file of a folder that is not YAML; None: all files are YAML."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)  # does not look at the harness's own tags
        except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
            return f"{path}: {_shorten(str(error))}"
    return None


def _set_num_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Set the number of examples as simple_evaluate does: a task that sets 0 keeps it."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def _check_task(name: str, task: Any, limit: int | None) -> None:
    """Render the documents of a task, and check for what the harness scores wrongly or fails at after the work."""
    with _blame(f"task {name} cannot be asked", task.get_config("num_fewshot")):
        task.set_fewshot_seed(seed=0)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        documents = [document for _, document in task.doc_iterator(limit=limit)]
        targets = [task.doc_to_target(document) for document in documents]
    for instance in task.instances:
        if not all(isinstance(argument, (str, dict)) for argument in instance.args):
            raise DataError(f"task {name} cannot be asked: {_shorten(repr(instance.args))} are not all texts")
        if instance.request_type == "generate_until":
            read_writing_options(instance.args[1])
    if not isinstance(task, ConfigurableTask) or task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
        return
    for number, (document, target) in enumerate(zip(documents, targets, strict=True)):
        choices = list(task.doc_to_choice(document))
        if not all(_is_label(label, choices) for label in (target if isinstance(target, list) else [target])):
            raise DataError(
                f"task {name} cannot be scored: the label of document {number} is {_shorten(repr(target))}, but must "
                f"be one of {_shorten(repr(choices))} or its number from 0; mend doc_to_target or the data"
            )


def _is_label(label: Any, choices: Sequence[str]) -> bool:
    if isinstance(label, (int, float)):
        return 0 <= label < len(choices) and label == int(label)
    return isinstance(label, str) and label in choices


@contextlib.contextmanager
def _blame(what: str, num_fewshot: int | None = None) -> Iterator[None]:
    """Turn any error of the harness, or of a package it uses, into one line that says what cannot be done."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {_shorten(str(error))}"
        if num_fewshot and "population" in str(error):  # the error of random.sample
            remedy = f"it has too few examples for num_fewshot={num_fewshot}, give a smaller --num-fewshot"
        elif isinstance(error, ConnectionError) or "offline" in reason.lower() or "on the Hub" in reason:
            remedy = "its data is not on this machine: load it once without --offline, where the hub can be reached"
        elif isinstance(error, IndexError) and "string index" in str(error):
            remedy = "the harness takes no empty text for a choice of the first document, give another order"
        else:
            remedy = "mend the task file or its data"
        raise DataError(f"{what}: {remedy} ({reason})") from error


def _shorten(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= MAX_REASON else f"{words[:MAX_REASON]}..."
