from __future__ import annotations

from pathlib import Path

from megalibi.evaluate.result import read_evaluation


def test_an_evaluation_may_lack_what_its_machine_could_not_measure(tmp_path: Path) -> None:
    path = tmp_path / "evaluation-long.json"
    path.write_text(
        '{"step": 1, "train_seq_length": 8, "protocol": "sliding", "stride": 4,'
        ' "results": [{"length": 8, "loss": 1.0, "perplexity": 2.718, "tokens": 64}]}'
    )
    evaluation = read_evaluation(path)
    assert (evaluation.name, evaluation.stride) == ("evaluation-long", 4)
    assert evaluation.results[0].memory_bytes is None
