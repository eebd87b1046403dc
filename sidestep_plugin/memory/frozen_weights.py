"""Saves memory and time in ways that change no bit of the adapter.

Frozen weights stay in bf16: upstream casts the whole decoder to fp32, and autocast casts the weights of linear and
convolution layers back to bf16 in every forward pass. Kept in bf16 these give the same bits, at half the memory.
Norms and tables are computed in their own type and stay fp32, and so do the layers that a LoKr adapts: LyCORIS computes
the difference to the base weight in that weight's type.

Idle LoKr layers are bypassed: LyCORIS wraps every linear layer and upstream freezes those that are not targets. Their
difference is exactly zero, and they would rebuild it in every forward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Set
from typing import TYPE_CHECKING, Any, Final

import click

from ..errors import Refusal
from ..hookspecs import hookimpl
from ..run import Run

if TYPE_CHECKING:
    import torch

_CAST: Final = "sidestep.cast"


@hookimpl
def acestep_options() -> list[click.Option]:

    return [
        click.Option(
            ["--frozen-weights"],
            type=click.Choice(["auto", "bf16", "fp32"]),
            default="auto",
            show_default=True,
            metavar="TYPE",
            help="Type of the base model's weights: auto, bf16 or fp32.",
        ),
    ]


@hookimpl
def engine_model_ready(run: Run, decoder: torch.nn.Module, network: Any, autocast: torch.dtype | None) -> list[str]:
    import torch

    wanted, lines = run.options["frozen_weights"], []
    kept = kept_weights(run, decoder, network, autocast)
    if wanted == "bf16" and not kept:
        where = "autocast does not compute in bf16 here" if autocast is not torch.bfloat16 else "none is in bf16"
        raise Refusal(f"--frozen-weights bf16: no frozen weight can stay in bf16 ({where}). Use --frozen-weights auto.")
    if idle := dict(_idle(network)):
        for module in idle.values():  # they stay in the network and in its file
            module.restore()
            run.engine.at_end(module.apply_to)
        lines = [
            f"LoKr: {len(idle)} of {len(network.loras)} wrapped layers are not trained, so they are bypassed (same "
            "result)"
        ]
    cast = run.state[_CAST] = _Cast(decoder, kept)
    run.engine.at_end(cast.end)
    return lines


@hookimpl
def engine_types_final(run: Run) -> list[str]:
    import torch

    cast: _Cast = run.state.pop(_CAST)
    cast.end()
    if any(weight.requires_grad and weight.dtype is torch.bfloat16 for weight in run.model.decoder.parameters()):
        return [
            "Warning: this version of ACE-Step keeps the adapter itself in bf16, which rounds small updates away. "
            "A version from 2026-02-09 or later trains it in fp32."
        ]
    if not cast.kept:
        return []
    if cast.saved is None:
        return ["Frozen weights: nothing to save, this version of ACE-Step does not cast them to fp32"]
    run.facts.append(lambda: {"frozen_weights": "bf16"})
    return [f"Frozen weights: bf16 instead of fp32, {cast.saved / 2**20:,.0f} MiB less (same result, bit for bit)"]


class _Cast:
    """Upstream's cast of the decoder, ``decoder.to(dtype=torch.float32)``, which leaves some weights alone.

    Nothing is fp32 in between, so the peak is lower, too.

    Args:
        decoder: the decoder.
        kept: names of the parameters that keep their type.

    Attributes:
        saved: bytes that were saved; None if upstream has not cast the decoder to fp32.
    """

    def __init__(self, decoder: Any, kept: Collection[str]) -> None:
        self._decoder, self.kept = decoder, frozenset(kept)
        self.saved: int | None = None
        self._original = decoder.to
        if kept:
            decoder.to = self._to

    def _to(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        dtype = kwargs.get("dtype", args[0] if len(args) == 1 else None)
        if dtype is not torch.float32 or len(args) + len(kwargs) != 1:
            return self._original(*args, **kwargs)
        self.end()
        self.saved = _cast_all_but(self._decoder, self.kept, dtype)
        return self._decoder

    def end(self) -> None:
        """Let the decoder's ``to`` be its own again."""
        if vars(self._decoder).get("to") == self._to:
            del self._decoder.to


def _cast_all_but(decoder: torch.nn.Module, kept: Set[str], dtype: torch.dtype) -> int:
    """Cast floating parameters and buffers. Returns how many bytes were saved by those that were kept."""
    saved = 0
    for name, parameter in decoder.named_parameters():
        if name in kept and parameter.dtype != dtype:
            saved += parameter.numel() * (dtype.itemsize - parameter.dtype.itemsize)
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for buffer in decoder.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    return saved


def kept_weights(run: Run, decoder: torch.nn.Module, network: Any, autocast: torch.dtype | None) -> dict[str, int]:
    """Names and sizes of the decoder's parameters that stay in bf16 in this training."""
    import torch

    if run.options["frozen_weights"] == "fp32" or autocast is not torch.bfloat16:
        return {}
    idle = dict(_idle(network))
    adapted = {id(lora.org_module[0]) for lora in getattr(network, "loras", ()) if lora.lora_name not in idle}
    return dict(_frozen_bf16(decoder, adapted))


def _frozen_bf16(decoder: torch.nn.Module, adapted: set[int]) -> Iterator[tuple[str, int]]:
    """Names and sizes of the frozen bf16 weights that autocast would cast back, except those of a LoKr's targets."""
    import torch

    cast_by_autocast = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.ConvTranspose1d)
    for prefix, module in decoder.named_modules():
        if isinstance(module, cast_by_autocast) and id(module) not in adapted:
            for name, weight in module.named_parameters(recurse=False):
                if not weight.requires_grad and weight.dtype is torch.bfloat16:
                    yield f"{prefix}.{name}", weight.numel()


def _idle(network: Any) -> Iterator[tuple[str, Any]]:
    """LyCORIS modules that are not trained and add exactly zero, by name."""
    for module in getattr(network, "loras", ()):
        weights = dict(module.named_parameters())
        trained = any(weight.requires_grad for weight in weights.values())
        # Dropout draws random numbers, and a decomposed weight is rounded: such modules stay where they are.
        plain = not any(getattr(module, name, 0) for name in ("dropout", "rank_dropout", "module_dropout", "wd"))
        if weights and not trained and plain and any(not bool(weight.any()) for weight in _factors(weights)):
            yield module.lora_name, module


def _factors(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The factors of a LoKr's product; the product is zero when one of them is."""
    return [weight for name, weight in weights.items() if name.startswith("lokr_") or name == "scalar"]
