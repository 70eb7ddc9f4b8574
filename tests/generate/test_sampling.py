from __future__ import annotations

import math

import pytest
import torch

from megalibi.errors import CheckpointError, ConfigError
from megalibi.generate.sampling import Sampler, Sampling, keep_likeliest

LOG_PROBS = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]).log()
DRAWS = 2000


def draw(sampling: Sampling, number: int = 0) -> list[int]:
    sampler = Sampler(sampling, number)
    return [sampler.choose(LOG_PROBS) for _ in range(DRAWS)]


@pytest.mark.parametrize(
    ("fields", "probs"),
    [
        ({}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"temperature": 0.5}, [0.01, 0.16, 0.0025, 0.0625, 0.04]),
        ({"top_k": 2}, [0.0, 0.4, 0.0, 0.25, 0.0]),
        ({"top_k": 9}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"top_p": 0.6}, [0.0, 0.4, 0.0, 0.25, 0.0]),
        ({"top_p": 0.66}, [0.0, 0.4, 0.0, 0.25, 0.2]),
        ({"top_p": 1e-9}, [0.0, 1.0, 0.0, 0.0, 0.0]),
        ({"top_k": 3, "top_p": 0.5, "temperature": 2.0}, [0.0, 0.4**0.5, 0.0, 0.25**0.5, 0.0]),
    ],
)
def test_what_is_left_has_its_share(fields: dict[str, float], probs: list[float]) -> None:
    sampling = Sampling(**fields)  # type: ignore[arg-type]
    expected = torch.tensor(probs, dtype=torch.float64) / sum(probs)
    kept = keep_likeliest(LOG_PROBS.double() / sampling.temperature, sampling)
    torch.testing.assert_close(kept, expected, rtol=1e-6, atol=0.0)
    drawn = torch.bincount(torch.tensor(draw(sampling)), minlength=5) / DRAWS
    five_deviations = 5 * (expected * (1 - expected) / DRAWS).sqrt()
    assert bool(((drawn - expected).abs() <= five_deviations).all())


def test_a_seed_and_the_number_of_the_text_decide_the_draws() -> None:
    assert draw(Sampling(seed=3)) == draw(Sampling(seed=3))
    assert draw(Sampling(seed=3)) != draw(Sampling(seed=4))
    assert draw(Sampling(seed=3)) != draw(Sampling(seed=3), number=1)
    assert draw(Sampling(seed=0), number=1_000_003) != draw(Sampling(seed=1))
    assert set(draw(Sampling(temperature=0.0))) == set(draw(Sampling(temperature=1e-310))) == {1}


def test_what_cannot_be_drawn_is_refused() -> None:
    for fields, message in [
        ({"temperature": -1.0}, "--temperature=-1.0: must be at least 0"),
        ({"temperature": math.nan}, "--temperature=nan: must"),
        ({"top_k": 0}, "--top-k=0: must be at least 1"),
        ({"top_p": 0.0}, "--top-p=0.0: must be above 0 and at most 1"),
        ({"top_p": math.nan}, "--top-p=nan: must"),
        ({"seed": -1}, "--seed=-1: must be at least 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Sampling(**fields)  # type: ignore[arg-type]
    for temperature in (0.0, 1.0):
        with pytest.raises(CheckpointError, match="the model gives NaN"):
            Sampler(Sampling(temperature=temperature)).choose(torch.tensor([0.0, math.nan]))
