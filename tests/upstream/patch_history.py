"""Applies the patch to every version of upstream's trainer in the given histories, imports it, and takes it out again.

    python tests/upstream/patch_history.py --repo DIR [--repo DIR ...] --out patches.json [--stubs DIR]

DIR after --repo is a clone of ACE-Step 1.5 or of a fork; --stubs is a folder for importable stand-ins of what upstream
imports and training never calls (torchaudio). For every version: git applies and reverts it; ``acestep-train patch``
does, with LF and with CRLF line ends, leaving every byte; and in a process of its own the trainer is imported,

    attached     the plugin is around its names; without the plugin's package and with ACESTEP_PLUGINS empty they are
                 upstream's own
    stopped      the plugin does not fit this version: a training ends at once with the reason
    no import    the trainer cannot be imported, and cannot without the patch either

Anything else is WRONG, and the command's exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from checkouts import extract_versions

from sidestep_plugin.engine import checkout_patch as patching

JOB = """
import json, sys
if "hide" in sys.argv:
    sys.modules["sidestep_plugin"] = None
try:
    import acestep.training.trainer as trainer
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
    raise SystemExit
attached = sys.modules.get("sidestep_plugin.engine.attachment")
train = trainer.LoRATrainer.train_from_preprocessed
blocked = train.__module__ == "sidestep_plugin.engine.attachment" and not hasattr(train, "__wrapped__")
print(json.dumps({
    "plugins": [one.registry.names for one in attached._attached] if attached else [],
    "wrapped": hasattr(train, "__wrapped__"),
    "blocked": list(train(None, ""))[0][2] if blocked else None,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stubs", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for checkout in extract_versions(options.repo, Path(scratch)):
            row = {"version": checkout.blob[:10], "date": checkout.date} | judged(checkout.root, options.stubs)
            print(row["date"], row["version"], row["verdict"], row.get("reason", ""), flush=True)
            rows.append(row)
    rows.sort(key=lambda row: (row["date"], row["version"]))
    options.out.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    print(Counter(row["verdict"] for row in rows))
    sys.exit(any(row["verdict"] == "WRONG" for row in rows))


def judged(root: Path, stubs: Path | None) -> dict[str, Any]:
    file = root / patching.TARGET
    original = file.read_bytes()
    alone = imported(root, stubs)

    for content in (original, original.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")):
        file.write_bytes(content)
        if not (patching.apply(root) and patching.revert(root)) or file.read_bytes() != content:
            return {"verdict": "WRONG", "reason": "acestep-train patch does not leave the file as it was"}
    file.write_bytes(original)
    if not git(root) or patching.status(root) != "applied":
        return {"verdict": "WRONG", "reason": "git does not apply the patch"}

    patched = imported(root, stubs)
    none = imported(root, stubs, environment={"ACESTEP_PLUGINS": ""})
    hidden = imported(root, stubs, "hide")
    if not git(root, "-R") or file.read_bytes() != original:
        return {"verdict": "WRONG", "reason": "git does not revert the patch"}
    if "error" in alone:
        same = all(result == alone for result in (patched, none, hidden))
        return {"verdict": "no import" if same else "WRONG", "reason": alone["error"]}
    if any(result != {"plugins": [], "wrapped": False, "blocked": None} for result in (alone, none, hidden)):
        return {"verdict": "WRONG", "reason": f"without plugins: {none}, without the package: {hidden}"}
    if patched.get("blocked"):
        return {"verdict": "stopped", "reason": patched["blocked"]}
    right = patched == {"plugins": [["sidestep"]], "wrapped": True, "blocked": None}
    return {"verdict": "attached"} if right else {"verdict": "WRONG", "reason": str(patched)}


def git(root: Path, *more: str) -> bool:
    line = ["git", "apply", "--unidiff-zero", *more, "-"]
    patch = patching.patch_text().encode()
    # Outside of a repository, as in a checkout that was downloaded as an archive.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
    return subprocess.run(line, cwd=root, input=patch, env=environment, capture_output=True).returncode == 0


def imported(
    root: Path, stubs: Path | None, *arguments: str, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    path = os.pathsep.join([str(root), *([str(stubs)] if stubs else []), *sys.path[1:]])
    done = subprocess.run(
        [sys.executable, "-c", JOB, *arguments],
        cwd=root,
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"} | (environment or {}),
        capture_output=True,
        text=True,
    )
    try:
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        told = {"error": done.stderr[-500:]}
    if "error" in told:
        told["error"] = told["error"].replace(str(root), "CHECKOUT")
    return told


if __name__ == "__main__":
    main()
