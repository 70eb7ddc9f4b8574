from __future__ import annotations

import sys
from pathlib import Path

from megalibi.studies.gpu_visit.machine import name_folder, show_command
from megalibi.studies.machinery.machine import COMMAND_SCRIPT


def test_a_card_names_its_folder() -> None:
    cards = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")
    named = [name_folder(Path(), "cuda", {"gpu": gpu}) for gpu in cards]
    assert named == [Path("results/gpu_h200"), Path("results/gpu_h100_80gb_hbm3")]


def test_a_step_is_shown_as_one_would_type_it() -> None:
    assert show_command([sys.executable, COMMAND_SCRIPT, "warm-triton", "a b"]) == "megalibi warm-triton 'a b'"
    assert show_command([sys.executable, "-m", "pytest"]) == "python -m pytest"
