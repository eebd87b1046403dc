"""Training for the miniature; as in ACE-Step, importing this package imports the trainer."""

from acestep.training.configs import LoKRConfig, LoRAConfig, TrainingConfig
from acestep.training.data_module import PreprocessedDataModule, PreprocessedTensorDataset
from acestep.training.dataset_builder import AudioSample, DatasetBuilder
from acestep.training.trainer import (
    LIGHTNING_AVAILABLE,
    LoKRTrainer,
    LoRATrainer,
    PreprocessedLoKRModule,
    PreprocessedLoRAModule,
)

__all__ = [
    "LIGHTNING_AVAILABLE",
    "AudioSample",
    "DatasetBuilder",
    "LoKRConfig",
    "LoKRTrainer",
    "LoRAConfig",
    "LoRATrainer",
    "PreprocessedDataModule",
    "PreprocessedLoKRModule",
    "PreprocessedLoRAModule",
    "PreprocessedTensorDataset",
    "TrainingConfig",
]
