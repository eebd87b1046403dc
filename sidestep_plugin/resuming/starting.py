"""Starts a training from a finished adapter's weights, with a new optimizer: ``--init-from ADAPTER``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from ..adapters.finding import find_weights
from ..adapters.inspection import inspect_adapter
from ..adapters.kinds import BY_NAME
from ..errors import Refusal
from ..hookspecs import hookimpl
from ..options import Place, option
from ..run import AdapterType, ModelFacts, Run
from ..text import counted, shown

_KEY: Final = "init_from"
_ADAPTERS: Final = ("rank", "alpha", "target_modules")


@hookimpl
def acestep_options() -> list[click.Option]:
    text = "Start from a finished adapter's weights, with a new optimizer."
    return [option("--init-from", text, Place(path_type=Path), "ADAPTER")]


def settings_to_start_from(
    adapter: Path, kind: AdapterType, kept: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The adapter's settings of a training that starts from an adapter's weights, by option name.

    Args:
        adapter: the weights file, or the folder of an adapter or a training.
        kind: what is to be trained.
        kept: settings that the adapter was trained with, as far as they are known.
        given: settings that were asked for.

    Raises:
        Refusal: it cannot be read, it is of another kind, or its rank or strength is not the one that was asked for.
    """
    try:
        report = inspect_adapter(adapter)
    except OSError as error:
        raise Refusal(f"Cannot read {adapter}: {error.strerror or error}. Make it readable.") from None
    if report.adapter.kind != kind:
        found, wanted = BY_NAME[report.adapter.kind].title, BY_NAME[kind].title
        raise Refusal(
            f"--init-from {adapter} is a {found}, and a {wanted} was asked for. Use --adapter-type "
            f"{report.adapter.kind}."
        )
    own = {name: report.facts.get(name) for name in _ADAPTERS} | {
        name: kept[name] for name in (*_ADAPTERS, *BY_NAME[kind].options) if name in kept
    }
    settings = {name: value for name, value in own.items() if value is not None}
    for name in ("rank", "alpha"):
        if name in given and name in settings and given[name] != settings[name]:
            copy = f"acestep-train average {adapter} --to-rank {given[name]} --output NEW"
            other = f", or bring a copy to that rank: {copy}" if name == "rank" else ""
            raise Refusal(
                f"--init-from {adapter} has {name} {settings[name]}, and --{name} is {given[name]}. Leave --{name} out"
                f"{other}."
            )
    return settings


@hookimpl
def engine_planned(run: Run) -> list[str] | None:
    """Look at the adapter before the model is changed, and note what the training started from. Raises Refusal."""
    adapter: Path | None = run.options[_KEY]
    said: dict[str, str] | None = None
    lines: list[str] = []
    if run.resuming:
        said = run.kept.get(_KEY)
    elif adapter is not None:
        report = inspect_adapter(adapter)
        file = find_weights(adapter)
        title = str(report.facts.get("title") or file.stem)
        said = {"said": f"{shown(title, 200)} (SHA-256 {_hash_of(file)[:16]})"}
        lines.append(f"Start: the weights of {adapter}, with a new optimizer")
        trained_for, model = report.facts.get("model_name"), ModelFacts.from_model(run.model).name
        if trained_for and model and trained_for != model:
            lines.append(f"Note: it was trained for {shown(trained_for, 80)}, and goes on with {model}.")
    if said is not None:
        run.facts.append(lambda: {_KEY: said["said"]})
        run.keeps[_KEY] = lambda: said
    return lines


@hookimpl
def engine_training_began(run: Run) -> None:
    """Put the weights into the adapter. Raises Refusal where they do not fit."""
    adapter: Path | None = run.options[_KEY]
    if adapter is None or run.resuming:
        return
    from safetensors.torch import load_file

    weights = load_file(find_weights(adapter))
    live = run.engine.adapter_tensors
    missing, more = sorted(live.keys() - weights.keys()), sorted(weights.keys() - live.keys())
    shapes = [name for name in live if name in weights and live[name].shape != weights[name].shape]
    if missing or more or shapes:
        name = (shapes or missing or more)[0]
        raise Refusal(
            f"--init-from {adapter} does not fit: of {counted(len(live), 'tensor')} that are trained, {len(missing)} "
            f"are not in it, {len(shapes)} have another shape, and it has {len(more)} others (such as {name}). Train "
            "for the model, with the rank and the target modules that it was made with; it has to be an adapter of "
            "ACE-Step's trainer, of this plugin or of Side-Step."
        )
    run.engine.put_weights(weights)


def _hash_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
