"""Where the tests compute: on the CPU, or with TEST_DEVICE=cuda on a GPU (``make test-gpu``).

Import this before torch: what decides whether torch and DeepSpeed see a GPU is read when they are imported.
"""

from __future__ import annotations

import os

DEVICE = os.environ.setdefault("TEST_DEVICE", "cpu")
if DEVICE not in ("cpu", "cuda"):
    raise ValueError(f"TEST_DEVICE={DEVICE}: must be cpu or cuda")
ON_GPU = DEVICE == "cuda"
COLLECTIVES = "nccl" if ON_GPU else "gloo"
if not ON_GPU:
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and threads would wait for each other
