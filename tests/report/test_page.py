from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from setuptools import Distribution

from megalibi.errors import FileError
from megalibi.report.page import write_report

WriteRun = Callable[..., Path]

ROOT = Path(__file__).parents[2]
VOID_TAGS = {"meta", "br"}


class Page(HTMLParser):
    """A page's text and attributes, and whether its tags nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID_TAGS:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_one_run_one_page(write_run: WriteRun) -> None:
    folder = write_run("quickstart")
    output = write_report([folder], folder / "report.html")
    assert output == folder / "report.html"
    page = Page(output)
    assert page.source.startswith("<!DOCTYPE html>\n")
    assert page.source.endswith("</html>\n")
    assert "<title>quickstart · megalibi</title>" in page.source
    assert page.source.count("<svg ") == 3
    for expected in (
        "mean of the last 2 steps",
        "33.12",
        "Model TFLOP/s, attention causal",
        "12 × layers × hidden size × sequence length",
        "python tools/evaluate.py --lengths 64,128",
        "training length 64",
        "position_method: alibi",
    ):
        assert expected in page.text
    assert 'class="trained"' in page.source
    assert not list(folder.glob("*.tmp"))


def test_the_page_loads_nothing_and_runs_nothing(write_run: WriteRun) -> None:
    folder = write_run("closed")
    page = Page(write_report([folder], folder / "report.html"))
    assert {tag for tag, _, _ in page.attributes}.isdisjoint({"script", "link", "img", "iframe", "object", "base"})
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", page.source)


def test_ids_are_unique_in_the_page(write_run: WriteRun) -> None:
    folder = write_run("ids")
    page = Page(write_report([folder], folder / "report.html"))
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_what_is_missing_is_said(write_run: WriteRun) -> None:
    folder = write_run("bare", validation=False, evaluation=False)
    page = Page(write_report([folder], folder / "report.html"))
    assert "bare: no validation is recorded." in page.text
    assert "No evaluation yet." in page.text
    assert "Validation loss" not in page.text
    assert page.source.count("<svg ") == 2


def test_a_run_that_has_just_begun_has_a_page(write_run: WriteRun) -> None:
    folder = write_run("new", steps=0, evaluation=False)
    page = Page(write_report([folder], folder / "report.html"))
    assert "No step is recorded yet" in page.text
    assert "<svg" not in page.source


def test_a_run_without_its_configuration_has_a_page(write_run: WriteRun) -> None:
    folder = write_run("lost")
    (folder / "config.yaml").unlink()
    assert "lost: its folder has no config.yaml." in Page(write_report([folder], folder / "report.html")).text


def test_several_runs_stand_side_by_side(write_run: WriteRun, tmp_path: Path) -> None:
    runs = [write_run("alibi"), write_run("sinusoidal", steps=25, evaluation=False)]
    page = Page(write_report(runs, tmp_path / "new folder" / "comparison.html"))
    assert "<h1>2 runs</h1>" in page.source
    assert '<th scope="col">alibi</th><th scope="col">sinusoidal</th>' in page.source
    assert re.search(r'<th scope="row">Steps</th><td>40</td><td>25 <small>of 40</small></td>', page.source)
    assert "No evaluation yet: sinusoidal." in page.text
    assert page.source.count("<svg ") == 3


def test_runs_of_one_name_are_numbered(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run("same")
    page = Page(write_report([run, run], tmp_path / "report.html"))
    assert '<th scope="col">same (1)</th><th scope="col">same (2)</th>' in page.source


def test_evaluations_of_one_protocol_are_told_apart(write_run: WriteRun) -> None:
    folder = write_run("twice")
    (folder / "evaluation-again.json").write_text((folder / "evaluation.json").read_text())
    text = Page(write_report([folder], folder / "report.html")).text
    assert "nonoverlapping, step 40." in text
    assert "nonoverlapping, step 40 (evaluation)." in text


def test_scaled_slopes_are_said(write_run: WriteRun) -> None:
    folder = write_run("scaled")
    assert "Slopes ×" not in Page(write_report([folder], folder / "report.html")).text
    fields = json.loads((folder / "evaluation.json").read_text())
    fields["results"] = [row | {"slope_scale": min(1.0, 64 / row["length"])} for row in fields["results"]]
    (folder / "evaluation-scaled.json").write_text(json.dumps(fields))
    text = Page(write_report([folder], folder / "report.html")).text
    assert "nonoverlapping, step 40." in text
    assert "nonoverlapping, slopes scaled, step 40." in text
    assert "Length × training Slopes × Loss" in text
    assert "128 2 0.5 " in text


def test_names_are_text_and_never_markup(write_run: WriteRun) -> None:
    folder = write_run("<b>&amp;")
    page = Page(write_report([folder], folder / "report.html"))
    assert "<b>" not in page.source
    assert "<b>&amp;" in page.text


def test_the_same_run_gives_the_same_page(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run("again")
    first, second = (write_report([folder], tmp_path / f"{i}.html").read_text() for i in range(2))
    assert first == second


def test_a_page_that_cannot_be_written_is_one_line(write_run: WriteRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"file/report\.html cannot be written"):
        write_report([write_run("unwritable")], tmp_path / "file" / "report.html")


def test_template_and_style_sheet_are_installed_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files()
    distribution.include_package_data = False  # what a manifest names comes on top; to look for it writes files
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    files = {f"{package}/{name}" for package, _, _, names in build.data_files for name in names}
    assert files >= {"megalibi/report/report.css", "megalibi/report/report.html.j2"}
