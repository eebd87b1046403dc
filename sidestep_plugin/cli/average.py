"""``acestep-train average``: the mean of adapters or of a training's checkpoints, or one at another rank."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidestep_plugin.errors import Refusal
from sidestep_plugin.options import Place, SongsOrShare, WholeNumber
from sidestep_plugin.text import counted, shown

from .commands import Command, Unusable
from .quiet import quiet_third_parties, quiet_upstream
from .terminal import echo, say
from .torch_here import require_torch
from .training_options import ACESTEP_ROOT, CHECKPOINT_DIR, FOLDER, check_device

if TYPE_CHECKING:
    from sidestep_plugin.adapters.averaging import Averaged
    from sidestep_plugin.adapters.inspection import Report

_OF_ONE = ("epoch", "global_step", "validation_epoch", "validation_loss", "validation_change", "validation_improved")


@click.command(cls=Command)
@click.argument("paths", metavar="RUN|ADAPTER...", nargs=-1, required=True, type=Place(path_type=Path))
@click.option("--output", type=Place(path_type=Path), required=True, metavar="DIR", help="Folder for the result.")
@click.option("--last", type=WholeNumber(1, 10**6), metavar="N", help="The last N checkpoints of a training.")
@click.option("--epochs", metavar="A-B", help="The checkpoints of a training from epoch A to B.")
@click.option("--weights", metavar="W,W,...", help="A positive number for each adapter.  [default: all alike]")
@click.option("--to-rank", type=WholeNumber(1, 65_536), metavar="R", help="Rank of the result.  [default: theirs]")
@click.option("--title", metavar="TEXT", help="Name of the result.")
@click.option(
    "--best-of", metavar="N,N,...", help="Of these numbers of last checkpoints, the one whose mean has the lowest loss."
)
@click.option("--dataset-dir", type=FOLDER, metavar="DIR", help="With --best-of: preprocessed songs to choose on.")
@click.option(
    "--validate",
    type=SongsOrShare(),
    default="0",
    metavar="N",
    help="With --best-of: only the songs that a training with --validate N holds out.",
)
@click.option("--model", metavar="NAME|DIR", help="With --best-of: model.  [default: the one that they are for]")
@ACESTEP_ROOT
@CHECKPOINT_DIR
@click.option(
    "--device", default="auto", callback=check_device, metavar="NAME", help="With --best-of: where to compute."
)
@click.option("--overwrite", is_flag=True, help="Replace an adapter in the folder.")
def average(
    paths: tuple[Path, ...],
    output: Path,
    last: int | None,
    epochs: str | None,
    weights: str | None,
    to_rank: int | None,
    title: str | None,
    best_of: str | None,
    overwrite: bool,
    **songs: Any,
) -> None:
    """Average adapters, or the checkpoints of a training, or bring one adapter to another rank.

    The mean is that of what the adapters do to the model, cut back to a rank; how much of it is kept is printed. The
    result has alpha = rank, so that every program plays it at full strength. No model is loaded, and no adapter is
    changed.

    \b
    Examples:
        acestep-train average adapters/jazz --last 4 --output adapters/jazz-mean
        acestep-train average adapters/jazz --epochs 300-500 --output adapters/jazz-mean
        acestep-train average adapters/jazz --best-of 2,4,8 --dataset-dir songs --validate 4 --output adapters/jazz-mean
        acestep-train average one/final two/final --weights 2,1 --output both
        acestep-train average adapters/jazz/final --to-rank 16 --output adapters/jazz-16
    """
    from sidestep_plugin.adapters.averaging import average as mean_of
    from sidestep_plugin.adapters.new_adapter import write_adapter

    chose: list[str] = []
    try:
        if best_of is not None:
            _check_output(output, overwrite)
            last, chose = _best_last(
                paths, best_of, to_rank, {"last": last, "epochs": epochs, "weights": weights}, songs
            )
            if last == 1:
                for line in [*chose, "Nothing was saved: the newest checkpoint alone has the lowest loss."]:
                    echo(line)
                return
        elif songs["dataset_dir"] is not None:
            raise Refusal("--dataset-dir is for choosing. Say among what: --best-of 2,4,8.")
        chosen, names = _chosen(paths, last, epochs)
        shares = _shares(weights, len(chosen))
        if len(chosen) == 1 and to_rank is None:
            raise Refusal(
                "Nothing to do: this is one adapter. Name several, or --last N or --epochs A-B of a training, or "
                "--to-rank R."
            )
        _check_output(output, overwrite)
        reports = _reports(chosen)
        _check_rank(reports, to_rank)
        done = mean_of([report.adapter for report in reports], shares, to_rank)
        told = _facts(reports, names, shares, done, title)
        if best_of is not None:
            told["average_best_of"] = best_of
        write_adapter(output.absolute(), done.kind, done.layers, told, reports[-1].adapter)
    except Refusal as refusal:
        raise Unusable(shown(refusal, 5000)) from None
    except OSError as error:
        raise Unusable(f"Cannot write the average: {error.strerror or error}: {error.filename or output}.") from None
    for line in [*chose, *_lines(reports, done, told, to_rank)]:
        echo(line)
    echo(f"Saved: {shown(output, 5000)}")


def _reports(paths: list[Path]) -> list[Report]:
    """What is known about adapters. Raises Refusal for one that cannot be averaged."""
    from sidestep_plugin.adapters.inspection import inspect_adapter

    reports = [inspect_adapter(path) for path in paths]
    for report in reports:
        if report.problems:
            raise Refusal(f"{report.adapter.file.path} was not averaged: {report.problems[0]} Leave it out.")
    return reports


def _best_last(
    paths: tuple[Path, ...], best_of: str, rank: int | None, others: dict[str, Any], songs: dict[str, Any]
) -> tuple[int, list[str]]:
    """The number of last checkpoints whose mean has the lowest loss on some songs, and lines that say so.

    One checkpoint, the newest, is always among them.

    Raises:
        Refusal: the numbers, the songs or the model cannot be used.
    """
    import tempfile

    from sidestep_plugin.adapters.averaging import average as mean_of
    from sidestep_plugin.adapters.new_adapter import write_adapter
    from sidestep_plugin.validation.comparing import compare

    if given := [name for name, value in others.items() if value is not None]:
        raise Refusal(f"--best-of chooses checkpoints by itself. Leave --{given[0]} out.")
    if songs["dataset_dir"] is None:
        raise Refusal("--best-of chooses by the loss on songs that were not trained on. Name them: --dataset-dir DIR.")
    numbers = [int(word) for word in best_of.split(",") if re.fullmatch(r"\s*\d{1,6}\s*", word)]
    if len(numbers) != best_of.count(",") + 1 or not all(number > 1 for number in numbers):
        raise Refusal(f"--best-of {shown(best_of, 80)}: expected whole numbers from 2 on, such as 2,4,8.")
    numbers = sorted({1, *numbers})
    chosen, _ = _chosen(paths, numbers[-1], None)
    reports = _reports(chosen)
    _check_rank(reports, rank)
    require_torch()
    quiet_third_parties()
    quiet_upstream()
    model = songs["model"] or reports[-1].facts.get("model_name")
    if not isinstance(model, str) or not model:
        raise Refusal("The adapters do not say which model they are for. Name it: --model NAME.")
    with tempfile.TemporaryDirectory(prefix="sidestep-average-") as folder:
        places = [chosen[-1]]
        for number in numbers[1:]:
            done = mean_of([report.adapter for report in reports[-number:]], None, rank)
            places.append(Path(folder) / f"last {number}")
            write_adapter(places[-1], done.kind, done.layers, {}, reports[-1].adapter)
        found = compare(
            places,
            model=model,
            dataset_dir=songs["dataset_dir"],
            acestep_root=songs["acestep_root"],
            checkpoint_dir=songs["checkpoint_dir"],
            device=songs["device"],
            held_out=songs["validate"],
            say=say,
        )
    losses = [found.mean(one.losses) for one in found.after]
    before = found.mean(found.before)
    finite = [place for place, loss in enumerate(losses) if math.isfinite(loss)]
    if not finite:
        raise Refusal("None of these adapters gives a loss that is a number. Choose earlier checkpoints: --epochs A-B.")
    best = min(finite, key=lambda place: losses[place])
    count = counted(len(found.songs), "song")
    lines = [f"Loss on {count} relative to {found.model} without adapter:"]
    for place, (number, loss) in enumerate(zip(numbers, losses, strict=True)):
        name = "the newest checkpoint" if number == 1 else f"mean of the last {number}"
        lines.append(f"  {name:<22} {100 * (loss / before - 1):+.2f} %{'  <-' if place == best else ''}")
    lines.append(f"It was chosen on {'this song' if count == '1 song' else f'these {count}'}: on others it gains less.")
    return numbers[best], lines


def _chosen(paths: tuple[Path, ...], last: int | None, epochs: str | None) -> tuple[list[Path], list[str]]:
    """The adapters to average, and what each is called in the facts. Raises Refusal."""
    if last is None and epochs is None:
        return list(paths), []
    if last is not None and epochs is not None:
        raise Refusal("--last and --epochs choose checkpoints in two ways. Leave one of them out.")
    if len(paths) > 1:
        raise Refusal("--last and --epochs choose checkpoints of one training. Name one --output-dir of a training.")
    from sidestep_plugin.resuming.overview import saved_in

    found: dict[int, str] = {}
    for saved in saved_in(paths[0].absolute()):  # earliest first, the finished adapter last
        if saved.epoch is not None and not saved.name.endswith("/best") and saved.name != "interrupted":
            found.setdefault(saved.epoch, saved.name)
    there = f"checkpoints of {counted(len(found), 'epoch')} ({', '.join(map(str, sorted(found)))})"
    if last is not None:
        if last > len(found):
            raise Refusal(f"--last {last}: {paths[0]} has {there}. Choose a lower number.")
        picked = sorted(found)[-last:]
    else:
        match = re.fullmatch(r"(\d+)-(\d+)", str(epochs).strip())
        if match is None or int(match[1]) > int(match[2]):
            raise Refusal(f"--epochs {shown(epochs, 40)}: expected two epochs, such as 300-500.")
        picked = [epoch for epoch in sorted(found) if int(match[1]) <= epoch <= int(match[2])]
        if not picked:
            raise Refusal(f"--epochs {epochs}: {paths[0]} has {there}. Choose some of these.")
    return [paths[0] / found[epoch] for epoch in picked], [f"epoch {epoch}" for epoch in picked]


def _shares(weights: str | None, count: int) -> list[float] | None:
    """The weights of the adapters. Raises Refusal."""
    if weights is None:
        return None
    try:
        shares = [float(word) for word in weights.split(",")]
    except ValueError:
        shares = []
    if len(shares) != count or not all(0.0 < share < 1e9 for share in shares):
        raise Refusal(f"--weights {shown(weights, 80)}: expected {count} positive numbers, such as 2,1.")
    return shares


def _check_output(output: Path, overwrite: bool) -> None:
    from sidestep_plugin.adapters.kinds import WEIGHT_NAMES

    if output.exists() and not output.is_dir():
        raise Refusal(f"{output} is no folder. Choose another --output.")
    if not overwrite and any((output / name).exists() for name in WEIGHT_NAMES):
        raise Refusal(f"There is an adapter in {output}. Choose another --output, or use --overwrite.")


def _check_rank(reports: list[Report], rank: int | None) -> None:
    if rank is None:
        return
    for report in reports:
        adapter = report.adapter
        if not all("A" in layer.parts for layer in adapter.layers.values()):
            raise Refusal(f"--to-rank changes the rank of a LoRA, and {adapter.file.path} is none. Leave it out.")
    highest = sum(max(report.adapter.ranks, default=0) for report in reports)
    if rank > highest:
        raise Refusal(
            f"--to-rank {rank} is higher than what there is: {highest}, the sum of the ranks. Choose a lower one."
        )


def _facts(
    reports: list[Report], names: list[str], shares: list[float] | None, done: Averaged, title: str | None
) -> dict[str, Any]:
    """What is known about the result: the last adapter's facts without what is true of that one alone."""
    from sidestep_plugin.adapters.facts import SCHEMA_VERSION

    facts = {key: value for key, value in reports[-1].facts.items() if key not in _OF_ONE}
    facts |= {"schema_version": SCHEMA_VERSION, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    told = names or [str(report.facts.get("title") or "an adapter without a title") for report in reports]
    if shares is not None:
        total = sum(shares)
        told = [f"{name} ({100 * share / total:.4g} %)" for name, share in zip(told, shares, strict=True)]
    if title is not None:
        facts["title"] = title
    if len(reports) > 1:
        facts = {key: value for key, value in facts.items() if not key.startswith("average_")}
        facts |= {"average_of": ", ".join(told)[:1000], "average_energy": round(done.energy, 6)}
    return facts


def _lines(reports: list[Report], done: Averaged, facts: dict[str, Any], rank: int | None) -> list[str]:
    lines = []
    models = dict.fromkeys(str(report.facts["model_name"]) for report in reports if "model_name" in report.facts)
    if len(models) > 1:
        lines.append(f"Warning: these adapters are for different models: {shown(', '.join(models), 300)}.")
    if len(reports) > 1:
        lines.append(f"Mean of {len(reports)}: {shown(facts['average_of'], 1000)}")
    span = sorted({min(done.ranks), max(done.ranks)}) if done.ranks else []
    size = f"rank {'-'.join(map(str, span))}" if span else "full matrices"
    lines.append(
        f"Kept at {size}: {100 * done.energy:.2f} % of the energy ({100 * done.lowest:.2f} % where most is lost)"
    )
    if rank is None and done.energy < 0.98:
        lines.append("A higher --to-rank would keep more of it.")
    return lines
