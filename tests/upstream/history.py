"""Runs the whole job on every version of upstream's trainer in the given histories, and records what happened.

    python tests/upstream/history.py --repo DIR [--repo DIR ...] --checkpoints DIR --tensors DIR --out versions.json

DIR after --repo is a clone of ACE-Step 1.5 or of a fork; --checkpoints holds acestep-v15-base and acestep-v15-turbo
(small random models of the real code will do, training is on the CPU), --tensors songs that were preprocessed for them.
--stubs is a folder for importable stand-ins of what upstream imports and training never calls (torchaudio).

For every version and kind of adapter: base and turbo through the command line, and turbo by upstream alone. Verdicts:

    trains right     base got continuous timesteps of the model's own law and dropped conditions, turbo is upstream's
                     own training bit for bit, every saved adapter says what it is, and the weights moved
    refused          stopped before anything was written, with the reason
    upstream fails   training failed, and fails the same way without any code of this project
    no LoKr          this version trains no LoKr adapters, and a training of one is refused
    WRONG            anything else; the command's exit code is then 1
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from checkouts import Checkout, extract_versions

from sidestep_plugin.timesteps.schedule import inference_timesteps, max_of_two_logit_normal_cdf

TO_GENERATE = {"base": (1.0, 50), "turbo": (3.0, 8)}
CFG_RATIO = 0.5  # high, so that every version shows it within few rows
EPOCHS = 30
SECONDS = 300
CHECKOUT = "CHECKOUT"  # stands for the version's folder in recorded messages

Report = dict[str, Any]


class Runner:
    """Runs one job at a time in a process of its own, in a scratch folder of its own."""

    def __init__(self, options: argparse.Namespace, scratch: Path, checkout: Checkout) -> None:
        self.options = options
        self.checkout = checkout
        self.folder = scratch / checkout.root.name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        # Without manifest.json: what its entries are relative to has changed over time.
        self.tensors = self.folder / "tensors"
        self.tensors.mkdir()
        for song in options.tensors.glob("*.pt"):
            shutil.copy(song, self.tensors)

    def plugin(self, kind: str, model: str) -> Report:
        """Train through the command line, started in a folder that holds neither songs nor output."""
        arguments = {
            "--plugin": "sidestep",
            "--acestep-root": self.checkout.root,
            "--checkpoint-dir": self.options.checkpoints,
            "--model": model,
            "--dataset-dir": self.tensors,
            "--output-dir": self.folder / f"{kind}-{model}",
            "--adapter-type": kind,
            "--epochs": EPOCHS,
            "--batch-size": 2,
            "--gradient-accumulation": 1,
            "--rank": 4,
            "--alpha": 8,
            "--learning-rate": 1e-3,
            "--warmup-steps": 1,
            "--save-every": EPOCHS // 2,
            "--seed": 7,
            "--device": "cpu",
        }
        if kind == "lora":
            arguments["--dropout"] = 0
        if model == "base":
            arguments["--cfg-ratio"] = CFG_RATIO
        return self._run(
            f"{kind}-{model}", ["plugin", *(str(word) for pair in arguments.items() for word in pair)], "elsewhere"
        )

    def alone(self, kind: str, model: str) -> Report:
        """Train without any code of this project, started where upstream's path guard accepts every path."""
        output = self.folder / f"{kind}-{model}-alone"
        training = {
            "max_epochs": EPOCHS,
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "warmup_steps": 1,
            "save_every_n_epochs": EPOCHS // 2,
            "seed": 7,
            "num_workers": 0,
            "pin_memory": False,
            "persistent_workers": False,
            "mixed_precision": "fp32",
            "output_dir": str(output),
        }
        lora = {"r": 4, "alpha": 8, "dropout": 0.0}
        job = {
            "adapter_type": kind,
            "adapter": lora if kind == "lora" else {"linear_dim": 4, "linear_alpha": 8},
            "training": training,
            "model": str(self.options.checkpoints / f"acestep-v15-{model}"),
            "tensors": str(self.tensors),
            "output": str(output),
            "compare": str(self.folder / f"{kind}-{model}"),
        }
        return self._run(f"{kind}-{model}-alone", ["alone", json.dumps(job)], ".", str(self.checkout.root))

    def _run(self, name: str, arguments: list[str], cwd: str, *more_paths: str) -> Report:
        report, where = self.folder / f"{name}.json", self.folder / cwd
        where.mkdir(exist_ok=True)
        stubs = [str(self.options.stubs)] if self.options.stubs else []
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*more_paths, *stubs]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(self.folder / "hf-modules"),
        }
        worker = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("one_job.py")), str(report)]
        try:
            done = subprocess.run(
                worker + arguments, cwd=where, env=environment, capture_output=True, timeout=SECONDS, check=False
            )
            output, errors = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        except subprocess.TimeoutExpired:
            output, errors = "", f"Error: not finished after {SECONDS} seconds"
        (self.folder / f"{name}.log").write_text(f"{output}\n--- stderr\n{errors}", encoding="utf-8")
        found: Report = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {"exit": "crashed"}
        found["message"] = self._neutral(re.split(r"^Error: ", errors, flags=re.MULTILINE)[-1])
        if found.get("error"):
            found["error"] = self._neutral(found["error"])
        return found

    def _neutral(self, text: str) -> str:
        return " ".join(text.replace(str(self.checkout.root), CHECKOUT).split())


def problems_of(report: Report, variant: str) -> list[str]:
    """What is wrong with a training that says it succeeded; [] when it did what its variant asks for."""
    steps = report["steps"]
    if not steps or any(step["decoder_calls"] != 1 for step in steps):
        return ["the decoder was not seen exactly once in every step"]
    problems = []

    def expect(holds: bool, otherwise: str) -> None:
        if not holds:
            problems.append(otherwise)

    t, null, turbo = timesteps(report), total(report, "null_rows"), total(report, "turbo_rows")
    expect(all(step["decoder_sees_t"] for step in steps), "the decoder saw other timesteps than were sampled")
    expect(all(step["r_is_t"] for step in steps), "timestep_r differs from timestep")
    expect(total(report, "strange_rows") == 0, "the decoder saw conditions of no song")
    worst = max(step["loss_off_by"] for step in steps)
    expect(worst < 0.02, f"a loss is {worst:.0%} away from that of its own timestep")
    if variant == "base":
        distance, limit = law_distance(t), 2.2 / len(t) ** 0.5  # exceeded by chance once in 8,000
        chance = most_turbo_by_chance(len(t), steps[0]["resolution"])
        expect(all(0.0 < value < 1.0 for value in t), "a timestep is not inside (0, 1)")
        expect(all(step["from_plugin"] for step in steps), "timesteps were not sampled by the plugin")
        expect(distance < limit, f"timesteps do not follow the model's law (distance {distance:.2f})")
        expect(turbo <= chance, f"{turbo} of {len(t)} timesteps are turbo's")
        expect(abs(null / len(t) - CFG_RATIO) < 0.15, f"{null} of {len(t)} rows lost their condition")
    else:
        expect(turbo == len(t), f"{len(t) - turbo} of {len(t)} timesteps are not turbo's")
        expect(len(set(t)) == 8, f"{len(set(t))} different timesteps, expected 8")
        expect(null == 0, f"{null} rows lost their condition")
    adapters = report["adapters"]
    expect(len(adapters) >= 2, f"{len(adapters)} adapters were saved, expected checkpoints and the final one")
    for adapter in adapters:
        facts = adapter["config"] or {}
        said = facts.get("model_variant"), (facts.get("shift"), facts.get("num_inference_steps"))
        expect(said == (variant, TO_GENERATE[variant]), f"{adapter['file']} says {said}")
        expect(0 < adapter["learned"] == adapter["tensors"], f"{adapter['file']}: weights did not move")
    return problems


def timesteps(report: Report) -> list[float]:
    return [value for step in report["steps"] for value in step["t"]]


def total(report: Report, what: str) -> int:
    return sum(int(step[what]) for step in report["steps"])


def law_distance(t: list[float]) -> float:
    """Largest distance between the distribution of t and the law of base (Kolmogorov–Smirnov)."""
    expected = [max_of_two_logit_normal_cdf(value, -0.4, 1.0) for value in sorted(t)]
    return max(max(p - i / len(t), (i + 1) / len(t) - p) for i, p in enumerate(expected))


def most_turbo_by_chance(count: int, resolution: float) -> float:
    """How many of `count` continuous timesteps may be turbo's by chance (mean and five standard deviations).

    Types with a coarse resolution (bf16: the first versions) have few values between 0 and 1, so that some coincide.
    """
    p = 0.0
    for value in inference_timesteps(3.0, 8):
        half = resolution * 2.0 ** math.floor(math.log2(value)) / 2.0
        p += max_of_two_logit_normal_cdf(value + half, -0.4, 1.0) - max_of_two_logit_normal_cdf(value - half, -0.4, 1.0)
    return count * p + 5.0 * (count * p) ** 0.5


def verdict(runner: Runner, kind: str) -> dict[str, str]:
    """Train one kind of adapter with one version and judge what happened."""
    if kind == "lokr" and not runner.checkout.has_lokr:
        asked = runner.plugin(kind, "base")
        refused = asked["exit"] == 2 and not asked["wrote"]
        return {"verdict": "no LoKr" if refused else "WRONG", "reason": asked["message"]}
    base, turbo, alone = runner.plugin(kind, "base"), runner.plugin(kind, "turbo"), runner.alone(kind, "turbo")
    reports = {"base": base, "turbo": turbo}
    exits = {report["exit"] for report in reports.values()}
    same = base["message"] == turbo["message"]
    without = f"fails: {alone['error']}" if alone["error"] else "trains"
    if exits == {2} and same and not base["wrote"] and not turbo["wrote"]:
        return {"verdict": "refused", "reason": base["message"], "upstream_alone": without}
    if exits == {1} and same and base["message"].removeprefix("ACE-Step: ") == alone["error"]:
        return {"verdict": "upstream fails", "reason": alone["error"]}
    if exits == {0}:
        wrong = [f"{name}: {problem}" for name, report in reports.items() for problem in problems_of(report, name)]
        if not alone["same_as_plugin"]:
            wrong.append(f"turbo: not the adapter that upstream makes alone (it {without})")
        return {"verdict": "WRONG", "reason": "; ".join(wrong)} if wrong else right(base, turbo)
    said = "; ".join(f"{name}: exit {report['exit']}, {report['message']}" for name, report in reports.items())
    return {"verdict": "WRONG", "reason": f"{said}; upstream alone {without}"}


def right(base: Report, turbo: Report) -> dict[str, str]:
    t = timesteps(base)
    found = (
        f"base: {len(t)} t in [{min(t):.3f}, {max(t):.3f}], distance to the law {law_distance(t):.3f}, "
        f"{total(base, 'turbo_rows')} of them turbo's, {total(base, 'null_rows')} rows without condition; "
        f"turbo: {len(timesteps(turbo))} t, all turbo's, adapter equal to upstream's own"
    )
    return {"verdict": "trains right", "reason": found}


def row(options: argparse.Namespace, scratch: Path, checkout: Checkout) -> dict[str, Any]:
    runner = Runner(options, scratch, checkout)
    result: dict[str, Any] = {
        "version": checkout.blob[:10],
        "date": checkout.date,
        "repo": checkout.repo,
        "commit": checkout.commit[:10],
        "lines": checkout.lines,
        "sampler": checkout.sampler,
        **{kind: verdict(runner, kind) for kind in ("lora", "lokr")},
    }
    if not options.work:
        shutil.rmtree(runner.folder)
    print(f"{checkout.root.name}  LoRA {result['lora']['verdict']:<14}  LoKr {result['lokr']['verdict']}", flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, action="append", required=True, help="a git repository, repeatable")
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--tensors", type=Path, required=True)
    parser.add_argument("--stubs", type=Path)
    parser.add_argument("--work", type=Path, help="keep every version, output and log here [default: keep nothing]")
    parser.add_argument("--only", default="", metavar="TEXT", help="versions whose DATE-BLOB contains this")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="the table; rows of versions not run now are kept")
    options = parser.parse_args()
    for name in ("checkpoints", "tensors", "stubs", "work"):
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).resolve())

    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary).resolve()
        versions = [v for v in extract_versions(options.repo, work / "versions") if options.only in v.root.name]
        with ThreadPoolExecutor(options.jobs) as pool:
            rows = list(pool.map(lambda version: row(options, work / "runs", version), versions))

    kept = json.loads(options.out.read_text(encoding="utf-8")) if options.only and options.out.is_file() else []
    table = {entry["version"]: entry for entry in [*kept, *rows]}
    ordered = sorted(table.values(), key=lambda entry: (entry["date"], entry["version"]))
    options.out.write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    wrong = [(r, kind) for r in rows for kind in ("lora", "lokr") if r[kind]["verdict"] == "WRONG"]
    for entry, kind in wrong:
        print(f"WRONG: {entry['version']} {kind}: {entry[kind]['reason']}", file=sys.stderr)
    print(f"{len(rows)} versions, {len(wrong)} wrong verdicts, table in {options.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
