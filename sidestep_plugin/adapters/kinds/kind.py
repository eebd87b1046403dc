"""What a kind of adapter is: its names in ACE-Step and in files, and what is computed differently for each kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..base_weights import BaseWeights
    from ..layers import Adapter, Layer
    from ..weights_file import NewTensor

Hook = Callable[[Any, tuple[Any, ...], Any], Any]
"""A forward hook of a module: module, inputs, output; returns the new output."""
Shape = tuple[int, int]  # rows and columns of a layer's weight: outputs and inputs


@dataclass(frozen=True)
class Mean:
    """The mean of what a layer does in several adapters."""

    tensors: dict[str, torch.Tensor]  # by the names in ``Layer.parts``, of one dtype; "alpha" is not among them
    rank: int | None  # None if no factor is decomposed
    alpha: float
    # exact, kept: energy (sum of squares) of the exact mean, and of what these tensors hold of it.
    exact: float
    kept: float


@dataclass(frozen=True, kw_only=True)
class Kind(ABC):
    """A kind of adapter that ACE-Step's trainer trains. A new one is a file with an object, and a line in ``KINDS``."""

    name: str  # as in ``--adapter-type`` and in facts
    title: str  # as people write it
    remark: str  # about it, for somebody who has to choose
    # library, package, module: what it needs, as people, as pip and as Python call it.
    library: str
    package: str
    module: str
    # module_class, trainer_class, config_class: names in ACE-Step's trainer module.
    module_class: str
    trainer_class: str
    config_class: str
    save_functions: tuple[str, ...]  # its functions there that save the weights, and a checkpoint
    # Where these put the weights, below the folder that they are given; the usual place first.
    weight_files: tuple[str, ...]
    # Attribute of the training module with the network beside the decoder; None if it is in the decoder.
    network: str | None
    fields: Mapping[str, str]  # names of the options in ACE-Step's configuration of it
    # Its own options, whole numbers and switches: metavar and help by name. None for the metavar: a switch.
    options: Mapping[str, tuple[str | None, str]] = field(default_factory=dict)
    default_rank: int  # ACE-Step's default of ``--rank``
    recommended: Mapping[str, tuple[float, str]]  # value and reason by option, where the kinds differ
    # Recommended epochs for any usual number of songs, and the reason; None if they depend on it.
    epochs: tuple[int, str] | None
    validates: bool  # whether ACE-Step validates such trainings by itself (``--val-split``), with Lightning
    dropout: bool  # whether it has dropout
    quantizable: bool  # whether the base weights may be quantized below it
    whole_difference: bool  # whether a step computes the whole difference of a weight, from unrounded base weights
    # Regular expressions for what follows a layer's name in files, each with the tensor's name in ``Layer.parts``;
    # None: the group "part" of the expression.
    tensors: tuple[tuple[str, str | None], ...]
    rank_parts: tuple[str, ...]  # tensors whose first size is the rank
    alpha_in_config: bool  # whether the alpha is in PEFT's configuration where no tensor has it
    copy_name: str  # file name of a copy for ComfyUI beside an adapter
    made_alike: str  # what else has to be equal in adapters that are averaged, as the end of a sentence
    # network_module, network_args: what kohya's headers call it.
    network_module: str
    network_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weight_name(self) -> str:
        """File name of the weights."""
        return self.weight_files[0].rpartition("/")[2]

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def matches(self, layer: str, name: str) -> bool:
        """Whether a name in ``--target-modules`` means a layer, given by its full name in the decoder."""

    @abstractmethod
    def parameters(self, shape: Shape, rank: int) -> int:
        """Number of trained parameters for one layer."""

    @abstractmethod
    def saves_untargeted(self) -> bool:
        """Whether the file has all linear layers of the decoder, whatever the target modules are."""

    def check_rank(self, rank: int, width: int, model: str) -> None:  # noqa: B027
        """Refuse a rank that makes no sense for a decoder of this width. Raises Refusal."""

    def without_effect(self, config: Any, shapes: Mapping[str, Shape]) -> list[str]:
        """Settings of ACE-Step's configuration that change nothing in layers of these sizes, as lines for people."""
        return []

    def effective_alpha(self, config: Any, shapes: Mapping[str, Shape]) -> Any:
        """The alpha that its library gives the tensors: the configuration's, unless it has no effect.

        `shapes` are those of the trained layers by name; {} if they are not known.
        """
        return getattr(config, self.fields["alpha"], None)

    # -- saved adapters ------------------------------------------------------------------------------------------------

    @abstractmethod
    def strength(self, layer: Layer) -> float | None:
        """What a layer's factors are multiplied by; None if its alpha is unknown."""

    def known_strength(self, layer: Layer) -> float:
        """The strength of a layer whose alpha has been checked before."""
        strength = self.strength(layer)
        assert strength is not None
        return strength

    @abstractmethod
    def shape(self, sizes: Mapping[str, Sequence[int]]) -> Shape | None:
        """Size of the weight that a layer was trained for, by its tensors' sizes; None if they do not fit together."""

    @abstractmethod
    def change(self, layer: Layer, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What a layer adds to the weight, without weight decomposition: fp32, of the weight's size as a matrix.

        Its strength has to be known. The tensors go by the names in ``layer.parts`` and are on one device.
        """

    @abstractmethod
    def hook(self, layer: Layer, tensors: Mapping[str, torch.Tensor], module: Any) -> Hook:
        """A forward hook that adds to the output of a module what the layer does."""

    @abstractmethod
    def scaled(self, tensors: Mapping[str, torch.Tensor], strength: float) -> dict[str, torch.Tensor]:
        """The tensors of a layer that does so many times as much, without weight decomposition; one of them in fp32."""

    @abstractmethod
    def try_on(self, module: torch.nn.Module) -> None:
        """Put a small adapter onto a module with a linear layer ``q_proj``. Raises whatever its library raises."""

    @abstractmethod
    def mean(self, layers: Sequence[tuple[float, Layer, Mapping[str, torch.Tensor]]], rank: int | None) -> Mean:
        """The weighted sum of what a layer does in several adapters, cut back to a rank; None: the highest among them.

        Given are the weight, the layer with a known strength and its tensors on the CPU, for each adapter.
        """

    @abstractmethod
    def same_sizes(self, sizes: Mapping[str, Sequence[int]]) -> object:
        """What has to be equal in layers that are averaged, by the sizes of one's tensors."""

    @abstractmethod
    def saved_name(self, layer: str, part: str) -> str:
        """The name of a tensor in the files that ACE-Step reads, by the layer's name and the name in its parts."""

    # -- ComfyUI -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def comfyui_names(self, layer: Layer) -> tuple[str, dict[str, str]]:
        """A layer's name in a file for ComfyUI, and the names of its tensors behind it, by the names in its parts."""

    @abstractmethod
    def check_comfyui(self, adapter: Adapter, trained: Sequence[Layer], base: BaseWeights | None) -> None:
        """Refuse an adapter that ComfyUI cannot play as it was trained. Raises Refusal.

        `trained` are its layers that may change something; `base` is None if the base model is not at hand.
        """

    def comfyui_changes(self, adapter: Adapter, layer: Layer, base: BaseWeights) -> dict[str, NewTensor] | None:
        """Tensors that a copy for ComfyUI has in place of the layer's own, by the names in its parts.

        None if the layer changes nothing and is left out. Raises Refusal for another model than that of the training.
        """
        return {}

    def comfyui_scaled(self, adapter: Adapter, layer: Layer, strength: float) -> dict[str, NewTensor]:
        """Tensors that multiply a layer, where an alpha that a copy is given does not. Raises Refusal if none can."""
        return {}

    # -- trainings -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def live(self, module: Any, decoder: Any) -> dict[str, torch.Tensor]:
        """The current tensors of an adapter that is trained, under the names that they are saved with.

        `module` is ACE-Step's training module, `decoder` the model's without the wrappers of Lightning and torch.
        Raises Refusal if it is trained without the library that saves it.
        """

    @abstractmethod
    def load(self, module: Any, live: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
        """Load tensors into an adapter that is trained, of the names and sizes that :meth:`live` has returned."""

    @abstractmethod
    def save(self, trainer: Any, module: Any, folder: Path) -> Path:
        """Save an adapter that is trained with a function of ACE-Step's trainer. Returns the folder of the weights."""


def adding(delta: torch.Tensor) -> Hook:
    """A forward hook that adds what a difference to a layer's weight, ``[outputs, inputs]``, adds to its output."""
    import torch.nn.functional as F

    def add(_: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        return (output + F.linear(inputs[0], delta.to(inputs[0].dtype))).to(output.dtype)

    return add


def decomposed(weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Weight decomposition (DoRA): a changed weight, fp32 ``[outputs, inputs]``, scaled to a magnitude.

    The magnitude is that of its rows, ``[outputs]`` or ``[outputs, 1]``, or of its columns, ``[1, inputs]``.
    """
    wanted = magnitude.to(weight.device).float()
    if wanted.dim() == 1:
        wanted = wanted.unsqueeze(1)
    of_rows = wanted.shape[0] == weight.shape[0]
    norm = weight.norm(dim=1 if of_rows else 0, keepdim=True)
    scaled: torch.Tensor = weight * (wanted / norm.clamp(min=1e-12))
    return scaled


def cut(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """The product of two factors, float64 ``[rows, inner]`` and ``[inner, columns]``, cut back to a rank.

    The singular values come from the small matrix between the factors' QR decompositions, so that the product itself is
    never made. Values below the rounding of the factors' own sizes are zero. Returns the two factors, ``[rows, r]`` and
    ``[r, columns]`` with r at most `rank`, and the energy of the product and of the result.
    """
    import torch

    rows, columns = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(rows.R @ columns.R.T, full_matrices=False)
    noise = left.norm() * right.norm() * 1e-13
    values = torch.where(values > noise, values, 0.0)
    exact, values, rank = float(values.square().sum()), values[:rank], min(rank, len(values))
    root = values.sqrt()
    one, other = (rows.Q @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ columns.Q.T)
    return one, other, exact, float(values.square().sum())


def widest(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The dtype that holds the numbers of all these tensors."""
    import torch

    return reduce(torch.promote_types, [tensor.dtype for tensor in tensors if tensor.is_floating_point()])
