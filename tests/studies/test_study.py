from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megalibi.config import config_to_dict
from megalibi.errors import ConfigError, FileError
from megalibi.studies.study import load_study
from tests.support.runs import make_config


@dataclass(frozen=True, kw_only=True)
class Section:
    methods: tuple[str, ...]
    lengths: tuple[int, ...] = (16, 32)
    limit: int | None = None


def write_study(folder: Path, **section: object) -> Path:
    tree = config_to_dict(make_config("tokens"))
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"study": section, **tree} if section else tree))
    return path


def test_a_study_is_its_section_and_a_run(tmp_path: Path) -> None:
    path = write_study(tmp_path, methods=["alibi", "none"], lengths=[8])
    study, base = load_study(path, (), Section)
    assert study == Section(methods=("alibi", "none"), lengths=(8,))
    assert base == make_config("tokens")


def test_overrides_reach_the_section_and_the_run(tmp_path: Path) -> None:
    path = write_study(tmp_path, methods=["alibi"])
    study, base = load_study(path, ["study.lengths=[4,8]", "study.limit=3", "train.seed=7"], Section)
    assert study == Section(methods=("alibi",), lengths=(4, 8), limit=3)
    assert base.train.seed == 7


BAD_INPUT = {
    "unknown key": ("study.lenghts=[4]", "study.lenghts is unknown: did you mean study.lengths?"),
    "unknown key of the run": ("train.stepps=4", "train.stepps is unknown: did you mean train.steps?"),
    "no list": ("study.lengths=4", "study.lengths=4: must be a list"),
    "wrong type in a list": ("study.lengths=[4,a]", "study.lengths[1]='a': must be a whole number"),
    "no section": ("study=3", "study=3: must be a mapping with methods, lengths, limit"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(tmp_path: Path, case: str) -> None:
    override, message = BAD_INPUT[case]
    with pytest.raises(ConfigError) as error:
        load_study(write_study(tmp_path, methods=["alibi"]), [override], Section)
    assert message in str(error.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"study.methods is missing: give it in the file or as study.methods=VALUE"):
        load_study(write_study(tmp_path, lengths=[4]), (), Section)
    with pytest.raises(ConfigError, match=r"study.yaml: must have the section study beside the sections of a run"):
        load_study(write_study(tmp_path), (), Section)
    with pytest.raises(FileError, match="cannot be read"):
        load_study(tmp_path / "none.yaml", (), Section)
