from __future__ import annotations

import pytest

from megalibi.model.vocabulary import build_embedding, build_output
from megalibi.model.vocabulary.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from megalibi.model.vocabulary.table import TableEmbedding, TableOutput
from megalibi.parallel import ALONE, WHOLE
from tests.support.models import VOCAB_SIZE, make_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("cutoffs", "kinds"), [((), (TableEmbedding, TableOutput)), ((41, 122), (AdaptiveEmbedding, AdaptiveSoftmax))]
)
def test_cutoffs_choose_both_ends_and_tied_ends_share_their_weights(
    cutoffs: tuple[int, ...], kinds: tuple[type, type], tied: bool
) -> None:
    model = make_model(adaptive_cutoffs=cutoffs, tie_embeddings=tied)
    embedding = build_embedding(model, VOCAB_SIZE, ALONE)
    output = build_output(model, VOCAB_SIZE, embedding, WHOLE)
    assert (type(embedding), type(output)) == kinds
    shared = {id(p) for p in embedding.parameters()} & {id(p) for p in output.parameters()}
    assert bool(shared) == tied
