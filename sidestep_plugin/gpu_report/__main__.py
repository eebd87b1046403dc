"""``python -m sidestep_plugin.gpu_report``: measures job after job, each in a process of its own, within a budget."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from ..errors import Refusal
from ..files import read_json_object, replacing
from ..measured.reading import SCHEMA_VERSION, driver_says
from ..options import FiniteFloat, Place, WholeNumber
from .jobs import SIZES, WAYS, Job, jobs

_LOOKS: Final = ("validation", "previews", "hooks")
_LEAST: Final = 5.0  # seconds that have to be left for a job to begin

_SAME: Final = ("system", "python", "torch", "cuda", "driver", "sidestep-plugin", "commit", "acestep_commit")
"""Versions that must be the same to add to a file that is there."""


_ABOUT: Final = ("what", "size", "song_seconds", "rank", "adapter", "way")
"""Keys that tell what an entry is about: a newer entry about the same replaces the older one."""


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--acestep-root", type=Place(path_type=Path), metavar="DIR", help="ACE-Step's folder.  [default: .]")
@click.option(
    "--size",
    "sizes",
    type=click.Choice(list(SIZES)),
    multiple=True,
    default=("2b",),
    show_default=True,
    help="Size of the model, with random weights. May be repeated.",
)
@click.option("--budget", type=FiniteFloat(1, 86_400), default=600.0, show_default=True, help="Seconds in all.")
@click.option("--out", type=Place(path_type=Path), default="gpu_report.json", show_default=True, help="The file.")
@click.option(
    "--song-seconds",
    "lengths",
    type=FiniteFloat(1, 3600),
    multiple=True,
    default=(180.0, 60.0),
    show_default=True,
    help="Length of the songs. May be repeated.",
)
@click.option("--rank", type=WholeNumber(1, 4096), default=64, show_default=True, help="Of the adapters.")
@click.option("--songs", type=WholeNumber(4, 1000), default=8, show_default=True, help="Songs; two epochs of them.")
@click.option("--only", type=click.Choice([*WAYS, *_LOOKS]), multiple=True, help="Measure this alone. May be repeated.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True, help="cpu: a dry run.")
@click.option("--job", hidden=True, type=Place(path_type=Path))
def main(
    acestep_root: Path | None,
    sizes: tuple[str, ...],
    budget: float,
    out: Path,
    lengths: tuple[float, ...],
    rank: int,
    songs: int,
    only: tuple[str, ...],
    device: str,
    job: Path | None,
) -> None:
    """Measure what trainings take on this machine's GPU: seconds per step and memory, with and without the plugin.

    Models have random weights, which cost what real ones cost; nothing is downloaded. A file that is there already is
    added to, if it is of the same card and the same versions.

    \b
    Examples, in ACE-Step's folder and its Python environment:
        python -m sidestep_plugin.gpu_report --size 2b --size xl --budget 900
        python -m sidestep_plugin.gpu_report --size tiny --device cpu      (a dry run)
    """
    if job is not None:
        _one(job)
        return
    try:
        if device == "cpu" and set(sizes) != {"tiny"}:
            raise Refusal("--device cpu is a dry run, which says nothing about a GPU. Use it with --size tiny alone.")
        root = _root(acestep_root, sizes)
        before = _there(out)
    except Refusal as refusal:
        raise click.UsageError(str(refusal)) from None
    listed = jobs(sizes, lengths, only, rank=rank, songs=songs, device=device, root=root, xl_config=_xl_config(root))
    report = Report(out, before, _outer_versions(root), device)
    try:
        _measure_all(list(listed), report, budget)
    except Refusal as refusal:
        raise click.ClickException(str(refusal)) from None
    except KeyboardInterrupt:
        report.write()
        click.echo(f"Stopped. What was measured until then is in {out}.")
        sys.exit(130)
    if not report.measured:
        raise click.ClickException(f"Nothing was measured. {out} says why.")


class Report:
    """What was measured so far, and its file, which is written after every job.

    `before` is what an earlier report on the same card has left there; `versions` are those of what the measuring
    processes do not know.
    """

    def __init__(self, out: Path, before: dict[str, Any] | None, versions: dict[str, str | None], device: str) -> None:
        self._out, self._versions = out, versions
        self.measured = 0
        self.content: dict[str, Any] = before or {
            "schema_version": SCHEMA_VERSION,
            "device": device,
            "card": None,
            "versions": {},
            "measured_on": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "trainings": [],
            "others": [],
            "not_measured": [],
        }

    def add(self, job: Job, found: dict[str, Any]) -> str:
        """Add what was found. Returns it in a few words. Raises Refusal for another card or other versions."""
        card, versions = found.pop("card"), found.pop("versions") | self._versions
        self._check_same(card, versions)
        self.content |= {"card": card, "versions": versions}
        self.measured += 1
        self._forget(job)
        place = "trainings" if job.kind == "training" else "others"
        others = [entry for entry in self.content[place] if any(entry.get(key) != found.get(key) for key in _ABOUT)]
        self.content[place] = [*others, found]
        self.write()
        return _in_words(job, found)

    def lack(self, job: Job, why: str) -> None:
        """Note that a job was not measured, and why."""
        self._forget(job)
        self.content["not_measured"].append({"what": job.name, "why": why})
        self.write()

    def write(self) -> None:
        text = json.dumps(self.content, indent=1, ensure_ascii=False) + "\n"
        with replacing(self._out) as file:
            file.write(text.encode("utf-8"))

    def _forget(self, job: Job) -> None:
        lacking = self.content["not_measured"]
        self.content["not_measured"] = [entry for entry in lacking if entry["what"] != job.name]

    def _check_same(self, card: dict[str, Any], versions: dict[str, str | None]) -> None:
        there = self.content["card"]
        if there is None:
            return
        differs = [name for name in _SAME if self.content["versions"].get(name) != versions.get(name)]
        if there["name"] != card["name"] or differs:
            how = f"on {there['name']}" if there["name"] != card["name"] else f"with another {differs[0]}"
            raise Refusal(f"{self._out} was measured {how}. Choose another --out, or delete it.")


def _measure_all(listed: Sequence[Job], report: Report, budget: float) -> None:
    """Measure within the budget. Raises Refusal when nothing can be added to the file."""
    ends = time.monotonic() + budget
    for number, job in enumerate(listed, start=1):
        left = ends - time.monotonic()
        if left < _LEAST:
            for late in listed[number - 1 :]:
                report.lack(late, f"no time left of --budget {budget:g}")
            click.echo(f"Out of time: {len(listed) - number + 1} of {len(listed)} not measured.")
            return
        click.echo(f"[{number}/{len(listed)}] {job.name} ... ", nl=False)
        found, why = _apart(job, left)
        if found is None:
            report.lack(job, why)
            click.echo(f"not measured: {why}")
        else:
            click.echo(report.add(job, found))


def _apart(job: Job, seconds: float) -> tuple[dict[str, Any] | None, str]:
    """Measure a job in a process of its own. Returns what was found, or None and why not."""
    with tempfile.TemporaryDirectory(prefix="gpu-report-", ignore_cleanup_errors=True) as temporary:
        file = Path(temporary) / "job.json"
        file.write_text(json.dumps(asdict(job)), encoding="utf-8")
        line = [sys.executable, "-W", "ignore", "-m", "sidestep_plugin.gpu_report", "--job", str(file)]
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        try:
            done = subprocess.run(line, timeout=seconds, errors="replace", **pipes)
        except subprocess.TimeoutExpired:
            return None, "the time of --budget was over before it was done"
        try:
            answer = read_json_object(file.with_name("found.json"))
        except (OSError, ValueError):
            told = [text for text in done.stderr.splitlines() if text.strip()] or [f"exit code {done.returncode}"]
            return None, told[-1].strip()[:300]
    return (answer["found"], "") if "found" in answer else (None, str(answer["why"])[:300])


def _one(file: Path) -> None:
    """Measure the job that a file describes, in this process, and write what was found beside it."""
    from .measuring import measure

    try:
        answer: dict[str, Any] = {"found": measure(Job(**json.loads(file.read_text(encoding="utf-8"))))}
    except Exception as error:  # whatever it is, the report says it and goes on
        answer = {"why": str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"}
    file.with_name("found.json").write_text(json.dumps(answer), encoding="utf-8")


def _root(said: Path | None, sizes: Iterable[str]) -> str:
    """The checkout's folder; "" for the miniature, which stands in for a tiny model. Raises Refusal."""
    from ..engine.checkout import find_root

    try:
        return str(find_root(said).resolve())
    except Refusal:
        if said is None and set(sizes) == {"tiny"}:
            return ""
        raise


def _xl_config(root: str) -> str:
    """The config.json of an XL model on this machine; "" without one."""
    from ..engine.models import checkpoint_folder, find_model

    try:
        return str(find_model("xl-base", checkpoint_folder(None, Path(root))) / "config.json") if root else ""
    except Refusal:
        return ""


def _there(out: Path) -> dict[str, Any] | None:
    """What an earlier report left in the file. Raises Refusal when it is something else."""
    if not out.exists():
        return None
    try:
        content = read_json_object(out)
    except (OSError, ValueError) as error:
        raise Refusal(f"{out} cannot be added to: {error}. Choose another --out, or delete it.") from None
    if content.get("schema_version") != SCHEMA_VERSION or "trainings" not in content:
        raise Refusal(f"{out} is no report of this version. Choose another --out, or delete it.")
    return content


def _outer_versions(root: str) -> dict[str, str | None]:
    """The driver's version, and the commits of this package and of ACE-Step where they are git checkouts."""
    driver = driver_says("driver_version")
    return {
        "driver": driver[0] if driver else None,
        "commit": _commit(Path(__file__).parent),
        "acestep_commit": _commit(Path(root)) if root else None,
    }


def _commit(folder: Path) -> str | None:
    """The commit of a git checkout, with "+" where tracked files were changed; None for any other folder."""
    line = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _in_words(job: Job, found: dict[str, Any]) -> str:
    if job.kind == "hooks":
        return f"{found['microseconds_added']:.0f} µs added to {found['microseconds_without']:.0f}"
    memory = f", peak {found['peak_allocated_bytes'] / 2**30:.1f} GiB" if found["peak_allocated_bytes"] else ""
    if job.kind == "previews":
        return f"{found['clips_per_minute']:.1f} clips of {found['clip_seconds']:g} s per minute{memory}"
    if job.kind == "validation":
        return f"{found['seconds']:.2f} s, as {found['in_steps']:.1f} steps{memory}"
    estimate = found["estimate_bytes"]
    told = f" (estimate {estimate / 2**30:.1f})" if memory and estimate else ""
    return f"{found['seconds_per_step']:.3g} s per step{memory}{told}"


if __name__ == "__main__":
    main(prog_name="python -m sidestep_plugin.gpu_report")
