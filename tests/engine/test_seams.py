"""Seams are judged by the trainer's code: what fits, what does not, and the sentence that says why."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
import textwrap

import pytest

from sidestep_plugin import UpstreamMismatch, attach
from sidestep_plugin.engine.checkout import find_root
from sidestep_plugin.engine.seams import cannot_do, examine, require

TRAINER = """
    {sampler}

    class PreprocessedLoRAModule:
        def training_step(self, batch):
            {call}

    class LoRATrainer:
        def train_from_preprocessed(self, tensor_dir, training_state=None):
            {save}

    def save_lora_weights(model, output_dir):
        ...
"""
_numbers = itertools.count()  # a module imported once stays imported
PARTS = {
    "sampler": "def sample_discrete_timestep(bsz, timesteps_tensor): ...",
    "call": "t, _ = sample_discrete_timestep(2, self.timesteps_tensor)",
    "save": "save_lora_weights(1, 2)",
}


@pytest.fixture
def trainer_with(tmp_path, monkeypatch):
    """A trainer module written for the test, so that its source can be read like a checkout's."""

    def make(source=TRAINER, **parts):
        name = f"written_trainer_{next(_numbers)}"
        text = textwrap.dedent(source).format(**(PARTS | parts))
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(name)

    return make


def misfits(trainer):
    """What keeps a version from training: seams that it must have."""
    looked = examine(trainer, "lora")
    return {seam.name: (seam.status, seam.reason) for seam in looked if seam.status != "found" and not seam.optional}


@pytest.mark.parametrize(
    ("signature", "call"),
    [
        ("(bsz, timesteps_tensor)", "(2, self.timesteps_tensor)"),
        ("(bsz, timesteps_tensor)", "(2, timesteps_tensor=self.timesteps_tensor)"),
        ("(bsz, device, dtype)", "(2, self.device, self.dtype)"),
        ("(bsz, device, dtype, dynamic_shift=False)", "(2, self.device, self.dtype, dynamic_shift=True)"),
    ],
)
def test_every_signature_seen_fits(trainer_with, signature, call):
    sampler = f"def sample_discrete_timestep{signature}: ..."
    assert misfits(trainer_with(sampler=sampler, call=f"sample_discrete_timestep{call}")) == {}


def test_a_sampler_called_by_a_helper_of_the_step_fits(trainer_with):
    helped = PARTS["sampler"] + "\ndef draw(bsz, table): return sample_discrete_timestep(bsz, table)"
    assert misfits(trainer_with(sampler=helped, call="draw(2, 3)")) == {}


def test_a_save_that_the_trainer_inherits_fits(trainer_with):
    source = TRAINER.replace(
        "class LoRATrainer:", "class Saving:\n        def done(self): {save}\n\n    class LoRATrainer(Saving):"
    )
    source = source.replace("training_state=None):\n            {save}", "training_state=None):\n            ...")
    assert source.count("{save}") == 1
    assert misfits(trainer_with(source)) == {}


def test_a_dropped_sampler_is_missing(trainer_with):
    found = misfits(trainer_with(sampler="", call="t = 0.5"))
    assert found["sample_discrete_timestep"][0] == "missing"


def test_a_sampler_that_is_never_called_does_not_fit(trainer_with):
    found = misfits(trainer_with(call="t = 0.5"))
    assert found == {
        "sample_discrete_timestep": (
            "wrong shape",
            "PreprocessedLoRAModule.training_step never calls it, so the plugin's timesteps would have no effect",
        )
    }


def test_a_call_that_disagrees_with_the_signature_is_upstreams_own_error(trainer_with):
    status, reason = misfits(trainer_with(call="sample_discrete_timestep(2, 'cpu', 3)"))["sample_discrete_timestep"]
    assert status == "wrong shape"
    assert "calls it as sample_discrete_timestep(2, 'cpu', 3)" in reason and "an error of ACE-Step's own" in reason


def test_an_unknown_signature_does_not_fit(trainer_with):
    sampler = "def sample_discrete_timestep(count, table, temperature): ..."
    _, reason = misfits(trainer_with(sampler=sampler, call="sample_discrete_timestep(1, 2, 3)"))[
        "sample_discrete_timestep"
    ]
    assert "(count, table, temperature)" in reason and "expected (bsz, timesteps_tensor)" in reason


def test_a_trainer_that_saves_elsewhere_does_not_fit(trainer_with):
    assert "never calls it" in misfits(trainer_with(save="..."))["save_lora_weights"][1]


def test_the_checkout_fits(trainer, kinds):
    for kind in kinds:
        looked = examine(trainer, kind)
        assert [seam for seam in looked if seam.status != "found" and (seam.without or not seam.optional)] == []


def test_everything_that_is_replaced_is_examined(trainer, kinds):
    with attach(trainer) as attachment:
        replaced = {replacement.name for replacement in attachment._replacements}
    examined = {seam.name.rpartition(".")[2] for kind in kinds for seam in examine(trainer, kind)}
    assert replaced <= examined


def test_a_version_that_cannot_resume_is_told(trainer_with):
    lost = require(trainer_with(), "lora", lambda hook: True)
    assert "resuming, saving a training that is stopped" in lost
    assert require(trainer_with(), "lora", lambda hook: hook == "acestep_sample_timesteps") == []


def test_attach_names_the_seam_and_what_to_do(trainer_with):
    with pytest.raises(
        UpstreamMismatch, match=r"not compatible \(sample_discrete_timestep\).*never calls it.*Use ACE-Step"
    ):
        attach(trainer_with(call="t = 0.5"))


def test_without_a_sampling_plugin_the_sampler_is_not_needed(trainer_with):
    with attach(trainer_with(sampler="", call="t = 0.5"), plugins=()):
        pass


def test_find_root(tmp_path, monkeypatch):
    (tmp_path / "acestep" / "training").mkdir(parents=True)
    (tmp_path / "acestep" / "training" / "trainer.py").touch()
    assert find_root(tmp_path) == tmp_path
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UpstreamMismatch, match=r"No ACE-Step 1.5 (found|in ).*--acestep-root"):
        find_root(empty)
    with pytest.raises(UpstreamMismatch):
        find_root(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("import module_that_nobody_has", "module_that_nobody_has"),
        ("def f(x: List[int]): ...", "NameError: name 'List' is not defined"),
        ("def (:", "SyntaxError"),
    ],
)
def test_a_trainer_that_cannot_be_imported_shows_upstreams_own_error(tmp_path, content, expected):
    training = tmp_path / "acestep" / "training"
    training.mkdir(parents=True)
    (training / "trainer.py").write_text(content, encoding="utf-8")
    code = (
        "import pathlib, sys\n"
        "from sidestep_plugin.engine.checkout import import_trainer\n"
        "from sidestep_plugin import UpstreamMismatch\n"
        "try: import_trainer(pathlib.Path(sys.argv[1]))\n"
        "except UpstreamMismatch as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "cannot be imported. ACE-Step's own error" in done.stdout and expected in done.stdout


def test_what_is_missing_is_said_with_its_reason():
    """Somebody without Lightning has no old version of ACE-Step, and can mend it."""
    from types import SimpleNamespace

    old, bare = SimpleNamespace(LIGHTNING_AVAILABLE=True), SimpleNamespace(LIGHTNING_AVAILABLE=False)
    assert cannot_do(old, ["a", "b"]) == "This version of ACE-Step cannot do: a, b"
    assert cannot_do(bare, ["a"]) == "Without the package lightning, ACE-Step cannot do: a (pip install lightning)"
