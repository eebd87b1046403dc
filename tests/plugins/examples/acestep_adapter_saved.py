"""Puts a note beside every adapter that is saved, and says so."""

from sidestep_plugin import hookimpl


@hookimpl
def acestep_adapter_saved(run, saved):
    note = f"Trained on {run.tensor_dir.name} for {run.steps} steps.\n"
    (saved.weights.parent / "NOTE.txt").write_text(note, encoding="utf-8")
    return [f"A note lies beside {saved.destination.name}."]
