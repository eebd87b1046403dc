"""The mean of adapters: of what they do to the model, layer by layer, not of their factors.

The mean of ``B A`` is not the product of the means. It is exactly the product of the factors side by side, whose rank
is the sum of the ranks, and is cut back to a rank by a singular value decomposition, which loses least. How much is
lost is told as a share of the energy, which is the sum of the squares of all numbers. No model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import Refusal
from ..text import shown
from .kinds import BY_NAME, KINDS, Kind, Mean, title_of
from .layers import Adapter, Layer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Averaged:
    """The mean of some adapters of one kind, by layer."""

    kind: Kind
    layers: dict[str, Mean]
    energy: float  # share of the exact mean's energy that it holds, from 0 to 1
    lowest: float  # the lowest of the layers' shares

    @property
    def ranks(self) -> set[int]:
        """The ranks of the layers that change something; empty for full matrices."""
        return {mean.rank for mean in self.layers.values() if mean.rank is not None and mean.exact > 0.0}


def average(adapters: Sequence[Adapter], weights: Sequence[float] | None = None, rank: int | None = None) -> Averaged:
    """The weighted mean of adapters of one kind. A layer that one of them does not have counts as zero there.

    The arithmetic is in float64; the result has the dtype of the adapters' tensors, the widest if they differ. The
    weights are positive, and their sum does not matter; None: all alike. It is cut back to `rank`; None: the highest of
    each layer.

    Raises:
        Refusal: they cannot be averaged exactly, or hold NaN; the message names the file and the layer.
        OSError: a file cannot be read.
    """
    kind = _kind_of(adapters)
    shares = [1.0] * len(adapters) if weights is None else list(weights)
    total = sum(shares)
    shares = [share / total for share in shares]
    for adapter in adapters:
        _check(adapter, kind)
    layers: dict[str, Mean] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        holders = [(share, adapter) for share, adapter in zip(shares, adapters, strict=True) if name in adapter.layers]
        parts = [(share, adapter.layers[name], _tensors(adapter, adapter.layers[name])) for share, adapter in holders]
        untrained = all(name in adapter.untrained for _, adapter in holders)
        if untrained and (rank is None or not _is_plain(holders[0][1], kind, holders[0][1].layers[name])):
            _, layer, tensors = parts[0]
            kept = {part: tensor for part, tensor in tensors.items() if part != "alpha"}
            layers[name] = Mean(kept, layer.rank, layer.alpha or float(layer.rank or 1), exact=0.0, kept=0.0)
            continue
        _check_sizes(kind, name, [adapter for _, adapter in holders], parts)
        layers[name] = kind.mean(parts, rank)
    exact = sum(mean.exact for mean in layers.values())
    energy = sum(mean.kept for mean in layers.values()) / exact if exact else 1.0
    lowest = min((mean.kept / mean.exact for mean in layers.values() if mean.exact > 0.0), default=1.0)
    return Averaged(kind, layers, energy, lowest)


def _kind_of(adapters: Sequence[Adapter]) -> Kind:
    names = dict.fromkeys(adapter.kind for adapter in adapters)
    if len(names) > 1:
        titles = " and ".join(title_of(name) for name in names)
        raise Refusal(f"There are {titles} among these adapters. Expected adapters of one kind.")
    (name,) = names
    if name not in BY_NAME:
        known = " and ".join(kind.title for kind in KINDS)
        raise Refusal(f"{adapters[0].file.path} is a {title_of(name)}. Only {known} can be averaged. Leave it out.")
    return BY_NAME[name]


def _check(adapter: Adapter, kind: Kind) -> None:
    path = adapter.file.path
    if adapter.unknown:
        raise Refusal(
            f"{path} holds tensors that belong to no adapter ({shown(adapter.unknown[0], 80)}). Leave it out."
        )
    for layer in adapter.layers.values():
        if "magnitude" in layer.parts:
            raise Refusal(
                f"{path} has weight decomposition (DoRA) in {shown(layer.name, 80)}: the mean of magnitudes is not the "
                "mean of what they do. Leave it out."
            )
        if kind.strength(layer) is None:
            raise adapter.unknown_alpha()
        if layer.name not in adapter.untrained and not _is_plain(adapter, kind, layer):
            raise Refusal(
                f"{path} cannot be averaged: the tensors of {shown(layer.name, 80)} are not two matrices. Leave it out."
            )


def _is_plain(adapter: Adapter, kind: Kind, layer: Layer) -> bool:
    """Whether a layer is a product of matrices and nothing else."""
    sizes = {part: adapter.file.tensors[key].shape for part, key in layer.parts.items()}
    return not {"lokr_t2", "scalar"} & sizes.keys() and kind.shape(sizes) is not None


def _tensors(adapter: Adapter, layer: Layer) -> dict[str, torch.Tensor]:
    tensors = adapter.load(layer)
    for part, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise Refusal(
                f"{adapter.file.path} holds NaN or infinity ({shown(layer.parts[part], 80)}). Leave it out, or take an "
                "earlier checkpoint."
            )
    return tensors


def _check_sizes(
    kind: Kind, name: str, adapters: Sequence[Adapter], parts: Iterable[tuple[float, Layer, dict[str, torch.Tensor]]]
) -> None:
    """Refuse layers of different sizes, and factors that make no single product."""
    first = None
    for adapter, (_, _, tensors) in zip(adapters, parts, strict=True):
        sizes = {part: tensor.shape for part, tensor in tensors.items()}
        found = kind.same_sizes(sizes)
        first = found if first is None else first
        if found != first:
            raise Refusal(
                f"{adapter.file.path} and {adapters[0].file.path} have other sizes in {shown(name, 80)}: {found} and "
                f"{first}. Expected adapters of one model{kind.made_alike}."
            )
