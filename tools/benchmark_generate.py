"""Measure generation: the memory of the cache, and tokens per second against recomputation, a full cache and MPT.

The model is a checkpoint's, or has the random weights of a configuration; it computes in fp32. The text is read once
into each cache, and then continued by the tokens that follow it, one at a time. transformers' MPT is what it loads from
the export of the checkpoint, or has the same random weights; its cache is filled from the full one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache, MptConfig, MptForCausalLM

from megalibi import log
from megalibi.config import ModelConfig, load_config
from megalibi.config.checks import check_option
from megalibi.data.tokens.token_file import TokenFile
from megalibi.errors import ConfigError
from megalibi.export.hf.formats import get_format
from megalibi.files import write_json
from megalibi.generate.decoder import DEFAULT_HORIZON_EPS, Decoder
from megalibi.measure.other_work import read_load_average
from megalibi.metrics.provenance import describe_run
from megalibi.model import GPT, initialize
from megalibi.parallel import ALONE, WHOLE
from megalibi.runtime.exit import run_tool
from megalibi.runtime.outputs import check_outputs

EXAMPLE = """examples:
  python tools/benchmark_generate.py --checkpoint runs/quickstart --data sample/valid --output quickstart.json
  python tools/benchmark_generate.py --config configs/books_24m_alibi.yaml --lengths 4096 16384
"""
EPSILONS = (DEFAULT_HORIZON_EPS, 2.0**-16, 2.0**-11, 2.0**-8)
MPT_NAMES = {
    "embedding": "transformer.wte",
    "blocks": "transformer.blocks",
    "attention_norm": "norm_1",
    "mlp_norm": "norm_2",
    "attention": "attn",
    "qkv": "Wqkv",
    "proj": "out_proj",
    "mlp": "ffn",
    "up": "up_proj",
    "down": "down_proj",
    "final_norm": "transformer.norm_f",
}
"""What MPT calls each part of a parameter's name."""
console = Console(stderr=True, soft_wrap=True, highlight=False)


def open_model(arguments: argparse.Namespace) -> tuple[GPT, ModelConfig, torch.dtype]:
    """Return the model, in fp32, what it is, and the type that its weights had."""
    if arguments.checkpoint is not None:
        from megalibi.checkpoint import Checkpoint  # it imports DeepSpeed

        checkpoint = Checkpoint.open(arguments.checkpoint)
        model = checkpoint.load_model(torch.device("cpu"))
        dtype = next(model.parameters()).dtype
        model.compute_dtype = torch.float32
        return model.float(), checkpoint.config.model, dtype
    config = load_config(arguments.config).model
    model = GPT(config, padded_vocab_size=config.vocab_size, layout=WHOLE)
    initialize(model, seed=1, group=ALONE)
    return model.requires_grad_(False).eval(), config, torch.float32


def read_text_tokens(prefix: str | None, model: GPT, count: int) -> list[int]:
    """Return tokens of a text, from its beginning again where it is too short; random ones without a text."""
    if prefix is None:
        return torch.randint(model.vocab_size, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    text = TokenFile(prefix)
    tokens = text.read(0, min(count, text.num_tokens)).tolist()
    return (tokens * (count // len(tokens) + 1))[:count]


def build_mpt(model: GPT, config: ModelConfig, max_length: int) -> MptForCausalLM:
    """Return transformers' MPT with the model's weights."""
    if config.position_method != "alibi" or config.bias or config.ffn_hidden_size % config.hidden_size:
        raise ConfigError("the model must have ALiBi, no biases, and a feed-forward width that its hidden_size divides")
    mpt_config = MptConfig(
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_layers=config.num_layers,
        expansion_ratio=config.ffn_hidden_size // config.hidden_size,
        max_seq_len=max_length,
        vocab_size=config.vocab_size,
    )
    mpt = MptForCausalLM(mpt_config).eval().requires_grad_(False)
    renamed = {}
    for name, parameter in model.named_parameters():
        renamed[".".join(MPT_NAMES.get(part, part) for part in name.split("."))] = parameter
    missing, unexpected = mpt.load_state_dict(renamed, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing  # tied
    return mpt


def open_exported_mpt(path: Path, dtype: torch.dtype, max_length: int) -> MptForCausalLM:
    """Return what transformers loads from the checkpoint's export as MPT, and computes in fp32.

    Args:
        path: The checkpoint.
        dtype: The type of its model's weights, to which the export rounds those of the optimizer as the model does.
        max_length: The most tokens.

    Raises:
        ConfigError: MPT cannot hold the model.
    """
    from megalibi.checkpoint import Checkpoint  # both import DeepSpeed
    from megalibi.export.hf.plan import plan_hf
    from megalibi.export.hf.write import convert_to_hf
    from megalibi.export.portable_tokenizer import find_tokenizer

    checkpoint = Checkpoint.open(path)
    tokenizer, name = find_tokenizer(checkpoint, None), str(dtype).removeprefix("torch.")
    plan = plan_hf(checkpoint, get_format("mpt"), tokenizer, dtype=name, max_length=max_length, compare=False)
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder, "mpt")
        convert_to_hf(checkpoint, exported, plan)
        mpt = MptForCausalLM.from_pretrained(exported, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    return mpt.eval().requires_grad_(False)


def repeat_rate(step: Callable[[int], object], tokens: Sequence[int], repeats: int) -> dict[str, Any]:
    """Return tokens per second of a step for each token, measured over equal parts of them."""
    size, rates = len(tokens) // repeats, []
    for part in range(repeats):
        start = time.perf_counter()
        for token in tokens[part * size : (part + 1) * size]:
            step(token)
        rates.append(size / (time.perf_counter() - start))
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "repeats": rates}


def measure_cache(
    model: GPT, prompt: list[int], more: list[int], repeats: int, eps: float
) -> tuple[dict[str, Any], Decoder, Tensor]:
    """Read the prompt and continue it: figures, the decoder after it, and its log-probabilities, [tokens, V]."""
    decoder, log_probs = Decoder(model, horizon_eps=eps), []
    start = time.perf_counter()
    decoder.feed(prompt)
    prompt_seconds = time.perf_counter() - start
    kept, memory_bytes = decoder.cache.kept_tokens(), decoder.cache.memory_bytes()
    rate = repeat_rate(lambda token: log_probs.append(decoder.feed([token])), more, repeats)
    figures = {
        "horizon_eps": eps,
        "memory_bytes": memory_bytes,
        "kept_share": sum(map(sum, kept)) / (len(prompt) * sum(map(len, kept))),
        "kept_tokens_by_layer_and_head": kept,
        "prompt_seconds": prompt_seconds,
        "tokens_per_second": rate,
        "rebuilds": decoder.num_rebuilds,
    }
    return figures, decoder, torch.stack(log_probs)


def measure_mpt(
    mpt: MptForCausalLM, full: Decoder, num_prompt: int, more: list[int], repeats: int
) -> tuple[dict[str, Any], Tensor]:
    """Continue the text with MPT's forward pass on its own cache, filled with the keys and values of ours."""
    cache, log_probs = DynamicCache(), []
    for number, layer in enumerate(full.cache.layers):
        (group,) = layer._groups
        cache.update(group.keys[None, :, :num_prompt].clone(), group.values[None, :, :num_prompt].clone(), number)

    def step(token: int) -> None:
        output = mpt(torch.tensor([[token]]), cache=cache, use_cache=True)
        log_probs.append(output.logits[0, -1].log_softmax(-1))

    return {"tokens_per_second": repeat_rate(step, more, repeats)}, torch.stack(log_probs)


def compare(log_probs: Tensor, log_probs_full: Tensor) -> dict[str, float]:
    """Return how far next-token distributions are from those of a full cache."""
    kl = (log_probs_full.exp() * (log_probs_full - log_probs)).sum(-1)
    return {
        "max_log_prob_difference": float((log_probs - log_probs_full).abs().max()),
        "mean_kl_nats": float(kl.mean()),
    }


def measure_length(
    model: GPT, mpt: MptForCausalLM, tokens: list[int], length: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return all figures of one length of the text before."""
    prompt, more = tokens[:length], tokens[length : length + arguments.tokens]
    repeats = arguments.repeats
    full_figures, full, of_full = measure_cache(model, prompt, more, repeats, 0.0)
    figures: dict[str, Any] = {"length": length, "full_cache": full_figures, "bounded_cache": []}
    del full_figures["kept_tokens_by_layer_and_head"]
    with torch.no_grad():
        mpt_figures, of_mpt = measure_mpt(mpt, full, length, more, repeats)
    figures["transformers_mpt"] = mpt_figures | compare(of_mpt, of_full)
    del full
    for eps in EPSILONS if length <= arguments.recompute_up_to else EPSILONS[:1]:
        row, _, log_probs = measure_cache(model, prompt, more, repeats, eps)
        figures["bounded_cache"].append(row | compare(log_probs, of_full))
    if length <= arguments.recompute_up_to:
        text = torch.tensor([prompt])
        rate = repeat_rate(lambda _: model.log_probs(text, first=length - 1), [0] * repeats, repeats)
        figures["recomputation"] = {"tokens_per_second": rate}
    return figures


def format_generation_table(results: Sequence[dict[str, Any]]) -> str:
    """Return the figures as a table in Markdown."""
    lines = [
        "| tokens before | what | cache MB | keys kept | tokens/s (min to max) | largest change of a log-probability |",
        "|---|---|---|---|---|---|",
    ]
    for row in results:
        kinds = [("full cache", row["full_cache"])]
        kinds += [(f"bounded, eps {cache['horizon_eps']:.1e}", cache) for cache in row["bounded_cache"]]
        kinds += [("transformers' MPT", row["transformers_mpt"])]
        kinds += [("recomputation", row["recomputation"])] if "recomputation" in row else []
        for name, kind in kinds:
            rate = kind["tokens_per_second"]
            memory = f"{kind['memory_bytes'] / 1e6:.1f}" if "memory_bytes" in kind else ""
            kept = f"{kind['kept_share']:.1%}" if "kept_share" in kind else ""
            difference = f"{kind['max_log_prob_difference']:.1e}" if "max_log_prob_difference" in kind else ""
            speed = f"{rate['median']:.1f} ({rate['min']:.1f} to {rate['max']:.1f})"
            lines.append(f"| {row['length']:,} | {name} | {memory} | {kept} | {speed} | {difference} |")
    return "\n".join(lines) + "\n"


def describe_measurement(model: GPT, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures with what they depend on, and how busy the machine was."""
    described = describe_run("cpu", ("torch", "transformers"))
    described["hardware"]["load_average_at_the_end"] = read_load_average()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {**described, "threads": torch.get_num_threads(), "parameters": parameters, "results": results}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="the trained model")
    source.add_argument("--config", metavar="FILE.yaml", help="a configuration, for random weights")
    parser.add_argument("--data", metavar="PREFIX", help="token file of the text (default: random tokens)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536], metavar="N")
    parser.add_argument("--tokens", type=int, default=60, help="tokens that continue the text (default: 60)")
    parser.add_argument("--repeats", type=int, default=5, help="parts they are measured in (default: 5)")
    parser.add_argument(
        "--recompute-up-to",
        type=int,
        default=16384,
        metavar="N",
        help="longest text to recompute, and to read with other eps than the first",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the figures; a .md beside it")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write."""
    arguments = parse_arguments()
    check_option("--repeats", arguments.repeats, 1)
    check_option("--tokens", arguments.tokens, arguments.repeats)
    for length in arguments.lengths:
        check_option("--lengths", length, 1)
    check_outputs({"--output": arguments.output})
    model, config, dtype = open_model(arguments)
    longest = max(arguments.lengths) + arguments.tokens
    if arguments.checkpoint is not None:
        mpt = open_exported_mpt(arguments.checkpoint, dtype, longest)
    else:
        mpt = build_mpt(model, config, longest)
    tokens = read_text_tokens(arguments.data, model, longest)
    results: list[dict[str, Any]] = []
    for length in sorted(arguments.lengths):
        results.append(measure_length(model, mpt, tokens, length, arguments))
        console.print(format_generation_table(results[-1:]))
        record = describe_measurement(model, results)
        if arguments.output:  # after each length: the next one may be too long for this machine
            write_json(record, arguments.output)
            arguments.output.with_suffix(".md").write_text(format_generation_table(results), encoding="utf-8")
    if arguments.output is None:
        print(json.dumps(record, indent=2))


if __name__ == "__main__":
    log.configure()
    run_tool(main)
