"""The type of the base model's frozen weights while an adapter is trained (``--base-weights``).

By default they stay in bf16, which changes no bit of the adapter: upstream casts the whole decoder to fp32, and
autocast casts the weights of linear and convolution layers back to bf16 in every forward pass. Kept in bf16 these give
the same bits, at half the memory. Norms and tables are computed in their own type and stay fp32, and so do the layers
that a LoKr adapts: LyCORIS computes the difference to the base weight in that weight's type.

Quantized weights (:mod:`.quantization`) give another adapter, and are what the user has asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any, Final

import click

from ..adapters.kinds import BY_NAME
from ..errors import Refusal
from ..hookspecs import hookimpl
from ..options import option
from ..run import Run
from .estimate import Saving
from .idle_layers import idle_layers
from .quantization import BYTES, quantize

if TYPE_CHECKING:
    import torch

_FACTS: Final = "sidestep.base_weights"
_CAST: Final = "sidestep.cast"


class WeightType(click.Choice):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.2 on
    """A type of weights. Values of earlier versions are understood: off was auto, and fp8 was cut."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value == "fp8":
            self.fail("fp8 is no longer offered: it was less exact than int8 at the same size. Use int8.", param, ctx)
        return str(super().convert("auto" if value == "off" else value, param, ctx))


@hookimpl
def acestep_options() -> list[click.Option]:
    text = f"Type of the base model's weights: auto, bf16, fp32 or {', '.join(BYTES)}."
    return [
        option("--base-weights", text, WeightType(("auto", "bf16", "fp32", *BYTES)), "TYPE", "auto"),
        # Of earlier versions, as are settings files with both.
        click.Option(["--frozen-weights"], type=WeightType(("auto", "bf16", "fp32")), default=None, hidden=True),
    ]


def chosen(options: Mapping[str, Any]) -> str:
    """The type that the options ask for: auto, bf16, fp32, or a quantized one.

    Raises:
        Refusal: the option and its old name ask for different types.
    """
    said, old = options.get("base_weights") or "auto", options.get("frozen_weights") or "auto"
    if said == "off":
        said = "auto"
    # Beside quantized weights the old option was about the layers that are not quantized; both types give the same.
    if old in ("auto", said) or said in BYTES:
        return str(said)
    if said == "auto":
        return str(old)
    raise Refusal(
        f"--base-weights {said} and --frozen-weights {old} are two types for the same weights. Leave --frozen-weights "
        "out: it is the old name of --base-weights."
    )


@hookimpl
def acestep_model_chosen(options: Mapping[str, Any]) -> None:
    chosen(options)


@hookimpl
def acestep_run_started(run: Run) -> None:
    """Refuse what would be without effect, or wrong."""
    kind = chosen(run.options)
    if kind == "auto":
        return
    if kind in BYTES and not BY_NAME[run.adapter_type].quantizable:
        raise Refusal(
            f"--base-weights {kind} works for a LoRA only: LyCORIS computes a LoKr from the base model's own weights. "
            "Leave it out, or train with --adapter-type lora."
        )
    if not run.with_lightning or run.tensor_dir is None:
        raise Refusal(
            f"--base-weights {kind} needs Lightning, with which ACE-Step's trainer casts them. Install it "
            "(pip install lightning), or leave the option out."
        )
    if kind in BYTES:
        # From the start, as resuming compares the facts; what was measured is added later.
        facts = run.state[_FACTS] = {"base_weights": kind}
        run.facts.append(lambda: facts)


@hookimpl
def engine_model_ready(run: Run, decoder: torch.nn.Module, network: Any, autocast: torch.dtype | None) -> list[str]:
    import torch

    kind, lines = chosen(run.options), []
    if kind in BYTES:
        line, change = quantize(run, decoder, autocast, kind)
        lines = [line]
        if change is not None:
            run.state[_FACTS]["base_weights_loss_change"] = round(change, 6)
    kept = kept_weights(run.options, decoder, network, autocast)
    if kind == "bf16" and not kept:
        where = "autocast does not compute in bf16 here" if autocast is not torch.bfloat16 else "none is in bf16"
        raise Refusal(f"--base-weights bf16: no frozen weight can stay in bf16 ({where}). Use --base-weights auto.")
    cast = run.state[_CAST] = _Cast(decoder, kept)
    run.engine.at_end(cast.end)
    return lines


@hookimpl
def engine_types_final(run: Run) -> list[str]:
    import torch

    cast: _Cast = run.state.pop(_CAST)
    cast.end()
    weights = list(run.model.decoder.parameters())
    if any(weight.requires_grad and weight.dtype is torch.bfloat16 for weight in weights):
        return [
            "Warning: this version of ACE-Step keeps the adapter itself in bf16, which rounds small updates away. "
            "A version from 2026-02-09 or later trains it in fp32."
        ]
    if chosen(run.options) == "fp32" and any(weight.dtype is torch.bfloat16 for weight in weights):
        return ["Note: --base-weights fp32 has no effect, this version of ACE-Step does not cast them to fp32"]
    if not cast.kept:
        return []
    if cast.saved is None:
        return ["Frozen weights: nothing to save, this version of ACE-Step does not cast them to fp32"]
    run.facts.append(lambda: {"frozen_weights": "bf16"})
    return [f"Frozen weights: bf16 instead of fp32, {cast.saved / 2**20:,.0f} MiB less (same result, bit for bit)"]


class _Cast:
    """Upstream's cast of the decoder, ``decoder.to(dtype=torch.float32)``, which leaves some weights alone.

    Nothing is fp32 in between, so the peak is lower, too.

    `kept` are the names of the parameters that keep their type.
    """

    def __init__(self, decoder: Any, kept: frozenset[str]) -> None:
        self._decoder, self.kept = decoder, kept
        self.saved: int | None = None  # bytes that were saved; None if upstream has not cast the decoder to fp32
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


def kept_weights(
    options: Mapping[str, Any], decoder: torch.nn.Module, network: Any, autocast: torch.dtype | None
) -> frozenset[str]:
    """Names of the decoder's parameters that stay in bf16: those that autocast would cast back, and no LoKr adapts."""
    import torch

    if chosen(options) == "fp32" or autocast is not torch.bfloat16:
        return frozenset()
    idle = dict(idle_layers(network))
    adapted = {id(lora.org_module[0]) for lora in getattr(network, "loras", ()) if lora.lora_name not in idle}
    cast_by_autocast = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.ConvTranspose1d)
    return frozenset(
        f"{prefix}.{name}"
        for prefix, module in decoder.named_modules()
        if isinstance(module, cast_by_autocast) and id(module) not in adapted
        for name, weight in module.named_parameters(recurse=False)
        if not weight.requires_grad and weight.dtype is torch.bfloat16
    )


BF16: Final = Saving(
    option="base_weights",
    apply=lambda now: now.but(frozen="bf16") if now.mixed and now.frozen == "fp32" else None,
    flag=lambda then: "--base-weights bf16",
    cost="same adapter, bit for bit",
)
INT8: Final = Saving(
    option="base_weights",
    apply=lambda now: (
        now.but(frozen="int8") if now.mixed and BY_NAME[now.kind].quantizable and now.frozen not in BYTES else None
    ),
    flag=lambda then: "--base-weights int8",
    cost="rounds the base model's weights",
)
