"""Clips from a saved adapter: finds the model, the songs and the table, generates and decodes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..adapters.applied import applied, check_applicable, linear_layers
from ..adapters.inspection import Report, inspect_adapter
from ..adapters.layers import Adapter
from ..adapters.staging import AVERAGE
from ..engine.checkout import find_root, import_trainer
from ..engine.models import (
    check_weights,
    checkpoint_folder,
    checkpoints_of,
    find_model,
    load_model,
    pick_device,
    restrict_gpus,
)
from ..engine.writable import check_writable
from ..errors import Refusal
from ..run import ModelFacts
from ..songs.dataset import inspect_dataset
from ..songs.fit import check_width
from ..songs.song_text import holds
from ..text import counted, shown
from ..timesteps.treatment import Treatment, decide_treatment
from .clip_files import is_sound
from .conditions import Song, choose_songs, look_at, read_silence
from .decoding import check_vae, find_vae, load_vae, why_not
from .making import decode_rest, freed, generated, heard, open_table, write_row
from .prompts import Prompt, encode_prompts, plain_name
from .settings import SECONDS, SEED, SONGS, PreviewSettings, guidance_for
from .table import BASE, FILE_NAME, FOLDER, Table, read_table

if TYPE_CHECKING:
    import torch


_AVERAGED: Final = f", {AVERAGE}"
"""End of what the clips of an average are called."""


@dataclass(frozen=True)
class ClipRequest:
    """What the user asked for; None where the table of the training, or a default, decides.

    Attributes:
        path: an adapter, or a folder whose clips are still latents.
        model: alias, folder name or path; None for the model that the adapter says it is for.
        output: folder for the clips; None for those of the adapter's training.
        prompt: a prompt to generate from, instead of songs.
        without: with `prompt`, whether the model without the adapter is heard beside it.
        strengths: what the adapter is multiplied by in turn, beside its own strength; each is a row of clips.
    """

    path: Path
    model: str | None = None
    dataset_dir: Path | None = None
    acestep_root: Path | None = None
    checkpoint_dir: Path | None = None
    output: Path | None = None
    songs: str | None = None
    seconds: float | None = None
    cfg: float | None = None
    seed: int | None = None
    device: str = "auto"
    prompt: Prompt | None = None
    without: bool = False
    strengths: tuple[float, ...] = (1.0,)


def decode_saved(request: ClipRequest, say: Callable[[str], None]) -> Path | None:
    """Decode what a training has saved as latents. Returns their folder; None if there is nothing of the kind.

    Raises:
        Refusal: there is no VAE.
        OSError: the folder cannot be written.
    """
    places = (request.path, request.path / FOLDER)
    folder = next((place for place in places if (place / FILE_NAME).is_file()), None)
    table = None if folder is None else read_table(folder)
    if folder is None or table is None or not table.undecoded or request.dataset_dir is not None:
        return None
    vae = _vae(request, None)
    if vae is None:
        raise Refusal(
            f"The clips in {folder} are latents, and there is no VAE: {why_not(find_vae(_checkpoints(request)))}. Say "
            "where ACE-Step's models are with --checkpoint-dir DIR, in ACE-Step's own Python environment."
        )
    restrict_gpus(request.device)
    number = decode_rest(folder, table, load_vae(vae, pick_device(request.device)))
    say(f"Decoded {counted(number, 'clip')}.")
    return folder


def make_clips(request: ClipRequest, say: Callable[[str], None]) -> Path:
    """Generate clips from a saved adapter and from the model without it. Returns their folder.

    Raises:
        Refusal: no adapter, no songs, no model, or they do not belong together.
        OSError: the folder cannot be written.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    report = inspect_adapter(request.path)
    if report.problems:
        raise Refusal(f"Cannot read {report.adapter.file.path} for generating: {report.problems[0]}")
    if request.dataset_dir is None and request.prompt is None:
        raise Refusal(
            "Clips are generated from preprocessed songs, or from a prompt. Say which: --dataset-dir DIR, or --prompt "
            "TEXT with what it is to sound like."
        )
    root = find_root(request.acestep_root)
    model_folder = find_model(_model_named(request, report), checkpoint_folder(request.checkpoint_dir, root))
    facts = ModelFacts.from_folder(model_folder)
    check_weights(model_folder, facts)
    output, label, epoch = _place(request, report)
    check_writable(output)
    before = read_table(output)
    settings, wanted = _settings(request, report, decide_treatment(facts), before)
    if request.prompt is not None:
        return _from_prompt(request, request.prompt, report, root, model_folder, settings, output, label, epoch, say)
    assert request.dataset_dir is not None
    dataset = inspect_dataset(request.dataset_dir.absolute(), allow_duplicates=True)
    songs = [look_at(file, settings.seconds) for file in choose_songs(dataset.files, wanted, "--songs")]
    table = _table(output, before, model_folder.name, songs, settings)
    silence, vae_folder = read_silence(model_folder), _vae(request, model_folder)
    restrict_gpus(request.device)
    device = pick_device(request.device)
    import_trainer(root)  # models' own code may import parts of ACE-Step
    say(f"Loading {model_folder.name} on {device} ...")
    model = load_model(model_folder, device).model
    check_width(dataset, facts.name, int(model.null_condition_emb.shape[-1]))
    layers = linear_layers(model.decoder)
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    check_applicable(report.adapter, shapes, facts.name, strengths=request.strengths)
    say(f"Generating {counted(len(songs), 'song')}: {settings.in_words} ...")
    named = _named(label, request.strengths)
    rows = _rows(model, report.adapter, layers, songs, silence, settings, named, epoch, base=not table.has(BASE))
    del model, layers
    vae = None if vae_folder is None else load_vae(vae_folder, device)
    for name, number, latents in rows:
        write_row(output, table, name, number, _loss(before, name), latents if vae is None else heard(vae, latents))
    if vae is None:
        say(f"Note: the clips are saved as latents, because {why_not(find_vae(_checkpoints(request, model_folder)))}.")
    return output


def _rows(
    model: Any,
    adapter: Adapter,
    layers: Mapping[str, torch.nn.Module],
    songs: list[Song],
    silence: torch.Tensor,
    settings: PreviewSettings,
    named: Mapping[str, float],
    epoch: int | None,
    *,
    base: bool,
) -> list[tuple[str, int | None, list[torch.Tensor]]]:
    """The latents of the adapter at each strength, and with `base` those of the model without it before them."""
    rows: list[tuple[str, int | None, list[torch.Tensor]]] = []
    if base:
        rows.append((BASE, 0, list(generated(model, songs, silence, settings))))
    for label, strength in named.items():
        with applied(adapter, layers, strength):
            rows.append((label, epoch, list(generated(model, songs, silence, settings))))
    return rows


def _named(label: str, strengths: Sequence[float]) -> dict[str, float]:
    """What the row of each strength is called: the trained one has no number."""
    return {label if strength == 1.0 else f"{label} x {strength:g}": strength for strength in strengths}


def _from_prompt(
    request: ClipRequest,
    prompt: Prompt,
    report: Report,
    root: Path,
    model_folder: Path,
    settings: PreviewSettings,
    output: Path,
    label: str,
    epoch: int | None,
    say: Callable[[str], None],
) -> Path:
    """Generate a clip from a prompt, in a folder of its own. Returns that folder."""
    for line in (*prompt.text.changes, *prompt.problems):
        say(f"Note: {line}")
    trigger = report.facts.get("trigger")
    if isinstance(trigger, str) and trigger and not holds(prompt.text.caption, trigger):
        say(f"Note: the adapter's trigger word, {shown(trigger, 60)}, is not in the prompt.")
    settings = replace(settings, seconds=prompt.seconds)
    if request.output is None:
        output = output.with_name("prompts") / f"{plain_name(prompt.name)}-{prompt.key}"
    vae_folder = _vae(request, model_folder)
    restrict_gpus(request.device)
    device = pick_device(request.device)
    import_trainer(root)
    say(f"Loading {model_folder.name} on {device} ...")
    model = load_model(model_folder, device).model
    layers = linear_layers(model.decoder)
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    check_applicable(report.adapter, shapes, model_folder.name, strengths=request.strengths)
    with tempfile.TemporaryDirectory(prefix="sidestep-prompts-") as folder:
        files = encode_prompts([prompt], model, model_folder, Path(folder), root)
        songs = [look_at(file, prompt.seconds) for file in files]
        table = _table(output, read_table(output), model_folder.name, songs, settings)
        say(f"Generating {prompt.seconds:g} s: {settings.in_words} ...")
        base = request.without and not table.has(BASE)
        silence = read_silence(model_folder)
        named = _named(label, request.strengths)
        rows = _rows(model, report.adapter, layers, songs, silence, settings, named, epoch, base=base)
    del model, layers
    freed(device)
    vae = None if vae_folder is None else load_vae(vae_folder, device)
    for name, number, latents in rows:
        write_row(output, table, name, number, None, latents if vae is None else heard(vae, latents))
    if vae is None:
        say(f"Note: the clip is saved as latents, because {why_not(find_vae(_checkpoints(request, model_folder)))}.")
    return output


def clips_of(report: Report) -> list[Path]:
    """The sounds that the previews of a training have of a saved adapter, at its trained strength.

    Raises:
        Refusal: there are none.
    """
    folder, label, _ = _place(ClipRequest(report.adapter.file.path), report)
    table = read_table(folder)
    names = [label] if label.endswith(_AVERAGED) else [label, f"epoch {report.facts.get('epoch')}"]
    rows = [] if table is None else [row for name in names for row in table.rows if row.label == name]
    clips = [folder / clip for clip in rows[0].clips if is_sound(clip)] if rows else []
    if not clips:
        what = "are latents" if rows else "there are none"
        raise Refusal(
            f"No clips of this adapter in {folder}: {what}. Make some: acestep-train preview, or name files: --clip."
        )
    return clips


def _model_named(request: ClipRequest, report: Report) -> str:
    named = request.model or report.facts.get("model_name")
    if not isinstance(named, str) or not named:
        raise Refusal("The adapter does not say which model it is for. Name it: --model NAME.")
    return named


def _place(request: ClipRequest, report: Report) -> tuple[Path, str, int | None]:
    """Where the clips go, what the row is called, and the number of its epoch."""
    folder = report.adapter.file.path.absolute().parent
    average = folder.name == AVERAGE
    folder = folder.parent if folder.name in ("adapter", AVERAGE) else folder
    training = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    belongs = folder.parent.name == "checkpoints" or folder.name in ("final", "interrupted")
    said = report.facts.get("epoch")
    epoch = said if isinstance(said, int) and folder.name not in ("final", "best", "interrupted") else None
    label = folder.name if epoch is None else f"epoch {epoch}"
    label += _AVERAGED if average else ""
    return request.output or (training if belongs else folder) / FOLDER, label, epoch


def _settings(
    request: ClipRequest, report: Report, treatment: Treatment, before: Table | None
) -> tuple[PreviewSettings, str]:
    """What to generate with, and which songs: what was said, else as in the table that is there, else the defaults."""
    there = {} if before is None else before.about["settings"]
    longest = max((song["seconds"] for song in before.about["songs"]), default=SECONDS) if before else SECONDS
    generate = report.generate
    shift = treatment.shift if generate.shift is None else generate.shift
    steps = treatment.num_inference_steps if generate.num_inference_steps is None else generate.num_inference_steps
    settings = PreviewSettings(
        shift=there.get("shift", shift),
        steps=there.get("steps", steps),
        guidance=guidance_for(treatment.variant, request.cfg, "--cfg")
        if request.cfg is not None or "guidance" not in there
        else there["guidance"],
        seed=there.get("seed", SEED) if request.seed is None else request.seed,
        seconds=longest if request.seconds is None else request.seconds,
    )
    return settings, request.songs or (",".join(before.songs) if before else SONGS)


def _table(output: Path, before: Table | None, name: str, songs: list[Song], settings: PreviewSettings) -> Table:
    """The table to add to. Raises Refusal if the one that is there has other settings."""
    if before is not None:
        fresh, _ = open_table(output / "unused", name, songs, settings, goes_on=True)
        if fresh.about != before.about:
            raise Refusal(
                f"{output} holds clips of other songs, of another model or with other settings, which cannot be "
                "compared with these. Leave those options out, or choose another --output."
            )
        return before
    return open_table(output, name, songs, settings, goes_on=True)[0]


def _loss(before: Table | None, label: str) -> float | None:
    return next((row.loss for row in before.rows if row.label == label), None) if before else None


def _checkpoints(request: ClipRequest, model_folder: Path | None = None) -> Path | None:
    if model_folder is not None and request.checkpoint_dir is None:
        return model_folder.parent
    if request.checkpoint_dir is not None:
        return request.checkpoint_dir
    try:
        return checkpoints_of(None, request.acestep_root)
    except Refusal:
        return None


def _vae(request: ClipRequest, model_folder: Path | None) -> Path | None:
    """The folder of the VAE that can be used, None without one. Raises Refusal for a VAE of another kind."""
    folder = find_vae(_checkpoints(request, model_folder))
    if folder is None or why_not(folder):
        return None
    check_vae(folder)
    return folder
