"""Tensor parallelism over torch.distributed: groups, layout, collectives, sharded layers, loss, keyed randomness."""

from megalibi.parallel.agreement import check_same, gather_objects, refusing_together
from megalibi.parallel.clocks import compare_clocks
from megalibi.parallel.collectives import (
    all_gather_raw,
    all_reduce_raw,
    copy_to_tensor_group,
    gather_from_tensor_group,
    reduce_from_tensor_group,
    reduce_scatter_raw,
)
from megalibi.parallel.cross_entropy import IGNORED_LABEL, vocab_parallel_cross_entropy
from megalibi.parallel.groups import ALONE, Group, ProcessGroups, build_process_groups, single_process_groups
from megalibi.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    parallel_lm_logits,
)
from megalibi.parallel.layout import WHOLE, Layout
from megalibi.parallel.products import linear, matmul
from megalibi.parallel.random import derive_key, dropout_key, fork_rng, init_normal_, keyed_dropout
from megalibi.parallel.sequence import (
    gather_from_sequence,
    reduce_scatter_to_sequence,
    scatter_to_sequence,
    use_replicated_param,
)
from megalibi.parallel.sharding import ShardSpec, get_shard_spec, set_shard_spec, shard, unshard
from megalibi.parallel.stopwatch import Stopwatch

__all__ = [
    "ALONE",
    "IGNORED_LABEL",
    "WHOLE",
    "ColumnParallelLinear",
    "Group",
    "Layout",
    "ProcessGroups",
    "RowParallelLinear",
    "ShardSpec",
    "Stopwatch",
    "VocabParallelEmbedding",
    "all_gather_raw",
    "all_reduce_raw",
    "build_process_groups",
    "check_same",
    "compare_clocks",
    "copy_to_tensor_group",
    "derive_key",
    "dropout_key",
    "fork_rng",
    "gather_from_sequence",
    "gather_from_tensor_group",
    "gather_objects",
    "get_shard_spec",
    "init_normal_",
    "keyed_dropout",
    "linear",
    "matmul",
    "parallel_lm_logits",
    "reduce_from_tensor_group",
    "reduce_scatter_raw",
    "reduce_scatter_to_sequence",
    "refusing_together",
    "scatter_to_sequence",
    "set_shard_spec",
    "shard",
    "single_process_groups",
    "unshard",
    "use_replicated_param",
    "vocab_parallel_cross_entropy",
]
