"""Rules about the code that the contracts in ``.importlinter`` cannot express, read from its syntax trees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAND_IN = "sidestep_plugin/miniature/"  # a copy of upstream's shape, not code that attaches to it
ATTACHMENT = "sidestep_plugin/engine/attachment.py"
TREES = {
    file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
    for folder in ("sidestep_plugin", "hooks", "patches")
    for file in sorted((ROOT / folder).rglob("*.py"))
}

OURS = {
    "answers",
    "attached",
    "attachment",
    "history",
    "host",
    "journal",
    "layer",
    "notes",
    "plan",
    "run",
    "self",
    "song",
    "stop",
    "step",
    "training",
    "validation",
}
"""Variables that always hold objects of this project's own classes."""

THEIRS = {"dit_handler", "fabric", "model", "module", "trainer"}
"""Attributes of those that hold upstream's objects."""

ALLOWED = {
    ("sidestep_plugin/engine/autoload.py", "getattr(trainer, name).train_from_preprocessed"): "_complain runs when "
    "attachment.py itself cannot be imported, and has to stop trainings all the same",
    ("sidestep_plugin/engine/autoload.py", "spec.loader"): "Python's import machinery",
    ("sidestep_plugin/engine/autoload.py", "module.__spec__.loader"): "Python's import machinery",
    ("sidestep_plugin/engine/autoload.py", "module.__loader__"): "Python's import machinery",
    ("sidestep_plugin/engine/song_encoding.py", "model.decoder"): "a model that we load ourselves",
    ("sidestep_plugin/engine/song_encoding.py", "model.config._attn_implementation"): "a model that we load ourselves",
    ("sidestep_plugin/engine/models.py", "model.null_condition_emb"): "a model that we load ourselves",
    ("sidestep_plugin/engine/programs.py", "sys.argv"): "the command line of the program that we run",
    ("sidestep_plugin/engine/wrappers/loaders.py", "loader.__class__"): "one loader, which upstream has just made",
    ("sidestep_plugin/engine/wrappers/loaders.py", "loader.worker_init_fn"): "the same loader",
    ("sidestep_plugin/engine/wrappers/loaders.py", "loader.generator"): "the same loader, for one call, and taken back",
    ("sidestep_plugin/engine/wrappers/loaders.py", "Watched.__name__"): "a class of ours",
    ("sidestep_plugin/engine/wrappers/loaders.py", "Watched.__qualname__"): "a class of ours",
    ("sidestep_plugin/engine/wrappers/loaders.py", "Watched.__module__"): "a class of ours",
    ("sidestep_plugin/engine/wrappers/engine.py", "Engine.__name__"): "a class of ours",
    ("sidestep_plugin/engine/wrappers/engine.py", "Engine.__qualname__"): "a class of ours",
    ("sidestep_plugin/engine/wrappers/engine.py", "Engine.__module__"): "a class of ours",
    ("sidestep_plugin/memory/compiling.py", "module._compiled_call_impl"): "torch's own place for it, "
    "until the training ends",
    ("sidestep_plugin/memory/base_weights.py", "decoder.to"): "one decoder, for one call, and taken back",
    ("sidestep_plugin/memory/base_weights.py", "parameter.data"): "upstream's own cast, made in its place",
    ("sidestep_plugin/memory/base_weights.py", "buffer.data"): "upstream's own cast, made in its place",
    ("sidestep_plugin/engine/decoders.py", "module.training"): "every module's mode is put back as it was",
    ("sidestep_plugin/engine/decoders.py", "module._compiled_call_impl"): "compiled code, put back after a look",
    ("sidestep_plugin/engine/wrappers/songs.py", "setattr()"): "one list of songs, which upstream has just made",
    ("sidestep_plugin/cli/quiet.py", "threading.excepthook"): "what our own program prints of its threads",
    (
        "sidestep_plugin/cli/workers.py",
        "sys.stdout",
    ): "our own program's output, of several processes",
    (
        "sidestep_plugin/engine/decoders.py",
        "decoder._forward_module",
    ): "Lightning's wrapper, taken back",
    ("sidestep_plugin/validation/comparing.py", "weight.data"): "a model that we load ourselves",
    ("sidestep_plugin/cli/commands.py", "ctx.default_map"): "click's context of our own command",
    ("sidestep_plugin/run.py", "__setattr__()"): "a step of ours, which is read only for plugins",
    ("sidestep_plugin/engine/replay.py", "weight.grad"): "a gradient is put back when resuming",
}
"""Attributes of other people's objects that are set outside of the attachment, each with the reason."""


def upstream_modules(tree: ast.Module) -> Iterator[str]:
    """Modules of ACE-Step that code imports, or names in a string that is not a docstring."""
    prose = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "acestep")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and str(node.module).partition(".")[0] == "acestep":
            yield str(node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield from re.findall(r"\bacestep(?!\.cpp\b)(?:\.[a-z_]\w*)+", node.value)


def foreign_names_set(tree: ast.Module) -> Iterator[str]:
    """Attributes that code sets or deletes on objects that may be other people's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if called in ("setattr", "delattr", "__setattr__", "__delattr__"):
                yield f"{called}()"
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            root, *between = ast.unparse(node.value).split(".")
            if root not in OURS or THEIRS & set(between):
                yield ast.unparse(node)


def test_only_the_engine_names_modules_of_ace_step():
    named = {
        (file, module)
        for file, tree in TREES.items()
        if not file.startswith(("sidestep_plugin/engine/", STAND_IN))
        for module in upstream_modules(tree)
    }
    # The entry-point group of plugins, which is not a module.
    assert named == {("sidestep_plugin/registry.py", "acestep.plugins")}
    assert set(upstream_modules(TREES["sidestep_plugin/engine/checkout.py"])), "the rule finds nothing any more"


def test_only_the_attachment_sets_names_of_upstream():
    found = {
        (file, name)
        for file, tree in TREES.items()
        if file != ATTACHMENT and not file.startswith(STAND_IN)
        for name in foreign_names_set(tree)
    }
    assert found - set(ALLOWED) == set(), "set it in attachment.py, or list it above with the reason"
    assert set(ALLOWED) - found == set(), "no longer there: take it off the list"
    assert {"setattr()", "delattr()"} <= set(foreign_names_set(TREES[ATTACHMENT])), "the rule finds nothing any more"


@pytest.mark.parametrize(
    "code, found",
    [
        ("setattr(trainer, 'f', g)", ["setattr()"]),
        ("object.__setattr__(trainer, 'f', g)", ["__setattr__()"]),
        ("trainer.f = g", ["trainer.f"]),
        ("host.trainer.f = g", ["host.trainer.f"]),
        ("self.module.model.f, x = g, h", ["self.module.model.f"]),
        ("del trainer.f", ["trainer.f"]),
        ("sys.modules['a'].f += 1", ["sys.modules['a'].f"]),
        ("self.trainer = trainer; run.steps += 1; training.run.module_ref = None", []),
    ],
)
def test_the_rule_about_names_can_fail(code, found):
    assert list(foreign_names_set(ast.parse(code))) == found


@pytest.mark.parametrize(
    "code, found",
    [
        ("import acestep.training.trainer", ["acestep.training.trainer"]),
        ("from acestep import training", ["acestep"]),
        ("import_module('acestep.training')", ["acestep.training"]),
        ("f'{x} of acestep.training'", ["acestep.training"]),
        ("'''About acestep.training.'''", []),
        ("'acestep-train', 'acestep', 'acestep_options'", []),
    ],
)
def test_the_rule_about_modules_can_fail(code, found):
    assert list(upstream_modules(ast.parse(code))) == found


def test_the_trainers_name_is_written_once():
    """Everything else takes it from there."""
    places = [file for file, tree in TREES.items() if "acestep.training.trainer" in upstream_modules(tree)]
    assert [file for file in places if not file.startswith(STAND_IN)] == ["sidestep_plugin/engine/checkout.py"]


def test_the_timesteps_room_draws_no_random_number():
    draws = re.compile(r"rand|bernoulli|multinomial|normal_$|uniform_$|manual_seed|^random$")
    found = [
        (file, name)
        for file, tree in TREES.items()
        if file.startswith("sidestep_plugin/timesteps/")
        for name in used_names(tree)
        if draws.search(name)
    ]
    assert found == []
    assert any(draws.search(name) for name in used_names(TREES["hooks/timesteps.py"])), "the rule finds nothing"


def used_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.alias):
            yield node.name


def test_every_package_is_in_the_wheel():
    """Packages are listed by name, so a new one could be left out."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    there = {file.parent.relative_to(ROOT) for file in (ROOT / "sidestep_plugin").rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in there} <= listed
    data = project["tool"]["setuptools"]["package-data"]
    assert "page.html" in data["sidestep_plugin.report"] and (ROOT / "sidestep_plugin/report/page.html").is_file()


def test_classes_are_made_with_every_click_that_is_allowed():
    """click's types became generic in 8.2 and 8.4; a checkout's environment often has an older click."""
    bases = [
        ast.unparse(base)
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    ]
    assert "click.ParamType" in bases
    assert [base for base in bases if base.startswith("click.") and "[" in base] == []
