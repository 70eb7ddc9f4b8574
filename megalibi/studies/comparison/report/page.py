"""The page of a comparison in Markdown: what the paper's numbers mean, and what was measured here beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megalibi.report.markdown import format_page
from megalibi.studies.comparison.curves import NUM_POINTS, mean_speedup
from megalibi.studies.comparison.disturbance import DISTURBED, MIN_TURNS, OTHER_WORK, describe_disturbances
from megalibi.studies.comparison.report.findings import format_replaced, judge_comparison
from megalibi.studies.comparison.report.tables import (
    PAPER_LENGTHS,
    equal_time_table,
    equal_updates_table,
    gain_table,
    level_table,
    paper_levels,
    plan_table,
    speed_table,
)
from megalibi.studies.comparison.results import Results
from megalibi.studies.comparison.study import ALIBI, ATTENTIONS, SINUSOIDAL, ComparedModel
from megalibi.studies.finding import format_findings
from megalibi.studies.paper import get_quote, get_table, memory_saving, update_rate_gain

_PAPER_CAPTION = (
    "In italics the paper's: 1.3 B parameters on CC100 and RoBERTa's corpora, on V100s with attention that held its "
    "scores; another text, vocabulary, model and machine than here, so only ratios can be compared."
)


def format_comparison(results: Results, *, facts: Sequence[str], picture: str | None) -> str:
    """Return the Markdown page.

    Args:
        results: The results of a comparison; what is not measured becomes a dash.
        facts: Sentences on what was run, and where.
        picture: File name of the analogue of Figure 5, if there is one.
    """
    equal_time = [*equal_time_table(results), "", *_explain_equal_time(results)]
    equal_updates = [*equal_updates_table(results), "", _explain_equal_updates(results)]
    sections: list[tuple[str, Iterable[str]]] = [
        ("# ALiBi at half the length against sinusoidal positions", facts),
        ("## What the paper's 11% are", _explain_paper()),
        ("## What the paper found, and what came out here", _findings(results)),
        ("## Speed and memory", _speed_and_memory(results)),
        ("## Perplexity against hours (Figure 5)", _figure_5(results, picture)),
        ("## After equal time (Table 11)", equal_time),
        ("## After equal updates (Table 12)", equal_updates),
    ]
    return format_page(sections)


def _explain_paper() -> Iterator[str]:
    quote, table = get_quote("time_to_perplexity"), get_table(11)
    short, long = (
        ComparedModel(method=ALIBI, length=PAPER_LENGTHS[1]),
        ComparedModel(method=SINUSOIDAL, length=PAPER_LENGTHS[2]),
    )
    ours, theirs = (table.row(method=model.method, train_length=model.length) for model in (short, long))
    levels = paper_levels((short, long))
    yield (
        f'"11% faster" is the time to a given perplexity: "{quote.text}" ({quote.source}). The computation used here '
        f"gives {mean_speedup(levels):.1%} on the digitised points of its Figure 5, from {levels[0].speedup:.1%} at "
        f"perplexity {levels[0].perplexity:.2f} to {levels[-1].speedup:.1%} at {levels[-1].perplexity:.2f}. It is not "
        f"the rate of updates, which is {update_rate_gain():.1%} higher: {ours['updates_thousands']}k against "
        f"{theirs['updates_thousands']}k in the same time ({table.source})."
    )
    yield ""
    yield (
        f'"11% less memory" is {ours["memory_gb"]} against {theirs["memory_gb"]} GB, {memory_saving():.1%} less. It '
        "comes from the shorter length: with as many tokens in a batch, attention that holds the scores of all pairs "
        "of tokens holds half as many at half the length. At equal length ALiBi and sinusoidal positions take the same "
        "memory (Table 12), and attention that never holds the scores has nothing to save there."
    )


def _findings(results: Results) -> Iterator[str]:
    findings = judge_comparison(results)
    if not findings:
        yield "Nothing is measured yet."
        return
    yield from format_findings(findings)
    yield ""
    yield (
        f"What rests on a speed is decided only where that speed has {MIN_TURNS} turns or more, two of its turns "
        f"differ by at most {DISTURBED:.1%} on average, and on a CPU other work took at most {OTHER_WORK:g} cores in "
        "the median of its turns. That ALiBi reaches a perplexity "
        "earlier, or is better after equal time, is not decided where it would be so as well if the updates of both "
        "models took equally long: then it learns better in an update, which says nothing of speed. Each model "
        "was trained once (n = 1): nothing here says how far two seeds lie apart."
    )
    replaced = sum(speed.turns_replaced for speed in results.speeds.values())
    if replaced:
        yield ""
        yield (
            f"{format_replaced(replaced)} by hand (`--again`), after a first record was seen: a selection by outcome, "
            "which makes a machine look more even and faster than it was. The first records are beside the new ones, "
            "and each statement about speed says how many of its turns were replaced."
        )


def _speed_and_memory(results: Results) -> Iterator[str]:
    for attention, backend in ATTENTIONS.items():
        yield f"**{attention}** attention, `model.attention_backend={backend}`:"
        yield ""
        yield from speed_table(results, attention)
        yield ""
    yield from gain_table(results)
    yield ""
    yield from _explain_turns(results)
    yield (
        "Medians of all counted steps, quartiles in brackets; gains are taken turn by turn. Device: the most that the "
        "GPU, or without one the process with its libraries, held. Allocator: the most bytes of tensors that one rank "
        "held, and what they were, in GB; in brackets what the plan below says. On a GPU the device's column counts "
        "everything on that GPU, other processes too; on a CPU the allocator's counts the tensors' bytes as they are "
        "traced, and does not see scratch memory inside native C++. " + _PAPER_CAPTION
    )
    yield ""
    yield "The plan: what a rank holds at its peak, computed from the shapes."
    yield ""
    yield from plan_table(results)


def _explain_turns(results: Results) -> Iterator[str]:
    if not results.speeds:
        return
    disturbed = [
        f"{variant.model} ({variant.attention}): {', '.join(found)}"
        for variant, speed in results.speeds.items()
        if (found := describe_disturbances(speed.turn_medians, speed.other_busy_cores))
    ]
    codes = sorted({str(code) for speed in results.speeds.values() for code in speed.codes})
    if codes:
        yield (
            f"Measured with {', '.join(codes)} (SHA-256 of the sources). In each turn every model is measured once "
            "with every kind of attention, every second turn in the reverse order."
        )
        yield ""
    yield (
        "Turns: how many were measured, in brackets how many of these anew after a first record was set aside. "
        "Between turns: the mean difference of two of their medians over the median of all. In a turn: the "
        "interquartile range of its steps over their median, the largest of all turns. Load: the lowest and the "
        "highest load average of the last minute before and after a turn, which counts the turns themselves too. Other "
        "cores: the most cores that anything else kept busy during the steps of a turn. "
        + (f"Disturbed: {'; '.join(disturbed)}. " if disturbed else "")
    ).strip()
    yield ""


def _figure_5(results: Results, picture: str | None) -> Iterator[str]:
    if picture is not None:
        yield f"![Perplexity against hours of training, ALiBi and sinusoidal positions]({picture})"
        yield ""
    yield "How much earlier ALiBi reaches a perplexity:"
    yield ""
    yield from level_table(results)
    yield ""
    learning = [
        f"{pair[0]} against {pair[1]} {mean_speedup(as_fast[0]):+.1%}"
        for pair in results.study.pairs()
        if (as_fast := [ls for kind in ATTENTIONS if (ls := results.at_equal_speed(pair).levels(pair, kind))])
    ]
    if learning:
        yield (
            f"The mean if the updates of both models took equally long: {'; '.join(learning)}. So much of these shares "
            "is how well the two learn; where it is above 0, that ALiBi is earlier is no result about speed."
        )
        yield ""
    yield (
        "Hours are updates times the median time of an update in the turns, with each kind of attention: trainings "
        "that share a machine have no fair clock of their own. Both clocks are of the same trainings. The "
        f"{NUM_POINTS} perplexities are those of the sinusoidal model at {NUM_POINTS} moments, evenly spaced in time "
        "from the highest to the lowest perplexity that both models reach. So the first one is a first checkpoint's, "
        "and shows the learning rate's warm-up too. Between checkpoints the logarithm of the perplexity is taken to be "
        "linear in time. The paper's row is the same computation on its digitised Figure 5, "
        "whose sinusoidal curve ends when ALiBi's training does."
    )


def _explain_equal_time(results: Results) -> Iterator[str]:
    stopped = []
    for pair in results.study.pairs():
        for attention in ATTENTIONS:
            equal = results.equal_time(pair, attention)
            late = [model for model in pair if equal and model.method == equal.stopped]
            stopped += [f"{model} beside {pair[1 - pair.index(model)]} ({attention})" for model in late]
    early = f"Stopped early, before its learning rate had come down: {'; '.join(stopped)}. " if stopped else ""
    yield (
        "Both models of a pair are read at the moment when the first of their trainings is done: between checkpoints "
        "the logarithm of the perplexity and the updates are taken to be linear in time. " + early + _PAPER_CAPTION
    )


def _explain_equal_updates(results: Results) -> str:
    return (
        f"After {results.updates:,} updates each. Perplexity by evaluation length, blocks that do not overlap. One "
        "training of each model (n = 1): the rows of one method put its training lengths in no order, unless they lie "
        "further apart than two seeds do, which was not measured. "
        "Hours by the turns' clock; as run: the sum of the steps' wall times, beside whatever else the machine did. "
        + _PAPER_CAPTION
    )
