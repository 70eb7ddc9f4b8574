from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from megalibi.metrics.records import RunMetrics, StepRecord
from megalibi.report.facts import describe_model, environment_facts, result_facts, setup_facts
from megalibi.report.run import read_run


def test_a_run_is_described_in_one_sentence(write_run: Callable[..., Path]) -> None:
    folder = write_run("described")
    (folder / "run_info.json").write_text(json.dumps({"num_parameters": 33_412_096}))
    assert describe_model(read_run(folder)) == (
        "A GPT of 33.4M parameters with ALiBi positions: 3 layers, 96 wide, 12 heads; trained at 64 tokens in bf16."
    )


def test_what_a_configuration_does_not_say_is_not_described(write_run: Callable[..., Path]) -> None:
    run = dataclasses.replace(read_run(write_run("short")), config={"model": {"num_layers": 2}})
    assert describe_model(run) == "A GPT: 2 layers."


def test_results_are_the_summary_in_words(write_run: Callable[..., Path]) -> None:
    facts = {fact.label: (fact.value, fact.note) for fact in result_facts(read_run(write_run("results")))}
    assert facts["Training loss"] == ("3.1013", "mean of the last 2 steps")
    assert facts["Validation loss"] == ("3.5000", "4.1k tokens, at step 40")
    assert facts["Validation perplexity"] == ("33.12", "")
    assert facts["Steps"] == ("40", "")
    assert facts["Tokens per second"] == ("1.0k", "[1.0k – 1.0k]")
    assert facts["Model TFLOP/s, attention in full"][0] == "0.21"
    assert facts["Model TFLOP/s, attention causal"][0] == "0.19"
    assert facts["Highest memory"] == ("1.3 GB", "rank 0")
    assert "Slowest rank" not in facts


def test_the_slowest_rank_is_named_where_the_ranks_compared(
    write_run: Callable[..., Path], make_step: Callable[..., StepRecord]
) -> None:
    step = make_step(10, straggler_ratio=1.25, slowest_rank=3)
    run = dataclasses.replace(read_run(write_run("slow")), metrics=RunMetrics(steps=(step,), validations=()))
    facts = {fact.label: (fact.value, fact.note) for fact in result_facts(run)}
    assert facts["Slowest rank"] == ("1.25 times the median of the ranks", "[1.25 – 1.25], most often rank 3")


def test_an_unfinished_run_says_how_far_it_is(write_run: Callable[..., Path]) -> None:
    facts = {fact.label: (fact.value, fact.note) for fact in result_facts(read_run(write_run("half", steps=25)))}
    assert facts["Steps"] == ("25", "of 40")


def test_the_set_up_names_what_config_yaml_names_and_nothing_else(write_run: Callable[..., Path]) -> None:
    run = read_run(write_run("set-up"))
    facts = {fact.label: fact.value for fact in setup_facts(run)}
    assert facts["Positions"] == "ALiBi"
    assert facts["Training data"] == "data/train"
    assert facts["Tensor parallel"] == "2"
    assert facts["Seed"] == "7"
    assert "Parameters" not in facts
    assert "Dropout" not in facts
    model = {"position_method": "alibi", "scale_alibi": True, "tie_embeddings": True, "embedding_norm": True}
    options = setup_facts(dataclasses.replace(run, config={"model": model}))
    assert [(fact.value, fact.note) for fact in options] == [
        ("ALiBi", "slopes divided by sqrt(head dimension)"),
        ("tied", "with a layer norm"),
    ]
    blend = {"train": [{"prefix": "a", "weight": 3.0}, {"prefix": "b", "weight": 1.0}], "document_mask": False}
    facts = {fact.label: fact.value for fact in setup_facts(dataclasses.replace(run, config={"data": blend}))}
    assert facts == {"Training data": "a (3), b (1)", "Document mask": "off"}


def test_the_environment_is_what_run_info_holds(write_run: Callable[..., Path]) -> None:
    folder = write_run("environment")
    info = {"num_parameters": 5, "world_size": 2, "versions": {"torch": "2.13.0"}, "command": ["a", "b"], "gpu": None}
    (folder / "run_info.json").write_text(json.dumps(info))
    facts = [(fact.label, fact.value) for fact in environment_facts(read_run(folder))]
    assert facts == [("world size", "2"), ("versions torch", "2.13.0"), ("command", "a b")]


def test_a_run_of_an_earlier_version_lacks_what_run_info_holds_now(write_run: Callable[..., Path]) -> None:
    folder = write_run("earlier")
    info = {"run_id": "a", "num_parameters": 5, "device": "cpu", "host": "one", "deterministic": False,
            "ranks": "1: tensor 1 x data 1", "megalibi": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8",
            "python": "3.11.7"}  # fmt: skip
    (folder / "run_info.json").write_text(json.dumps(info))
    facts = {fact.label: fact.value for fact in environment_facts(read_run(folder))}
    assert (facts["host"], facts["torch"]) == ("one", "2.13.0")
    assert facts.keys().isdisjoint({"commit", "command", "date"})
    origin = {"command": "python launch/pretrain.py", "commit": "0123456789ab-dirty", "date": "2026-11-26T16:00:00"}
    (folder / "run_info.json").write_text(json.dumps(info | origin))
    assert {fact.label: fact.value for fact in environment_facts(read_run(folder))} == {**facts, **origin}


def test_steps_that_were_skipped_and_rollbacks_are_said(write_run: Callable[..., Path]) -> None:
    folder = write_run("rolled_back")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "rolled_back_from": 43, "spike_loss": 9.5, "left_out": "320-343"}\n')
    run = read_run(folder)
    steps = (*run.metrics.steps[:-1], dataclasses.replace(run.metrics.steps[-1], skipped=True))
    run = dataclasses.replace(run, metrics=dataclasses.replace(run.metrics, steps=steps))
    facts = {fact.label: (fact.value, fact.note) for fact in result_facts(run)}
    assert facts["Skipped steps"] == ("1", "not finite")
    assert facts["Rollbacks"] == ("1", "loss spikes")
