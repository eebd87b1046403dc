"""LoKr, by LyCORIS: ``W + (w1 ⊗ w2) · alpha / dimension``, each factor whole or a product of two.

The sizes are those of ``lycoris/modules/lokr.py`` (lycoris-lora 3.1 to 4.1). A factor is decomposed if the dimension is
below half of its larger side. If neither is, alpha is set to the dimension, so that the strength is 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...errors import Refusal
from .kind import Hook, Kind, Mean, Shape, adding, cut, decomposed, widest

if TYPE_CHECKING:
    import torch

    from ..base_weights import BaseWeights
    from ..layers import Adapter, Layer
    from ..weights_file import NewTensor


@dataclass(frozen=True, kw_only=True)
class _Lokr(Kind):
    def matches(self, layer: str, name: str) -> bool:
        """ACE-Step's rule: the end of the layer's name in LyCORIS, or any part of it after an underscore."""
        lycoris, wanted = f"lycoris_{layer.replace('.', '_')}".lower(), name.strip().lower()
        return bool(wanted) and (lycoris.endswith(wanted) or f"_{wanted}" in lycoris)

    def parameters(self, shape: Shape, rank: int) -> int:
        """As LyCORIS makes it with factor -1, the default: w1 is whole."""
        first, second = factors(shape)
        whole = 2 * rank >= max(second)
        return first[0] * first[1] + (second[0] * second[1] if whole else rank * sum(second))

    def saves_untargeted(self) -> bool:
        return True

    def without_effect(self, config: Any, shapes: Mapping[str, Shape]) -> list[str]:
        rank, alpha = getattr(config, "linear_dim", None), getattr(config, "linear_alpha", None)
        if not isinstance(rank, int) or not shapes:
            return []
        whole = {name: shape for name, shape in shapes.items() if _is_whole(config, rank, shape)}
        if not whole or alpha == rank:
            return []
        where = "all trained layers" if len(whole) == len(shapes) else f"{len(whole)} of {len(shapes)} trained layers"
        told = f"LoKr: rank {rank} and alpha {alpha} change nothing in {where}: LyCORIS trains full matrices there."
        if not getattr(config, "full_matrix", False):
            bound = min(-(-max(_factors(config, shape)[1]) // 2) for shape in whole.values())
            told += f" It does not below rank {bound}."
        return [f"{told} They are recorded as strength 1."]

    def effective_alpha(self, config: Any, shapes: Mapping[str, Shape]) -> Any:
        """The dimension where every trained layer is whole."""
        rank = getattr(config, "linear_dim", None)
        if isinstance(rank, int) and shapes and all(_is_whole(config, rank, shape) for shape in shapes.values()):
            return rank
        return super().effective_alpha(config, shapes)

    def strength(self, layer: Layer) -> float | None:
        if layer.rank is None:
            return 1.0
        return None if layer.alpha is None else layer.alpha / layer.rank

    def shape(self, sizes: Mapping[str, Sequence[int]]) -> Shape | None:
        found = []
        for name in ("lokr_w1", "lokr_w2"):
            whole, left, right = (tuple(sizes.get(f"{name}{end}", ())) for end in ("", "_a", "_b"))
            if not whole and len(left) == len(right) == 2 and left[1] == right[0]:
                whole = (left[0], right[1])
            if len(whole) != 2:
                return None
            found.append(whole)
        return found[0][0] * found[1][0], found[0][1] * found[1][1]

    def change(self, layer: Layer, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        first, second = (factor_of(tensors, name) for name in ("lokr_w1", "lokr_w2"))
        return torch.kron(first, second) * self.known_strength(layer)

    def hook(self, layer: Layer, tensors: Mapping[str, torch.Tensor], module: Any) -> Hook:
        base = module.weight.detach().float()
        changed = base + self.change(layer, tensors).to(base.device).reshape(base.shape)
        return adding((decomposed(changed, tensors["magnitude"]) if "magnitude" in tensors else changed) - base)

    def scaled(self, tensors: Mapping[str, torch.Tensor], strength: float) -> dict[str, torch.Tensor]:
        part = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"
        return {**tensors, part: tensors[part].float() * strength}

    def mean(self, layers: Sequence[tuple[float, Layer, Mapping[str, torch.Tensor]]], rank: int | None) -> Mean:
        """The Kronecker product that is nearest to the sum of several, with the first one's alpha and decompositions.

        With the numbers of w1 as rows and those of w2 as columns, a Kronecker product is a matrix of rank 1, so the
        nearest one is given by the largest singular value (Van Loan and Pitsianis, 1993).
        """
        import torch

        _, first, given = layers[0]
        strength = self.known_strength(first)
        dtype = widest(tensor for _, _, tensors in layers for part, tensor in tensors.items() if part != "alpha")
        ones, others = [], []
        for share, layer, tensors in layers:
            ones.append(share * self.known_strength(layer) / strength * factor_of(tensors, "lokr_w1").double())
            others.append(factor_of(tensors, "lokr_w2").double())
        one, other, exact, kept = cut(
            torch.stack([w.flatten() for w in ones], dim=1), torch.stack([w.flatten() for w in others]), 1
        )
        made: dict[str, torch.Tensor] = {}
        for name, w, size in (("lokr_w1", one, ones[0].shape), ("lokr_w2", other, others[0].shape)):
            whole = w.reshape(size)
            if name in given:
                made[name] = whole.to(dtype).contiguous()
                continue
            inner = given[f"{name}_b"].shape[0]
            left, right, all_of_it, rest = cut(whole, torch.eye(size[1], dtype=torch.float64), inner)
            made |= {f"{name}_a": left.to(dtype).contiguous(), f"{name}_b": right.to(dtype).contiguous()}
            kept *= rest / all_of_it if all_of_it else 1.0
        alpha = float(first.rank or 1) if first.alpha is None else first.alpha
        return Mean(made, first.rank, alpha, strength**2 * exact, strength**2 * kept)

    def same_sizes(self, sizes: Mapping[str, Sequence[int]]) -> object:
        found = []
        for name in ("lokr_w1", "lokr_w2"):
            whole = tuple(sizes.get(name, ()))
            found.append(whole or (sizes[f"{name}_a"][0], sizes[f"{name}_b"][1]))
        return tuple(found)

    def saved_name(self, layer: str, part: str) -> str:
        return f"lycoris_{layer.replace('.', '_')}.{part}"

    def try_on(self, module: torch.nn.Module) -> None:
        from lycoris import create_lycoris

        create_lycoris(module, 1.0, algo="lokr", linear_dim=1, linear_alpha=1)

    def comfyui_names(self, layer: Layer) -> tuple[str, dict[str, str]]:
        parts = {part: "dora_scale" if part == "magnitude" else part for part in layer.parts}
        return f"lycoris_{layer.name.replace('.', '_')}", parts

    def check_comfyui(self, adapter: Adapter, trained: Sequence[Layer], base: BaseWeights | None) -> None:
        path = adapter.file.path
        for layer in trained:
            if "alpha" not in layer.parts:
                raise Refusal(
                    f"{path} has no alpha among its tensors, so it would not work as trained in ComfyUI. Use it in "
                    "ACE-Step's app."
                )
            if "lokr_t2" in layer.parts:
                raise Refusal(
                    f"{path} is a LoKr with a Tucker decomposition, which ComfyUI does not support for ACE-Step. Use "
                    "it in ACE-Step's app."
                )

        if base is None and any(_scales_rows(adapter, layer) for layer in trained):
            raise Refusal(
                f"{path} is a LoKr with weight decomposition. ComfyUI scales it by other norms than LyCORIS, so an "
                "exact copy needs the base model that it was trained on: name it with --model."
            )

    def comfyui_changes(self, adapter: Adapter, layer: Layer, base: BaseWeights) -> dict[str, NewTensor] | None:
        """The magnitude times ``|W| / |W + dW|``, row by row."""
        from ..weights_file import NewTensor

        if not _scales_rows(adapter, layer):
            return {}
        weight, tensors = base(layer.name), adapter.load(layer)
        sizes = self.shape({part: tensor.shape for part, tensor in tensors.items()})
        if weight is None or sizes is None or sizes[0] * sizes[1] != weight.numel() or sizes[0] != weight.shape[0]:
            raise _another_model(adapter)
        rows, change = weight.flatten(1), self.change(layer, tensors).reshape(weight.shape[0], -1)
        was, magnitude = rows.norm(dim=1) + _EPSILON, tensors["magnitude"].float().flatten()
        if layer.name in adapter.untrained:
            # LyCORIS begins with the norms, which tell the model that it was trained on.
            if bool(((magnitude - was).abs() > 0.01 * was).any()):
                raise _another_model(adapter)
            return None
        scaled = magnitude * was / ((rows + change).norm(dim=1) + _EPSILON)
        size = adapter.file.tensors[layer.parts["magnitude"]].shape
        return {"magnitude": NewTensor("F32", size, scaled.numpy().tobytes())}

    def comfyui_scaled(self, adapter: Adapter, layer: Layer, strength: float) -> dict[str, NewTensor]:
        """The first factor in fp32: alpha has no effect in full matrices."""
        from ..weights_file import NewTensor

        if "magnitude" in layer.parts:
            raise Refusal(
                f"{adapter.file.path} has weight decomposition, which no factor scales. Leave --strength out, and "
                "choose the strength where you use the copy."
            )
        part = "lokr_w1" if "lokr_w1" in layer.parts else "lokr_w1_a"
        scaled = adapter.load(layer)[part].float() * strength
        return {part: NewTensor("F32", tuple(scaled.shape), scaled.contiguous().numpy().tobytes())}

    def live(self, module: Any, decoder: Any) -> dict[str, torch.Tensor]:
        return dict(module.lycoris_net.state_dict())

    def load(self, module: Any, live: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
        # Its state_dict is computed, so it has to be loaded the same way.
        module.lycoris_net.load_state_dict(dict(weights), strict=False)

    def save(self, trainer: Any, module: Any, folder: Path) -> Path:
        config = {"lokr_config": module.lokr_config.to_dict()}  # ACE-Step reads it back when it loads the file
        trainer.save_lokr_weights(module.lycoris_net, str(folder), metadata=config)
        return folder


LOKR: Final = _Lokr(
    name="lokr",
    title="LoKr",
    remark="makes smaller files, and fewer programs load it",
    library="LyCORIS",
    package="lycoris-lora",
    module="lycoris",
    module_class="PreprocessedLoKRModule",
    trainer_class="LoKRTrainer",
    config_class="LoKRConfig",
    save_functions=("save_lokr_weights", "save_lokr_training_checkpoint"),
    weight_files=("lokr_weights.safetensors",),
    network="lycoris_net",
    fields={
        "rank": "linear_dim",
        "alpha": "linear_alpha",
        "dropout": "dropout",
        "target_modules": "target_modules",
        "lokr_factor": "factor",
        "lokr_decompose_both": "decompose_both",
        "lokr_weight_decompose": "weight_decompose",
        "lokr_full_matrix": "full_matrix",
    },
    options={
        "lokr_factor": ("N", "Size of a LoKr's first factor; -1: near the square root.  [ACE-Step's default: -1]"),
        "lokr_decompose_both": (None, "Decompose both factors of a LoKr."),
        "lokr_weight_decompose": (None, "Weight decomposition (DoRA) of a LoKr, as in the app's LoKr tab."),
        "lokr_full_matrix": (None, "Do not decompose a LoKr's factors."),
    },
    default_rank=64,
    recommended={
        "rank": (64, "the default of ACE-Step's trainer and of the app's LoKr tab"),
        "learning_rate": (0.03, "ACE-Step's LoRA tutorial; the app's LoKr tab has 0.001, which is slower and safer"),
    },
    epochs=(500, "ACE-Step's LoRA tutorial, and the default of the app's LoKr tab"),
    validates=False,
    dropout=False,
    quantizable=False,
    whole_difference=True,
    tensors=((r"\.(?P<part>lokr_\w+)", None),),
    rank_parts=("lokr_w1_b", "lokr_w2_b"),
    alpha_in_config=False,
    copy_name="comfyui_lokr.safetensors",
    made_alike=", with the same factors",
    network_module="lycoris",
    network_args={"algo": "lokr"},
)


# -- LyCORIS' arithmetic -----------------------------------------------------------------------------------------------


def factors(shape: Shape, factor: int = -1, unbalanced: bool = False) -> tuple[Shape, Shape]:
    """Sizes of the two factors that LyCORIS makes of a weight (``lycoris.functional.factorization``).

    `factor` is the first factor's side, -1 for the one closest to the square root; `unbalanced` exchanges the rows'
    factors.
    """
    rows, columns = (_divided(size, factor) for size in shape)
    if unbalanced:
        rows = rows[1], rows[0]
    return (rows[0], columns[0]), (rows[1], columns[1])


def _divided(size: int, factor: int) -> tuple[int, int]:
    """A number as a product of two, smaller one first."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    largest = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next((small for small in range(largest, 0, -1) if size % small == 0), 1)
    return small, size // small


def _is_whole(config: Any, rank: int, shape: Shape) -> bool:
    """Whether LyCORIS makes no decomposed factor for a layer, so that it sets alpha to the dimension."""
    if getattr(config, "full_matrix", False):
        return True
    first, second = _factors(config, shape)
    return 2 * rank >= max(second) and not (getattr(config, "decompose_both", False) and 2 * rank < max(first))


def _factors(config: Any, shape: Shape) -> tuple[Shape, Shape]:
    return factors(shape, getattr(config, "factor", -1), bool(getattr(config, "unbalanced_factorization", False)))


def _scales_rows(adapter: Adapter, layer: Layer) -> bool:
    """Whether a layer has a magnitude of one number a row, as LyCORIS makes it since version 3.2."""
    return "magnitude" in layer.parts and adapter.file.tensors[layer.parts["magnitude"]].shape[:1] != (1,)


def _another_model(adapter: Adapter) -> Refusal:
    return Refusal(
        f"{adapter.file.path} was trained on another model than this one: the norms of the weights are others. "
        "Name the model that it was trained on."
    )


def factor_of(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """One of a layer's two factors as a matrix, in fp32."""
    whole = tensors.get(name)
    if whole is None:
        product: torch.Tensor = tensors[f"{name}_a"].float() @ tensors[f"{name}_b"].float()
        return product
    return whole.float().flatten(1)


_EPSILON: Final = 2.0**-23  # of float32, as LyCORIS adds it
