"""Makes every saved adapter say what it is and how to generate with it: ``training_config.json`` beside its weights."""

from __future__ import annotations

from sidestep_plugin import hookimpl
from sidestep_plugin.metadata import describe_adapter, write_training_config
from sidestep_plugin.run import Run, SavedAdapter

from .model_treatment import treatment_of


@hookimpl
def acestep_adapter_saved(run: Run, saved: SavedAdapter) -> None:
    write_training_config(saved.weights.parent, describe_adapter(run, saved, treatment_of(run)))
