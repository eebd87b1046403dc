"""Bad days, on purpose: kills whole trainings at random moments, fills the disk, locks folders, cuts files off.

    python tests/tools/faults.py                 all of it, 200 kills: some minutes
    python tests/tools/faults.py --kills 20      fewer

After every fault it looks whether each checkpoint that was reported as saved is there and whole, resumes the training,
and compares the finished adapter with that of a training nothing happened to: they have to be the same bit for bit.
The job is ``acestep-train`` on the miniature, forked from this process so that a training takes a second.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

EPOCHS = 6
NOBODY = 65534


class Faults:
    """The trainings, and what was counted.

    Attributes:
        counts: by fault: how often it was tried, and what came of it.
        losses: what was lost or damaged, in words. Has to stay empty.
    """

    def __init__(self, work: Path, seed: int) -> None:
        import torch

        import sidestep_plugin
        from sidestep_plugin import miniature
        from sidestep_plugin.engine.checkout import import_trainer
        from sidestep_plugin.engine.models import find_model, load_model

        self.work, self.draw = work, random.Random(seed)
        self.built = miniature.build(work / "miniature", models=["acestep-v15-base"], songs=5)
        for place in [work / "miniature", *(work / "miniature").rglob("*")]:  # for a training by another user
            place.chmod(0o755 if place.is_dir() else 0o644)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.losses: list[str] = []
        self.reported: set[str] = set()
        self.adapter_only: set[str] = set()
        self.usual = 1.0
        self.whole = {}
        # Here, so that no training has to import them: the trainer itself, and what it and we import late.
        import_trainer(self.built.root)
        for name in (
            "transformers",
            "peft",
            "lycoris",
            "torch.utils.tensorboard",
            "tensorboard",
            *(module.name for module in pkgutil.walk_packages(sidestep_plugin.__path__, "sidestep_plugin.")),
        ):
            if not name.endswith("__main__"):
                with suppress(ImportError):
                    importlib.import_module(name)
        load_model(find_model("base", self.built.checkpoints), torch.device("cpu"))
        for kind in ("lora", "lokr"):
            self.train(work / f"whole-{kind}", kind)  # and what comes even later
        for kind in ("lora", "lokr"):
            began = time.monotonic()
            code, said = self.train(work / f"whole-{kind}", kind, "--overwrite")
            self.usual = time.monotonic() - began
            if code != 0:
                sys.exit(f"a training without any fault ends with {code}: {said}")
            self.whole[kind] = finished(work / f"whole-{kind}")

    # -- trainings ---------------------------------------------------------------------------------------------------

    def start(self, output: Path, kind: str, *more: str, user: int | None = None) -> tuple[int, Path]:
        """Begin a training in a process of its own | returns its number, and the file with what it says."""
        line = ["--plugin", "sidestep", "--model", "base", "--adapter-type", kind, "--device", "cpu"]
        line += ["--acestep-root", str(self.built.root), "--dataset-dir", str(self.built.tensors)]
        line += ["--output-dir", str(output), "--epochs", str(EPOCHS), "--save-every", "1", "--batch-size", "1"]
        line += ["--rank", "4", "--alpha", "8", "--gradient-accumulation", "2"]
        line += ["--val-split", "0.3"] if kind == "lora" else []
        said = self.work / "said.txt"
        child = os.fork()
        if child == 0:
            code = 99
            try:
                with said.open("w", encoding="utf-8") as stream:
                    os.dup2(stream.fileno(), 1)
                    os.dup2(stream.fileno(), 2)
                sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
                sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
                if user is not None:
                    os.setuid(user)
                from sidestep_plugin.cli import cli

                try:
                    cli.main([*line, *more], prog_name="acestep-train")
                except SystemExit as exit_:
                    code = exit_.code if isinstance(exit_.code, int) else 0
            except KeyboardInterrupt:  # before there was a command line that could take it
                code = 130
            finally:
                sys.stdout.flush()
                os._exit(code)
        return child, said

    def train(self, output: Path, kind: str, *more: str) -> tuple[int, str]:
        """A training to its end | returns its exit code and what it said."""
        child, said = self.start(output, kind, *more)
        _, status = os.waitpid(child, 0)
        text = said.read_text(encoding="utf-8", errors="replace")
        self._note(text)
        return os.waitstatus_to_exitcode(status), text

    def go_on(self, output: Path, kind: str) -> tuple[int, str]:
        """The same command with --resume-from latest; without it when nothing was saved yet."""
        code, said = self.train(output, kind, "--resume-from", "latest")
        if code == 2 and "No checkpoint to resume from" in said and not self.reported:
            return self.train(output, kind, "--overwrite")
        return code, said

    def _note(self, said: str) -> None:
        """Remember what was reported as saved."""
        self.reported |= {f"epoch_{number}" for number in re.findall(r"Checkpoint saved at epoch (\d+)", said)}
        self.reported |= {"interrupted"} if "Saved as it was after" in said else set()
        self.adapter_only |= set(re.findall(r"no training can be resumed from .*?([^/\n]+):", said))
        self.reported |= {"final"} if re.search(r"^Adapter: ", said, re.MULTILINE) else set()

    # -- looking -----------------------------------------------------------------------------------------------------

    def look(self, fault: str, output: Path) -> None:
        """Everything that was reported as saved is there; everything that is there is whole."""
        from sidestep_plugin.adapters.staging import settle_below
        from sidestep_plugin.errors import Refusal
        from sidestep_plugin.resuming.checkpoints import read_checkpoint

        settle_below(output)  # what the next command does first
        there = {re.sub(r"_loss.*", "", folder.name): folder for folder in output.glob("checkpoints/*/")}
        there |= {folder.name: folder for folder in output.glob("*/")}
        for name in sorted(self.reported - there.keys()):
            self.losses.append(f"{fault}: {name} was reported as saved and is gone")
        for name, folder in there.items():
            if name in ("checkpoints", "logs", "final", "overwritten"):
                continue
            if folder.name in self.adapter_only and any(folder.rglob("*.safetensors")):
                self.counts[fault, "adapter saved without what resuming needs, and told so"] += 1
                continue
            try:
                read_checkpoint(folder)
            except Refusal as refusal:
                self.losses.append(f"{fault}: {refusal}")

    def compare(self, fault: str, output: Path, kind: str, code: int, said: str, history: Sequence[str] = ()) -> None:
        """A training that has ended well has the adapter of one that nothing happened to."""
        import torch

        if code != 0:
            self.losses.append(f"{fault}: resuming ended with {code}: {said[-400:]}")
            return
        tensors, whole = finished(output), self.whole[kind]
        same = tensors.keys() == whole.keys() and all(torch.equal(tensors[name], whole[name]) for name in whole)
        self.counts[fault, "finished, bit for bit as without" if same else "finished otherwise"] += 1
        if not same:
            self.losses.append(f"{fault}: the finished {kind} is another one: {' | '.join(history)}")

    @contextmanager
    def folder(self) -> Iterator[Path]:
        output = Path(tempfile.mkdtemp(dir=self.work, prefix="output-"))
        self.reported, self.adapter_only = set(), set()
        yield output
        shutil.rmtree(output, ignore_errors=True)

    # -- the faults --------------------------------------------------------------------------------------------------

    def kills(self, wanted: int) -> None:
        """SIGKILL at random moments, again and again until a training gets through; some with Ctrl-C before."""
        while self.counts["killed", "kills"] < wanted:
            print(f"{self.counts['killed', 'kills']} of {wanted} killed", end="\r", file=sys.stderr, flush=True)
            kind = self.draw.choice(["lora", "lokr"])
            with self.folder() as output:
                history = []
                for attempt in range(100):
                    resume = ["--resume-from", "latest"] if self.reported else []
                    child, said = self.start(output, kind, *(resume or ["--overwrite"]))
                    # Fewer chances from time to time, so that every training ends some day.
                    time.sleep(self.draw.uniform(0.2, 1.0 + 0.1 * attempt) * self.usual)
                    way = self.draw.choices(["kill", "Ctrl-C", "Ctrl-C, kill", "Ctrl-C twice"], [8, 1, 1, 1])[0]
                    with suppress(ProcessLookupError):
                        if way.startswith("Ctrl-C"):
                            os.kill(child, signal.SIGINT)
                        if way.endswith((", kill", "twice")):
                            time.sleep(self.draw.uniform(0.0, 0.1))
                        if way.endswith("twice"):
                            os.kill(child, signal.SIGINT)
                        if way.endswith("kill"):
                            os.kill(child, signal.SIGKILL)
                    _, status = os.waitpid(child, 0)
                    text = said.read_text(encoding="utf-8", errors="replace")
                    self._note(text)
                    killed = os.WIFSIGNALED(status)
                    went_on = re.search(r"Resumed: .*", text)
                    history.append(f"{went_on[0] if went_on else 'from the start'}, then {way}")
                    if not killed and os.waitstatus_to_exitcode(status) == 0:
                        self.compare("killed", output, kind, 0, text, history)
                        self.look("killed", output)
                        break
                    self.counts["killed", "kills" if killed and way.endswith("kill") else f"ended by {way}"] += 1
                    if not killed and os.waitstatus_to_exitcode(status) != 130:
                        self.losses.append(
                            f"killed: {way} ended with {os.waitstatus_to_exitcode(status)}: {text[-400:]}"
                        )
                    self.counts["killed", "with something left unfinished"] += any(output.rglob(".*.*.*"))
                    self.look("killed", output)
                else:
                    self.losses.append("killed: a training did not get through in 100 attempts")

    def full_disks(self, wanted: int) -> None:
        """A disk too small for all checkpoints; then there is room again, and the training goes on."""
        sizes = [300 + 150 * number for number in range(wanted)]  # kB; a whole training takes about 3 MB
        for number, size in enumerate(sizes):
            kind = ("lora", "lokr")[number % 2]
            with self.folder() as output:
                mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(output)]
                if subprocess.run(mount, capture_output=True).returncode != 0:
                    print("NOT TRIED: full disks (mounting a small one needs Linux and: unshare -rm)")
                    return
                try:
                    code, said = self.train(output, kind)
                    self.counts["disk full", "trainings"] += 1
                    self.counts["disk full", f"ended with {code}"] += 1
                    if code == 1 and not re.search(r"MB free", said):
                        self.losses.append(f"disk full: not told what to do: {said[-400:]}")
                    self.look("disk full", output)
                    subprocess.run(["mount", "-o", "remount,size=64m", str(output)], check=True)
                    if code != 0:
                        code, said = self.go_on(output, kind)
                    self.compare("disk full", output, kind, code, said)
                finally:
                    subprocess.run(["umount", "--lazy", str(output)], check=True)

    def locked_folders(self, wanted: int) -> None:
        """The folder of checkpoints cannot be written any more at some moment, and later can again."""
        root = os.getuid() == 0
        if root and not readable_by_others():
            print("NOT TRIED: locked folders (root may write anywhere, and others may not read this environment)")
            return
        for number in range(wanted):
            kind = ("lora", "lokr")[number % 2]
            with self.folder() as output:
                checkpoints = output / "checkpoints"
                checkpoints.mkdir()
                if root:
                    for folder in (output, checkpoints):
                        os.chown(folder, NOBODY, NOBODY)
                child, said = self.start(output, kind, user=NOBODY if root else None)
                time.sleep(self.draw.uniform(0.2, 1.0) * self.usual)
                checkpoints.chmod(0o555)
                _, status = os.waitpid(child, 0)
                text = said.read_text(encoding="utf-8", errors="replace")
                self._note(text)
                self.counts["folder locked", "trainings"] += 1
                self.counts["folder locked", "checkpoints reported as not saved"] += text.count("could not be saved")
                checkpoints.chmod(0o755)
                self.look("folder locked", output)
                self.compare("folder locked", output, kind, os.waitstatus_to_exitcode(status), text)

    def cut_files(self, wanted: int) -> None:
        """A file of the newest checkpoint is cut off: the one before it is taken, and said so."""
        for number in range(wanted):
            kind = ("lora", "lokr")[number % 2]
            with self.folder() as output:
                shutil.copytree(self.work / f"whole-{kind}", output, dirs_exist_ok=True)
                shutil.rmtree(output / "final")
                newest = next(output.glob(f"checkpoints/epoch_{EPOCHS}_*"))
                shutil.rmtree(output / "checkpoints" / "best", ignore_errors=True)
                files = [file for file in newest.rglob("*") if file.suffix in (".pt", ".safetensors")]
                file = self.draw.choice(files)
                content = file.read_bytes()
                file.write_bytes(content[: self.draw.randrange(len(content))])
                self.reported = {f"epoch_{epoch}" for epoch in range(1, EPOCHS)}
                code, said = self.train(output, kind, "--resume-from", "latest")
                self.counts["file cut off", "checkpoints"] += 1
                if f"Note: skipped {newest.name}" not in said or f"epoch_{EPOCHS - 1}" not in said:
                    self.losses.append(f"file cut off: {file.name} was not noticed: {said[:400]}")
                self.compare("file cut off", output, kind, code, said)


def readable_by_others() -> bool:
    """Whether another user could look into what this one runs; everything else has been imported by then."""
    places = (sysconfig.get_path("purelib"), str(Path(__file__).parents[2]))
    child = os.fork()
    if child == 0:
        try:
            os.setuid(NOBODY)
            os._exit(0 if all(os.access(place, os.R_OK | os.X_OK) for place in places) else 1)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def finished(output: Path) -> dict[str, object]:
    from safetensors.torch import load_file

    return dict(load_file(next((output / "final").rglob("*.safetensors"))))


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=200, help="how many trainings to kill [default: 200]")
    arguments.add_argument("--seed", type=int, default=6)
    said = arguments.parse_args()
    again = "SIDESTEP_FAULTS_MOUNTS" in os.environ
    if not again and shutil.which("unshare"):  # a place of its own, where small disks can be mounted
        own = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-rm"]
        if subprocess.run([*own, "true"], capture_output=True).returncode == 0:
            os.environ["SIDESTEP_FAULTS_MOUNTS"] = "1"
            os.execvp(own[0], [*own, sys.executable, *sys.argv])

    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="sidestep-faults-", ignore_cleanup_errors=True) as work:
        os.environ["HF_MODULES_CACHE"] = f"{work}/modules"
        os.chmod(work, 0o755)  # noqa: PTH101
        faults = Faults(Path(work), said.seed)
        few = max(2, said.kills // 10)
        faults.kills(said.kills)
        faults.full_disks(few)
        faults.locked_folders(few)
        faults.cut_files(2 * few)
        os.chdir("/")
    for fault in dict.fromkeys(fault for fault, _ in faults.counts):
        print(fault)
        for (of, what), count in faults.counts.items():
            if of == fault:
                print(f"    {count:5}  {what}")
    print(f"lost or damaged: {len(faults.losses)}")
    for loss in faults.losses:
        print(f"    {loss}")
    return 1 if faults.losses else 0


if __name__ == "__main__":
    sys.exit(main())
