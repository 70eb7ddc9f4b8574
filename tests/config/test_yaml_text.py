"""What a YAML file may hold, and what of it is refused in one line that names the file and the line in it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalibi.config.yaml_text import MAX_DEPTH, SavedLoader, SpellingLoader, ValueLoader, parse_yaml, read_yaml
from megalibi.errors import ConfigError, FileError

COMPLAINT = "run.yaml cannot be used"


def parse(text: str, loader: type[SavedLoader] = ValueLoader) -> Any:
    return parse_yaml(text, loader, COMPLAINT)


SCALARS = {
    "1e-3": 0.001, "1E5": 100000.0, "-.5e3": -500.0, "1_0.5": 10.5, "5.": 5.0, ".inf": math.inf, "1e400": math.inf,
    "007": 7, "0x10": 16, "1_000": 1000, "-3": -3, "12:30": 750, "0b11": 3,
    "yes": True, "off": False, "True": True, "null": None, "~": None,
    "2026-11-26": "2026-11-26", "2026_11_26": 20261126, "1.10": 1.1, "=": "=", "<<": "<<", "a b": "a b", "1e": "1e",
    "7" * 400: math.inf, "-" + "7" * 400: -math.inf, "9" * 5001: math.inf, "0x" + "f" * 5001: math.inf,
}  # fmt: skip


def test_a_scalar_has_a_value_and_a_spelling() -> None:
    for spelling, value in SCALARS.items():
        assert parse(spelling) == value
        assert type(parse(spelling)) is type(value)
        assert parse(spelling, SpellingLoader) == spelling
        assert parse(f"a: [{spelling}]", SpellingLoader) == {"a": [spelling]}
    assert math.isnan(parse(".nan"))
    assert (parse("a:"), parse("a:", SpellingLoader), parse("")) == ({"a": None}, {"a": ""}, None)
    assert (parse("'7'"), parse("!!str 7"), parse('!!int "7"'), parse("!!float 7")) == ("7", "7", 7, 7.0)


def test_what_yaml_writes_is_what_the_loader_of_saved_files_reads() -> None:
    """PyYAML writes the text 1e5 without quotes, for it reads no number there."""
    tree = {"texts": [str(key) for key in SCALARS], "numbers": [1e-05, 1e300, -3, True, None, 0.1, math.inf]}
    assert parse(yaml.safe_dump(tree), SavedLoader) == tree


def test_aliases_and_merged_mappings_are_read() -> None:
    text = "base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\nlist: [*base, *base]\n"
    assert parse(text)["other"] == {"a": 1, "b": 3}
    assert parse(text)["list"] == [{"a": 1, "b": 2}] * 2


BOMB = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
)
REFUSED = {
    "set": ("x: 1\nzero: !!set {a, b}", "line 2: the tag !!set must be left out"),
    "python": (
        "x: !!python/object/apply:os.getcwd []\n",
        "line 1: the tag !!python/object/apply:os.getcwd must be left out",
    ),
    "own tag": ("x: 1\ny: !mine 3\n", "line 2: the tag !mine must be left out"),
    "binary": ("x: !!binary aGk=\n", "line 1: the tag !!binary must be left out"),
    "no int": ("x: !!int seven\n", "line 1: 'seven' must be of the type int"),
    "empty int": ("x: !!int ''\n", "line 1: '' must be of the type int"),
    "no bool": ("x: !!bool seven\n", "line 1: 'seven' must be of the type bool"),
    "brackets": ("x:\n  " + "[" * 3000 + "]" * 3000, f"line 2: values must be nested at most {MAX_DEPTH} levels deep"),
    "open brackets": ("[" * 100_000 + "\n", f"line 1: values must be nested at most {MAX_DEPTH} levels deep"),
    "number as key": ("x: 1\n7: 3\n", "line 2: the key '7' must be a name"),
    "null as key": ("~: 3\n", "line 1: the key '~' must be a name"),
    "list as key": ("? [a]\n: 3\n", "line 1: the key, a sequence, must be a name"),
    "key twice": ("x: 1\ny: 2\nx: 3\n", "line 3: x stands twice, first in line 1"),
    "inner key twice": ("x:\n  y: 2\n  z: 1\n  y: 3\n", "line 4: y stands twice, first in line 2"),
    "bomb": (BOMB, "line 1: the file must have at most 10,000 values, those that aliases repeat included"),
    "merged bomb": (re.sub(r"\[(.*)\]", r"{<<: [\1]}", BOMB), "line 1: the file must have at most 10,000 values"),
    "itself": ("x: &x\n  y: *x\n", "line 1: the file must have at most 10,000 values"),
    "unknown alias": ("x: 1\ny: *z\n", "line 2: found undefined alias 'z'"),
    "NUL": ("x: \0\n", "unacceptable character #x0000: special characters are not allowed"),
    "tab": ("x:\n\ty: 1\n", "line 2: while scanning for the next token, found character '\\t' that cannot start any"),
    "two documents": ("x: 1\n---\ny: 1\n", "line 2: expected a single document in the stream, but found another"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("loader", [ValueLoader, SpellingLoader, SavedLoader])
def test_what_is_not_values_is_refused_in_one_line(case: str, loader: type[SavedLoader]) -> None:
    text, message = REFUSED[case]
    if loader is SpellingLoader and case in ("no int", "empty int", "no bool"):
        assert parse(text, loader) in ({"x": "seven"}, {"x": ""})
        return
    with pytest.raises(ConfigError, match=re.escape(f"{COMPLAINT}: {message}")) as caught:
        parse(text, loader)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_file_is_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("x: ü\n".encode("utf-8-sig"))
    assert parse(read_yaml(path)) == {"x": "ü"}
    path.write_bytes("x: ü\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.yaml is not a valid configuration: 'utf-8' codec can't decode byte"):
        read_yaml(path)
    with pytest.raises(FileError, match="cannot be read: Is a directory; give the path of a YAML file"):
        read_yaml(tmp_path)
