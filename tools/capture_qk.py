"""Save the queries and keys of a trained model, to time attention on them with tools/benchmark_attention.py --qk."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalibi import log
from megalibi.data.tokens.token_file import TokenFile, check_ids
from megalibi.errors import ConfigError
from megalibi.files import open_aside
from megalibi.runtime.exit import run_tool
from megalibi.runtime.outputs import check_outputs

EXAMPLE = """example:
  python tools/capture_qk.py --checkpoint runs/quickstart --data sample/valid --length 4096 --output qk.pt
"""


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a step's folder, or a run's: its latest step"
    )
    parser.add_argument("--data", required=True, metavar="PREFIX", help="a token file, without .bin and .idx")
    parser.add_argument("--length", type=int, default=4096, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--layer", type=int, metavar="N", help="layer, counted from 0 (default: the middle one)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.pt", help="where to write q and k")
    return parser.parse_args()


def read_tokens(prefix: str, length: int, vocab_size: int) -> Tensor:
    """Return the first tokens of a file, [1, length + 1]."""
    text = TokenFile(prefix)
    if not 1 <= length < text.num_tokens:
        raise ConfigError(
            f"--length={length}: must be 1 to {text.num_tokens - 1}, for {text.bin_path} has one token more"
        )
    tokens = text.read(0, length + 1)
    check_ids(tokens, vocab_size, text, 0)
    return torch.from_numpy(tokens.astype("int64"))[None]


@torch.no_grad()
def capture(model: nn.Module, layer: int, tokens: Tensor) -> dict[str, Tensor]:
    """Run the model and return q and k of one layer, [1, S, H, K] each, as they reach the scores."""
    attention: Any = model.get_submodule(f"blocks.{layer}.attention")
    captured: dict[str, Tensor] = {}

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], qkv: Tensor) -> None:
        q, k, _ = qkv.unflatten(-1, (3, attention.num_heads_local, -1)).unbind(2)
        q, k = attention.apply_to_query_key(q, k)
        captured.update(q=q.clone(), k=k.clone())

    handle = attention.qkv.register_forward_hook(keep)
    try:
        model(tokens[:, :-1], tokens[:, 1:])
    finally:
        handle.remove()
    return captured


def main() -> None:
    """Load, run, save."""
    arguments = parse_arguments()
    check_outputs({"--output": arguments.output})
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which the reader imports, warns of no GPU
    from megalibi.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(arguments.checkpoint)
    model = checkpoint.config.model
    layer = model.num_layers // 2 if arguments.layer is None else arguments.layer
    if not 0 <= layer < model.num_layers:
        raise ConfigError(f"--layer={layer}: must be 0 to {model.num_layers - 1}, a layer of the model")
    tokens = read_tokens(arguments.data, arguments.length, model.vocab_size)
    captured = capture(checkpoint.load_model(torch.device("cpu")), layer, tokens)
    with open_aside(arguments.output) as file:
        torch.save(captured, file)
    _, length, num_heads, head_dim = captured["q"].shape
    print(f"{arguments.output}: layer {layer}, {length} tokens; --heads {num_heads} --head-dim {head_dim}")


if __name__ == "__main__":
    log.configure()
    run_tool(main)
