"""LoRA, by PEFT: ``W + B A · alpha / rank``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...errors import Refusal
from ...text import shown
from .kind import Hook, Kind, Mean, Shape, adding, cut, decomposed, widest

if TYPE_CHECKING:
    import torch

    from ..base_weights import BaseWeights
    from ..layers import Adapter, Layer


@dataclass(frozen=True, kw_only=True)
class _Lora(Kind):
    def matches(self, layer: str, name: str) -> bool:
        """PEFT's rule for a list of names: a layer's full name, or its end after a dot."""
        return layer == name or layer.endswith(f".{name}")

    def parameters(self, shape: Shape, rank: int) -> int:
        return rank * sum(shape)

    def saves_untargeted(self) -> bool:
        return False

    def check_rank(self, rank: int, width: int, model: str) -> None:
        """Refuse a rank above the decoder's width: no update of a layer that is trained can have a higher rank."""
        if 0 < width < rank:
            raise Refusal(
                f"--rank {rank} is higher than {model} is wide ({width}), which adds nothing to what an adapter can "
                "learn. Choose a lower one; 8 to 128 are usual."
            )

    def strength(self, layer: Layer) -> float | None:
        return None if layer.alpha is None or not layer.rank else layer.alpha / layer.rank

    def shape(self, sizes: Mapping[str, Sequence[int]]) -> Shape | None:
        down, up = sizes.get("A", ()), sizes.get("B", ())
        return (up[0], down[1]) if len(down) == len(up) == 2 and down[0] == up[1] else None

    def change(self, layer: Layer, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        difference: torch.Tensor = tensors["B"].float().flatten(1) @ tensors["A"].float().flatten(1)
        return difference * self.known_strength(layer)

    def hook(self, layer: Layer, tensors: Mapping[str, torch.Tensor], module: Any) -> Hook:
        import torch.nn.functional as F

        strength = self.known_strength(layer)
        down, up = (tensors[part].to(module.weight.device).float() for part in ("A", "B"))
        if "magnitude" in tensors:
            base = module.weight.detach().float()
            return adding(decomposed(base + up @ down * strength, tensors["magnitude"]) - base)

        def add(_: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            added = F.linear(F.linear(inputs[0].to(down.dtype), down), up) * strength
            return (output + added).to(output.dtype)

        return add

    def scaled(self, tensors: Mapping[str, torch.Tensor], strength: float) -> dict[str, torch.Tensor]:
        return {**tensors, "B": tensors["B"].float() * strength}

    def mean(self, layers: Sequence[tuple[float, Layer, Mapping[str, torch.Tensor]]], rank: int | None) -> Mean:
        """The factors side by side, cut back: alpha is the rank, so that the strength is 1 in every program."""
        import torch

        dtype = widest(tensors[part] for _, _, tensors in layers for part in ("A", "B"))
        ups, downs = [], []
        for share, layer, tensors in layers:
            ups.append(share * self.known_strength(layer) * tensors["B"].double().flatten(1))
            downs.append(tensors["A"].double().flatten(1))
        wanted = max(tensor.shape[0] for tensor in downs) if rank is None else rank
        up, down, exact, kept = cut(torch.cat(ups, dim=1), torch.cat(downs), wanted)
        tensors = {"A": down.to(dtype).contiguous(), "B": up.to(dtype).contiguous()}
        return Mean(tensors, len(down), float(len(down)), exact, kept)

    def same_sizes(self, sizes: Mapping[str, Sequence[int]]) -> object:
        return self.shape(sizes)

    def saved_name(self, layer: str, part: str) -> str:
        return f"base_model.model.{layer}.lora_{part}.weight"

    def try_on(self, module: torch.nn.Module) -> None:
        from peft import LoraConfig, get_peft_model

        get_peft_model(module, LoraConfig(r=1, target_modules=["q_proj"]))

    def comfyui_names(self, layer: Layer) -> tuple[str, dict[str, str]]:
        return f"base_model.model.{layer.name}", {"A": "lora_A.weight", "B": "lora_B.weight"}

    def check_comfyui(self, adapter: Adapter, trained: Sequence[Layer], base: BaseWeights | None) -> None:
        from ..layer_names import is_block_layer, is_outer_layer
        from ..peft_config import unread_pattern

        path = adapter.file.path
        if adapter.is_dora:
            raise Refusal(
                f"{path} is a DoRA. ComfyUI scales DoRA by different norms than PEFT, so a copy would not work as "
                "trained. Use it in ACE-Step's app or in diffusers."
            )
        for layer in adapter.layers.values():
            flat = any(key.startswith(("lora_unet_", "lycoris_")) for key in layer.parts.values())
            if flat and not is_block_layer(layer.name) and not is_outer_layer(layer.name):
                raise Refusal(
                    f"{path} adapts {shown(layer.name, 80)}, a layer that ComfyUI does not know in ACE-Step 1.5. Use "
                    "it in ACE-Step's app."
                )
            sizes = [adapter.file.tensors[layer.parts[part]].shape for part in ("A", "B") if part in layer.parts]
            if len(sizes) < 2 or any(len(size) < 2 for size in sizes) or sizes[0][0] != sizes[1][1]:
                raise Refusal(
                    f"{path} is damaged: lora_A and lora_B of {shown(layer.name)} do not fit together. Copy or "
                    "download it again."
                )
        pattern = unread_pattern(adapter.config)
        if pattern is not None and not all("alpha" in layer.parts for layer in adapter.layers.values()):
            raise Refusal(
                f"{path} has the alpha_pattern '{shown(pattern, 100)}'. Regular expressions are not read, so the "
                "alphas are unknown. Put the layers' names into alpha_pattern, or use the adapter in ACE-Step's app."
            )
        if any(layer.alpha is None for layer in adapter.layers.values()):
            raise Refusal(
                f"The alpha of {path} is unknown, and so is its strength. Put its adapter_config.json beside it, or "
                "pass --alpha NUMBER. Expected the alpha that it was trained with."
            )

    def live(self, module: Any, decoder: Any) -> dict[str, torch.Tensor]:
        if not hasattr(decoder, "peft_config"):
            raise Refusal(
                "This ACE-Step trains without PEFT here, and such an adapter cannot be resumed. Start again without "
                "--resume-from."
            )
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(decoder, save_embedding_layers=False))

    def load(self, module: Any, live: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
        import torch

        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(weights[name])

    def save(self, trainer: Any, module: Any, folder: Path) -> Path:
        trainer.save_lora_weights(module.model, str(folder))
        return folder / "adapter" if (folder / "adapter").is_dir() else folder


LORA: Final = _Lora(
    name="lora",
    title="LoRA",
    remark="is the usual one",
    library="PEFT",
    package="peft",
    module="peft",
    module_class="PreprocessedLoRAModule",
    trainer_class="LoRATrainer",
    config_class="LoRAConfig",
    save_functions=("save_lora_weights", "save_training_checkpoint"),
    weight_files=(
        "adapter/adapter_model.safetensors",
        "adapter/adapter_model.bin",
        "adapter_model.safetensors",
        "lora_weights.pt",
        "model.pt",
    ),
    network=None,
    fields={"rank": "r", "alpha": "alpha", "dropout": "dropout", "target_modules": "target_modules"},
    default_rank=8,
    recommended={
        "rank": (64, "the default of the app's training tab and of training_v2; the trainer's own is 8"),
        "learning_rate": (
            1e-4,
            "the default of ACE-Step's trainer and of training_v2; the app's training tab has 0.0003",
        ),
    },
    epochs=None,
    validates=True,
    dropout=True,
    quantizable=True,
    whole_difference=False,
    tensors=(
        (r"\.lora_A(\.default)?\.weight|\.lora_down\.weight|\.lora\.down\.weight", "A"),
        (r"\.lora_B(\.default)?\.weight|\.lora_up\.weight|\.lora\.up\.weight", "B"),
    ),
    rank_parts=("A",),
    alpha_in_config=True,
    copy_name="comfyui_lora.safetensors",
    made_alike="",
    network_module="peft.tuners.lora",
)
