"""Does it help to train base and sft adapters at the model's own timesteps and with condition dropout?

    python tests/experiments/effect --preset cpu --out DIR --acestep-root CHECKOUT

DRAFT
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
    parser.add_argument("--preset", choices=[*PRESETS], default="cpu", help="sizes: cpu takes about an hour of one core")
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
