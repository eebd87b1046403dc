"""Clips while it trains (``--preview-every``): some songs are generated with the adapter at the end of an epoch.

They are generated from the songs' own conditions, silence as context and the same noise each time, with the steps,
the shift and the guidance that the model is meant for, and once by the model without the adapter. The page of the
training plays them: what is on it about them are the report's entries "previews". A
preview changes nothing of the training: random states, modes and gradients are as before, bit for bit.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ..errors import Refusal
from ..hookspecs import hookimpl
from ..options import FiniteFloat, Line, Place, WholeNumber, option
from ..run import Clip, EpochNews, Run
from ..songs.dataset import songs_in
from ..text import counted, sentence
from ..timesteps.treatment import treatment_of
from .conditions import SECONDS, SEED, SONGS, PreviewSettings, Song, choose_songs, guidance_for, look_at, read_silence
from .decoding import find_vae, why_not
from .prompts import encode_prompts, read_prompts
from .table import BASE, FOLDER, Table, leave_branch, read_table, set_aside

if TYPE_CHECKING:
    import torch

_KEY: Final = "sidestep.previews"
_LATER: Final = "acestep-train preview OUTPUT --checkpoint-dir DIR"


@hookimpl
def acestep_options() -> list[click.Option]:
    return [
        option(
            "--preview-every",
            "Generate clips every N epochs, to listen to.  [default: off]",
            WholeNumber(min=0),
            "N",
            default=0,
        ),
        option("--preview-songs", "How many songs, or which ones: a,b,c.", Line(), "K|NAMES", default=SONGS),
        option("--preview-prompts", "TOML file of prompts to hear instead of songs.", Place(path_type=Path), "FILE"),
        option(
            "--preview-seconds",
            "Length of a song's clip, at most the song's.",
            FiniteFloat(0.0, 600.0, min_open=True),
            "S",
            default=SECONDS,
        ),
        option(
            "--preview-cfg",
            "Guidance scale of the clips.  [default: base and sft 7, turbo none]",
            FiniteFloat(1.0, 30.0),
            "X",
        ),
        option("--preview-seed", "Seed of the clips' noise.", WholeNumber(0, 2**32 - 1), "N", default=SEED),
    ]


@dataclass
class _Plan:
    """The previews of one run."""

    every: int
    songs: list[Song]
    settings: PreviewSettings
    silence: torch.Tensor  # the latents of silence, shape [1,N,64]
    vae: Path | None  # folder of the VAE; None when clips stay latents, or the app's own VAE is used
    table: Table | None = None  # that of the output folder, once it was opened
    told: bool = False  # whether time and memory were said
    over: bool = False  # whether a preview failed, so that there are no more


@hookimpl
def acestep_model_chosen(options: Mapping[str, Any]) -> None:
    """Refuse options without effect. From a settings file they come with their defaults."""
    for each in acestep_options():
        if not options["preview_every"] and options[str(each.name)] != each.default:
            raise Refusal(
                f"{each.opts[0]} says how to make previews, and none are made. Leave it out, or say how often to "
                "make them: --preview-every N."
            )
    if options["preview_prompts"] is not None:
        read_prompts(options["preview_prompts"])


@hookimpl
def acestep_run_started(run: Run) -> list[str] | None:
    """Decide what will be heard, and refuse what cannot be."""
    every = run.options["preview_every"]
    if not every or run.tensor_dir is None:
        return None
    treatment = treatment_of(run)
    guidance = guidance_for(treatment.variant, run.options["preview_cfg"])
    if guidance > 1.0 and getattr(run.model, "null_condition_emb", None) is None:
        raise Refusal("The model has no null_condition_emb, which guidance needs. Use --preview-cfg 1.")
    seconds = run.options["preview_seconds"]
    folder = Path(str(getattr(run.model.config, "_name_or_path", "") or ""))
    lines, prompts = _from_prompts(run, folder)
    songs: list[Song] = []
    if run.options["preview_prompts"] is None or run.options["preview_songs"] != SONGS:
        chosen = choose_songs(songs_in(run.tensor_dir), run.options["preview_songs"])
        songs = [look_at(file, seconds) for file in chosen]
    settings = PreviewSettings(
        treatment.shift, treatment.num_inference_steps, guidance, run.options["preview_seed"], seconds
    )
    often = "every epoch" if every == 1 else f"every {every} epochs"
    names = ", ".join(song.name for song in (*prompts, *songs))
    lines += [f"Previews: {often}, {names}, {settings.in_words} (does not change training)"]
    short = [
        f"{song.name} {song.seconds:.1f} s" for song in songs if song.seconds < seconds and song.frames == song.whole
    ]
    if short:
        lines.append(f"Note: songs shorter than --preview-seconds {seconds:g} are heard whole: {', '.join(short)}.")
    vae = None
    if run.loaded_vae() is None:
        vae = find_vae(folder.parent)
        if reason := why_not(vae):
            vae = None
            lines.append(f"Note: previews are saved as latents, because {reason}. To hear them later: {_LATER}")
    run.state[_KEY] = _Plan(every, [*prompts, *songs], settings, read_silence(folder), vae)
    return lines


def _from_prompts(run: Run, model_folder: Path) -> tuple[list[str], list[Song]]:
    """Songs to hear from the file of prompts, which are kept until the training is over, and lines about them."""
    file = run.options["preview_prompts"]
    if file is None:
        return [], []
    prompts = read_prompts(file)
    folder = Path(tempfile.mkdtemp(prefix="sidestep-prompts-"))
    run.engine.at_end(partial(shutil.rmtree, folder, ignore_errors=True))
    files = encode_prompts(prompts, run.model, model_folder, folder)
    lines = [f"Warning: prompt {prompt.name}: {problem}" for prompt in prompts for problem in prompt.problems]
    return lines, [look_at(each, prompt.seconds) for each, prompt in zip(files, prompts, strict=True)]


@hookimpl
def engine_planned(run: Run) -> None:
    if run.ranks.first:
        run.reports.append(partial(_for_the_report, run))


def _for_the_report(run: Run) -> dict[str, Any]:
    """The clips that are in the output folder now, whoever has made them, with addresses relative to that folder."""
    try:
        table = read_table(run.engine.folder / FOLDER)
    except Refusal:  # a warning has told it
        return {}
    if table is None or (_KEY not in run.state and all(row.epoch == 0 for row in table.rows)):
        return {}
    rows = [replace(row, clips=[f"{FOLDER}/{clip}" for clip in row.clips]) for row in table.rows]
    return {"previews": Table(table.about, rows).as_report()}


@hookimpl
def engine_training_began(run: Run) -> list[str]:
    """Move clips aside that this training did not make, whether or not it makes any."""
    folder = run.engine.folder / FOLDER
    if not run.ranks.first:
        return []
    try:
        table = read_table(folder)
        if table is None or all(row.epoch == 0 for row in table.rows):
            return []
        if not run.resuming:
            return [f"Note: clips of an earlier training were moved to {set_aside(folder)}."]
        aside = leave_branch(folder, table, run.engine.epochs_before)
        if aside is None:
            return []
        return [f"Note: clips of epochs after the checkpoint, which an earlier run made, were moved to {aside}."]
    except (Refusal, OSError) as error:  # a training of hours matters more than a clip
        return [f"Warning: the clips in {folder} stay as they are: {error}"]


class _NotAnyMore(Exception):
    """Somebody has stopped the training while clips were being made."""


@hookimpl
def acestep_between_epochs(run: Run, epoch: int, loss: float | None, folder: Path) -> EpochNews | None:
    plan: _Plan | None = run.state.get(_KEY)
    if plan is None or plan.over or not run.ranks.first:  # of several processes, the first one makes the clips
        return None
    if (epoch % plan.every and not run.engine.ends_after(epoch)) or run.engine.stopping:
        return None
    from .generation import computed_in
    from .making import freed

    device = computed_in(run.engine.decoder)[0]
    news: EpochNews | None
    try:
        with run.engine.undisturbed():
            news = _preview(run, plan, device, epoch, loss, folder / FOLDER)
    except _NotAnyMore:
        news = None
    except Exception as error:  # a training of hours matters more than a clip
        plan.over = True
        reason = sentence(str(error) or type(error).__name__)
        news = EpochNews(
            lines=(
                f"Warning: no preview after epoch {epoch}: {reason} The training goes on without previews. Clips of "
                f"any saved adapter: {_LATER}",
            )
        )
    freed(device)
    return news


def _preview(run: Run, plan: _Plan, device: torch.device, epoch: int, loss: float | None, folder: Path) -> EpochNews:
    """Make the clips of an epoch, and those of the base model if there are none yet. Raises what goes wrong."""
    from .making import generated, open_table, write_row

    began, peak = time.monotonic(), _peak(device)
    lines: list[str] = []
    if plan.table is None:
        name = treatment_of(run).model_name
        plan.table, aside = open_table(folder, name, plan.songs, plan.settings, goes_on=run.resumed_at > 0)
        if aside is not None:
            lines.append(f"Note: clips of an earlier training were moved to {aside}.")
    table = plan.table
    rows: list[tuple[str, int, float | None, list[torch.Tensor]]] = []
    first = not table.has(BASE)
    total = (first + (epoch > 0)) * len(plan.songs)

    def clips() -> list[torch.Tensor]:
        before = len(rows) * len(plan.songs)

        def told(done: int) -> None:
            if run.engine.stopping:
                raise _NotAnyMore
            run.engine.waiting("Previews", before + done, total)

        return list(generated(run.model, plan.songs, plan.silence, plan.settings, told))

    if first:
        with run.engine.without_adapter():
            rows.append((BASE, 0, None, clips()))
    if epoch > 0:
        rows.append((f"epoch {epoch}", epoch, loss, clips()))
    run.engine.waiting("Previews", total, total)
    logged = {}
    heard = _decoded(run, plan, device, [latents for *_, latents in rows], lines)
    for (label, number, mean, latents), sounds in zip(rows, heard, strict=True):
        write_row(folder, table, label, number, mean, sounds or latents)
        if number == epoch:
            logged = {f"preview/{song.name}": clip for song, clip in zip(plan.songs, sounds, strict=bool(sounds))}
    if rows and not plan.told:
        plan.told = True
        lines.append(_costs(len(rows) * len(plan.songs), time.monotonic() - began, peak, device, folder))
    return EpochNews(tuple(lines), logged)


def _decoded(
    run: Run, plan: _Plan, device: torch.device, rows: list[list[torch.Tensor]], lines: list[str]
) -> list[list[Clip]]:
    """The clips of each row, empty lists without a VAE. A VAE that fails is not asked again, and a line says so."""
    from .decoding import load_vae
    from .making import heard

    vae = run.loaded_vae()
    if vae is None and plan.vae is None:
        return [[] for _ in rows]
    try:
        vae = vae if vae is not None or plan.vae is None else load_vae(plan.vae, device)
        return [heard(vae, latents) for latents in rows]
    except Exception as error:
        plan.vae = None
        reason = " ".join(str(error).split()) or type(error).__name__
        lines.append(
            f"Warning: the previews could not be decoded ({reason}) and are saved as latents. To hear them: {_LATER}"
        )
        return [[] for _ in rows]


def _peak(device: torch.device) -> int:
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _costs(clips: int, seconds: float, before: int, device: torch.device, folder: Path) -> str:
    """What the first preview cost. The counter of the peak is only read: others use it too."""
    line = f"Previews: {counted(clips, 'clip')} in {seconds:.1f} s"
    if device.type == "cuda":
        now = _peak(device)
        line += (
            f", peak GPU memory {now / 2**30:.1f} GiB instead of {before / 2**30:.1f}"
            if now > before
            else ", no more GPU memory than the training"
        )
    return f"{line}, in {folder}"
