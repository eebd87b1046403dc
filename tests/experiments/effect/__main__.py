"""Does it help to train base and sft adapters at the model's own timesteps and with condition dropout?

    python tests/experiments/effect --preset cpu --out DIR --acestep-root CHECKOUT

A small model of ACE-Step's real architecture is trained from scratch on synthetic songs, on its own objective, until it
generates its own domain (``judge.py``). Then LoRAs are trained on songs of new domains by ACE-Step's own trainer with
this plugin attached, in four ways: {ACE-Step's eight steps, the model's law} x {no condition dropout, 15 %}, for near
and far domains, few and many songs, two lengths of training, and several seeds. Cells of one seed are paired. What is
measured is in ``measures.py``, the statistics are in ``intervals.py``. Without ``--acestep-root`` the miniature stands
in for ACE-Step, which shows only that everything runs. Ctrl-C loses at most the cell that is running; the same command
goes on. DIR then holds ``tables.md``, ``effect.png`` and ``result.json`` with every number, seed and version.

The predictions below were written before the first full run, and are kept as they are. "Plugin" is the law with
dropout, "ACE-Step" the eight steps without; "shown" means that the 95 % interval over seeds excludes zero, with all
domains and numbers of songs together, at the longest training. What was known: an earlier toy whose base model could
not generate (in it the plugin's loss was lower and its samples at guidance 1 were farther away), and pilot trainings of
ACE-Step's arm alone with seed 90, which is not among the experiment's, to choose the learning rate: 0.01 was better for
that arm than 0.001 and 0.003, in loss and in distance.

1. Held-out loss, weighted by the model's law, with the condition: lower with the plugin than with ACE-Step, shown. By
   t: lower below about 0.8, higher above 0.95.
2. The same without the condition: lower with the plugin, shown, by more than in 1; dropout causes most of it.
3. Distance of songs generated at guidance 1: NOT better with the law. Expected direction: slightly farther, because
   the law hardly trains t above 0.95, where a generation decides what it will be.
4. Distance at guidance 3: better with dropout than without, shown, because guidance subtracts the null pass.
5. The adapter off on the null pass (guidance 3): worse than its own null pass when it was trained with dropout.
6. The old domain: no difference of its distance at guidance 1 between the plugin and ACE-Step will be shown.
7. 8 songs against 48: differences in loss are larger with 8 songs, where the eight steps overfit at high t.

Added after the first run (``--preset cpu``), before that of ``--preset cpu-apg``, which generates with ACE-Step's own
guidance (APG) instead of plain guidance, from the same adapters, and trains a fifth way: 30 % of t from 0.9 to 1.

8. With APG, distances at guidance 3, 5 and 7 are still better with dropout, shown, but by less than with plain
   guidance.
9. 30 % high t against the plugin: loss lower at t 0.97, shown; law-weighted loss slightly higher; distance at guidance
   1 without a difference that is shown.

Added before ``--preset cpu-conditions`` was ever run. It trains the plugin's way twice: on conditions as generations
have them, and padded and without their first token, as ACE-Step's preprocessing encodes songs (8 rows of padding for 3
that say something; there it is 256 + 512 rows, mostly padding). Both are measured on conditions as generated. Whether
ACE-Step's own models were trained on padded conditions is unknown; this base model was not.

10. Loss with the condition: higher with padded conditions, shown, by less than dropout's share in 2 (the adapter learns
    part of its domain behind rows that are missing when it is used).
11. Distance at guidance 1 and 3: larger with padded conditions, shown at one of the two at least.
12. Loss without the condition: no difference that is shown, since the null condition is the same rows in both.
13. All of it is smaller with 48 songs than with 8, or equal: not a matter of the number of songs.

What would count against conditions as generated: a loss or a distance that is shown to be larger with them.

Added before ``--preset cpu-average`` was ever run. It trains the plugin's way once for each domain, number of songs and
seed, and measures the adapter as it is and means of it over its steps so far, in which step k counts as k**p: p = 18,
4 and 2 are as old on average as the plain mean of the last tenth, third and half. It does so after 60 of 120 steps,
where the learning rate has fallen to half, and at the end, where it is zero. The means are those of each factor (of A
and of B), and for the third also the exact mean of B A, cut back to the rank. What was known: on this toy, with 8 songs
and 400 steps, the mean of the last four checkpoints (each of A and of B) had a loss 5 % lower at half the rate, lower
in 10 of 10 trainings, and 0.5 % lower at the end; exact means were the same. Generation was not measured.

14. Loss with the condition after 60 steps: lower with the mean over a third than without, shown, by 2 to 7 %.
15. The same at the end: lower by at most 2 %.
16. After 60 steps the wider mean is the better one: a third better than a tenth, and a half no worse than a third.
17. Distance at guidance 1 and 3 after 60 steps: smaller with the mean over a third, shown at one of the two at least.
    At the end no difference is shown.
18. The mean of the factors and the exact mean differ in loss by less than 0.5 %, at both places.
19. The gain in loss after 60 steps is there with 8 and with 48 songs, near and far, and no difference between them is
    shown.

What would count against averaging: a loss or a distance that is shown to be larger with the mean over a third, at
either place. It is on by default in the product only if 14 holds and nothing counts against it.

What would count against the plugin: a distance at guidance 1 or 3 that is shown to be larger with it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment | returns the exit code: 0 done, 2 unusable settings, 130 stopped (nothing is lost)."""
    from effect import experiment, figure, report
    from effect.presets import PRESETS
    from sidestep_plugin import Refusal

    parser = argparse.ArgumentParser(
        prog="python tests/experiments/effect",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset", choices=[*PRESETS], default="cpu", help="sizes: cpu takes about an hour of one core"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything; to go on, again")
    parser.add_argument("--acestep-root", type=Path, metavar="DIR", help="ACE-Step checkout. Default: the miniature")
    parser.add_argument("--report-only", action="store_true", help="only tables and figure, from the finished cells")
    given = parser.parse_args(arguments)
    out, root = given.out.absolute(), given.acestep_root and given.acestep_root.absolute()
    try:
        if not given.report_only:
            experiment.run(PRESETS[given.preset], out, root, lambda line: print(line, flush=True))
        experiment.write_json(out / "result.json", report.result(out))
        (out / "tables.md").write_text(report.tables(out), encoding="utf-8")
        figure.draw(out, out / "effect.png")
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    print(f"{out / 'tables.md'}, {out / 'effect.png'} and {out / 'result.json'}")
    return 0


if __name__ == "__main__":
    # The folder of this file must not be searched for modules: its names are the package's own.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT would ask for the base model's name
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.exit(main())
