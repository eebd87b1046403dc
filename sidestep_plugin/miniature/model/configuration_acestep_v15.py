"""Configuration of the miniature's models: the keys of ACE-Step 1.5 that training reads, at toy sizes."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class AceStepConfig(PretrainedConfig):
    """As upstream's class does, it calls every model "turbo" by default and knows no `is_turbo`.

    So a config.json that lacks both keys still reads as turbo in memory: ask the file, not the object.
    """

    model_type = "acestep"

    def __init__(
        self,
        hidden_size: int = 64,
        encoder_hidden_size: int | None = None,
        intermediate_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        text_hidden_dim: int = 32,
        audio_acoustic_hidden_dim: int = 64,
        timestep_mu: float = -0.4,
        timestep_sigma: float = 1.0,
        data_proportion: float = 0.5,
        model_version: str = "turbo",
        **others: Any,
    ) -> None:
        self.hidden_size = hidden_size
        if encoder_hidden_size is not None:
            self.encoder_hidden_size = encoder_hidden_size
        self.intermediate_size, self.text_hidden_dim = intermediate_size, text_hidden_dim
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.audio_acoustic_hidden_dim = audio_acoustic_hidden_dim
        self.timestep_mu, self.timestep_sigma = timestep_mu, timestep_sigma
        self.data_proportion = data_proportion
        self.model_version = model_version
        super().__init__(**{"tie_word_embeddings": False, **others})
