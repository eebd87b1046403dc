import csv
from pathlib import Path

import acestep_loss_bands

from sidestep_plugin import miniature
from sidestep_plugin.launch.launch import Request, prepare


def test_every_step_is_in_one_band(tmp_path):
    built = miniature.build(tmp_path)
    request = Request(
        model="base",
        dataset_dir=built.tensors,
        output_dir=tmp_path / "output",
        acestep_root=built.root,
        settings={"epochs": 2, "batch_size": 2},
        device="cpu",
    )
    launch = prepare(request, say=print, extra_plugins=lambda: {"loss-bands": acestep_loss_bands})
    with launch.attachment:
        for _ in launch.messages():
            pass
    table = Path(launch.final_adapter) / "loss_by_timestep.csv"
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["steps"]) for row in rows) == launch.total_steps
