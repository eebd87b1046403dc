"""The adapter that is trained: no other one is in the model or in its files."""

from __future__ import annotations

from ..hookspecs import hookimpl
from ..run import Run, SavedAdapter
from .foreign import check_no_foreign_adapters, drop_foreign_adapters


@hookimpl
def acestep_run_started(run: Run) -> None:
    """Refuse a model that carries an adapter already. Raises Refusal."""
    # Without a decoder nothing is trained; a module of somebody's own has its adapter by now.
    if run.module_ref is None and hasattr(run.model, "decoder"):
        check_no_foreign_adapters(run.model, run.adapter_type, run.adapter_config)


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
