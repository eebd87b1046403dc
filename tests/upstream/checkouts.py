"""Takes every distinct version of upstream's trainer out of git repositories, each with the package around it."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

TRAINER = "acestep/training/trainer.py"
PACKAGE = "acestep/"
SAMPLER = "sample_discrete_timestep"


@dataclass(frozen=True)
class Checkout:
    """One version of the trainer, in the earliest commit that holds it.

    Attributes:
        root: the folder that was written; it holds the package ``acestep``.
        blob: git's name of the trainer's content; versions are told apart by it.
        sampler: parameters of the trainer's sampler, "not defined" where it has none.
        has_lokr: whether the trainer trains LoKr adapters.
    """

    root: Path
    blob: str
    date: str
    repo: str
    commit: str
    lines: int
    sampler: str
    has_lokr: bool


@dataclass(frozen=True, order=True)
class _Holder:
    """A commit that holds a version. The least one is taken: by date, then by the order of the repositories."""

    time: int
    repo_index: int
    commit: str


def extract_versions(repos: list[Path], target: Path) -> Iterator[Checkout]:
    """Write every distinct version to `target`, oldest first, one folder each."""
    first: dict[str, _Holder] = {}
    for index, repo in enumerate(repos):
        for commit, time, blob in _trainer_blobs(repo):
            holder = _Holder(time, index, commit)
            first[blob] = min(holder, first.get(blob, holder))
    for blob, holder in sorted(first.items(), key=lambda item: (item[1].time, item[0])):
        repo = repos[holder.repo_index]
        date = f"{datetime.fromtimestamp(holder.time, UTC):%Y-%m-%d}"
        root = target / f"{date}-{blob[:10]}"
        _write_package(repo, holder.commit, root)
        source = (root / TRAINER).read_text(encoding="utf-8")
        tree = ast.parse(source)
        yield Checkout(
            root=root,
            blob=blob,
            date=date,
            repo=_repo_name(repo),
            commit=holder.commit,
            lines=len(source.splitlines()),
            sampler=_sampler_text(tree),
            has_lokr=any(isinstance(node, ast.ClassDef) and node.name == "LoKRTrainer" for node in tree.body),
        )


def _git(repo: Path, *args: str, stdin: bytes | None = None) -> bytes:
    """Run git; objects that a partial copy lacks are never fetched."""
    command = ["git", "-c", "core.quotePath=false", "-C", str(repo), *args]
    environment = {**os.environ, "GIT_NO_LAZY_FETCH": "1"}
    return subprocess.run(command, input=stdin, stdout=subprocess.PIPE, check=True, env=environment).stdout


def _trainer_blobs(repo: Path) -> Iterator[tuple[str, int, str]]:
    """Yield (commit, commit time, blob) for every reachable commit that has the trainer, merges included.

    Each commit's tree is asked, so no history simplification can hide a version.
    """
    log = _git(repo, "log", "--all", "--format=%H %ct").decode().split()
    commits = list(zip(log[0::2], map(int, log[1::2]), strict=True))
    query = "".join(f"{commit}:{TRAINER}\n" for commit, _ in commits).encode()
    answers = _git(repo, "cat-file", "--batch-check=%(objectname) %(objecttype)", stdin=query).decode().splitlines()
    for (commit, time), answer in zip(commits, answers, strict=True):
        name, _, kind = answer.rpartition(" ")
        if kind == "blob":
            yield commit, time, name


def _write_package(repo: Path, commit: str, root: Path) -> None:
    """Write the Python files of the package in that commit (no links, no submodules)."""
    shutil.rmtree(root, ignore_errors=True)
    files: dict[str, str] = {}
    listing = _git(repo, "ls-tree", "-r", "-z", commit, "--", PACKAGE).decode("utf-8", "surrogateescape")
    for entry in listing.split("\0"):
        info, _, path = entry.partition("\t")
        if path.endswith(".py") and info.startswith("100") and ".." not in Path(path).parts:
            files[path] = info.split()[2]
    contents = dict(_read_blobs(repo, files.values()))
    for path, blob in files.items():
        content = contents[blob]
        if content is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)


def _read_blobs(repo: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
    """Yield each object name with its content, None where the repository lacks it."""
    wanted = list(dict.fromkeys(names))
    data = _git(repo, "cat-file", "--batch", stdin="".join(f"{name}\n" for name in wanted).encode())
    start = 0
    for name in wanted:
        end = data.index(b"\n", start)
        header = data[start:end].split()
        start = end + 1
        if header[-1] == b"missing":
            yield name, None
            continue
        size = int(header[2])
        yield name, data[start : start + size]
        start += size + 1


def _repo_name(repo: Path) -> str:
    """Owner and name as the repository's origin says them, else as its folder does ("owner+name", or "name")."""
    command = ["git", "-C", str(repo), "config", "--get", "remote.origin.url"]
    origin = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if "://" in origin or origin.startswith("git@"):
        return "/".join(origin.removesuffix(".git").replace(":", "/").split("/")[-2:])
    path = repo.resolve()
    name = path.parent.name if path.name in {"repo", ".git"} else path.name
    return name.removesuffix(".git").replace("+", "/")


def _sampler_text(tree: ast.Module) -> str:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == SAMPLER:
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
            return f"({ast.unparse(node.args)})"
    return "not defined"
