"""Loads the C++ kernel; writes whether it can be used, why not, what auto takes, and how exact its values are."""

import logging
import sys

import torch

from alibi_attention import alibi_slopes, attention, resolve_backend
from alibi_attention.backends.native.attend import capability as find_capability

logging.basicConfig(format="%(levelname)s %(message)s")
capability = find_capability()
lines = [str(capability.usable), capability.reason, resolve_backend("auto", "cpu", torch.float32, 64)]
if capability.usable:
    q, k, v = torch.randn(3, 1, 97, 4, 24, generator=torch.Generator().manual_seed(0)).unbind(0)
    ours, exact = (attention(q, k, v, alibi_slopes=alibi_slopes(4), backend=name) for name in ("native", "reference"))
    lines.append(str((ours - exact).abs().max().item()))
sys.stdout.write("\n".join(lines) + "\n")
