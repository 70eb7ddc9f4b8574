"""The steps of a visit in order of worth: the 1.3B model on a GPU, or a toy of it on a CPU, to try the visit itself.

The seconds that steps are expected to take are estimates, from visits to one H200 with an earlier state of the code.
They say that nine minutes are enough for everything but the peers that torch compiles, which a repeated command does.
Attention on q and k of a trained model has no step, because it needs a file from tools/capture_qk.py of such a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megalibi.studies.gpu_visit.results import TESTS_FILE
from megalibi.studies.gpu_visit.setup import TOY_VOCAB_SIZE, VOCAB_SIZE_1_3B, Setup
from megalibi.studies.gpu_visit.step import VisitStep
from megalibi.studies.machinery.machine import COMMAND_SCRIPT

CONFIG_1_3B = "configs/gpt_1.3b_alibi_2048_1gpu.yaml"
CONFIG_RESUME = "configs/books_24m_alibi.yaml"
CONFIG_EXTRAPOLATION = "configs/extrapolation_gpu.yaml"
EXTRAPOLATION_FROM_SECONDS = 3600.0
EXTRAPOLATION_JOBS = 6
"""Trainings that share the GPU: their models are too small to fill it."""
_TOY_LEAST, _TESTS_LIMIT = 5.0, 300


def plan_steps(setup: Setup) -> list[VisitStep]:
    """Return the steps in order of worth.

    Args:
        setup: What the steps are made of.
    """
    short, long = "data.seq_length=2048 train.micro_batch_size=8", "data.seq_length=8192 train.micro_batch_size=2"
    short_batch, long_batch = "train.global_batch_size=32 train.steps=6", "train.global_batch_size=8 train.steps=5"
    if setup.is_toy:
        short, long = "data.seq_length=64 train.micro_batch_size=2", "data.seq_length=128 train.micro_batch_size=1"
        short_batch, long_batch = "train.global_batch_size=4 train.steps=2", "train.global_batch_size=2 train.steps=2"
    steps = [
        _warm(setup),  # comes first, because steps that need no Triton can run beside it
        _measure(setup, "machine", "driver, clocks, memory and versions", 60, expected=8),
        _measure(setup, "ceilings", "matrix products and copies at their best", 60, expected=5, least=15),
        _contract(setup),
        _train(setup, "train_alibi", "ALiBi", short, short_batch),
        _profile(setup, short),
        _attention(setup, 1, setup.peers, expected=80),
        _train(setup, "train_alibi_long", "ALiBi, 4 times as long", long, long_batch),
        _plan(setup),  # runs beside steps that are not timed
        _resume(setup),
        _tests(setup),  # may take all the time that is left, so what is worth more comes before
        _attention(setup, 8, setup.peers, expected=40),
        _train(setup, "train_no_positions", "no positions", short, short_batch, "model.position_method=none"),
        _train(setup, "train_sinusoidal", "sinusoidal", short, short_batch, "model.position_method=sinusoidal"),
        _attention_in_a_graph(setup),
        _compiled_attention(setup),
        _extrapolation(setup),
    ]
    if setup.is_toy:
        return [replace(step, least=min(step.least, _TOY_LEAST), expected=0.0) for step in steps]
    return steps


def _measure(
    setup: Setup, name: str, what: str, limit: float, *arguments: str, expected: float, least: float = 0.0
) -> VisitStep:
    output = setup.output(name)
    command = [setup.python, COMMAND_SCRIPT, "study", "measure-device", name, "--device", setup.device]
    return VisitStep(
        name=name,
        what=what,
        command=(*command, "--output", str(output), *arguments),
        limit=limit,
        expected=expected,
        least=least,
        output=output,
    )


def _warm(setup: Setup) -> VisitStep:
    return VisitStep(
        name="warm",
        what="Triton's kernels compiled on all cores, beside the next steps",
        command=(setup.python, COMMAND_SCRIPT, "warm-triton"),
        expected=45,
        limit=90,  # kernels that are not compiled by then are compiled at their first use
        least=30,
        in_background=True,
        impossible="Triton compiles for GPUs alone" if setup.device == "cpu" else "",
    )


def _contract(setup: Setup) -> VisitStep:
    lengths, more = ("17", ("--backends", "sdpa")) if setup.is_toy else ("97,1025,4096", ())
    command = (setup.python, "-m", "alibi_attention", "--contract", "--device", setup.device, "--lengths", lengths)
    return VisitStep(
        name="contract",
        what="every back end of attention against fp64",
        command=(*command, *more),
        limit=100,
        expected=27,
        least=30,
        after="warm",
    )


def _tests(setup: Setup) -> VisitStep:
    junit = setup.folder / TESTS_FILE
    command = [setup.python, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml", str(junit)]
    if setup.is_toy:  # a test that is quick anywhere
        chosen = [str(setup.root / "tests" / "alibi_attention" / "test_slopes.py")]
    else:
        # pytest ends before the step is killed, so that its failures until then are known.
        chosen = ["-m", "gpu", "--maxfail=20", f"--session-timeout={_TESTS_LIMIT - 15}", str(setup.root / "tests")]
    return VisitStep(
        name="test_gpu",
        what="the tests that are for a GPU, the memory plan against the allocator among them",
        command=(*command, *chosen),
        limit=_TESTS_LIMIT,
        expected=120,
        least=60,
        output=junit,
        environment={"TEST_DEVICE": setup.device},
    )


def _model_overrides(setup: Setup) -> tuple[str, ...]:
    ours = [
        f"data.train={setup.data}",
        "data.valid=[]",
        "checkpoint.every_steps=0",
        "optimizer.warmup_steps=2",
        f"train.output_dir={setup.scratch / 'run'}",
    ]
    if setup.vocab_size > VOCAB_SIZE_1_3B:
        ours.append(f"model.vocab_size={setup.vocab_size}")
    if setup.is_toy:
        ours += ["model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4"]
        ours += ["model.ffn_hidden_size=256", f"model.vocab_size={TOY_VOCAB_SIZE}"]
    return tuple(ours)


def _train(setup: Setup, name: str, what: str, shape: str, batch: str, *method: str) -> VisitStep:
    output = setup.output(name)
    command = (setup.python, COMMAND_SCRIPT, "study", "measure-turn")
    run = ("--config", str(setup.root / CONFIG_1_3B), "--output", str(output))
    overrides = (*_model_overrides(setup), *shape.split(), *batch.split(), *method, *setup.overrides)
    return VisitStep(
        name=name,
        what=f"steps of the {'toy' if setup.is_toy else '1.3B'} model, {what}",
        command=(*command, *run, *overrides),
        limit=75,
        expected=30,
        least=35,
        output=output,
        after="warm",
    )


def _profile(setup: Setup, shape: str) -> VisitStep:
    output = setup.output("profile_step")
    command = (setup.python, COMMAND_SCRIPT, "study", "profile-step")
    run = ("--config", str(setup.root / CONFIG_1_3B), "--output", str(output))
    batch = f"train.global_batch_size={4 if setup.is_toy else 16}"
    steps = f"train.steps={1 if setup.is_toy else 3}"
    return VisitStep(
        name="profile_step",
        what="one of these steps by kernel and by part",
        command=(*command, *run, *_model_overrides(setup), *shape.split(), batch, steps, *setup.overrides),
        limit=75,
        expected=40,
        least=35,
        output=output,
        after="warm",
    )


def _attention(
    setup: Setup, batch: int, peers: Sequence[str], *, expected: float, name: str = "", lengths: str = ""
) -> VisitStep:
    name = name or f"attention_batch_{batch}"
    output = setup.output(name)
    command = [setup.python, str(setup.root / "tools" / "benchmark_attention.py"), "--device", setup.device]
    command += ["--batch", str(batch), "--dtype", "bfloat16", "--peers", ",".join(peers) or "none"]
    if setup.is_toy:
        command += ["--head-dim", "16", "--heads", "2", "--repeats", "2", "--lengths", "32", "--backends", "sdpa"]
    else:
        lengths = lengths or ("1024,2048,4096,8192,16384" if batch == 1 else "1024,2048,4096")
        command += ["--head-dim", "128", "--heads", "16", "--repeats", "5", "--lengths", lengths]
        command += ["--backends", "triton"]
    return VisitStep(
        name=name,
        what=f"attention beside its peers, batch {batch}",
        command=(*command, "--output", str(output)),
        limit=120,
        expected=expected,
        least=30,
        output=output,
        after="warm",
    )


def _attention_in_a_graph(setup: Setup) -> VisitStep:
    peers = [peer for peer in setup.peers if peer.startswith("flash_attn")]
    step = _attention(setup, 1, peers, expected=20, name="attention_cuda_graph", lengths="1024,2048")
    return replace(
        step,
        what="attention in CUDA graphs, without the host's time, batch 1",
        command=(*step.command, "--cuda-graph"),
        limit=60,
        impossible="CUDA graphs need a GPU" if setup.device == "cpu" else "",
    )


def _compiled_attention(setup: Setup) -> VisitStep:
    step = _attention(setup, 1, setup.compiled_peers, expected=90, name="attention_compiled", lengths="2048,4096,16384")
    return replace(
        step,
        what="attention beside the peers that torch compiles, batch 1",
        command=(*step.command, "--modes", "forward_backward"),
        limit=150,
        least=45,
        impossible="" if setup.compiled_peers else "no peer here is compiled by torch",
    )


def _plan(setup: Setup) -> VisitStep:
    turns = [word for name in ("train_alibi", "train_alibi_long") for word in ("--turn", str(setup.output(name)))]
    step = _measure(setup, "plan", "planned memory beside what the steps held", 120, *turns, expected=25, least=20)
    return replace(step, in_background=True)  # it needs no GPU


def _resume(setup: Setup) -> VisitStep:
    small = [f"data.train={setup.data}", "data.valid=[]", "data.tokenizer=null", "train.deterministic=true"]
    if setup.is_toy:
        small += ["model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2"]
        small += ["model.ffn_hidden_size=64", f"model.vocab_size={TOY_VOCAB_SIZE}", "data.seq_length=32"]
        small += ["train.global_batch_size=2", "train.micro_batch_size=2"]
    else:
        small += [f"model.vocab_size={setup.vocab_size}"]
    given = ("--config", str(setup.root / CONFIG_RESUME), "--scratch", str(setup.scratch / "resume"))
    return _measure(
        setup, "resume", "20 steps against 10, a resume, and 10", 120, *given, *small, expected=45, least=45
    )


def _extrapolation(setup: Setup) -> VisitStep:
    impossible = ""
    if setup.seconds < EXTRAPOLATION_FROM_SECONDS:
        impossible = f"it takes an hour: give --seconds {EXTRAPOLATION_FROM_SECONDS:.0f} or more"
    elif not setup.valid:
        impossible = "it needs text: give --data and --valid"
    config = setup.root / CONFIG_EXTRAPOLATION
    overrides = [f"data.train={setup.data}", f"data.valid={setup.valid}", "data.tokenizer=null"]
    overrides += [f"model.vocab_size={setup.vocab_size}", f"train.output_dir={setup.scratch / 'extrapolation'}"]
    output = ("--output", str(setup.folder / "extrapolation"), "--jobs", str(EXTRAPOLATION_JOBS))
    return VisitStep(
        name="extrapolation",
        what="the extrapolation study, each method with its best learning rate",
        command=(setup.python, COMMAND_SCRIPT, "study", "extrapolate", str(config), *output, *overrides),
        limit=24 * 3600.0,
        expected=EXTRAPOLATION_FROM_SECONDS,
        least=600,
        impossible=impossible,
    )
