"""The same design on the real model: one command for somebody with ACE-Step's weights, a GPU and songs.

    python tests/experiments/effect/recipe.py --acestep-root CHECKOUT --model base \\
        --dataset-dir SONGS --held-out-dir HELD_OUT --out DIR [--seeds 5] [-- OPTIONS OF acestep-train]

It trains 4 adapters for each seed with ``acestep-train`` (8 steps or the model's law, with and without 15 % dropout),
compares them on the held-out songs with ``acestep-train compare``, and prints paired differences with intervals over
seeds. With ``--preview-songs K`` it also generates clips with ``acestep-train preview``. A stopped recipe goes on where
it was: what is finished is not done again. Nothing is sent anywhere.

Songs: 12 to 20 of one artist or style for SONGS, 8 others of the same for HELD_OUT, 1 to 3 minutes each, preprocessed
with ACE-Step. Repeat it with a style near to what the model plays anyway and one far from it. Public-domain and CC0
recordings (Musopen, the Open Goldberg Variations, CC0 works on the Free Music Archive) may be published with the
result. Time: 4 trainings a seed.

Does it matter how songs are encoded? Prepare the same audio twice: ``acestep-train prepare --conditions generated`` for
--dataset-dir, and ``--conditions upstream`` for ``--upstream-conditions-dir``. The plugin trains on both, and both are
compared on the held-out songs, whose conditions are as generated (line "padded - as generated").

With ``--kad-reference DIR``, a folder with WAV files of the held-out songs, the clips are compared with them by KAD
(Kernel Audio Distance) with two public encoders, because one encoder's taste is not evidence. It needs kadtk
(pip install kadtk, in an environment of its own, because it asks for an older torch) and its encoders, which kadtk
downloads by itself. Lower is nearer; with few clips it says little.

The seeds pair the initial adapter. Unlike in the toy, order and noise are not the same in all arms, because
``acestep-train`` draws them as ACE-Step does; expect wider intervals and use more seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-c", "from sidestep_plugin.cli import main; main()"]
"""``acestep-train``, also where it is not on the PATH."""

ENCODERS = ("clap-laion-music", "MERT-v1-95M-7")
"""Names that kadtk has for a public encoder of music and text, and for one of music alone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe | returns the exit code: 0, that of a training that failed, or 2 where `compare` is missing."""
    given = _parsed(sys.argv[1:] if arguments is None else arguments)
    if given.kad_reference is not None and (wrong := cannot_compute_kad(given)):
        print(f"Error: {wrong}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        for seed in range(given.seeds):
            for arm, options in arms(given.upstream_conditions_dir is not None).items():
                if code := train(given, arm, options, seed):
                    return code
        if "compare" not in run(["--help"], capture=True).stdout:
            print(
                f"The adapters are in {given.out}. This version of sidestep-plugin has no 'acestep-train compare', "
                "which measures them: install a newer one and repeat this command.",
                file=sys.stderr,
            )
            return 2
        values: dict[str, dict[tuple[int, str], list[float]]] = {}
        for seed in range(given.seeds):
            for arm, name, value in compare(given, seed):
                values.setdefault(name, {})[seed, arm] = [value]
        if given.kad_reference is not None:
            compute_kad(given)
        return show(given, values)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130


def arms(padded: bool = False) -> dict[str, list[str]]:
    """The options of ``acestep-train`` for each arm, by the names that the toy uses.

    Args:
        padded: whether the plugin's way is also trained on songs with upstream's conditions.
    """
    from effect.presets import ARMS, PADDED

    return {
        arm.name: ["--timestep-mode", arm.timestep_mode, "--cfg-ratio", str(arm.cfg_ratio), "--variant", "auto"]
        for arm in (*ARMS, *([PADDED] if padded else []))
    }


def songs_for(given: argparse.Namespace, arm: str) -> Path:
    """The folder of songs that an arm is trained on."""
    folder: Path = given.upstream_conditions_dir if arm.endswith("padded") else given.dataset_dir
    return folder


def adapter(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm.replace('+', '-')}-seed{seed}"


def train(given: argparse.Namespace, arm: str, options: Sequence[str], seed: int) -> int:
    """Train one adapter, unless it is there | returns the exit code."""
    folder = adapter(given.out, arm, seed)
    if (folder / "final").is_dir():
        return 0
    print(f"{folder.name}: training", flush=True)
    resume = ["--resume-from", "latest"] if (folder / "checkpoints").is_dir() else []
    return run(
        [
            *("train", "--plugin", "sidestep", *options, *where(given), "--dataset-dir", songs_for(given, arm)),
            *("--output-dir", folder, "--seed", seed, *resume, *given.training),
        ]
    ).returncode


def compare(given: argparse.Namespace, seed: int) -> Iterator[tuple[str, str, float]]:
    """Measure a seed's adapters on the held-out songs | yields (arm, measure, value)."""
    padded = given.upstream_conditions_dir is not None
    folders = {arm: adapter(given.out, arm, seed) for arm in arms(padded)}
    file = given.out / f"compared-seed{seed}.json"
    if not file.exists():
        print(f"seed {seed}: comparing", flush=True)
        done = run(
            ["compare", *folders.values(), *where(given), "--dataset-dir", given.held_out_dir, "--json"], capture=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        file.write_text(done.stdout, encoding="utf-8")
    yield from numbers(json.loads(file.read_text("utf-8")), folders)
    if given.preview_songs:
        for folder in folders.values():
            if not (folder / "previews").exists():
                songs = ["--dataset-dir", given.held_out_dir, "--songs", given.preview_songs]
                run(["preview", folder, *where(given), *songs])


def cannot_compute_kad(given: argparse.Namespace) -> str:
    """Why KAD cannot be computed, and what to do; "" if it can."""
    if not given.preview_songs:
        return "--kad-reference compares clips, and none are made. Add --preview-songs 8."
    if not any(given.kad_reference.glob("*.wav")):
        return f"No WAV files in {given.kad_reference}. Put those of the held-out songs there."
    if shutil.which(given.kadtk) is None:
        return f"No program {given.kadtk}. Install it (pip install kadtk), or say where it is: --kadtk PATH."
    return ""


def compute_kad(given: argparse.Namespace) -> None:
    """Let kadtk write a table for each encoder: a line for each folder of clips."""
    made = (
        row
        for seed in range(given.seeds)
        for arm in arms(given.upstream_conditions_dir is not None)
        for row in sorted((adapter(given.out, arm, seed) / "previews").glob("*/"))
    )
    rows = [row for row in made if row.name != "base_model" and any(row.glob("*.wav"))]
    if not rows:
        print("KAD: no clips were decoded, because the models' folder has no VAE.", file=sys.stderr)
    for encoder in ENCODERS:
        table = given.out / f"kad-{encoder}.csv"
        for row in rows:
            done = subprocess.run([given.kadtk, encoder, str(given.kad_reference), str(row), "--csv", str(table)])
            if done.returncode:
                print(f"KAD: {given.kadtk} failed for {row} with {encoder} (see above).", file=sys.stderr)
        if rows:
            print(f"KAD with {encoder}: {table}")


def numbers(compared: Mapping[str, Any], folders: Mapping[str, Path]) -> Iterator[tuple[str, str, float]]:
    """The losses of each adapter in what ``acestep-train compare --json`` prints, which is in the order asked for."""
    for arm, entry in zip(folders, compared["adapters"], strict=True):
        yield arm, "loss, as trained", float(entry["loss"])
        for key, name in (("loss_by_t", "with"), ("loss_by_t_without_condition", "without")):
            for t, loss in zip(compared["timesteps"], entry.get(key, ()), strict=False):
                yield arm, f"loss {name} condition at t {t:.2f}", float(loss)


def show(given: argparse.Namespace, values: Mapping[str, Mapping[tuple[int, str], Sequence[float]]]) -> int:
    """Print the differences between the arms, and write them to recipe.json."""
    from effect.intervals import CONTRASTS, contrast

    found = []
    for measure, by_arm in values.items():
        for name, weights in CONTRASTS.items():
            one = contrast(by_arm, weights)
            interval = None if math.isnan(one.low) else [one.low, one.high]
            said = (
                "no interval with fewer than 3 seeds" if interval is None else f"95 % {one.low:+.4g} to {one.high:+.4g}"
            )
            if name != "interaction":
                print(f"{measure}, {name}: {one.mean:+.4g}, {said}{'' if one.shown else ' (may be chance)'}")
            entry = {"measure": measure, "comparison": name, "mean": one.mean, "interval": interval}
            found.append(entry | {"shown": one.shown, "by_seed": list(one.seeds)})
    (given.out / "recipe.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def where(given: argparse.Namespace) -> list[Any]:
    """The options that say which model, for every command."""
    found: list[Any] = ["--model", given.model, "--acestep-root", given.acestep_root]
    if given.checkpoint_dir is not None:
        found += ["--checkpoint-dir", given.checkpoint_dir]
    return found


def run(arguments: Sequence[Any], *, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run ``acestep-train`` with these arguments."""
    return subprocess.run([*COMMAND, *map(str, arguments)], text=True, encoding="utf-8", capture_output=capture)


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tests/experiments/effect/recipe.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--acestep-root", type=Path, required=True, metavar="DIR", help="ACE-Step's checkout")
    parser.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="models. Default: the checkout's")
    parser.add_argument("--model", default="base", metavar="NAME", help="base or sft, or a folder")
    parser.add_argument("--dataset-dir", type=Path, required=True, metavar="DIR", help="preprocessed songs to train on")
    parser.add_argument(
        "--upstream-conditions-dir", type=Path, metavar="DIR", help="the songs of --dataset-dir, encoded ACE-Step's way"
    )
    parser.add_argument("--held-out-dir", type=Path, required=True, metavar="DIR", help="others, to compare on")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="at least 3 for intervals")
    parser.add_argument("--preview-songs", type=int, default=0, metavar="K", help="clips of each adapter")
    parser.add_argument("--kad-reference", type=Path, metavar="DIR", help="WAV files of the held-out songs, for KAD")
    parser.add_argument("--kadtk", default="kadtk", metavar="PATH", help="the program that computes KAD [kadtk]")
    parser.add_argument("training", nargs="*", help="after --: more options of acestep-train")
    return parser.parse_args(list(arguments))


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
