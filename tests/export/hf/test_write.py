"""What a format cannot hold is refused, and what a conversion gets wrong is found by its certificate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megalibi.checkpoint import Checkpoint
from megalibi.config import DatasetConfig
from megalibi.errors import ConfigError, DataError, FileError
from megalibi.export.compose import compose_checkpoint
from megalibi.export.fp32 import convert_to_fp32
from megalibi.export.hf import plan as hf_plan
from megalibi.export.hf import software, trial, write
from megalibi.export.hf.formats import FORMATS, get_format
from megalibi.export.hf.incoming.read import convert_from_hf, plan_import
from megalibi.export.hf.plan import plan_hf
from megalibi.export.hf.write import convert_to_hf
from megalibi.export.portable_tokenizer import find_tokenizer
from tests.support.conversions import configure_model, draw_weights, plan, write_random

REFUSED = [
    ("mpt", {"bias": True}, "model.bias=true: must be false for --format mpt: its class has no biases; model.norm_b"),
    ("mpt", {"norm_bias": True}, "model.norm_bias=true: must be false for --format mpt"),
    ("mpt", {"embedding_norm": True}, "model.embedding_norm=true: must be false"),
    ("mpt", {"activation": "gelu_tanh"}, "model.activation=gelu_tanh: must be gelu"),
    ("mpt", {"ffn_hidden_size": 96}, "model.ffn_hidden_size=96: must be 192"),
    ("mpt", {"position_method": "rotary"}, "model.position_method=rotary: must be alibi"),
    ("mpt", {"final_norm": False}, "model.final_norm=false: must be true"),
    ("mpt", {"adaptive_cutoffs": [100]}, r"model.adaptive_cutoffs=\[100\]: must be \[\]"),
    ("mpt", {"scale_alibi": True}, "model.scale_alibi=true: must be false"),
    ("bloom", {"bias": False}, "model.bias=false: must be true for --format bloom"),
    ("bloom", {"norm_bias": False}, "model.norm_bias=false: must be true"),
    ("bloom", {"embedding_norm": False}, "model.embedding_norm=false: must be true"),
    ("bloom", {"activation": "gelu"}, "model.activation=gelu: must be gelu_tanh"),
    ("falcon", {"scale_alibi": False}, "model.scale_alibi=false: must be true"),
    ("falcon", {"norm_bias": False}, "model.norm_bias=false: must be true"),
    ("falcon", {"num_attention_heads": 16}, "computes the bias of ALiBi in bfloat16.*give --accept-rounded-bias"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "model", "message"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_with_the_reason(
    tmp_path: Path, kind: str, model: dict[str, Any], message: str
) -> None:
    checkpoint, _ = write_random(tmp_path / "a", configure_model(kind, **model))
    with pytest.raises(ConfigError, match=message):
        plan(checkpoint, kind)


def test_falcons_bias_is_exact_up_to_position_256(tmp_path: Path) -> None:
    checkpoint, _ = write_random(tmp_path / "a", configure_model("falcon", heads=8))
    for seq_length, is_exact in ((128, True), (129, False)):
        fields = checkpoint.manifest.config
        fields["data"]["seq_length"] = seq_length
        found = Checkpoint(checkpoint.path, checkpoint.manifest)
        if is_exact:
            assert not plan(found, "falcon").rounds
        else:
            with pytest.raises(ConfigError, match="at 258 tokens"):
                plan(found, "falcon")


def test_options_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    checkpoint, _ = write_random(tmp_path / "a", configure_model("mpt"))
    with pytest.raises(ConfigError, match='model_type="gpt2": must be one of mpt'):
        get_format("gpt2")
    found = find_tokenizer(checkpoint, None)
    with pytest.raises(ConfigError, match=r"--max-length=5: must be from data\.seq_length=33 to 16777216"):
        plan_hf(checkpoint, FORMATS["mpt"], found, max_length=5)
    with pytest.raises(ConfigError, match="--accept-rounded-bias: must stand beside --format falcon, and not mpt"):
        plan_hf(checkpoint, FORMATS["mpt"], found, accept_rounded_bias=True)
    with pytest.raises(DataError, match="no such tokenizer"):
        find_tokenizer(checkpoint, tmp_path / "t.model")


@pytest.mark.parametrize(
    ("kind", "fault", "dtype"),
    [
        ("bloom", "slopes", "float32"),
        ("bloom", "qkv", "float32"),
        ("bloom", "qkv", "bfloat16"),
        ("bloom", "flipped bit", "float32"),
        ("falcon", "slopes", "float32"),
        ("falcon", "qkv", "float16"),
    ],
)
def test_a_wrong_conversion_is_found_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fault: str, dtype: str
) -> None:
    """Of weights in 16 bits and of a Falcon whose rounded bias the user accepts, too: the rounding alone is allowed."""
    checkpoint, _ = write_random(tmp_path / "a", configure_model(kind, heads=12 if kind == "falcon" else 4))
    if fault == "slopes":
        right = software.compute_their_slopes
        monkeypatch.setattr(software, "compute_their_slopes", lambda *sizes: right(*sizes).flip(0))
        message = "computes other slopes than the source"
    elif fault == "qkv":  # there and back alike, so that the bits alone would not show it
        monkeypatch.setattr("megalibi.export.hf.formats.interleave_heads", lambda fused, heads: fused)
        monkeypatch.setattr("megalibi.export.hf.formats.separate_heads", lambda fused, heads: fused)
        message = "computes other logits than the source"
    else:
        right_read = write.read_back

        def read_flipped(folder: Path, files: dict[str, str]) -> Any:
            for name, values in right_read(folder, files):
                if name == "transformer.ln_f.bias":
                    values.view(torch.int32)[0] ^= 1
                yield name, values

        monkeypatch.setattr(write, "read_back", read_flipped)
        message = "1 tensors read back from the disk are not what was written: transformer.ln_f.bias"
    with pytest.raises(FileError, match=message):
        convert_to_hf(checkpoint, tmp_path / "hf", plan(checkpoint, kind, dtype=dtype, accept=kind == "falcon"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_without_the_software_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, _ = write_random(tmp_path / "a", configure_model("mpt"))
    certificate = convert_to_hf(checkpoint, tmp_path / "b", plan(checkpoint, "mpt", compare=False))
    assert (certificate.comparison, certificate.not_compared) == (None, "--no-compare was given")
    card = (tmp_path / "b" / "README.md").read_text()
    assert "The logits of both were not compared: --no-compare was given." in card
    assert "logits of both are within" not in card
    back = plan_import(tmp_path / "b", config=None, tensor_parallel_size=1, accept_rounded_bias=False)
    for module in (software, trial, hf_plan):
        monkeypatch.setattr(module, "TRANSFORMERS_VERSION", None)
    certificate = convert_to_hf(checkpoint, tmp_path / "c", plan(checkpoint, "mpt"))
    assert certificate.comparison is None
    assert certificate.not_compared is not None
    assert certificate.not_compared.startswith("transformers is not installed")
    assert certificate.slopes is not None
    assert (certificate.slopes.target, certificate.slopes.largest_difference) == (None, None)
    assert certificate.all_equal
    imported = convert_from_hf(back, tmp_path / "d")
    assert imported.slopes is not None
    assert (imported.slopes.source, imported.comparison, imported.all_equal) == (None, None, True)
    assert imported.slopes.target == certificate.slopes.source


def test_numbers_that_are_not_finite_go_nowhere(tmp_path: Path) -> None:
    config = configure_model("mpt")
    weights = draw_weights(config)
    weights["final_norm.weight"][3] = torch.nan
    (tmp_path / "a").mkdir()
    compose_checkpoint(tmp_path / "a", config, weights.__getitem__)
    checkpoint = Checkpoint.open(tmp_path / "a")
    message = r"final_norm\.weight has 1 numbers that are not finite"
    with pytest.raises(FileError, match=message):
        convert_to_hf(checkpoint, tmp_path / "b", plan(checkpoint, "mpt"))
    with pytest.raises(FileError, match=message):
        convert_to_fp32(checkpoint, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_16_bits_are_compared_with_weights_of_16_bits(tmp_path: Path) -> None:
    checkpoint, _ = write_random(tmp_path / "a", configure_model("mpt"))
    certificate = convert_to_hf(checkpoint, tmp_path / "b", plan(checkpoint, "mpt", dtype="bfloat16"))
    assert certificate.comparison is not None
    assert certificate.held_logit_difference is not None
    assert certificate.held_logit_difference <= 1e-4 < certificate.comparison.largest_logit_difference


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    checkpoint, _ = write_random(tmp_path / "a", configure_model("mpt"))
    convert_to_hf(checkpoint, tmp_path / "hf", plan(checkpoint, "mpt", compare=False))
    back = plan_import(tmp_path / "hf", config=None, tensor_parallel_size=1, accept_rounded_bias=False)

    def interrupt(name: str, done: int, total: int) -> None:
        if done == total // 2:
            assert any(path.name.startswith("b.partial.") for path in tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_to_hf(checkpoint, tmp_path / "b", plan(checkpoint, "mpt"), show=interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_from_hf(back, tmp_path / "b", show=interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_to_fp32(checkpoint, tmp_path / "b", show=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "hf"]


def test_what_has_come_to_exist_meanwhile_is_kept(tmp_path: Path) -> None:
    checkpoint, _ = write_random(tmp_path / "a", configure_model("mpt"))

    def appear(name: str, done: int, total: int) -> None:
        if not done:
            (tmp_path / "b").mkdir()

    with pytest.raises(FileExistsError, match="meanwhile"):
        convert_to_fp32(checkpoint, tmp_path / "b", show=appear)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert list((tmp_path / "b").iterdir()) == []


def test_a_card_has_no_path_of_the_host(tmp_path: Path) -> None:
    config = configure_model("mpt")
    data = dataclasses.replace(config.data, train=(DatasetConfig(prefix="/home/somebody/secret/tokens"),))
    checkpoint, _ = write_random(tmp_path / "a", dataclasses.replace(config, data=data))
    convert_to_hf(checkpoint, tmp_path / "b", plan(checkpoint, "mpt", compare=False))
    card = (tmp_path / "b" / "README.md").read_text()
    assert "prefix: tokens" in card
    assert "secret" not in card


def test_a_comparison_for_which_there_is_no_room_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = write_random(tmp_path / "a", configure_model("mpt"))
    monkeypatch.setattr("megalibi.export.comparison.measure_available_bytes", lambda: 100_000)
    with pytest.raises(
        ConfigError, match=r"at 66 tokens takes about .* has 100\.0 KB of memory left: give --no-compare"
    ):
        plan(checkpoint, "mpt")
    convert_to_hf(checkpoint, tmp_path / "b", plan(checkpoint, "mpt", compare=False))
