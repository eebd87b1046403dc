"""Checks, in the first step of a run, that the decoder receives what the plugins decided.

A trainer may call the sampler and ignore the result, or drop conditions a second time. Reading values waits for a GPU,
so only the first step is checked this way. :mod:`seams` reads the trainer's code for what one step cannot show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from ..errors import UpstreamMismatch
from .shapes import SAMPLER

if TYPE_CHECKING:
    import torch

    from ..run import Step

Given = dict[str, "torch.Tensor"]

_PASSED_ON: Final = ("attention_mask", "encoder_hidden_states", "encoder_attention_mask", "context_latents")
"""Entries of a batch that upstream's step passes on to the decoder unchanged, under the same names."""

_ROUNDING: Final = 2.0**-7
"""Relative difference that rounding to bf16 makes, which some versions of upstream do on the way."""


@contextmanager
def watched_decoder(module: Any) -> Iterator[list[Given]]:
    """Collect the tensors that a step passes to its decoder by keyword, one mapping a call.

    The list stays empty when the module has no decoder or calls it otherwise.
    """
    import torch

    calls: list[Given] = []

    def note(_: Any, __: Any, arguments: Mapping[str, Any]) -> None:
        calls.append({name: value.detach() for name, value in arguments.items() if isinstance(value, torch.Tensor)})

    decoder = getattr(module.model, "decoder", None)
    if not isinstance(decoder, torch.nn.Module):
        yield calls
        return
    with decoder.register_forward_pre_hook(note, with_kwargs=True):
        yield calls


def check_decoder_input(step: Step, batch: Mapping[str, Any], calls: list[Given], *, samples: bool) -> None:
    """Compare what the decoder received with what was sampled and prepared.

    Args:
        batch: the batch that was handed to upstream's step.
        calls: what :func:`watched_decoder` collected.
        samples: whether a plugin samples the timesteps.

    Raises:
        UpstreamMismatch: the timesteps or a batch entry were changed on the way.
    """
    for given in calls:
        if samples and step.t is not None and "timestep" in given and not _same(step.t, given["timestep"]):
            raise unused(step.module, f"gave its decoder other timesteps than {SAMPLER} returned")
        for name in _PASSED_ON:
            handed: Any = batch.get(name)
            if name in given and hasattr(handed, "shape") and not _same(handed, given[name]):
                raise UpstreamMismatch(
                    f"{type(step.module).__name__}.training_step changes {name} on its way to the decoder, so what "
                    "the plugins decided would not hold (conditions might be dropped twice). Stopped before the "
                    "optimizer changed anything. Use ACE-Step's main version."
                )


def unused(module: Any, what: str) -> UpstreamMismatch:
    """The error of a step in which the plugin's timesteps had no effect."""
    return UpstreamMismatch(
        f"{type(module).__name__}.training_step {what}: the plugin's timesteps were not used. Stopped before the "
        "optimizer changed anything. Use ACE-Step's main version."
    )


def _same(handed: torch.Tensor, received: torch.Tensor) -> bool:
    """Whether two tensors hold the same values, up to rounding. Values that are not finite count as equal."""
    if handed.shape != received.shape:
        return False
    ours, theirs = handed.to(received.device).float(), received.float()
    apart = (ours - theirs).abs() > _ROUNDING * ours.abs() + 1e-6
    return not bool(apart.any())
