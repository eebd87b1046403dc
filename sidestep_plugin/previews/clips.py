"""Clips from a saved adapter: finds the model, the songs and the table, generates and decodes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..adapters.applied import applied, check_applicable, linear_layers
from ..adapters.inspection import Report, inspect_adapter
from ..adapters.staging import AVERAGE
from ..engine import models
from ..engine.checkout import find_root, import_trainer
from ..engine.writable import check_writable
from ..errors import Refusal
from ..run import ModelFacts
from ..songs.dataset import check_width, inspect_dataset
from ..songs.song_text import holds
from ..text import counted, shown
from ..timesteps.treatment import Treatment, decide_treatment
from .clip_files import is_sound
from .conditions import SECONDS, SEED, SONGS, PreviewSettings, Song, choose_songs, guidance_for, look_at, read_silence
from .decoding import check_vae, find_vae, load_vae, why_not
from .making import decode_rest, freed, generated, heard, open_table, write_row
from .prompts import Prompt, encode_prompts, plain_name
from .table import BASE, FILE_NAME, FOLDER, Table, read_table

if TYPE_CHECKING:
    import torch


_AVERAGED: Final = f", {AVERAGE}"  # end of what the clips of an average are called


@dataclass(frozen=True)
class ClipRequest:
    """What the user asked for; None where the table of the training, or a default, decides."""

    path: Path  # an adapter, or a folder whose clips are still latents
    model: str | None = None  # alias, folder name or path; None for the model that the adapter says it is for
    dataset_dir: Path | None = None
    acestep_root: Path | None = None
    checkpoint_dir: Path | None = None
    output: Path | None = None  # folder for the clips; None for those of the adapter's training
    songs: str | None = None
    seconds: float | None = None
    cfg: float | None = None
    seed: int | None = None
    device: str = "auto"
    prompt: Prompt | None = None  # a prompt to generate from, instead of songs
    without: bool = False  # with `prompt`, whether the model without the adapter is heard beside it
    # What the adapter is multiplied by in turn, beside its own strength; each is a row of clips.
    strengths: tuple[float, ...] = (1.0,)


def decode_saved(request: ClipRequest, say: Callable[[str], None]) -> Path | None:
    """Decode what a training has saved as latents. Returns their folder; None if there is nothing of the kind.

    Raises Refusal without a VAE, and OSError.
    """
    places = (request.path, request.path / FOLDER)
    folder = next((place for place in places if (place / FILE_NAME).is_file()), None)
    table = None if folder is None else read_table(folder)
    asked = request.dataset_dir is not None or request.prompt is not None or request.songs is not None
    if folder is None or table is None or not table.undecoded or asked:
        return None
    vae = _vae(request, None)
    if vae is None:
        raise Refusal(
            f"The clips in {folder} are latents, and there is no VAE: {why_not(find_vae(_checkpoints(request)))}. Say "
            "where ACE-Step's models are with --checkpoint-dir DIR, in ACE-Step's own Python environment."
        )
    models.restrict_gpus(request.device)
    number = decode_rest(folder, table, load_vae(vae, models.pick_device(request.device)))
    say(f"Decoded {counted(number, 'clip')}.")
    return folder


def make_clips(request: ClipRequest, say: Callable[[str], None]) -> Path:
    """Generate clips from a saved adapter and from the model without it. Returns their folder.

    Raises Refusal if anything is missing, or if adapter, songs and model do not belong together; and OSError.
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
    model_folder = models.find_model(
        _model_named(request, report), models.checkpoint_folder(request.checkpoint_dir, root)
    )
    facts = ModelFacts.from_folder(model_folder)
    models.check_weights(model_folder, facts)
    output, label, epoch = _place(request, report)
    check_writable(output)
    settings, wanted = _settings(request, report, decide_treatment(facts), read_table(output))
    dataset, table, songs, prompt = None, None, list[Song](), request.prompt
    if prompt is not None:
        _tell(prompt, report, say)
        settings = replace(settings, seconds=prompt.seconds)
        if request.output is None:
            output = output.with_name("prompts") / f"{plain_name(prompt.name)}-{prompt.key}"
    elif request.dataset_dir is not None:
        dataset = inspect_dataset(request.dataset_dir.absolute(), allow_duplicates=True)
        songs = [look_at(file, settings.seconds) for file in choose_songs(dataset.files, wanted, "--songs")]
        table = _table(output, model_folder.name, songs, settings)
    silence, vae_folder = read_silence(model_folder), _vae(request, model_folder)
    models.restrict_gpus(request.device)
    device = models.pick_device(request.device)
    import_trainer(root)  # models' own code may import parts of ACE-Step
    say(f"Loading {model_folder.name} on {device} ...")
    model = models.load_model(model_folder, device).model
    if dataset is not None:
        check_width(dataset, facts.name, int(model.null_condition_emb.shape[-1]))
    layers = linear_layers(model.decoder)
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    check_applicable(report.adapter, shapes, facts.name, strengths=request.strengths)
    rows: list[tuple[str, int | None, list[torch.Tensor]]] = []
    with tempfile.TemporaryDirectory(prefix="sidestep-prompts-") as folder:
        if prompt is not None:
            files = encode_prompts([prompt], model, model_folder, Path(folder), root)
            songs = [look_at(file, prompt.seconds) for file in files]
            table = _table(output, model_folder.name, songs, settings)
        assert table is not None
        what = counted(len(songs), "song") if prompt is None else f"{prompt.seconds:g} s"
        say(f"Generating {what}: {settings.in_words} ...")
        if not table.has(BASE) and (prompt is None or request.without):
            rows.append((BASE, 0, list(generated(model, songs, silence, settings))))
        for strength in request.strengths:
            name = label if strength == 1.0 else f"{label} x {strength:g}"
            with applied(report.adapter, layers, strength):
                rows.append((name, epoch, list(generated(model, songs, silence, settings))))
    del model, layers
    freed(device)
    losses = {row.label: row.loss for row in table.rows}
    vae = None if vae_folder is None else load_vae(vae_folder, device)
    for name, number, latents in rows:
        write_row(output, table, name, number, losses.get(name), latents if vae is None else heard(vae, latents))
    if vae is None:
        are = "the clips are" if prompt is None else "the clip is"
        say(f"Note: {are} saved as latents, because {why_not(find_vae(_checkpoints(request, model_folder)))}.")
    return output


def _tell(prompt: Prompt, report: Report, say: Callable[[str], None]) -> None:
    """Say what is told otherwise than it was typed, and that the trigger word is missing."""
    for line in (*prompt.text.changes, *prompt.problems):
        say(f"Note: {line}")
    trigger = report.facts.get("trigger")
    if isinstance(trigger, str) and trigger and not holds(prompt.text.caption, trigger):
        say(f"Note: the adapter's trigger word, {shown(trigger, 60)}, is not in the prompt.")


def clips_of(report: Report) -> list[Path]:
    """The sounds that the previews of a training have of a saved adapter, at its trained strength. Raises Refusal."""
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


def _table(output: Path, name: str, songs: list[Song], settings: PreviewSettings) -> Table:
    """The table to add to. Raises Refusal if the one that is there has other settings."""
    before = read_table(output)
    fresh, _ = open_table(output / "unused", name, songs, settings, goes_on=True)
    if before is not None and before.about != fresh.about:
        raise Refusal(
            f"{output} holds clips of other songs, of another model or with other settings, which cannot be "
            "compared with these. Leave those options out, or choose another --output."
        )
    return before or fresh


def _checkpoints(request: ClipRequest, model_folder: Path | None = None) -> Path | None:
    if request.checkpoint_dir is not None:
        return request.checkpoint_dir
    if model_folder is not None:
        return model_folder.parent
    try:
        return models.checkpoints_of(None, request.acestep_root)
    except Refusal:
        return None


def _vae(request: ClipRequest, model_folder: Path | None) -> Path | None:
    """The folder of the VAE that can be used, None without one. Raises Refusal for a VAE of another kind."""
    folder = find_vae(_checkpoints(request, model_folder))
    if folder is None or why_not(folder):
        return None
    check_vae(folder)
    return folder
