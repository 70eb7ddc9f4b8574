"""One optimizer step: it takes micro batches, changes the weights, and returns what the step was."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from megalibi.data.loader import Batch
from megalibi.parallel import IGNORED_LABEL, ProcessGroups, Stopwatch, all_reduce_raw, derive_key


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step was; all fields but the last are the same on every rank."""

    loss: float
    """Mean loss over the tokens of the global batch, in nats."""
    grad_norm: float
    """Norm of the gradient of all parameters, over all ranks, before clipping."""
    tokens: int
    """Number of tokens of the global batch that have a loss."""
    sample_hash: int
    """Sum of the hashes of all samples of the global batch, modulo 2^64, as a signed number."""
    loss_scale: float
    """The factor by which the loss was multiplied; 1 unless the precision is fp16."""
    skipped: bool
    """Whether the gradient was not finite, so that the step left the weights as they were."""
    bad_samples: tuple[tuple[int, int], ...] = ()
    """Of the samples of this rank whose loss is not finite: the micro batch, and the position in the data."""


def train_step(
    engine: DeepSpeedEngine,
    batches: Sequence[Batch],
    *,
    groups: ProcessGroups,
    device: torch.device,
    learning_rate: float,
    seed: int,
    samples_consumed: int,
    forward: Stopwatch | None = None,
) -> StepResult:
    """Compute the gradient of the mean loss over the tokens of the global batch and step along it.

    Every token of the global batch weighs the same, however many of them each rank and micro batch has: the summed
    losses are divided by the number of tokens of all ranks, known before the first backward pass, and DeepSpeed's
    division by the number of data ranks is undone.

    Where the loss or the gradient of a rank is not finite, no rank changes its weights or its optimizer's state.
    DeepSpeed and our optimizers decide that by the global norm, which they bring to the host in any case. A loss that
    is not finite is carried into the gradient, so that the norm shows it, too.

    Args:
        engine: The engine that build_engine returned.
        batches: This rank's micro batches.
        groups: The groups of this process.
        device: Where this rank computes.
        learning_rate: The learning rate of this step.
        seed: The seed of the run.
        samples_consumed: Position in the data before this step. With the seed it keys dropout, so that a resumed run
            drops what it would have dropped without the interruption.
        forward: Measures the forward passes; the clock of the tensor group then measures the waits in them. None:
            nothing is measured.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    # A sum of int64 wraps around at 2^64, which is how sample hashes are added.
    counts = torch.tensor([[int((b.labels != IGNORED_LABEL).sum()), b.sample_hash] for b in batches]).sum(0)
    if groups.data.size > 1:  # a rank alone knows them without waiting for the device
        counts = all_reduce_raw(counts.to(device), groups.data)
    tokens, sample_hash = counts.tolist()
    loss_scale = find_loss_scale(engine)
    if hasattr(engine.optimizer, "loss_scaler"):
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # StepResult says that the step was skipped
    # ZeRO 1 to 3 multiply by the loss scale themselves.
    factor = groups.data.size / tokens * (loss_scale if engine.zero_optimization_stage() == 0 else 1.0)

    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    losses_by_position: dict[int, torch.Tensor] = {}
    for index, host_batch in enumerate(batches):
        batch = host_batch.to(device)
        first_sample = samples_consumed + (index * groups.data.size + groups.data.rank) * len(batch.tokens)
        with _measuring(forward, groups, device):
            losses_BS = engine(
                batch.tokens,
                batch.labels,
                cu_seqlens=batch.cu_seqlens,
                micro_batch_key=derive_key(seed, "dropout", first_sample),
            )
        losses_by_position[first_sample] = losses_BS.detach()
        loss = losses_BS.sum(dtype=torch.float64)
        loss_sum += loss.detach()
        if index == len(batches) - 1:
            loss = loss * (1.0 + 0.0 * loss_sum)  # by exactly 1, or by NaN
        engine.backward(loss * factor, scale_wrt_gas=False)
        engine.step()

    loss_mean = all_reduce_raw(loss_sum, groups.data).item() / tokens
    return StepResult(
        loss=loss_mean,
        grad_norm=float(engine.get_global_grad_norm()),
        tokens=tokens,
        sample_hash=sample_hash,
        loss_scale=loss_scale,
        skipped=bool(getattr(engine.optimizer, "overflow", False)),
        bad_samples=() if math.isfinite(loss_mean) else _find_bad_samples(losses_by_position),
    )


def _find_bad_samples(losses_by_position: dict[int, torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """Return micro batch and position of the samples with a loss [B, S] that is not finite; it waits for the device."""
    return tuple(
        (index, first + row)
        for index, (first, losses_BS) in enumerate(losses_by_position.items())
        for row in (~losses_BS.isfinite()).any(dim=1).nonzero().flatten().tolist()
    )


@contextlib.contextmanager
def _measuring(forward: Stopwatch | None, groups: ProcessGroups, device: torch.device) -> Iterator[None]:
    if forward is None:
        yield
        return
    with forward.running(device), groups.tensor.clock.measuring():
        yield


def find_loss_scale(engine: DeepSpeedEngine) -> float:
    """Return the factor by which the optimizer multiplies the loss, or expects it to be multiplied; 1 if by none."""
    return float(getattr(engine.optimizer, "loss_scale", 1.0))
