from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalibi.model.dropout import OUTSIDE_BLOCKS, ResidualDropout, Site
from megalibi.parallel import Layout, all_gather_raw, scatter_to_sequence
from tests.support.models import build_gpt, make_model
from tests.support.ranks import run_on_ranks
from tests.support.tensors import tensor_group


def _drop_ones(sequence_parallel: bool) -> Tensor:
    """What dropout leaves of ones, for two layers x two sites, whole over the sequence."""
    group = tensor_group()
    ones = torch.ones(2, 6, 32)
    kept = []
    for layer in (0, 1):
        dropout = ResidualDropout(0.5, layer, layout=Layout(group, sequence_parallel))
        for site in (Site.ATTENTION_OUTPUT, Site.MLP_OUTPUT):
            if sequence_parallel:
                kept.append(all_gather_raw(dropout(scatter_to_sequence(ones, group), site, 3), group, dim=1))
            else:
                kept.append(dropout(ones, site, 3))
    return torch.stack(kept)


def test_trap_7_dropout_outside_has_one_mask_and_under_sequence_parallelism_one_for_each_slice() -> None:
    first, second = run_on_ranks(2, _drop_ones, False)
    assert torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert len(first.flatten(1).unique(dim=0)) == 4  # every layer and site has its own

    first, second = run_on_ranks(2, _drop_ones, True)
    assert torch.equal(first, second)
    assert not torch.equal(first[:, :, :3], first[:, :, 3:])


@pytest.mark.parametrize(
    ("fields", "p"), [({}, 0.3), ({"attention_dropout": 0.1}, 0.1), ({"attention_dropout": 0.0}, 0.0)]
)
def test_attention_dropout_is_dropout_unless_it_is_given(fields: dict[str, float], p: float) -> None:
    gpt = build_gpt(make_model(dropout=0.3, **fields))
    assert gpt.blocks[0].attention.dropout_p == p
    assert gpt.blocks[0].dropout.p == gpt.dropout.p == 0.3


def test_the_names_of_sites_are_those_that_masks_were_always_drawn_from() -> None:
    """Another name is another mask: a run that is resumed would drop what it would not have dropped."""
    assert [Site.EMBEDDING, Site.ATTENTION_WEIGHTS, Site.ATTENTION_OUTPUT, Site.ACTIVATION, Site.MLP_OUTPUT] == [
        "embedding", "attention", "attention output", "activation", "mlp output"
    ]  # fmt: skip
    assert (Site.ADAPTIVE_SOFTMAX, Site.of_band(2)) == ("adaptive softmax", "adaptive softmax, band 2")
    assert OUTSIDE_BLOCKS == -1
