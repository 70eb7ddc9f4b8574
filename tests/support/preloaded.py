"""What the processes of tests have imported before they are forked: all that a training imports, early or late.

Imported for its effect in the servers of ``processes`` and ``warm_python``. What is missing here costs its time in
every process anew; ``sys.modules`` at the end of a process, compared with that at its beginning, tells what it is.
"""

from __future__ import annotations

import gc
import importlib

import deepspeed

MODULES = (
    "megalibi.runtime.ranks",
    "megalibi.train.loop",
    "megalibi.train.start",
    "torch._dynamo",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.triton_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "rich._emoji_codes",
)

for module in MODULES:
    importlib.import_module(module)
assert not deepspeed.ops.__compatible_ops__["deepspeed_not_implemented"]  # DeepSpeed asks compilers, once a process
gc.collect()
gc.freeze()  # what is imported stays: no collection in a forked process looks at it again
