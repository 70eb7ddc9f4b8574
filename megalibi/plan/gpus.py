"""GPUs that a plan can be compared with.

The bandwidths of the memory and of the links were written down from memory of the data sheets named as ``source``. They
have not been looked up again, and no test compares them with the sheets: check the row of your GPU before you rely on
an estimate. Measured rates are in results/gpu_h200_first, of one H200 alone.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from megalibi.errors import ConfigError

GIB = 1 << 30
USABLE = 0.95
"""Share of a GPU's memory that a plan may fill. The rest is assumed to go to CUDA itself, to NCCL and to gaps between
the allocator's blocks."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU and the figures of its data sheet."""

    name: str
    """The name by which ``--gpu`` asks for it."""
    memory_bytes: int
    """Memory by the data sheet, 2^30 bytes for each GB. Drivers show up to 2% less."""
    peak_flops_per_second: float
    """Peak of dense products of bf16 matrices summed in fp32; of fp16 matrices on V100, which has no bf16."""
    memory_bytes_per_second: float
    """Bandwidth of its memory; see the head of this file."""
    link_bytes_per_second: float
    """Bandwidth one way to other GPUs of the host: half of the data sheet's NVLink, or of PCIe where there is no NVLink
    or it only joins pairs. See the head of this file."""
    source: str
    """The data sheet that the figures are meant to be those of."""

    @property
    def usable_bytes(self) -> int:
        """Bytes that a plan may fill."""
        return int(USABLE * self.memory_bytes)


def _gpu(name: str, memory_gib: float, peak_tflops: float, memory_gbps: float, link_gbps: float, source: str) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=int(memory_gib * GIB),
        peak_flops_per_second=peak_tflops * 1e12,
        memory_bytes_per_second=memory_gbps * 1e9,
        link_bytes_per_second=link_gbps * 1e9,
        source=source,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("V100-16GB", 16, 125, 900, 150, "NVIDIA V100 data sheet, SXM2"),
        _gpu("V100-32GB", 32, 125, 900, 150, "NVIDIA V100 data sheet, SXM2"),
        _gpu("A100-40GB", 40, 312, 1555, 300, "NVIDIA A100 data sheet, SXM"),
        _gpu("A100-80GB", 80, 312, 2039, 300, "NVIDIA A100 data sheet, SXM"),
        _gpu("A6000", 48, 154.8, 768, 32, "NVIDIA Ampere GA102 architecture paper, RTX A6000"),
        _gpu("A10", 24, 125, 600, 32, "NVIDIA A10 data sheet"),
        _gpu("RTX4090", 24, 165.2, 1008, 32, "NVIDIA Ada GPU architecture paper, GeForce RTX 4090"),
        _gpu("L40S", 48, 362, 864, 32, "NVIDIA L40S data sheet"),
        _gpu("H100", 80, 989.4, 3350, 450, "NVIDIA H100 data sheet, SXM"),
        _gpu("H100-PCIE", 80, 756, 2000, 64, "NVIDIA H100 data sheet, PCIe"),
        _gpu("H200", 141, 989.4, 4800, 450, "NVIDIA H200 data sheet, SXM"),
    )
}
"""Name -> GPU. Data sheets that state the peak with sparsity state twice these figures."""


def get_gpu(name: str) -> Gpu:
    """Return a GPU by its name, in any case.

    Raises:
        ConfigError: It is not in the table.
    """
    if name.upper() in GPUS:
        return GPUS[name.upper()]
    near = [known for known in GPUS if known.startswith(name.upper())]
    near = near or difflib.get_close_matches(name.upper(), GPUS, n=1, cutoff=0.3)
    hint = f"did you mean {' or '.join(near)}? It " if near else ""
    raise ConfigError(
        f"--gpu={name}: {hint}must be one of {', '.join(GPUS)}; or give the memory alone with --gpu-memory-gib"
    )
