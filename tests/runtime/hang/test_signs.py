from __future__ import annotations

from pathlib import Path

from megalibi.runtime.hang.signs import SIGNS_FOLDER, RankSign, RankSigns


def make_sign(rank: int) -> RankSign:
    return RankSign(
        rank=rank, host="a", pid=1, started=0.0, number=1, progress=0, step=0, marks=0, words="b", is_collective=False
    )


def test_a_sign_makes_no_folder_of_a_run(tmp_path: Path) -> None:
    """A run that was refused has taken its folder away, and another rank may give a sign after that."""
    RankSigns(tmp_path / "run", 1, 2).give(make_sign(1))
    assert list(tmp_path.iterdir()) == []


def test_what_the_ranks_of_a_refused_run_gave_is_taken_away(tmp_path: Path) -> None:
    ranks = [RankSigns(tmp_path, rank, 2) for rank in range(2)]
    for rank, signs in enumerate(ranks):
        signs.give(make_sign(rank))
    assert len(list((tmp_path / SIGNS_FOLDER).iterdir())) == 2
    ranks[0].clear()
    ranks[1].remove()
    assert list(tmp_path.iterdir()) == []
