"""Killed at any moment, a save leaves whole files: the old ones, the new ones, never half of one.

Run by itself (``python tests/test_kills.py FOLDER [in-place]``) this file is the killing: it imports everything once,
and forks a child that saves again and again, kills it after a random time, looks at what is there, and begins anew.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

SAVES, KILLS = 200, 60
LEFT_OVER = (".saving", ".tmp")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")]


def damage(output):
    """Files that a program would open and that are not whole, and adapters that do not say what they are."""
    from safetensors import SafetensorError, safe_open

    found = []
    for file in sorted(output.rglob("*")):
        if any(part.startswith(".") and part.endswith(LEFT_OVER) for part in file.relative_to(output).parts):
            continue
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as weights:
                    if "sidestep.schema_version" not in weights.metadata():
                        raise ValueError("not described")
                    for name in weights.keys():  # noqa: SIM118
                        weights.get_tensor(name)
            elif file.name in ("training_config.json", "adapter_config.json"):
                json.loads(file.read_text(encoding="utf-8"))["rank" if "training" in file.name else "r"]
            elif file.suffix == ".pt":
                zipfile.ZipFile(file).close()
        except (SafetensorError, ValueError, KeyError, zipfile.BadZipFile) as error:
            found.append(f"{file.relative_to(output)}: {error}")
    return found


# -- the killing -----------------------------------------------------------------------------------------------------


def real_saves(work):
    """Every way in which upstream saves an adapter, with the plugin attached: functions that take a folder."""
    import torch

    from sidestep_plugin import attach, miniature
    from sidestep_plugin.engine.checkout import import_trainer
    from sidestep_plugin.engine.models import find_model, load_model

    torch.set_num_threads(1)
    built = miniature.build(work / "miniature", models=["acestep-v15-base"], songs=1)
    (work / "output").mkdir(exist_ok=True)
    os.chdir(work)  # upstream's path guard accepts what lies under the directory that it was imported in
    trainer = import_trainer(built.root)
    attach(trainer, options={"export": "comfyui"}, announce=lambda line: None)
    batch = torch.load(built.tensors / "song_01.pt", weights_only=True)
    batch = {name: value[None] for name, value in batch.items() if isinstance(value, torch.Tensor)}
    modules = {}
    for kind, config in (("LoRA", trainer.LoRAConfig(r=4, alpha=8)), ("LoKR", trainer.LoKRConfig(linear_dim=4))):
        handler = load_model(find_model("base", built.checkpoints), torch.device("cpu"))
        make = getattr(trainer, f"Preprocessed{kind}Module")
        modules[kind] = make(handler.model, config, trainer.TrainingConfig(), handler.device, handler.dtype)
        modules[kind].training_step(batch)  # begins a run
    model, network = modules["LoRA"].model, modules["LoKR"].lycoris_net
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(10_000))])
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    about = {"training_config": {"shift": 3.0}}
    state = (optimizer, scheduler, 1, 2)
    return {
        "lora": lambda folder: trainer.save_lora_weights(model, folder),
        "lora-checkpoint": lambda folder: trainer.save_training_checkpoint(model, *state, folder),
        "lokr": lambda folder: trainer.save_lokr_weights(network, folder),
        "lokr-checkpoint": lambda folder: trainer.save_lokr_training_checkpoint(
            network, *state, folder, modules["LoKR"].lokr_config, about
        ),
    }


def in_place(work):
    """What a save must not be: it opens the file and fills it."""
    (work / "output").mkdir(exist_ok=True)
    text = json.dumps({"rank": list(range(1000))}).encode()

    def save(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with (Path(folder) / "training_config.json").open("wb") as stream:
            stream.write(text[:1000])
            stream.flush()
            time.sleep(0.01)
            stream.write(text[1000:])

    return {"in-place": save}


def save_for_ever(ways, output, numbers, report):
    """Over the same folders again and again, and every other time into a new one."""
    for number in numbers:
        name = sorted(ways)[number % len(ways)]
        new = (number // len(ways)) % 2
        ways[name](str(output / (f"epochs/{name}-{number}" if new else name)))
        os.write(report, b".")


def main(work, make):
    ways, output = make(work), work / "output"
    began = time.monotonic()
    for way in ways:
        ways[way](str(output / way))
    usual = (time.monotonic() - began) / len(ways)
    draw, counts = random.Random(5), {"saves": 0, "kills": 0, "damage": []}
    while counts["kills"] < KILLS or counts["saves"] + counts["kills"] < SAVES:
        told, report = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(ways, output, itertools.count(1000 * counts["kills"] + draw.randrange(8)), report)
            finally:
                os._exit(1)
        os.close(report)
        time.sleep(draw.uniform(0, 5 * usual))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit("the child ended by itself: a save failed")
        while piece := os.read(told, 1000):
            counts["saves"] += len(piece)
        os.close(told)
        counts["kills"] += 1
        counts["damage"] += damage(output)
    counts["left over"] = sum(place.name.endswith(LEFT_OVER) for place in output.rglob(".*"))
    for way in ways:  # what was left lying stands in nobody's way
        ways[way](str(output / way))
    counts["damage at the end"] = damage(output)
    print(json.dumps(counts))


# -- the tests -------------------------------------------------------------------------------------------------------


def killed(work, *words):
    line = [sys.executable, __file__, str(work), *words]
    done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", env=os.environ | {"PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_saves_leave_whole_files(checkout, require_kind, tmp_path):
    if checkout.real:
        pytest.skip("upstream's versions name these functions and their arguments in their own ways")
    require_kind("lokr")
    counts = killed(tmp_path)
    print(f"{counts['saves']} saves, {counts['kills']} kills, {counts['left over']} folders and files left over")
    assert counts["damage"] == [] == counts["damage at the end"]
    assert counts["kills"] >= KILLS and counts["saves"] + counts["kills"] >= SAVES
    assert counts["left over"] >= 10, "hardly a kill came while something was being written"


def test_the_same_kills_damage_what_is_written_in_place(tmp_path):
    counts = killed(tmp_path, "in-place")
    assert counts["kills"] >= KILLS and len(counts["damage"]) > 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), in_place if "in-place" in sys.argv[2:] else real_saves)
