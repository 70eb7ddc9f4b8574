"""The precision of a run as a dtype of torch."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype that the model computes in, for each ``train.precision``."""
