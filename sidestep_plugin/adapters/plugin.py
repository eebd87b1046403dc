"""The adapter that is trained: no other one is in the model or in its files, and its settings do something."""

from __future__ import annotations

from ..hookspecs import hookimpl
from ..run import Run, SavedAdapter
from .foreign import check_no_foreign_adapters, drop_foreign_adapters
from .kinds import BY_NAME
from .targets import trained_shapes


@hookimpl
def acestep_run_started(run: Run) -> list[str]:
    """Refuse a model that carries an adapter already, and tell settings without effect. Raises Refusal."""
    # Without a decoder nothing is trained; a module of somebody's own has its adapter by now.
    if run.module_ref is None and hasattr(run.model, "decoder"):
        check_no_foreign_adapters(run.model, run.adapter_type, run.adapter_config)
    shapes = trained_shapes(run.model, run.adapter_type, run.adapter_config)
    return BY_NAME[run.adapter_type].without_effect(run.adapter_config, shapes)


@hookimpl
def acestep_adapter_saved(run: Run, saved: SavedAdapter) -> list[str] | None:
    """Remove what PEFT has saved of an adapter that was loaded while this one is trained."""
    try:
        others = drop_foreign_adapters(saved.weights.parent)
    except OSError as error:
        return [f"Warning: {saved.destination.parent} may hold another adapter, too: {error.strerror or error}."]
    return [
        f"The adapter {name!r} was loaded during this training. It is not in {saved.destination}." for name in others
    ]
