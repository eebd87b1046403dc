"""What a run is told: names and defaults are ACE-Step's, since launchers and saved files use them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


def _attention_projections() -> list[str]:
    return [f"{letter}_proj" for letter in "qkvo"]


@dataclass
class LoRAConfig:
    """A PEFT adapter; `to_dict` speaks PEFT's names."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.1
    target_modules: list[str] = field(default_factory=_attention_projections)
    bias: str = "none"

    def to_dict(self) -> dict[str, Any]:
        own = asdict(self)
        return {{"alpha": "lora_alpha", "dropout": "lora_dropout"}.get(key, key): own[key] for key in own}


@dataclass
class LoKRConfig:
    """A LyCORIS adapter; `to_dict` speaks LyCORIS' names, which are the same."""

    linear_dim: int = 64
    linear_alpha: int = 128
    factor: int = -1
    decompose_both: bool = False
    use_tucker: bool = False
    use_scalar: bool = False
    weight_decompose: bool = False
    target_modules: list[str] = field(default_factory=_attention_projections)
    full_matrix: bool = False
    bypass_mode: bool = False
    rs_lora: bool = False
    unbalanced_factorization: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class TrainingConfig:
    """The run itself. `shift` and `num_inference_steps` are carried along and never used."""

    shift: float = 3.0
    num_inference_steps: int = 8
    # the optimizer
    learning_rate: float = 1e-4
    batch_size: int = 1
    gradient_accumulation_steps: int = 4
    max_epochs: int = 100
    save_every_n_epochs: int = 10
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    # how it runs, and where to
    mixed_precision: str = "bf16"
    use_fp8: bool = False
    gradient_checkpointing: bool = False
    seed: int = 42
    output_dir: str = "./lora_output"
    # the loaders
    num_workers: int = 4
    pin_memory: bool = True
    prefetch_factor: int = 2
    persistent_workers: bool = True
    pin_memory_device: str = ""
    # what is looked at
    log_every_n_steps: int = 10
    val_split: float = 0.0

    def __post_init__(self) -> None:
        if self.val_split < 0.0 or self.val_split >= 1.0:
            raise ValueError(f"val_split is a fraction from 0 up to, not including, 1: {self.val_split}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
