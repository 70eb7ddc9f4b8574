from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megalibi.checkpoint import Checkpoint, save_checkpoint
from megalibi.config import Config, derive
from megalibi.data.tokenizer.tokenizer import Tokenizer
from megalibi.data.tokenizer.training import train_tokenizer
from megalibi.data.tokens.token_file import TokenFileWriter
from megalibi.errors import ConfigError, DataError
from megalibi.evaluate.lm_harness import BATCH_TOKENS, HarnessModel, TaskManager, simple_evaluate
from megalibi.evaluate.lm_tasks import open_tasks, prepare_tasks
from megalibi.model import GPT
from tests.support.planted import plant
from tests.support.ranks import run_on_ranks
from tests.support.runs import CPU, identify, iterate_ours, make_config, process_groups
from tests.support.warm_python import warm_python

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "lm_evaluate.py"
STEPS = 40
LENGTH = 33  # that the model is trained at, and sees at once
MAX_NEW_TOKENS = 6
LOG_PROB_RELATIVE_BOUND = 1e-5  # fp32; other sums than in a padded batch
TEXTS = [(ROOT / "megalibi" / "config" / name).read_text() for name in ("schema.py", "derive.py", "load.py")]
CHOICES = [
    {"question": "def __post_init__(self) -> ", "choices": ["None", "Config", "a check"]},
    {"question": "from __future__ import ", "choices": ["torch", "annotations"]},
    {"question": "x = 1  # more than the model sees at once\n" * 8, "choices": ["raise", "return ConfigError"]},
    {"question": "", "choices": ["@dataclass", "zzz"]},
]
NUM_RIGHT = 3  # the answers of the others are what the model finds least likely
ROLLING = [{"text": TEXTS[1][:700]}, {"text": "Raises:\n"}]
WRITING = [{"question": "from megalibi.config.", "stop": "\n"}, {"question": "if not math.is", "stop": "("}]


def write_task(folder: Path, name: str, documents: list[dict[str, Any]], **fields: Any) -> None:
    """Write a task file; the harness reads YAML, and JSON is YAML."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "target_delimiter": "",
        **fields,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def train_and_save(config: Config) -> None:
    for step, (engine, _) in enumerate(iterate_ours(config, STEPS), start=1):
        if step == STEPS:
            groups = process_groups(1)
            folder = Path(config.train.output_dir) / "checkpoints"
            save_checkpoint(
                engine, config, derive(config, 1), identify(config), groups, folder=folder, step=STEPS, run_id="a"
            )


@dataclass(frozen=True)
class Trained:
    folder: Path
    model: GPT
    tokenizer: Tokenizer

    @property
    def harness(self) -> HarnessModel:
        return HarnessModel(self.model, self.tokenizer, max_length=LENGTH, device=CPU)

    @torch.no_grad()
    def log_likelihood(self, tokens: list[int], num_scored: int) -> float:
        """Of the last tokens, one by one, each with the tokens before it that the model sees at once."""
        total = 0.0
        for place in range(len(tokens) - num_scored, len(tokens)):
            stream = torch.tensor([tokens[max(0, place - LENGTH) : place + 1]])
            total -= self.model(stream[:, :-1], stream[:, 1:])[0, -1].item()
        return total

    @torch.no_grad()
    def likeliest(self, tokens: list[int]) -> int:
        """The next token of least loss, each asked for by itself."""
        seen = torch.tensor(tokens[-LENGTH:]).expand(self.tokenizer.vocab_size, -1)
        labels = torch.full_like(seen, -100)
        labels[:, -1] = torch.arange(self.tokenizer.vocab_size)
        return int(self.model(seen, labels)[:, -1].argmin())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model that has learned a little, and task files."""
    folder = tmp_path_factory.mktemp("run")
    train_tokenizer(TEXTS, 400, folder / "t.model")
    tokenizer = Tokenizer(folder / "t.model")
    with TokenFileWriter(folder / "text", tokenizer.vocab_size) as writer:
        for text in TEXTS:
            writer.add_document([*tokenizer.encode(text), tokenizer.end_of_document_id])
    config = make_config(
        str(folder / "text"),
        model={"vocab_size": 403},  # more than the tokenizer has
        data={"tokenizer": str(folder / "t.model"), "seq_length": LENGTH},
        train={"output_dir": str(folder)},
    )
    run_on_ranks(1, train_and_save, config)
    torch.set_num_threads(1)  # so small that threads only wait for each other
    (folder / "tasks").mkdir()
    model = Checkpoint.open(folder / "checkpoints" / f"step_{STEPS:08d}").load_model(CPU)
    trained = Trained(folder, model, tokenizer)
    write_task(
        folder / "tasks",
        "our_choice",
        [{**d, "answer": choose(trained, d, most=number < NUM_RIGHT)} for number, d in enumerate(CHOICES)],
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}],
    )
    write_task(
        folder / "tasks",
        "our_text",
        ROLLING,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    )
    return trained


def written_by(trained: Trained, question: str, stop: str) -> str:
    """What greedy decoding writes, by its definition."""
    tokens = trained.tokenizer.encode(question)
    start = len(tokens)
    for _ in range(MAX_NEW_TOKENS):
        token = trained.likeliest(tokens)
        if token == trained.tokenizer.end_of_document_id:
            break
        tokens.append(token)
    return trained.tokenizer.decode(tokens[start:]).partition(stop)[0]


def encode_pair(trained: Trained, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of a context, and those by which it and a continuation are longer; spaces belong to the latter."""
    context_ids = trained.tokenizer.encode(context.rstrip())
    ids = trained.tokenizer.encode(context + continuation)[len(context_ids) :]
    return context_ids or [trained.tokenizer.end_of_document_id], ids


def likelihood_of(trained: Trained, context: str, continuation: str) -> float:
    context_ids, ids = encode_pair(trained, context, continuation)
    # What is too long is cut once, for the whole continuation.
    return trained.log_likelihood((context_ids + ids)[-LENGTH - 1 :], len(ids))


def choose(trained: Trained, document: dict[str, Any], *, most: bool) -> int:
    """Return the likeliest choice, or the least likely one."""
    likelihoods = [likelihood_of(trained, document["question"], choice) for choice in document["choices"]]
    return likelihoods.index(max(likelihoods) if most else min(likelihoods))


def run_tool(trained: Trained, tasks: str, *options: str) -> subprocess.CompletedProcess[str]:
    folder = trained.folder
    command = [warm_python(), str(TOOL), "--checkpoint", str(folder), "--tasks", tasks, "--offline"]
    command += ["--include-path", str(folder / "tasks"), "--output", str(folder / "out.json"), *options]
    environment = {**os.environ, "HF_HOME": str(folder / "cache")}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_three_kinds_of_tasks_have_the_answers_of_our_own_losses(trained: Trained) -> None:
    written = [written_by(trained, **document) for document in WRITING]
    for number, document in enumerate(WRITING):  # the second one's answer is not what the model writes
        write_task(
            trained.folder / "tasks",
            f"our_writing{number}",
            [{**document, "answer": written[number] if number == 0 else "something else"}],
            output_type="generate_until",
            doc_to_text="{{question}}",
            doc_to_target="{{answer}}",
            generation_kwargs={"until": [document["stop"]], "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False},
            metric_list=[{"metric": "exact_match"}],
        )
    done = run_tool(trained, "our_choice,our_text,our_writing0,our_writing1")
    assert done.returncode == 0, done.stderr
    fields = json.loads((trained.folder / "out.json").read_text())
    results = fields["results"]

    assert results["our_choice"]["acc,none"] == NUM_RIGHT / len(CHOICES)

    total, num_bytes = 0.0, 0
    for document in ROLLING:
        total += rolling_likelihood(trained, document["text"])
        num_bytes += len(document["text"].encode())
    bits = -total / math.log(2) / num_bytes
    assert results["our_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=LOG_PROB_RELATIVE_BOUND)
    assert results["our_text"]["byte_perplexity,none"] == pytest.approx(2**bits, rel=LOG_PROB_RELATIVE_BOUND)

    assert written[0]
    assert results["our_writing0"]["exact_match,none"] == 1.0
    assert results["our_writing1"]["exact_match,none"] == 0.0
    assert (fields["step"], fields["max_length"], fields["versions"].keys()) == (
        STEPS, LENGTH, {"megalibi", "python", "torch", "lm_eval"}
    )  # fmt: skip
    assert f"our_text: bits_per_byte {results['our_text']['bits_per_byte,none']:.4f}" in done.stdout


def rolling_likelihood(trained: Trained, text: str) -> float:
    """Blocks that do not overlap; the last one reaches back to be whole, and scores what is new to it."""
    tokens = [trained.tokenizer.end_of_document_id, *trained.tokenizer.encode(text)]
    total = 0.0
    for scored_from in range(1, len(tokens), LENGTH):
        scored_to = min(scored_from + LENGTH, len(tokens))
        start = max(0, scored_to - LENGTH - 1)
        stream = torch.tensor([tokens[start:scored_to]])
        with torch.no_grad():
            total -= trained.model(stream[:, :-1], stream[:, 1:])[0, scored_from - scored_to :].sum().item()
    return total


@dataclass(frozen=True)
class Request:
    args: tuple[Any, ...]


def test_many_requests_in_batches_are_each_as_alone_and_in_order(trained: Trained) -> None:
    text = TEXTS[0]
    pairs = [(text[i : i + 7 + i % 90], text[i + 7 + i % 90 : i + 12 + i % 90]) for i in range(0, 3000, 41)]
    contexts = [context.rstrip() for context, _ in pairs[:10]]
    likeliest = [trained.likeliest(trained.tokenizer.encode(context)) for context in contexts]
    pairs[:10] = [(c, trained.tokenizer.decode([token])) for c, token in zip(contexts, likeliest, strict=True)]
    results = trained.harness.loglikelihood([Request(pair) for pair in pairs], disable_tqdm=True)
    assert len(pairs) * LENGTH > BATCH_TOKENS  # several forward passes
    greedy = []
    for (context, continuation), (likelihood, is_greedy) in zip(pairs, results, strict=True):
        expected = likelihood_of(trained, context, continuation)
        assert likelihood == pytest.approx(expected, rel=LOG_PROB_RELATIVE_BOUND)
        context_ids, ids = encode_pair(trained, context, continuation)
        kept = (context_ids + ids)[-LENGTH - 1 :]
        places = range(len(kept) - len(ids), len(kept))
        assert is_greedy == all(trained.likeliest(kept[:place]) == kept[place] for place in places)
        greedy.append(is_greedy)
    assert any(greedy)
    assert not all(greedy)


def test_a_continuation_longer_than_the_window_is_refused(trained: Trained) -> None:
    message = f"--max-length={LENGTH}: must be at least the [0-9]+ tokens of 'from __future__"
    with pytest.raises(ConfigError, match=message):
        trained.harness.loglikelihood(
            [Request(("x", TEXTS[1][TEXTS[1].index("from __future__") :]))], disable_tqdm=True
        )


def test_drawing_at_random_is_refused(trained: Trained) -> None:
    options = {"until": ["\n"], "do_sample": True, "temperature": 0.7}
    with pytest.raises(
        DataError,
        match=r"^generation_kwargs=.*'do_sample': True.*: must have do_sample: false, nothing is drawn at random here",
    ):
        trained.harness.generate_until([Request(("x", options))], disable_tqdm=True)


def test_nothing_is_certain_to_follow_anything(trained: Trained) -> None:
    pairs = [("", ""), ("from ", "__future__"), ("x = ", ""), ("", "import")]
    results = trained.harness.loglikelihood([Request(pair) for pair in pairs], disable_tqdm=True)
    assert results[0] == results[2] == (0.0, True)
    for number in (1, 3):
        expected = likelihood_of(trained, *pairs[number])
        assert results[number][0] == pytest.approx(expected, rel=LOG_PROB_RELATIVE_BOUND)


CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
WRITE: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match"}],
}
ANSWERED = [{"question": f"{number}: ", "choices": ["a", "b"], "answer": number % 2} for number in range(4)]
BROKEN_TASKS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "no_file": (
        {**CHOICE, "dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}},
        ANSWERED,
        "--tasks=CASE cannot be loaded: mend the task file or its data \\(FileNotFoundError: .*nowhere.jsonl",
    ),
    "no_split": ({**CHOICE, "test_split": "other"}, ANSWERED, "--tasks=CASE cannot be loaded: .*KeyError"),
    "no_output_type": ({**CHOICE, "output_type": "singing"}, ANSWERED, "--tasks=CASE cannot be loaded: .*singing"),
    "template": ({**CHOICE, "doc_to_text": "{{question"}, ANSWERED, "cannot be loaded: .*TemplateSyntaxError"),
    "field": ({**CHOICE, "doc_to_text": "{{a.b}}"}, ANSWERED, "cannot be loaded: .*UndefinedError: 'a' is undefined"),
    "later_field": (
        {**CHOICE, "doc_to_text": "{{question if answer == 0 else a.b}}"},
        ANSWERED,
        "task CASE cannot be asked: mend the task file or its data .*'a' is undefined",
    ),
    "target": (
        {**WRITE, "doc_to_target": "{{answer if answer == 0 else a.b}}"},
        ANSWERED,
        "task CASE cannot be asked: mend the task file or its data .*'a' is undefined",
    ),
    "label": (
        {**CHOICE, "doc_to_target": "nolabel"},
        ANSWERED,
        "task CASE cannot be scored: the label of document 0 is 'nolabel', but must be one of \\['a', 'b'\\] or ",
    ),
    "late_label": (
        CHOICE,
        [*ANSWERED, {**ANSWERED[0], "answer": 2}],
        "task CASE cannot be scored: the label of document 4 is 2, but must be one of",
    ),
    "hidden_label": (
        {**CHOICE, "doc_to_target": "answer"},
        [{**ANSWERED[0], "answer": -1}],
        "task CASE cannot be scored: the label of document 0 is -1, but must be one of",
    ),
    "empty_first_choice": (
        CHOICE,
        [{**ANSWERED[0], "choices": ["", "b"]}],
        "--tasks=CASE cannot be loaded: the harness takes no empty text for a choice of the first document",
    ),
    "examples": (
        {**CHOICE, "num_fewshot": 50},
        ANSWERED,
        "task CASE cannot be asked: it has too few examples for num_fewshot=50, give a smaller --num-fewshot",
    ),
    "at_random": (
        {**WRITE, "generation_kwargs": {"until": ["."], "do_sample": True, "temperature": 1.0}},
        ANSWERED,
        "must have do_sample: false, nothing is drawn at random here",
    ),
}


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """Knows the broken tasks by their cases, and some that can be asked; it takes seconds to make one."""
    folder = tmp_path_factory.mktemp("tasks")
    for case, (fields, documents, _) in BROKEN_TASKS.items():
        write_task(folder, case, documents, **fields)
    write_task(folder, "numbers", ANSWERED, **CHOICE)
    write_task(folder, "late", [*ANSWERED, {**ANSWERED[0], "answer": 2}], **CHOICE)
    texts = [{**document, "answer": "b", "choices": ["a", "b", ""]} for document in ANSWERED]
    write_task(folder, "texts", [{**ANSWERED[0], "answer": "a"}, *texts], **CHOICE)
    (folder / "no_yaml.yaml").write_text("task: a\n  b: [c\n")
    with pytest.raises(
        ConfigError, match=r"--tasks=a: must be a task; .*; and a task file cannot be read, .*no_yaml\.yaml: "
    ):
        open_tasks(["a"], folder)
    return open_tasks(list(BROKEN_TASKS), folder)


@pytest.mark.parametrize("case", BROKEN_TASKS)
def test_a_task_that_cannot_be_used_is_said_in_one_line_before_there_is_a_model(
    manager: TaskManager, case: str
) -> None:
    message = BROKEN_TASKS[case][2].replace("CASE", case)
    with pytest.raises(DataError, match=message) as caught:
        prepare_tasks(manager, [case], num_fewshot=None, limit=None)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_only_what_is_asked_is_checked_and_a_choice_by_its_text_is_a_label(manager: TaskManager) -> None:
    late, texts = prepare_tasks(manager, ["late", "texts"], num_fewshot=None, limit=4)
    assert (len(late.instances), len(texts.instances)) == (8, 11)
    with pytest.raises(DataError, match="task numbers cannot be asked: it has too few examples for num_fewshot=6"):
        prepare_tasks(manager, ["numbers"], num_fewshot=6, limit=4)


def test_what_is_prepared_is_asked_as_the_harness_itself_would(trained: Trained, manager: TaskManager) -> None:
    options = {"task_manager": manager, "num_fewshot": 2, "limit": 3}
    harness = simple_evaluate(trained.harness, tasks=["numbers"], **options)
    tasks = prepare_tasks(manager, ["numbers"], num_fewshot=2, limit=3)
    ours = simple_evaluate(trained.harness, tasks=tasks, **options)
    assert harness is not None
    assert ours is not None
    assert ours["samples"] == harness["samples"]
    assert len(ours["samples"]["numbers"]) == 3


def test_options_that_cannot_be_are_one_line(trained: Trained) -> None:
    for options, message in (
        (("--limit", "0"), "--limit=0: must be at least 1"),
        (("--limit", "-1"), "--limit=-1: must be at least 1"),
        (("--num-fewshot", "-1"), "--num-fewshot=-1: must be at least 0"),
        (("--max-length", "0"), "--max-length=0: must be at least 1"),
        (("--output", "."), "--output=.: must be the name of a file, and is a folder"),
    ):
        done = run_tool(trained, "our_choice", *options)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")
    other = trained.folder / "other.model"
    train_tokenizer([*TEXTS, "another text " * 1_000], 400, other)
    done = run_tool(trained, "our_choice", "--tokenizer", str(other))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: --tokenizer={other} (sha256 " in done.stderr
    assert "is not the tokenizer that the checkpoint was trained with" in done.stderr
    done = run_tool(trained, "lambada_openai")
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 2
    assert line.startswith("error: --tasks=lambada_openai cannot be loaded: its data is not on this machine")
    assert "Traceback" not in done.stderr


def test_an_unknown_task_is_refused_with_the_nearest_name(trained: Trained) -> None:
    with pytest.raises(ConfigError, match=r"--tasks=our_choise: must be a task; did you mean our_choice\?"):
        open_tasks(["our_text", "our_choise"], trained.folder / "tasks")
    with pytest.raises(ConfigError, match=r"--include-path=none: must be a folder, and there is none of that name"):
        open_tasks(["our_text"], Path("none"))


def test_tasks_of_ones_own_are_found_without_reading_the_harnesss(trained: Trained) -> None:
    own = open_tasks(["our_text", "our_choice"], trained.folder / "tasks").task_index
    assert {"our_text", "our_choice"} <= set(own)
    assert "lambada_openai" not in own


def test_without_the_package_the_line_says_what_to_install(trained: Trained) -> None:
    """A folder in front of the installed packages, in which lm_eval cannot be imported."""
    folder = trained.folder / "hidden"
    folder.mkdir()
    (folder / "lm_eval.py").write_text("raise ModuleNotFoundError(\"No module named 'lm_eval'\")\n")
    command = [sys.executable, str(TOOL), "--checkpoint", str(trained.folder), "--tasks", "a", "--output", "o.json"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder)}, cwd=trained.folder
    )
    assert done.returncode == 2
    assert "error: lm-evaluation-harness is not installed" in done.stderr
    assert "pip install 'megalibi[lm-eval]'" in done.stderr


def test_code_in_a_checkpoint_does_not_run(trained: Trained, tmp_path: Path) -> None:
    checkpoint = tmp_path / f"step_{STEPS:08d}"
    shutil.copytree(trained.folder / "checkpoints" / checkpoint.name, checkpoint)
    path = plant(checkpoint, "weights_tensor_00_data_0000.safetensors", tmp_path / "made")
    done = run_tool(trained, "our_choice", "--checkpoint", str(checkpoint))
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {path} cannot be loaded: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "made").exists()
