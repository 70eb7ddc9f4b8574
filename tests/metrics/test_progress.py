from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable

from rich.console import Console

from megalibi.metrics.progress import ConsoleWriter
from megalibi.metrics.records import StepRecord, ValidationRecord

MakeStep = Callable[..., StepRecord]
MakeValidation = Callable[..., ValidationRecord]


def console_to(text: io.StringIO, *, terminal: bool) -> Console:
    return Console(file=text, force_terminal=terminal, width=100, highlight=False)


def test_plain_lines_come_every_few_steps_and_at_both_ends(
    make_step: MakeStep, make_validation: MakeValidation
) -> None:
    text = io.StringIO()
    writer = ConsoleWriter(total_steps=18, log_every_steps=5, resumed_step=7, console=console_to(text, terminal=False))
    for step in range(8, 19):
        writer.step(make_step(step, loss=3.45123, grad_norm=0.8123, tokens_per_second=12_345.0, step_seconds=19.0))
    writer.validation(make_validation(18))
    writer.close()
    lines = text.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "step 8/18",
        "step 10/18",
        "step 15/18",
        "step 18/18",
        "step 18/18",
    ]
    assert lines[0] == (
        "step 8/18 | loss 3.4512 | grad norm 0.812 | lr 3.00e-04 | 12.3k tokens/s | 0.21 TFLOP/s | 1.2 GB | 3m10s left"
    )
    assert lines[-1] == "step 18/18 | validation loss 3.5000 | perplexity 33.12 | 4.1k tokens | 2s"


def test_plain_lines_say_the_loss_scale_and_a_skipped_step(make_step: MakeStep) -> None:
    text = io.StringIO()
    writer = ConsoleWriter(total_steps=2, log_every_steps=1, console=console_to(text, terminal=False))
    writer.step(make_step(1, loss_scale=65536.0, skipped=True))
    assert text.getvalue().startswith("step 1/2 | skipped | loss 7.0000 | grad norm 0.800 | ")
    assert " | loss scale 65536 | " in text.getvalue()


def test_a_validation_that_read_fewer_samples_than_it_should_says_so(make_validation: MakeValidation) -> None:
    for samples, end in ((None, "2s"), (15, "15 samples, all of data.valid: train.eval_samples=16"), (16, "2s")):
        text = io.StringIO()
        console = console_to(text, terminal=False)
        writer = ConsoleWriter(total_steps=18, log_every_steps=1, eval_samples=16, console=console)
        writer.validation(dataclasses.replace(make_validation(18), validation_samples=samples))
        assert text.getvalue().rstrip().split(" | ")[-1] == end


def test_a_terminal_gets_a_bar_with_validations_above_it(make_step: MakeStep, make_validation: MakeValidation) -> None:
    text = io.StringIO()
    writer = ConsoleWriter(total_steps=2, log_every_steps=1, console=console_to(text, terminal=True))
    writer.step(make_step(1))
    writer.validation(make_validation(1))
    writer.step(make_step(2))
    writer.close()
    shown = text.getvalue()
    assert "━" in shown
    assert "validation loss 3.5000" in shown
    assert "2/2 | loss 5.0000 | 1.0k tokens/s | 0s left" in shown
    assert "\x1b[?25h" in shown  # the cursor is back
