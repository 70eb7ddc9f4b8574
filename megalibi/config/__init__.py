"""What a run is: frozen dataclasses, their loading from YAML, and what follows from them; nothing imports torch."""

from megalibi.config.annotations import Decides, OnResume
from megalibi.config.derive import (
    AdaptiveBand,
    Derived,
    adaptive_bands,
    derive,
    learning_rate_at,
    padded_vocab_size,
)
from megalibi.config.identity import (
    BY_CONTENT,
    DECIDES,
    NO_WEIGHT_DEPENDS_ON,
    ON_RESUME,
    find_changes,
    find_differences,
    flatten_config,
)
from megalibi.config.load import config_from_dict, config_to_dict, load_config, save_config
from megalibi.config.model import ModelConfig
from megalibi.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DatasetConfig,
    OptimizerConfig,
    ParallelConfig,
    RuntimeConfig,
    TrainConfig,
    ZeroConfig,
)

__all__ = [
    "BY_CONTENT",
    "DECIDES",
    "NO_WEIGHT_DEPENDS_ON",
    "ON_RESUME",
    "AdaptiveBand",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DatasetConfig",
    "Decides",
    "Derived",
    "ModelConfig",
    "OnResume",
    "OptimizerConfig",
    "ParallelConfig",
    "RuntimeConfig",
    "TrainConfig",
    "ZeroConfig",
    "adaptive_bands",
    "config_from_dict",
    "config_to_dict",
    "derive",
    "find_changes",
    "find_differences",
    "flatten_config",
    "learning_rate_at",
    "load_config",
    "padded_vocab_size",
    "save_config",
]
