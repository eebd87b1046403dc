"""Bypasses the layers of a LoKr that are not trained: same result, in less time.

LyCORIS wraps every linear layer, and upstream freezes those that are not targets. Their difference is exactly zero, and
they would rebuild it in every forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..hookspecs import hookimpl
from ..run import Run


@hookimpl
def engine_model_ready(run: Run, network: Any) -> list[str]:
    idle = dict(idle_layers(network))
    if not idle:
        return []
    for module in idle.values():  # they stay in the network and in its file
        module.restore()
        run.engine.at_end(module.apply_to)
    return [
        f"LoKr: {len(idle)} of {len(network.loras)} wrapped layers are not trained, so they are bypassed (same result)"
    ]


def idle_layers(network: Any) -> Iterator[tuple[str, Any]]:
    """LyCORIS modules that are not trained and add exactly zero, by name; none for a LoRA, whose network is None."""
    for module in getattr(network, "loras", ()):
        weights = dict(module.named_parameters())
        trained = any(weight.requires_grad for weight in weights.values())
        # Dropout draws random numbers, and a decomposed weight is rounded: such modules stay where they are.
        plain = not any(getattr(module, name, 0) for name in ("dropout", "rank_dropout", "module_dropout", "wd"))
        # A product is zero when one of its factors is.
        factors = [weight for name, weight in weights.items() if name.startswith("lokr_") or name == "scalar"]
        if weights and not trained and plain and any(not bool(weight.any()) for weight in factors):
            yield module.lora_name, module
