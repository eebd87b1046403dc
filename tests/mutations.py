"""Shows that the tests can fail: ``python tests/mutations.py`` breaks a copy of the project in one way after another.

Each mutation is a mistake that would train wrongly without anybody noticing. For each the named tests are run on the
broken copy and must fail; a mutation that they pass, or whose text is no longer in the code, ends with exit code 1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutation:
    """One mistake: the text in a file, what it becomes, and the tests that must notice."""

    mistake: str
    file: str
    found: str
    becomes: str
    tests: str


MUTATIONS = [
    Mutation(
        "a single draw instead of the maximum of two",
        "hooks/timestep_sampling.py",
        "return torch.maximum(first, second)",
        "return first",
        "tests/timesteps/test_timestep_law.py tests/test_promises.py::test_the_loss_is_that_of_the_models_own_forward",
    ),
    Mutation(
        "one draw that both times share",
        "hooks/timestep_sampling.py",
        "return torch.maximum(first, second)",
        "return torch.maximum(first, first)",
        "tests/timesteps/test_timestep_law.py tests/test_promises.py::test_the_loss_is_that_of_the_models_own_forward",
    ),
    Mutation(
        "the dropout mask drawn after the noise",
        "hooks/cfg_dropout.py",
        "    dropped = torch.rand((conditions.shape[0],), device=step.device, dtype=step.dtype) < cfg_ratio\n",
        "    state = torch.get_rng_state()\n    torch.randn_like(batch['target_latents'])\n"
        "    dropped = torch.rand((conditions.shape[0],), device=step.device, dtype=step.dtype) < cfg_ratio\n"
        "    torch.set_rng_state(state)\n",
        "tests/test_promises.py::test_the_loss_is_that_of_the_models_own_forward",
    ),
    Mutation(
        "dropout in validation",
        "hooks/cfg_dropout.py",
        "cfg_ratio == 0.0 or not step.training",
        "cfg_ratio == 0.0",
        "tests/test_promises.py::test_conditions_are_dropped_in_training_and_never_in_validation",
    ),
    Mutation(
        "whole batches dropped at once",
        "hooks/cfg_dropout.py",
        "torch.rand((conditions.shape[0],), device=step.device, dtype=step.dtype) < cfg_ratio",
        "(torch.rand((1,), device=step.device, dtype=step.dtype) < cfg_ratio).expand(conditions.shape[0])",
        "tests/hooks/test_cfg_dropout.py tests/test_promises.py::test_the_loss_is_that_of_the_models_own_forward",
    ),
    Mutation(
        "dropout for turbo",
        "sidestep_plugin/timesteps/treatment.py",
        'cfg_ratio=0.0 if turbo and mode == "discrete" else cfg_ratio',
        "cfg_ratio=cfg_ratio",
        "tests/test_promises.py::test_turbo_is_upstream",
    ),
    Mutation(
        "shift used in training",
        "sidestep_plugin/timesteps/treatment.py",
        "    own_shift, own_steps = inference_settings(decision.variant, facts.name)\n",
        "    own_shift, own_steps = inference_settings(decision.variant, facts.name)\n"
        "    own_shift = shift or own_shift\n",
        "tests/test_promises.py::test_shift_never_trains",
    ),
    Mutation(
        "the sampler left unpatched",
        "sidestep_plugin/trainer/attachment.py",
        "            yield trainer, SAMPLER, partial(wrap_sampler, host)",
        "            pass",
        "tests/test_promises.py::test_base_and_sft_are_trained_at_continuous_times",
    ),
    Mutation(
        "the sampler's answer thrown away",
        "sidestep_plugin/trainer/wrappers/sampler.py",
        "            return t, t\n",
        "            return original(*args, **kwargs)\n",
        "tests/test_promises.py::test_base_and_sft_are_trained_at_continuous_times",
    ),
    Mutation(
        "no guard against a step that never calls the sampler",
        "sidestep_plugin/trainer/wrappers/step.py",
        "if samples and not step.sampler_called:",
        "if False:",
        "tests/trainer/test_attachment.py::test_a_step_that_never_calls_the_sampler_stops_the_run",
    ),
    Mutation(
        "mu and sigma of the official models, whatever the config says",
        "sidestep_plugin/timesteps/treatment.py",
        'mu, sigma = _number(facts, "timestep_mu"), _number(facts, "timestep_sigma")\n        if sigma <=',
        "mu, sigma = -0.4, 1.0\n        if sigma <=",
        "tests/timesteps/test_treatment.py",
    ),
    Mutation(
        "the table of shift 2 for shift 1",
        "sidestep_plugin/variants.py",
        'return 1.0 if "shift1" in words_of(model_name) else TURBO_SHIFT',
        'return 2.0 if "shift1" in words_of(model_name) else TURBO_SHIFT',
        "tests/test_promises.py::test_turbo_shift1_is_trained_at_the_times_of_shift_1",
    ),
    Mutation(
        "detach forgets a name",
        "sidestep_plugin/trainer/attachment.py",
        "        while self._replacements:\n            self._replacements.pop().undo()\n        self._host",
        "        while len(self._replacements) > 1:\n            self._replacements.pop().undo()\n"
        "        self._replacements.clear()\n        self._host",
        "tests/trainer/test_attachment.py::test_detach_puts_back_the_very_objects",
    ),
    Mutation(
        "checkpoints without metadata",
        "sidestep_plugin/trainer/seams.py",
        '("save_lora_weights", "save_training_checkpoint")',
        '("save_lora_weights", "save_lora_weights")',
        "tests/cli/test_train.py::test_the_whole_job",
    ),
    Mutation(
        "alpha as it is for diffusers, whatever the rank of a layer",
        "sidestep_plugin/adapters/diffusers.py",
        "for layer in layers if layer.alpha != alpha}",
        "for layer in ()}",
        "tests/adapters/test_diffusers.py",
    ),
    Mutation(
        "no alpha tensors for ComfyUI",
        "sidestep_plugin/adapters/comfyui.py",
        'tensors[f"{name}.alpha"] = NewTensor("F32", (), struct.pack("<f", layer.alpha))',
        "pass",
        "tests/adapters/test_comfyui.py",
    ),
    Mutation(
        "local paths left in upstream's header",
        "sidestep_plugin/adapters/header.py",
        "header[key] = without_paths(text, facts)",
        "header[key] = text",
        "tests/adapters/test_adapter_loaders.py",
    ),
    Mutation(
        "adapters saved in place",
        "sidestep_plugin/trainer/wrappers/saving.py",
        "                with published(stage, folder):",
        "                import shutil as s; s.copytree(stage, folder, dirs_exist_ok=True)\n"
        "                with published(stage, folder):",
        "tests/test_kills.py",
    ),
    Mutation(
        "what cannot be attached is forgotten",
        "sidestep_plugin/trainer/attachment.py",
        "        attachment._message = message\n        attachment._apply()\n",
        "",
        "tests/trainer/test_checkout_patch.py",
    ),
    Mutation(
        "the losing sampler is asked",
        "sidestep_plugin/registry.py",
        "for name, plugin in implementing if name == self.wins",
        "for name, plugin in implementing if name != self.wins",
        "tests/test_plugins_of_others.py",
    ),
    Mutation(
        "a resumed adapter that keeps its fresh weights, as upstream's does",
        "sidestep_plugin/resuming/weights.py",
        "                tensor.copy_(point.weights[name])",
        "                pass",
        "tests/resuming/test_resume.py::test_three_and_three_epochs_are_six",
    ),
    Mutation(
        "a fresh optimizer after resuming",
        "sidestep_plugin/resuming/replay.py",
        '{"state": point.optimizer["state"], "param_groups": groups}',
        '{"state": {}, "param_groups": groups}',
        "tests/resuming/test_resume.py::test_three_and_three_epochs_are_six",
    ),
    Mutation(
        "other random numbers after resuming",
        "sidestep_plugin/resuming/replay.py",
        "        if point.random is not None:\n            set_random_states(point.random, self.device)",
        "        if False:\n            pass",
        "tests/resuming/test_resume.py::test_three_and_three_epochs_are_six",
    ),
    Mutation(
        "another order of the songs after a stop within an epoch",
        "sidestep_plugin/resuming/replay.py",
        "            set_random_states(self.point.epoch_random, self.device)",
        "            pass",
        "tests/resuming/test_resume.py::test_a_training_that_was_stopped_anywhere_goes_on_as_if_it_had_not",
    ),
    Mutation(
        "gradients that waited are forgotten",
        "sidestep_plugin/resuming/replay.py",
        "            weight.grad = None if gradient is None else gradient.to(weight.device, copy=True)",
        "            pass",
        "tests/resuming/test_resume.py::test_a_training_that_was_stopped_anywhere_goes_on_as_if_it_had_not",
    ),
    Mutation(
        "a save that Ctrl-C broke off is published",
        "sidestep_plugin/adapters/staging.py",
        "    except Exception:\n        _put(stage, folder)",
        "    except BaseException:\n        _put(stage, folder)",
        "tests/adapters/test_staging.py",
    ),
    Mutation(
        "a checkpoint's files are not compared with what was saved",
        "sidestep_plugin/resuming/checkpoints.py",
        "        if found != expected:",
        "        if False:",
        "tests/resuming/test_resume.py::test_whatever_is_cut_off_or_missing_is_refused",
    ),
    Mutation(
        "the layers that a LoKr adapts kept in bf16",
        "hooks/memory.py",
        " and id(module) not in adapted:",
        ":",
        "tests/hooks/test_memory.py::test_a_lokr_is_the_same_bit_for_bit",
    ),
    Mutation(
        "norms kept in bf16, too",
        "hooks/memory.py",
        "isinstance(module, cast_by_autocast) and",
        "",
        "tests/hooks/test_memory.py::test_a_lora_is_the_same_bit_for_bit",
    ),
    Mutation(
        "a fork that drops conditions by itself goes unnoticed",
        "sidestep_plugin/trainer/seams.py",
        "if _DROPOUT.fullmatch(name):",
        "if name == '':",
        "tests/trainer/test_decoder_check.py",
    ),
    Mutation(
        "a batch that is changed behind the hooks goes unnoticed",
        "sidestep_plugin/trainer/decoder_check.py",
        'hasattr(handed, "shape") and not _same(handed, given[name])',
        "handed is given",
        "tests/trainer/test_decoder_check.py",
    ),
    Mutation(
        "a plugin that only looks is handed the loss itself",
        "sidestep_plugin/trainer/wrappers/step.py",
        "loss=loss.detach().clone()",
        "loss=loss",
        "tests/trainer/test_decoder_check.py",
    ),
    Mutation(
        "two trainings in one output folder",
        "sidestep_plugin/resuming/lock.py",
        "            raise BlockingIOError from error\n",
        "            return\n",
        "tests/resuming/test_lock.py",
    ),
    Mutation(
        "the same random numbers in every process",
        "sidestep_plugin/trainer/wrappers/engine.py",
        "                seed_apart(training.run)\n",
        "                pass\n",
        "tests/several_gpus/test_equality.py::test_random_numbers_differ_and_songs_are_divided",
    ),
    Mutation(
        "songs in the order of seed 0, whatever the run's seed",
        "sidestep_plugin/trainer/devices.py",
        '        shuffle=True,\n        seed=int(getattr(run.training_config, "seed", 0)),\n',
        "        shuffle=True,\n",
        "tests/several_gpus/test_equality.py",
    ),
    Mutation(
        "a stop that all processes have to ask for",
        "sidestep_plugin/trainer/processes.py",
        "op=dist.ReduceOp.MAX",
        "op=dist.ReduceOp.MIN",
        "tests/several_gpus/test_equality.py::test_a_stop_in_one_process_ends_all_after_the_same_step",
    ),
    Mutation(
        "resumed with the random numbers of the first process everywhere",
        "hooks/resume_training.py",
        "own = known[run.ranks.rank] if",
        "own = known[0] if",
        "tests/several_gpus/test_equality.py::test_resuming_with_as_many_processes_equals_going_through",
    ),
]


def broken_copy(mutation: Mutation, folder: Path) -> Path:
    """Copy the project and make one mistake in it. Raises LookupError when the text is not there exactly once."""
    for part in ("sidestep_plugin", "hooks", "patches", "docs", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    file = folder / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.found) != 1:
        raise LookupError(f"{mutation.file} holds {text.count(mutation.found)} times: {mutation.found!r}")
    file.write_text(text.replace(mutation.found, mutation.becomes), encoding="utf-8")
    # Where the package looks for its plugin and its patch when it is used without being installed.
    for part in ("hooks", "patches"):
        shutil.copytree(folder / part, folder / "sidestep_plugin" / part)
    return folder


def main() -> int:
    """Try every mutation | returns the exit code."""
    survived = 0
    for mutation in MUTATIONS:
        with tempfile.TemporaryDirectory() as temporary:
            copy = broken_copy(mutation, Path(temporary) / "copy")
            line = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rf", "-p", "no:cacheprovider"]
            done = subprocess.run(
                [*line, *mutation.tests.split()],
                cwd=copy,
                capture_output=True,
                text=True,
                env=os.environ | {"PYTHONPATH": str(copy)},
            )
        failed = re.findall(r"^FAILED (\S+?)(?:\[| |$)", done.stdout, flags=re.MULTILINE)
        caught = done.returncode == 1 and bool(failed)
        survived += not caught
        names = ", ".join(sorted(set(failed))) if caught else f"NOTHING FAILED\n{done.stdout[-600:]}"
        print(f"{'caught  ' if caught else 'SURVIVED'} {mutation.mistake}: {names}", flush=True)
    print(f"{len(MUTATIONS) - survived} passed, {survived} failed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
