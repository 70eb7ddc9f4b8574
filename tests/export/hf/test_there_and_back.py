"""Every architecture out, in and out again, at several tensor parallel sizes, and folders that transformers wrote."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers  # which imports a class where it is first named
from safetensors.torch import load_file
from torch import Tensor

from megalibi.checkpoint import Checkpoint
from megalibi.errors import FileError
from megalibi.export.certificate import CERTIFICATE, Certificate
from megalibi.export.compose import compose_checkpoint
from megalibi.export.hf.incoming.read import ImportPlan, convert_from_hf, plan_import
from megalibi.export.hf.write import convert_to_hf
from megalibi.export.judge import MAX_LOGIT_DIFFERENCE
from tests.support.conversions import SEQ_LENGTH, configure_model, draw_weights, has_weights, plan, write_random

CASES = [
    ("mpt", 4, 1, 2),
    ("mpt", 12, 4, 1),
    ("bloom", 4, 2, 4),
    ("bloom", 12, 1, 2),
    ("falcon", 4, 4, 1),
    ("falcon", 12, 2, 4),
]
"""Format, heads, and the tensor parallel sizes before and after."""
MAX_SHARD_BYTES = 50_000


def plan_again(folder: Path, *, tensor: int = 1, compare: bool = True) -> ImportPlan:
    return plan_import(folder, tensor_parallel_size=tensor, accept_rounded_bias=True, compare=compare)


def assert_same(certificate: Certificate, *, rounded: bool = False) -> None:
    assert certificate.all_equal
    assert certificate.slopes is not None
    assert certificate.slopes.target is not None
    assert certificate.not_compared is None
    assert certificate.comparison is not None
    assert certificate.comparison.tokens == 2 * SEQ_LENGTH
    assert (certificate.comparison.largest_logit_difference <= MAX_LOGIT_DIFFERENCE) is not rounded
    if rounded:  # and all but the rounding is as it should be
        assert certificate.held_logit_difference is not None
        assert certificate.held_logit_difference <= MAX_LOGIT_DIFFERENCE
    assert any("bfloat16" in note for note in certificate.notes) is rounded


def read_all(folder: Path) -> dict[str, Tensor]:
    return {name: values for path in folder.glob("*.safetensors") for name, values in load_file(path).items()}


def mean_losses(logits_SV: Tensor, tokens_S: Tensor) -> float:
    log_probs_SV = logits_SV[:-1].double().log_softmax(-1)
    return float(-log_probs_SV.gather(1, tokens_S[1:, None]).mean())


@pytest.mark.parametrize(("kind", "heads", "before", "after"), CASES)
def test_a_checkpoint_goes_out_and_comes_in_again(
    tmp_path: Path, kind: str, heads: int, before: int, after: int
) -> None:
    checkpoint, weights = write_random(tmp_path / "a", configure_model(kind, heads=heads, tensor=before))
    rounded = (kind, heads) == ("falcon", 12)
    out = convert_to_hf(
        checkpoint, tmp_path / "hf", plan(checkpoint, kind, accept=rounded), max_shard_bytes=MAX_SHARD_BYTES
    )
    assert_same(out, rounded=rounded)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    back = convert_from_hf(plan_again(tmp_path / "hf", tensor=after), tmp_path / "b")
    assert_same(back, rounded=rounded)
    again = Checkpoint.open(tmp_path / "b")
    again.verify()
    assert again.config.parallel.tensor_parallel_size == after
    assert again.config.data.seq_length == SEQ_LENGTH
    assert has_weights(again, weights)
    assert {tensor.source_sha256 for tensor in out.tensors} == {tensor.target_sha256 for tensor in back.tensors}
    assert json.loads((tmp_path / "b" / CERTIFICATE).read_text())["comparison"]["tokens"] == 2 * SEQ_LENGTH
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "hf"]
    if not rounded:
        check_perplexities(tmp_path / "hf", again)


def check_perplexities(folder: Path, checkpoint: Checkpoint) -> None:
    """By whatever class AutoModel takes, at 1x, 2x and 4x the training length."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    ours = checkpoint.load_model(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    tokens_S = torch.randint(checkpoint.config.model.vocab_size, (4 * SEQ_LENGTH,), generator=generator)
    for factor in (1, 2, 4):
        part_S = tokens_S[: factor * SEQ_LENGTH]
        with torch.no_grad():
            logits_SV = theirs(input_ids=part_S[None]).logits[0]
        loss, loss_ref = (mean_losses(values_SV, part_S) for values_SV in (logits_SV, ours.log_probs(part_S[None])[0]))
        assert loss == pytest.approx(loss_ref, rel=1e-6)


SIZES: dict[str, Any] = {"vocab_size": 101, "hidden_size": 32}
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "mpt": ("Mpt", {"n_layers": 2, "n_heads": 12, "vocab_size": 101, "d_model": 48}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4, **SIZES}),
    "falcon": (
        "Falcon",
        {
            "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, "multi_query": False,
            "parallel_attn": False, "ffn_hidden_size": 72, "bias": False, "activation": "relu", **SIZES,
        },
    ),
}  # fmt: skip


def make_foreign(kind: str, **more: Any) -> Any:
    """A model of transformers with random weights."""
    name, fields = FOREIGN[kind]
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**fields, **more))


@pytest.mark.parametrize(("kind", "tied"), [("mpt", True), ("bloom", False), ("falcon", True)])
def test_what_transformers_wrote_comes_in_and_goes_out_again(tmp_path: Path, kind: str, tied: bool) -> None:
    torch.manual_seed(0)
    model = make_foreign(kind, tie_word_embeddings=tied, megalibi_seq_length=SEQ_LENGTH)
    for parameter in model.parameters():  # biases of zero and norms of one would show nothing
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "hf")
    assert_same(convert_from_hf(plan_again(tmp_path / "hf", tensor=1), tmp_path / "a"))
    checkpoint, first = Checkpoint.open(tmp_path / "a"), read_all(tmp_path / "hf")
    assert_same(convert_to_hf(checkpoint, tmp_path / "hf1", plan(checkpoint, kind)))
    for tensor, before in ((2, 1), (4, 2)):
        convert_from_hf(plan_again(tmp_path / f"hf{before}", tensor=tensor, compare=False), tmp_path / f"b{tensor}")
        checkpoint = Checkpoint.open(tmp_path / f"b{tensor}")
        convert_to_hf(checkpoint, tmp_path / f"hf{tensor}", plan(checkpoint, kind, compare=False))
        again = read_all(tmp_path / f"hf{tensor}")
        assert first.keys() == again.keys()
        assert all(torch.equal(values, again[name]) for name, values in first.items())


def test_old_bin_files_and_16_bits_come_in(tmp_path: Path) -> None:
    """The names of a model without its output layer, too, as Bloom's files; in the format before torch 1.6."""
    torch.manual_seed(0)
    model = make_foreign("bloom", megalibi_seq_length=SEQ_LENGTH).bfloat16()
    model.transformer.config.save_pretrained(tmp_path / "hf")
    states = model.transformer.state_dict()
    torch.save(states, tmp_path / "hf" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(convert_from_hf(plan_again(tmp_path / "hf"), tmp_path / "a"))
    checkpoint = Checkpoint.open(tmp_path / "a")
    assert checkpoint.config.train.precision == "bf16"
    certificate = convert_to_hf(checkpoint, tmp_path / "hf2", plan(checkpoint, "bloom", dtype="bfloat16"))
    assert_same(certificate)  # of numbers that bfloat16 has
    assert certificate.held_logit_difference == certificate.comparison.largest_logit_difference
    theirs = read_all(tmp_path / "hf2")
    assert all(torch.equal(values, theirs[f"transformer.{name}"]) for name, values in states.items())


def test_several_bin_files_come_in_by_their_index(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_foreign("falcon", megalibi_seq_length=SEQ_LENGTH, tie_word_embeddings=False)
    model.config.save_pretrained(tmp_path / "hf")
    states = model.state_dict()
    half = len(states) // 2
    places = {name: f"pytorch_model-0000{1 + (number >= half)}-of-00002.bin" for number, name in enumerate(states)}
    for file in set(places.values()):
        torch.save({name: states[name] for name in states if places[name] == file}, tmp_path / "hf" / file)
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same(convert_from_hf(plan_again(tmp_path / "hf"), tmp_path / "a"))
    checkpoint = Checkpoint.open(tmp_path / "a")
    convert_to_hf(checkpoint, tmp_path / "hf2", plan(checkpoint, "falcon", compare=False))
    again = read_all(tmp_path / "hf2")
    assert states.keys() == again.keys()
    assert all(torch.equal(values, again[name]) for name, values in states.items())


def test_a_run_of_longer_texts_is_compared_at_their_length(tmp_path: Path) -> None:
    checkpoint, _ = write_random(tmp_path / "a", configure_model("mpt"))
    convert_to_hf(checkpoint, tmp_path / "hf", plan(checkpoint, "mpt", compare=False))
    data = dataclasses.replace(checkpoint.config.data, seq_length=2 * SEQ_LENGTH)
    config = dataclasses.replace(checkpoint.config, data=data)
    longer = plan_import(tmp_path / "hf", config=config, tensor_parallel_size=1, accept_rounded_bias=False)
    certificate = convert_from_hf(longer, tmp_path / "b")
    assert certificate.comparison is not None
    assert certificate.comparison.tokens == 4 * SEQ_LENGTH


def test_the_rounding_of_a_class_on_long_texts_is_allowed(tmp_path: Path) -> None:
    """Its bias is half the length of the text at the first head, of which fp32 has 24 bits."""
    config = configure_model("mpt", heads=8)
    long = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=1024))
    checkpoint, _ = write_random(tmp_path / "a", long)
    certificate = convert_to_hf(checkpoint, tmp_path / "hf", plan(checkpoint, "mpt"))
    assert certificate.comparison is not None
    assert certificate.bounds.logits == pytest.approx(4 * 2**-24 * 2048 / 2)
    assert MAX_LOGIT_DIFFERENCE < certificate.comparison.largest_logit_difference < certificate.bounds.logits


def test_a_cap_on_the_length_of_the_text_is_lifted_to_compare(tmp_path: Path) -> None:
    """As in a folder of others, which does not say how long the samples were: the cap is then taken for that."""
    torch.manual_seed(0)
    make_foreign("mpt", max_seq_len=64).save_pretrained(tmp_path / "hf")
    certificate = convert_from_hf(plan_again(tmp_path / "hf"), tmp_path / "b")
    assert certificate.comparison is not None
    assert certificate.comparison.tokens == 128


def test_a_type_that_cannot_hold_a_weight_is_refused(tmp_path: Path) -> None:
    config = configure_model("mpt")
    weights = draw_weights(config)
    weights["final_norm.weight"][3] = 1e5
    (tmp_path / "a").mkdir()
    compose_checkpoint(tmp_path / "a", config, weights.__getitem__)
    checkpoint = Checkpoint.open(tmp_path / "a")
    with pytest.raises(FileError, match=r"--dtype=float16: cannot hold final_norm\.weight"):
        convert_to_hf(checkpoint, tmp_path / "hf", plan(checkpoint, "mpt", dtype="float16"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
