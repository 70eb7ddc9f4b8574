"""A few rows, and what the paper says or follows from them; the numbers here are read off the paper a second time."""

from __future__ import annotations

import pytest

from megalibi.studies import paper

PAPER_METHODS = ("sinusoidal", "rotary", "t5_bias", "alibi")


@pytest.mark.parametrize(
    ("number", "length", "perplexities"),
    [
        (2, 512, (20.05, 20.07, 19.65, 19.73)),
        (2, 1012, (43.54, 21.37, 18.79, 18.73)),
        (2, 15512, (406.01, 79.25, None, 18.31)),  # the T5 bias ran out of memory
        (3, 1024, (19.34, 19.33, 18.80, 18.66)),
        (4, 3072, (18.67, 18.57, 18.01, 17.60)),
    ],
)
def test_extrapolation_tables(number: int, length: int, perplexities: tuple[float | None, ...]) -> None:
    row = paper.get_table(number).row(length=length)
    assert tuple(row[method] for method in PAPER_METHODS) == perplexities


def test_extrapolation_by_method() -> None:
    assert paper.extrapolation("alibi", 512, "nonoverlapping")[1112] == 18.68
    assert 15512 not in paper.extrapolation("t5_bias", 512, "nonoverlapping")
    sliding = paper.extrapolation("alibi", 512, "sliding")
    assert sliding == {512: 17.98, 1024: 17.92, 1536: 18.20, 2048: 18.28, 3072: 18.30}
    assert paper.extrapolation("sinusoidal", 1024, "sliding")[1536] == 206.55
    assert paper.extrapolation("rotary", 512, "sliding") == {}
    assert paper.extrapolation("none", 512, "nonoverlapping") == {}


@pytest.mark.parametrize(
    ("number", "page", "keys", "column", "value"),
    [
        (1, 15, {"method": "rotary", "train_length": 1024}, "train_memory_gb", 22.8),
        (1, 15, {"method": "alibi", "train_length": 512}, "inference_words_per_second", 85_800),
        (6, 20, {"method": "t5_bias"}, "test", 18.73),
        (6, 20, {"method": "alibi", "train_length": 512, "eval_length": 3072}, "train_words_per_second", 28_300),
        (7, 20, {"model": "Transformer-XL (Dai et al., 2019)"}, "parameters_millions", 257),
        (7, 20, {"model": "alibi", "train_length": 3072}, "test", 17.66),
        (8, 21, {"method": "alibi", "train_length": 1024}, "3072", 13.52),
        (9, 21, {"method": "alibi", "train_length": 512}, "test", 10.98),
        (10, 22, {"model": "Staged Training (Press et al., 2021)"}, "test", 10.48),
        (10, 22, {"model": "alibi", "train_length": 3072}, "validation", 12.70),
    ],
)
def test_a_value_of_each_table(number: int, page: int, keys: dict[str, paper.Cell], column: str, value: float) -> None:
    table = paper.get_table(number)
    assert table.source == f"arXiv:2108.12409v2, Table {number}, p. {page}"
    assert table.row(**keys)[column] == value


@pytest.mark.parametrize("number", range(1, 16))
def test_cells_are_of_the_type_that_their_column_says(number: int) -> None:
    table = paper.get_table(number)
    names = {"method": str, "model": str}
    assert len(set(table.columns)) == len(table.columns)
    assert len(set(table.rows)) == len(table.rows)
    for cells in table.rows:
        for name, cell in zip(table.columns, cells, strict=True):
            if name == "method":
                assert cell in PAPER_METHODS
            elif name.endswith("length"):
                assert cell is None or (type(cell) is int and cell >= 64)
            elif cell is not None:
                assert isinstance(cell, names.get(name, (int, float)))
                assert isinstance(cell, str) or cell > 0


def test_validation_perplexities_stand_in_two_tables() -> None:
    on_wikitext, on_books, by_length = (paper.get_table(number) for number in (6, 9, 8))
    for method in PAPER_METHODS:
        of_table_4 = paper.get_table(4).row(length=3072)[method]
        assert on_wikitext.row(method=method, train_length=3072)["validation"] == of_table_4
    short = {"method": "alibi", "train_length": 512}
    assert on_wikitext.row(**short)["validation"] == paper.get_table(5).row(**short)["3072"]
    for train_length in (512, 3072):
        keys = {"method": "alibi", "train_length": train_length}
        assert on_books.row(**keys)["validation"] == by_length.row(**keys)["3072"]
    assert on_books.row(method="sinusoidal")["validation"] == by_length.row(method="sinusoidal")["3072"]


def test_speeds_of_table_6_and_figure_7_are_those_of_table_1() -> None:
    for cells in paper.get_table(1).rows:
        method, train_length, words_per_second = cells[:3]
        for row in paper.get_table(6).rows:
            if row[:2] == (method, train_length):
                assert row[4] == words_per_second
        curves = paper.get_curves("7")
        if method in curves:
            point = dict(curves[str(method)])[train_length]  # type: ignore[index]
            assert int(point / 100) * 100 == words_per_second  # cut off, not rounded
    assert sorted(paper.get_curves("7")) == ["alibi", "sinusoidal"]
    assert [x for x, _ in paper.get_curves("7")["alibi"]] == [64, 128, 256, 512, 1024, 1536, 2048, 3072]


def test_tables_share_what_they_have_in_common() -> None:
    """Table 5 has the first points of Tables 2 to 4 once more."""
    for train_length, number in paper.EXTRAPOLATION_TABLES.items():
        row = paper.get_table(5).row(method="alibi", train_length=train_length)
        assert row[str(train_length)] == paper.get_table(number).row(length=train_length)["alibi"]


def test_the_best_models_of_the_paper() -> None:
    """Section 1: trained at 512, ALiBi's best is 18.31; 13.1% and 10.6% are the two parts of "11%"."""
    assert min(paper.extrapolation("alibi", 512, "nonoverlapping").values()) == 18.31
    assert paper.update_rate_gain() == pytest.approx(0.131, abs=5e-4)
    assert paper.memory_saving() == pytest.approx(0.106, abs=5e-4)
    assert paper.get_quote("time_to_perplexity").value == 0.11


def test_alibi_and_sinusoidal_take_the_same_memory_at_the_same_length() -> None:
    table = paper.get_table(12)
    for length, gigabytes in ((512, 24.6), (1024, 26.2)):
        rows = [table.row(method=method, train_length=length) for method in ("alibi", "sinusoidal")]
        assert [row["memory_gb"] for row in rows] == [gigabytes, gigabytes]


@pytest.mark.parametrize(
    ("figure", "series", "number", "train_length", "column"),
    [
        ("5 left", "alibi_512", 11, 512, "1024"),
        ("5 left", "sinusoidal_1024", 11, 1024, "1024"),
        ("5 right", "alibi_1024", 11, 1024, "2048"),
        ("5 right", "sinusoidal_2048", 11, 2048, "2048"),
    ],
)
def test_the_curves_of_figure_5_end_where_table_11_says(
    figure: str, series: str, number: int, train_length: int, column: str
) -> None:
    hours, perplexity = paper.get_curves(figure)[series][-1]
    row = paper.get_table(number).row(method=series.split("_")[0], train_length=train_length)
    assert perplexity == row[column]
    assert int(hours / 100) / 10 == row["gpu_hours_thousands"]  # cut off, not rounded


def test_figure_6_begins_where_table_12_says() -> None:
    for name, points in paper.get_curves("6").items():
        method, length = name.split("_")
        row = paper.get_table(12).row(method=method, train_length=int(length))
        assert points[0] == (int(length), row[length])


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(KeyError):
        paper.get_table(16)
    with pytest.raises(KeyError, match="Table 2 has no row with"):
        paper.get_table(2).row(length=77)
    assert paper.get_table(2).source == "arXiv:2108.12409v2, Table 2, p. 16"
