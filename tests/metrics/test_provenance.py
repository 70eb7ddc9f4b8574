from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import megalibi
from megalibi.metrics.provenance import _find_sources, describe_origin, describe_run, hash_code

ROOT = Path(__file__).parents[2]


def test_a_record_says_what_its_figures_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/some.py", "--name", "a b"])
    record = describe_run("cpu", ("torch", "no-such-package"))
    assert record["command"] == "python tools/some.py --name 'a b'"
    assert record["versions"].keys() == {"megalibi", "python", "torch"}
    assert record["hardware"]["cores"] >= 1
    assert "gpu" not in record["hardware"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["date"])
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", record["commit"])


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["launch/pretrain.py", "--config", "a.yaml"], "python launch/pretrain.py --config a.yaml"),
        (["/env/lib/megalibi/__main__.py", "report", "a"], "python -m megalibi report a"),
        (["/env/bin/megalibi", "report", "a"], "megalibi report a"),
    ],
)
def test_the_command_is_what_one_would_type(monkeypatch: pytest.MonkeyPatch, argv: list[str], command: str) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert describe_origin()["command"] == command


def test_the_commit_is_that_of_megalibi_and_of_no_other_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *settings, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    package = tmp_path / "env" / "megalibi" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.touch()
    monkeypatch.setattr(megalibi, "__file__", str(package))
    assert describe_origin()["commit"] == "unknown"  # no repository
    git("init", "--quiet")
    (tmp_path / "other.txt").touch()
    git("add", "other.txt")
    git("commit", "--quiet", "--message", "other")
    assert describe_origin()["commit"] == "unknown"  # installed into another project's repository
    git("add", "env")
    git("commit", "--quiet", "--message", "megalibi")
    assert describe_origin()["commit"] == git("rev-parse", "--short=12", "HEAD")
    package.write_text("changed")
    assert describe_origin()["commit"] == f"{git('rev-parse', '--short=12', 'HEAD')}-dirty"


def test_the_sources_of_all_our_packages_are_counted() -> None:
    """Those of the kernels too: fused ones and plain ones do not round alike."""
    ours = {
        path.relative_to(root).as_posix(): path
        for root, folders in ((ROOT, "megalibi"), (ROOT / "kernels", "."))
        for path in (root / folders).rglob("*")
        if path.suffix in (".py", ".cpp", ".h")
    }
    assert _find_sources() == ours
    assert {name.partition("/")[0] for name in ours} == {"megalibi", "alibi_attention", "fused_ops"}


def test_the_checksum_of_the_code_is_that_of_names_and_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hash_of(sources: dict[str, str]) -> str:
        for name, text in sources.items():
            (tmp_path / name).write_text(text)
        found = {name: tmp_path / name for name in sources}
        monkeypatch.setattr("megalibi.metrics.provenance._find_sources", lambda: found)
        return hash_code.__wrapped__()

    hashes = [hash_of(sources) for sources in ({"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1", "c": "2"})]
    assert len(set(hashes)) == 3
    assert hash_of({"b": "2", "a": "1"}) == hashes[0]
