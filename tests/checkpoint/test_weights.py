from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn

from megalibi.checkpoint import Checkpoint, save_checkpoint
from megalibi.config import Config, derive
from megalibi.errors import CheckpointError
from megalibi.model import DTYPES
from megalibi.parallel import ShardSpec, get_shard_spec, shard, unshard
from tests.support.ranks import run_on_ranks
from tests.support.runs import (
    CPU,
    STAGES,
    VOCAB_SIZE,
    identify,
    iterate_ours,
    make_config,
    process_groups,
    write_tokens,
)

# The engine sums over the tensor group in another order, and in bf16 (unit roundoff 2^-9) where the run is bf16.
LOSS_RELATIVE_BOUNDS = {"fp32": 1e-6, "bf16": 2e-4}
STEPS = 2
RankWeights = dict[str, tuple[Tensor, ShardSpec | None]]


def make_configs(prefix: str, folder: Path, tensor: int, data: int) -> list[Config]:
    """Return a run for each ZeRO stage; some sizes are odd on 2 tensor ranks, so that 2 data ranks need padding."""
    return [
        make_config(
            prefix,
            model={"hidden_size": 46, "num_attention_heads": 2, "ffn_hidden_size": 98, "bias": True,
                   "tie_embeddings": data == 1},
            parallel={"tensor_parallel_size": tensor},
            zero={"stage": stage},
            train={"precision": "fp32" if tensor == data else "bf16", "output_dir": str(folder / f"zero{stage}")},
        )
        for stage in STAGES
    ]  # fmt: skip


def train_and_save(configs: list[Config]) -> list[float]:
    """Train each run, save a checkpoint and beside it the engine's own weights; return the losses on a batch."""
    losses = []
    for config in configs:
        for step, (engine, _) in enumerate(iterate_ours(config, STEPS), start=1):
            if step == STEPS:
                losses.append(save_and_evaluate(engine, config))
    return losses


def save_and_evaluate(engine: DeepSpeedEngine, config: Config) -> float:
    groups = process_groups(config.parallel.tensor_parallel_size)
    folder, dtype = Path(config.train.output_dir), DTYPES[config.train.precision]
    derived = derive(config, groups.world.size)
    save_checkpoint(engine, config, derived, identify(config), groups, folder=folder, step=STEPS, run_id="a")
    weights: RankWeights = {}
    for name, parameter in engine.module.named_parameters():
        with GatheredParameters([parameter], enabled=config.zero.stage == 3):
            weights[name] = (parameter.detach().to(dtype, copy=True), get_shard_spec(parameter))
    if groups.data.rank == 0:
        torch.save(weights, folder / f"engine{groups.tensor.rank}.pt")
    engine.eval()
    return evaluate(engine)


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    tokens = torch.tensor([[(31 * i + 7 * row) % VOCAB_SIZE for i in range(65)] for row in range(3)])
    return model(tokens[:, :-1], tokens[:, 1:]).mean().item()


def checkpoint_of(config: Config) -> Path:
    return Path(config.train.output_dir) / f"step_{STEPS:08d}"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def load_shares(checkpoints: list[Path]) -> list[float]:
    """Load each checkpoint's model on this rank and another; compare its slices, and return the losses on a batch."""
    groups, losses = process_groups(2), []
    for checkpoint in checkpoints:
        opened = Checkpoint.open(checkpoint)
        model, weights = opened.load_model(CPU, groups), dict(opened.read_weights())
        for name, parameter in model.named_parameters():
            spec = get_shard_spec(parameter)
            assert torch.equal(
                parameter, weights[name] if spec is None else shard(weights[name], spec, groups.tensor.rank, 2)
            )
        losses.append(evaluate(model))
    return losses


@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_weights_and_loss_are_the_engines(prefix: str, tmp_path: Path, tensor: int, data: int) -> None:
    configs = make_configs(prefix, tmp_path, tensor, data)
    losses_ref = run_on_ranks(tensor * data, train_and_save, configs)[0]
    for config, loss_ref in zip(configs, losses_ref, strict=True):
        engine_files = [Path(config.train.output_dir) / f"engine{rank}.pt" for rank in range(tensor)]
        ranks: list[RankWeights] = [torch.load(file, weights_only=False) for file in engine_files]
        checkpoint = Checkpoint.open(checkpoint_of(config))
        weights = dict(checkpoint.read_weights())
        assert list(weights) == list(ranks[0])
        for name, (local, spec) in ranks[0].items():
            full_ref = local if spec is None else unshard([rank[name][0] for rank in ranks], spec)
            assert weights[name].dtype == full_ref.dtype
            assert torch.equal(weights[name], full_ref), (config.zero.stage, name)

        model = checkpoint.load_model(CPU)
        assert (model.output.weight is model.embedding.weight) == config.model.tie_embeddings
        bound = LOSS_RELATIVE_BOUNDS[config.train.precision]
        assert evaluate(model) == pytest.approx(loss_ref, rel=bound, abs=0.0), config.zero.stage
    for losses in run_on_ranks(2, load_shares, [checkpoint_of(config) for config in configs]):
        assert losses == pytest.approx(losses_ref, rel=bound, abs=0.0)


def test_a_damaged_file_is_named(prefix: str, tmp_path: Path) -> None:
    config = make_configs(prefix, tmp_path, 1, 1)[3]
    run_on_ranks(1, train_and_save, [config])
    path = checkpoint_of(config) / "optimizer_tensor_00_data_0000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path} is damaged: .*; use another checkpoint"):
        Checkpoint.open(checkpoint_of(config)).load_model(CPU)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path} is no checkpoint and has none: give a step's folder, a"):
        Checkpoint.open(tmp_path)
