"""Preprocessed songs: a folder of .pt files, and the loaders that make batches of them."""

from __future__ import annotations

import json
import os
from collections.abc import Sized
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, random_split

from acestep.training.log import logger
from acestep.training.path_safety import safe_path

TENSORS = (
    "target_latents",  # [T, 64]
    "attention_mask",  # [T]
    "encoder_hidden_states",  # [L, D]
    "encoder_attention_mask",  # [L]
    "context_latents",  # [T, 128]
)


class PreprocessedTensorDataset(Dataset[dict[str, Any]]):
    """The songs that manifest.json names, or without one every .pt file of the folder."""

    def __init__(self, tensor_dir: str) -> None:
        self.tensor_dir = safe_path(tensor_dir)
        if not os.path.isdir(self.tensor_dir):
            raise ValueError(f"no such folder: {tensor_dir}")
        manifest = os.path.join(self.tensor_dir, "manifest.json")
        if os.path.exists(manifest):
            with open(manifest) as file:  # in the system's code page, as upstream does
                found = [self._find(name) for name in json.load(file).get("samples", [])]
            self.sample_paths = [path for path in found if path is not None]
        else:
            names = (name for name in os.listdir(self.tensor_dir) if name.endswith(".pt"))
            self.sample_paths = [safe_path(name, base=self.tensor_dir) for name in names]
        self.valid_paths = [path for path in self.sample_paths if os.path.exists(path)]

    def _find(self, name: str) -> str | None:
        """A manifest's entry is relative to its folder or, in old ones, to the safe root."""
        for base in (self.tensor_dir, None):
            try:
                path: str = safe_path(name, base=base)
            except ValueError:
                continue
            if os.path.exists(path):
                return path
        logger.warning(f"manifest.json names {name!r}, which is not there")
        return None

    def __len__(self) -> int:
        return len(self.valid_paths)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        song = torch.load(self.valid_paths[idx], map_location="cpu", weights_only=True)
        return {**{name: song[name] for name in TENSORS}, "metadata": song.get("metadata", {})}


def collate_preprocessed_batch(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack songs, padded with zeros at the end to the longest of the batch."""
    stacked = {name: pad_sequence([song[name] for song in batch], batch_first=True) for name in TENSORS}
    return {**stacked, "metadata": [song["metadata"] for song in batch]}


class PreprocessedDataModule:
    """Makes the training loader and, with `val_split`, the validation loader."""

    def __init__(
        self,
        tensor_dir: str,
        batch_size: int = 1,
        num_workers: int = 4,
        pin_memory: bool = True,
        prefetch_factor: int = 2,
        persistent_workers: bool = True,
        pin_memory_device: str = "",
        val_split: float = 0.0,
    ) -> None:
        self.tensor_dir = tensor_dir
        self.val_split = val_split
        self.train_dataset: Dataset[dict[str, Any]] | None = None
        self.val_dataset: Dataset[dict[str, Any]] | None = None
        self._loader_options: dict[str, Any] = {
            "batch_size": batch_size,
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "collate_fn": collate_preprocessed_batch,
        }
        if num_workers > 0:  # DataLoader refuses both settings without workers
            self._loader_options |= {"prefetch_factor": prefetch_factor, "persistent_workers": persistent_workers}
        if pin_memory_device:
            self._loader_options["pin_memory_device"] = pin_memory_device

    def setup(self, stage: str | None = None) -> None:
        if stage not in ("fit", None):
            return
        songs = PreprocessedTensorDataset(self.tensor_dir)
        self.train_dataset, self.val_dataset = songs, None
        if self.val_split > 0 and len(songs) > 1:
            held_out = max(1, int(self.val_split * len(songs)))
            self.train_dataset, self.val_dataset = random_split(songs, [len(songs) - held_out, held_out])

    def count(self) -> int:
        """How many songs there are to train on."""
        return len(self.train_dataset) if isinstance(self.train_dataset, Sized) else 0

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        assert self.train_dataset is not None, "call setup() first"
        return DataLoader(self.train_dataset, shuffle=True, **self._loader_options)

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | None:
        if self.val_dataset is None:
            return None
        return DataLoader(self.val_dataset, shuffle=False, **self._loader_options)
