"""``acestep-train estimate``: how much memory a training will need, and with which flags it would fit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidestep_plugin.adapters.kinds import BY_NAME, DEFAULT, KINDS, NAMES
from sidestep_plugin.errors import Refusal
from sidestep_plugin.options import FiniteFloat, WholeNumber
from sidestep_plugin.text import counted

from .commands import OURS, Command, Unusable, chosen, echo_json
from .terminal import columns, echo
from .torch_here import require_torch
from .training_options import ACESTEP_ROOT, CHECKPOINT_DIR, FOLDER, plugin_option

if TYPE_CHECKING:
    from sidestep_plugin.memory.estimate import Settings
    from sidestep_plugin.memory.sizes import DecoderSize
    from sidestep_plugin.memory.table import Row


class MemorySize(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.4 on
    """Memory such as 12GB, 11.5 GiB or 8000MB | converts to bytes; GB counts as GiB, as on the boxes of GPUs."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s*(G|M)(?:i?B)?", str(value).strip(), re.IGNORECASE)
        size = int(float(found[1]) * 2 ** (30 if found[2].upper() == "G" else 20)) if found else 0
        if not size:
            self.fail(f"{value!r} is not a size of memory. Expected one such as 12GB.", param, ctx)
        return size


def _usual_rank(kind: str, with_sidestep: bool) -> int:
    """The rank of a training without ``--rank``: the recommended one, or ACE-Step's own."""
    return int(BY_NAME[kind].recommended["rank"][0]) if with_sidestep else BY_NAME[kind].default_rank


_RANKS = ", ".join(f"{kind.title} {_usual_rank(kind.name, True)}" for kind in KINDS)


@click.command(cls=Command)
@click.option("--model", required=True, metavar="NAME|DIR", help="Model: base, sft, turbo, xl-base, ..., or a path.")
@click.option("--dataset-dir", type=FOLDER, metavar="DIR", help="Preprocessed songs; the longest one counts.")
@click.option(
    "--seconds", type=FiniteFloat(0.0, 86_400.0, min_open=True), metavar="S", help="Longest song, without a dataset."
)
@click.option("--memory", type=MemorySize(), metavar="SIZE", help="Memory of the GPU: 12GB.  [default: what is free]")
@click.option("--adapter-type", type=click.Choice(NAMES), default=DEFAULT.name, show_default=True, help="Adapter.")
@click.option("--rank", type=WholeNumber(1, 65_536), metavar="N", help=f"Its size.  [default: {_RANKS}]")
@click.option(
    "--target-modules",
    default="q_proj,k_proj,v_proj,o_proj",
    show_default=True,
    metavar="NAMES",
    help="Layers to adapt.",
)
@click.option(
    "--dropout",
    type=FiniteFloat(0.0, 1.0, max_open=True),
    metavar="X",
    default=0.1,
    show_default=True,
    help="LoRA dropout.",
)
@click.option(
    "--batch-size", type=WholeNumber(1, 1024), metavar="N", default=1, show_default=True, help="Songs per batch."
)
@click.option("--average", is_flag=True, help="Count the running mean that a training with --average keeps, too.")
@ACESTEP_ROOT
@CHECKPOINT_DIR
@plugin_option()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def estimate(
    model: str,
    dataset_dir: Path | None,
    seconds: float | None,
    memory: int | None,
    adapter_type: str,
    rank: int | None,
    target_modules: str,
    dropout: float,
    batch_size: int,
    average: bool,
    acestep_root: Path | None,
    checkpoint_dir: Path | None,
    plugin: tuple[str, ...],
    as_json: bool,
) -> None:
    """Estimate the memory that a training on a GPU needs, and say with which flags it would fit.

    It is computed from the model's config.json and the length of the longest song. No GPU is needed. Official models
    can be estimated before they are downloaded.

    \b
    Examples:
        acestep-train estimate --model base --dataset-dir tensors/jazz
        acestep-train estimate --model xl-base --seconds 180 --rank 64 --memory 12GB
    """
    from sidestep_plugin.memory.estimate import Settings
    from sidestep_plugin.memory.table import rows_for
    from sidestep_plugin.registry import Registry

    try:
        options = frozenset(str(option.name) for option in Registry.load(chosen(plugin)).declared_options())
        require_torch()
        size, notes = _size(model, acestep_root, checkpoint_dir)
        frames, tokens, left_out = _length(dataset_dir, seconds)
        notes += left_out
        settings = Settings(
            kind=adapter_type,
            rank=rank or _usual_rank(adapter_type, OURS in chosen(plugin)),
            targets=tuple(name.strip() for name in target_modules.split(",") if name.strip()),
            dropout=dropout > 0.0,
            batch_size=batch_size,
            frames=frames,
            tokens=tokens,
            averaged=average,
        )
        known = ", ".join(sorted({name.partition(".")[2] for name in size.layer_linears}))
        unknown = [name for name in settings.targets if not size.targets([name])]
        if unknown or not settings.targets:
            named = ", ".join(unknown) or target_modules
            raise Refusal(f"--target-modules: {named} names no layer of the decoder. Choose from {known}.")
    except Refusal as refusal:
        raise Unusable(str(refusal)) from None
    free = _free_memory() if memory is None else memory
    rows = rows_for(size, settings, options)
    answer = _Answer(model, size, settings, options, rows, free, memory is not None, notes)
    if as_json:
        echo_json(answer.as_json())
        return
    for line in answer.lines():
        echo(line)


def _fitted(table: list[str], wide: int) -> list[str]:
    """A table with each name above its numbers, where both do not fit into a line of the terminal.

    Args:
        table: its lines.
        wide: length of the longest name.
    """
    room = columns()
    if room is None or max(map(len, table)) <= room:
        return table
    lines = []
    for line in table:
        lines += [name] if (name := line[:wide].rstrip()) else []
        *numbers, last = line[wide:].split()
        lines.append("".join(f"{cell:>12}" for cell in numbers) + f"{last:>7}")
    return lines


@dataclass(frozen=True)
class _Answer:
    """What is printed."""

    model: str
    size: DecoderSize
    settings: Settings
    options: frozenset[str]
    rows: list[Row]
    free: int | None
    said: bool
    notes: list[str]

    def lines(self) -> list[str]:
        from sidestep_plugin.memory.estimate import FRAMES_A_SECOND
        from sidestep_plugin.memory.sizes import adapter_parameters
        from sidestep_plugin.memory.table import as_text

        settings = self.settings
        trained = adapter_parameters(self.size, settings.kind, settings.rank, settings.targets)
        kind = BY_NAME[settings.kind].title
        return [
            f"Model: {self.model}, {self.size.parameters:,} parameters in the decoder",
            f"Adapter: {kind} of rank {settings.rank} on {', '.join(settings.targets)}, {trained:,} parameters",
            f"Batch: {counted(settings.batch_size, 'song')} of {settings.frames / FRAMES_A_SECOND:.0f} s, "
            "conditions of "
            f"{settings.tokens} tokens",
            *(f"Note: {note}" for note in self.notes),
            "",
            "GiB at the peak of a training in bf16 on a GPU, computed, not measured; each line keeps the flags above:",
            "",
            *_fitted(as_text(self.rows, self.free), max(len(row.name) for row in self.rows)),
            "",
            self._verdict(),
        ]

    def _verdict(self) -> str:
        from sidestep_plugin.memory.estimate import shown

        if self.free is None:
            return "Free memory: unknown, there is no CUDA device. Say how much there is: --memory 12GB"
        memory = f"{shown(self.free)} {'' if self.said else 'are free'}".strip()
        if not self.options:
            fits = self.rows[0].needs.fits(self.free)
            return f"{memory}: enough" if fits else f"{memory}: not enough with a margin. Leave --plugin none out."
        flags = self._flags()
        if flags is None:
            return f"{memory}: none of these fits with a margin. Use shorter songs, or a smaller model."
        return f"{memory}: enough with {' '.join(flags)}"

    def _flags(self) -> list[str] | None:
        """The cheapest flags with which it fits; None if there are none."""
        from sidestep_plugin.memory.estimate import needs
        from sidestep_plugin.memory.savings import enough

        if self.free is None or not self.options:
            return None
        free, now = self.free, self.settings.but(checkpointing=False)
        if needs(self.size, now).fits(free):
            return ["--gradient-checkpointing off"]
        found = enough(now, self.options, lambda then: needs(self.size, then).fits(free))
        return None if found is None else found[0]

    def as_json(self) -> dict[str, Any]:
        import dataclasses

        return {
            "model": self.model,
            "decoder_parameters": self.size.parameters,
            "frames": self.settings.frames,
            "tokens": self.settings.tokens,
            "free_bytes": self.free,
            "notes": self.notes,
            "rows": [
                {
                    "name": row.name,
                    "flags": list(row.flags),
                    **dataclasses.asdict(row.needs),
                    "total": row.needs.total,
                    "fits": None if self.free is None else row.needs.fits(self.free),
                }
                for row in self.rows
            ],
            "flags": self._flags(),
        }


def _size(model: str, root: Path | None, checkpoints: Path | None) -> tuple[DecoderSize, list[str]]:
    """The decoder's size, and notes about where it comes from. Raises Refusal."""
    from sidestep_plugin.engine.models import checkpoints_of, find_model
    from sidestep_plugin.memory.known import GUESSED, XL, known_size
    from sidestep_plugin.memory.sizes import DecoderSize
    from sidestep_plugin.run import ModelFacts

    try:
        folder = find_model(model, checkpoints_of(checkpoints, root))
    except Refusal:
        size = known_size(model)
        if size is None:
            raise
        guess = f"; guessed: {GUESSED}" if size == XL else ""
        return size, [f"{model} is not on this machine, so the sizes of the official model are taken{guess}."]
    size = DecoderSize.from_config(ModelFacts.from_folder(folder).config) or known_size(folder.name)
    if size is None:
        raise Refusal(f"config.json of {folder.name} does not say how large the model is. Copy the model folder again.")
    return size, []


def _length(dataset_dir: Path | None, seconds: float | None) -> tuple[int, int, list[str]]:
    """Frames and tokens of the longest song, and notes about songs that were left out. Raises Refusal."""
    from sidestep_plugin.memory.estimate import FRAMES_A_SECOND, USUAL_TOKENS
    from sidestep_plugin.songs.dataset import inspect_dataset, songs_in

    if (dataset_dir is None) is (seconds is None):
        raise Refusal("How long are the songs? Give either --dataset-dir DIR or --seconds S.")
    if seconds is not None:
        return max(1, round(seconds * FRAMES_A_SECOND)), USUAL_TOKENS, []
    from sidestep_plugin.songs.one_song import longest, read_song

    assert dataset_dir is not None
    songs = songs_in(dataset_dir)
    damaged = {song: problem for song in songs if (problem := read_song(song)[1])}
    frames, tokens = longest(song for song in songs if song not in damaged)
    if not frames:
        if dataset_dir.is_dir():
            inspect_dataset(dataset_dir, allow_duplicates=None)  # says what is there instead of songs
        raise Refusal(
            f"No songs in {dataset_dir}: expected .pt files, which acestep-train prepare makes. Name another folder."
        )
    refused = "It is left out here, a training refuses it"
    notes = [f"{song.name} {problem}. {refused}." for song, problem in damaged.items()]
    return frames, tokens, notes


def _free_memory() -> int | None:
    """Bytes that are free on the first CUDA device; None without one."""
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
