"""``acestep-train run``: upstream's own commands in this process, plugins attached when they import the trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import without_training_packages

from sidestep_plugin.engine.programs import find_command
from sidestep_plugin.errors import Refusal
from sidestep_plugin.miniature import build

APP = """
import sys


def main():
    from acestep.training import trainer

    print("arguments:", sys.argv)
    print("sampler:", getattr(trainer.sample_discrete_timestep, "__wrapped__", None) is not None)
    from sidestep_plugin.engine.attachment import _attached

    print("attached:", [(one.registry.names, one.options.get("cfg_ratio")) for one in _attached])
    if "--fail" in sys.argv:
        raise OSError("the app's own trouble")
    return 3


if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = build(tmp_path_factory.mktemp("running"), models=[], songs=0).root
    (root / "acestep" / "app.py").write_text(APP, encoding="utf-8")
    (root / "pyproject.toml").write_text('[project.scripts]\nacestep-app = "acestep.app:main"\n', encoding="utf-8")
    return root


@pytest.fixture
def run(checkout):
    def start(*words, **environment):
        line = [sys.executable, "-c", "from sidestep_plugin.cli import main; main()", "run", *words]
        return subprocess.run(
            line,
            cwd=checkout,
            env=without_training_packages(os.environ | {"PYTHONUTF8": "1"} | environment),
            capture_output=True,
            text=True,
            encoding="utf-8",
        )

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["acestep-app"],
        ["-m", "acestep.app"],
        ["python", "-m", "acestep.app"],
        ["python3.11", str(Path("acestep") / "app.py")],
        [str(Path("acestep") / "app.py")],
    ],
    ids=" ".join,
)
def test_every_way_to_name_a_command(command, run):
    done = run("--plugin", "sidestep", "--cfg-ratio", "0.25", "--", *command, "--port", "7860", "--plugin", "its own")
    assert "attached: [(['sidestep'], 0.25)]" in done.stdout, done.stderr
    assert "sampler: True" in done.stdout
    assert "'--port', '7860', '--plugin', 'its own']" in done.stdout, "the command's arguments are its own"
    assert done.returncode == 3, "the command's exit code is its own"


@pytest.mark.slow
def test_without_a_plugin_nothing_is_attached(run):
    done = run("--", "acestep-app")
    assert "attached: []" in done.stdout and "sampler: False" in done.stdout


@pytest.mark.slow
def test_in_a_patched_checkout_the_command_line_decides(run, checkout):
    from sidestep_plugin.engine import checkout_patch as patching

    patching.apply(checkout)
    try:
        done = run("--plugin", "sidestep", "--cfg-ratio", "0.25", "--", "acestep-app", SIDESTEP_CFG_RATIO="0.5")
        assert "attached: [(['sidestep'], 0.25)]" in done.stdout
        assert "attached: []" in run("--", "acestep-app").stdout
    finally:
        patching.revert(checkout)


@pytest.mark.slow
def test_what_the_command_raises_is_its_own(run):
    done = run("--plugin", "sidestep", "--", "acestep-app", "--fail")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "OSError: the app's own trouble" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, told",
    [
        ([], "Missing argument"),
        (["--plugin", "sidestep", "--"], "Missing argument"),
        (["--plugin", "nothing-like-it", "--", "acestep-app"], "No plugin 'nothing-like-it' is installed"),
        (["--plugin", "sidestep", "--cfg-ratio", "7", "--", "acestep-app"], "7.0 is not in the range"),
        (
            ["--plugin", "sidestep", "--", "acestep-apq"],
            "No command 'acestep-apq'. Expected one of ACE-Step's (acestep-app",
        ),
        (["--plugin", "sidestep", "--", "nowhere.py"], "No script nowhere.py"),
        (["--plugin", "sidestep", "--", "uv", "run", "acestep"], "uv run acestep-train run"),
        (["--plugin", "sidestep", "--", "python", "-c", "pass"], "Expected a script or -m MODULE"),
        (["--plugin", "sidestep", "--", "-m"], "Expected a module name"),
        (["--acestep-root", "nowhere", "--", "acestep-app"], "No ACE-Step 1.5 found"),
    ],
)
def test_what_cannot_be_run_is_one_message(words, told, run):
    done = run(*words)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_arguments_are_put_back(tmp_path):
    script = tmp_path / "job.py"
    script.write_text("import sys\nassert sys.argv[1:] == ['a']\n", encoding="utf-8")
    before = list(sys.argv)
    find_command((str(script), "a"), None)()
    assert sys.argv == before
    sys.path.remove(str(tmp_path))


def test_a_module_that_is_not_there_says_so_itself(run):
    done = run("--plugin", "sidestep", "--", "-m", "acestep.nowhere")
    assert done.returncode == 1 and "No module named acestep.nowhere" in done.stderr


def test_a_checkout_without_pyproject_has_no_commands(tmp_path):
    with pytest.raises(Refusal, match="No command 'acestep-app'"):
        find_command(("acestep-app",), tmp_path)


# -- other processes -------------------------------------------------------------------------------------------------

WORKER = """
import multiprocessing
import subprocess
import sys


def train(answer):
    from acestep.training import trainer
    from sidestep_plugin.engine.attachment import _attached

    answer.put([(one.registry.names, one.options.get("cfg_ratio")) for one in _attached])


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    worker = context.Process(target=train, args=(answer,))
    worker.start()
    print("spawned:", answer.get(timeout=100))
    worker.join(timeout=100)
    code = "import queue, worker; answer = queue.Queue(); worker.train(answer); print('started:', answer.get())"
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True).stdout)
"""


@pytest.mark.slow
def test_processes_that_the_program_starts_get_the_plugins_too(checkout, run):
    (checkout / "worker.py").write_text(WORKER, encoding="utf-8")
    done = run("--plugin", "sidestep", "--cfg-ratio", "0.25", "--", "worker.py", PYTHONPATH=str(checkout))
    assert "spawned: [(['sidestep'], 0.25)]" in done.stdout, done.stderr
    assert "started: [(['sidestep'], 0.25)]" in done.stdout, done.stderr


def test_the_machines_own_sitecustomize_is_run_as_well(checkout, run, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['SEEN'] = 'yes'\n", encoding="utf-8")
    (checkout / "child.py").write_text(
        "import subprocess, sys\n"
        "code = 'import os; print(os.environ.get(\"SEEN\"))'\n"
        "subprocess.run([sys.executable, '-c', code], check=True)\n",
        encoding="utf-8",
    )
    done = run("--plugin", "sidestep", "--", "child.py", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and done.stdout.strip() == "yes", done.stderr


# -- upstream's other trainer ----------------------------------------------------------------------------------------

OTHER_TRAINER = """
from dataclasses import dataclass


@dataclass
class FixedLoRATrainer:
    model: object

    def train(self):
        yield 0, 0.0, "trained"
"""


@pytest.fixture(scope="module")
def with_training_v2(checkout):
    package = checkout / "acestep" / "training_v2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "trainer_fixed.py").write_text(OTHER_TRAINER, encoding="utf-8")
    script = checkout / "fixed.py"
    script.write_text(
        "import acestep.training\nfrom acestep.training_v2.trainer_fixed import FixedLoRATrainer\n"
        "print(list(FixedLoRATrainer(1).train()))\n",
        encoding="utf-8",
    )
    return script


@pytest.mark.slow
def test_training_v2_is_refused_by_name(with_training_v2, run):
    done = run("--plugin", "sidestep", "--", with_training_v2.name)
    assert done.returncode != 0 and "trained" not in done.stdout
    assert "acestep.training_v2 has its own training step" in done.stderr
    assert "Train with acestep-train --plugin" in done.stderr


@pytest.mark.slow
def test_without_a_plugin_training_v2_is_left_alone(with_training_v2, run):
    done = run("--", with_training_v2.name)
    assert done.returncode == 0 and "trained" in done.stdout and "training_v2" not in done.stderr


@pytest.mark.slow
def test_in_a_patched_checkout_training_v2_trains_and_the_log_says_what_takes_no_part(with_training_v2, checkout):
    from sidestep_plugin.engine import checkout_patch

    checkout_patch.apply(checkout)
    try:
        line = [sys.executable, with_training_v2.name]
        done = subprocess.run(
            line,
            cwd=checkout,
            env=without_training_packages(os.environ),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
        )
    finally:
        checkout_patch.revert(checkout)
    assert done.returncode == 0 and "trained" in done.stdout, done.stderr
    assert "plugins (sidestep) take no part" in done.stderr
