"""Shows that the tests can fail: ``python tests/tools/mutations.py`` breaks a copy of the project in many ways.

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

ROOT = Path(__file__).parents[2]


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
        "a window that reaches into a song's padding",
        "hooks/crops.py",
        "    last = (shown - window).clamp(min=0)\n",
        "    last = (shown * 0 + frames - window).clamp(min=0)\n",
        "tests/hooks/test_crops.py::test_a_window_lies_within_its_own_song",
    ),
    Mutation(
        "the context not cut with the song",
        "sidestep_plugin/engine/answers.py",
        "    return lengths.pop() if len(lengths) == 1 and 0 <",
        "    return min(lengths) if 0 <",
        "tests/hooks/test_crops.py::test_entries_that_do_not_belong_together_stop_the_step",
    ),
    Mutation(
        "a song from RAM although its file changed",
        "sidestep_plugin/memory/song_cache.py",
        "(kept.state, kept.written) == (state, writes(counted(kept.song)))",
        "kept.written == writes(counted(kept.song))",
        "tests/memory/test_song_cache.py::test_a_file_that_changes_is_read_again",
    ),
    Mutation(
        "a song from RAM that somebody wrote to",
        "sidestep_plugin/memory/song_cache.py",
        "(kept.state, kept.written) == (state, writes(counted(kept.song)))",
        "kept.state == state",
        "tests/memory/test_song_cache.py::test_a_song_that_somebody_wrote_to_is_read_again",
    ),
    Mutation(
        "the measuring of quantized weights draws from the run's random numbers",
        "sidestep_plugin/memory/quantization.py",
        "torch.randn(data.shape, generator=torch.Generator().manual_seed(0))",
        "torch.randn(data.shape)",
        "tests/memory/test_quantization.py::test_measuring_draws_no_random_number",
    ),
    Mutation(
        "quantized layers that stay in the model",
        "sidestep_plugin/memory/quantization.py",
        "    if not run.engine.ends_the_program:",
        "    if False:",
        "tests/memory/test_quantization.py::test_a_training_with_quantized_weights",
    ),
    Mutation(
        "compiled blocks that stay compiled",
        "sidestep_plugin/memory/compiling.py",
        "    run.engine.at_end(partial(_undo, blocks))\n",
        "",
        "tests/memory/test_compiling.py::test_a_training_with_compiled_blocks",
    ),
    Mutation(
        "windows in validation",
        "hooks/crops.py",
        "window is None or not step.training or",
        "window is None or",
        "tests/hooks/test_crops.py::test_whole_songs_draw_no_random_number",
    ),
    Mutation(
        "validation that draws from the training's random numbers",
        "sidestep_plugin/engine/decoders.py",
        "        set_random_states(states, device)",
        "        pass",
        "tests/validation/test_validating.py::test_the_training_is_the_same_bit_for_bit",
    ),
    Mutation(
        "a decoder left in eval mode by validation",
        "sidestep_plugin/engine/decoders.py",
        "            module.training = mode",
        "            pass",
        "tests/validation/test_validating.py::test_the_training_is_the_same_bit_for_bit",
    ),
    Mutation(
        "new noise in every validation",
        "sidestep_plugin/engine/wrappers/step.py",
        "    point.seed_noise(step.device)\n",
        "",
        "tests/validation/test_validating.py::test_a_learning_rate_of_zero_gives_the_same_number_in_every_epoch",
    ),
    Mutation(
        "validated before the epoch's last optimizer step",
        "sidestep_plugin/engine/journal.py",
        "            self.epoch_to_end = self.epochs_begun, self._losses.mean_of_newest(self._in_epoch)\n",
        "            self.epoch_to_end = self.epochs_begun, self._losses.mean_of_newest(self._in_epoch)\n"
        "            self.ends()\n",
        "tests/validation/test_validating.py::test_best_has_the_weights_that_were_measured",
    ),
    Mutation(
        "songs that are held out trained on all the same",
        "sidestep_plugin/engine/wrappers/songs.py",
        "        if out:\n",
        "        if False:\n",
        "tests/validation/test_validating.py::test_the_training_is_the_same_bit_for_bit",
    ),
    Mutation(
        "the newest adapter as final where the best was promised",
        "sidestep_plugin/engine/services.py",
        "        put_weights(run, point.weights)\n",
        "",
        "tests/validation/test_validating.py::test_a_planted_overfit_turns_the_curve_and_patience_stops_it",
    ),
    Mutation(
        "a single draw instead of the maximum of two",
        "hooks/timesteps.py",
        "return torch.maximum(first, second)",
        "return first",
        "tests/timesteps/test_timestep_law.py tests/test_promises.py::test_the_loss_is_that_of_the_models_own_forward",
    ),
    Mutation(
        "one draw that both times share",
        "hooks/timesteps.py",
        "return torch.maximum(first, second)",
        "return torch.maximum(first, first)",
        "tests/timesteps/test_timestep_law.py tests/test_promises.py::test_the_loss_is_that_of_the_models_own_forward",
    ),
    Mutation(
        "the dropout mask drawn after the noise",
        "hooks/condition_dropout.py",
        "    dropped = torch.rand((conditions.shape[0],), device=step.device, dtype=step.dtype) < cfg_ratio\n",
        "    state = torch.get_rng_state()\n    torch.randn_like(batch['target_latents'])\n"
        "    dropped = torch.rand((conditions.shape[0],), device=step.device, dtype=step.dtype) < cfg_ratio\n"
        "    torch.set_rng_state(state)\n",
        "tests/test_promises.py::test_the_loss_is_that_of_the_models_own_forward",
    ),
    Mutation(
        "dropout in validation",
        "hooks/condition_dropout.py",
        "cfg_ratio == 0.0 or not step.training",
        "cfg_ratio == 0.0",
        "tests/test_promises.py::test_conditions_are_dropped_in_training_and_never_in_validation",
    ),
    Mutation(
        "whole batches dropped at once",
        "hooks/condition_dropout.py",
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
        "a preview that leaves the random state as it made it",
        "sidestep_plugin/engine/decoders.py",
        "        set_random_states(states, device)\n",
        "        random_states(device)\n",
        "tests/previews/test_in_training.py::test_drawing_in_a_preview_changes_nothing",
    ),
    Mutation(
        "a preview that leaves the decoder in eval mode",
        "sidestep_plugin/engine/decoders.py",
        "            module.training = mode\n",
        "            pass\n",
        "tests/previews/test_in_training.py::test_the_adapter_is_the_same_bit_for_bit",
    ),
    Mutation(
        "the base model's clips with the adapter on",
        "sidestep_plugin/engine/decoders.py",
        "                layer.enable_adapters(False)\n",
        "                pass\n",
        "tests/previews/test_in_training.py::test_a_resumed_run_without_a_table_makes_the_base_row_with_the_adapter_off",
    ),
    Mutation(
        "clips from the song's own audio",
        "sidestep_plugin/previews/conditions.py",
        "    context = silent_context(silence, song.frames).to(device, dtype)\n",
        '    context = tensors["context_latents"][: song.frames].unsqueeze(0).to(device, dtype)\n',
        "tests/previews/test_generation.py::test_the_songs_own_audio_is_in_no_condition",
    ),
    Mutation(
        "the sampler left unpatched",
        "sidestep_plugin/engine/seams.py",
        '        hooks=("acestep_sample_timesteps", EVALUATE),',
        "        hooks=(EVALUATE,),",
        "tests/test_promises.py::test_base_and_sft_are_trained_at_continuous_times",
    ),
    Mutation(
        "the sampler's answer thrown away",
        "sidestep_plugin/engine/wrappers/sampler.py",
        "            return t, t\n",
        "            return original(*args, **kwargs)\n",
        "tests/test_promises.py::test_base_and_sft_are_trained_at_continuous_times",
    ),
    Mutation(
        "no guard against a step that never calls the sampler",
        "sidestep_plugin/engine/wrappers/step.py",
        "if samples and not step.sampler_called:",
        "if False:",
        "tests/engine/test_attachment.py::test_a_step_that_never_calls_the_sampler_stops_the_run",
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
        "sidestep_plugin/engine/attachment.py",
        "        while self._replacements:\n            self._replacements.pop().undo()\n        self._host",
        "        while len(self._replacements) > 1:\n            self._replacements.pop().undo()\n"
        "        self._replacements.clear()\n        self._host",
        "tests/engine/test_attachment.py::test_detach_puts_back_the_very_objects",
    ),
    Mutation(
        "checkpoints without metadata",
        "sidestep_plugin/adapters/kinds/lora.py",
        '("save_lora_weights", "save_training_checkpoint")',
        '("save_lora_weights", "save_lora_weights")',
        "tests/cli/test_train.py::test_the_whole_job",
    ),
    Mutation(
        "alpha as it is for diffusers, whatever the rank of a layer",
        "sidestep_plugin/adapters/header.py",
        "for layer in layers if layer.alpha != alpha}",
        "for layer in ()}",
        "tests/adapters/test_diffusers.py",
    ),
    Mutation(
        "no alpha tensors for ComfyUI",
        "sidestep_plugin/adapters/comfyui.py",
        'tensors[f"{name}.alpha"] = NewTensor("F32", (), struct.pack("<f", layer.alpha * strength))',
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
        "sidestep_plugin/engine/wrappers/saving.py",
        "                with published(stage, folder):",
        "                import shutil as s; s.copytree(stage, folder, dirs_exist_ok=True)\n"
        "                with published(stage, folder):",
        "tests/test_kills.py",
    ),
    Mutation(
        "what cannot be attached is forgotten",
        "sidestep_plugin/engine/attachment.py",
        "        attachment._message = message\n        attachment._apply()\n",
        "",
        "tests/engine/test_checkout_patch.py",
    ),
    Mutation(
        "the losing sampler is asked",
        "sidestep_plugin/registry.py",
        "for name in implementing if owner_of(name) == self.wins",
        "for name in implementing if owner_of(name) != self.wins",
        "tests/test_plugins_of_others.py",
    ),
    Mutation(
        "a resumed adapter that keeps its fresh weights, as upstream's does",
        "sidestep_plugin/adapters/kinds/lora.py",
        "                tensor.copy_(weights[name])",
        "                pass",
        "tests/resuming/test_resume.py::test_three_and_three_epochs_are_six",
    ),
    Mutation(
        "a fresh optimizer after resuming",
        "sidestep_plugin/engine/replay.py",
        '{"state": point.optimizer["state"], "param_groups": groups}',
        '{"state": {}, "param_groups": groups}',
        "tests/resuming/test_resume.py::test_three_and_three_epochs_are_six",
    ),
    Mutation(
        "other random numbers after resuming",
        "sidestep_plugin/engine/replay.py",
        "        if point.random is not None:\n            set_random_states(point.random, self.device)",
        "        if False:\n            pass",
        "tests/resuming/test_resume.py::test_three_and_three_epochs_are_six",
    ),
    Mutation(
        "another order of the songs after a stop within an epoch",
        "sidestep_plugin/engine/replay.py",
        "            set_random_states(self.point.epoch_random, self.device)",
        "            pass",
        "tests/resuming/test_resume.py::test_a_training_that_was_stopped_anywhere_goes_on_as_if_it_had_not",
    ),
    Mutation(
        "gradients that waited are forgotten",
        "sidestep_plugin/engine/replay.py",
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
        "sidestep_plugin/memory/base_weights.py",
        " and id(module) not in adapted\n",
        "\n",
        "tests/memory/test_frozen_weights.py::test_a_lokr_is_the_same_bit_for_bit",
    ),
    Mutation(
        "norms kept in bf16, too",
        "sidestep_plugin/memory/base_weights.py",
        "isinstance(module, cast_by_autocast) and",
        "",
        "tests/memory/test_frozen_weights.py::test_a_lora_is_the_same_bit_for_bit",
    ),
    Mutation(
        "checkpointing that loses the gradients",
        "sidestep_plugin/memory/gradient_checkpointing.py",
        "use_reentrant=False",
        "use_reentrant=True",
        "tests/memory/test_gradient_checkpointing.py::test_on_and_off_are_the_same_bit_for_bit",
    ),
    Mutation(
        "checkpointing whose second pass draws other numbers",
        "sidestep_plugin/memory/gradient_checkpointing.py",
        "use_reentrant=False",
        "use_reentrant=False, preserve_rng_state=False",
        "tests/memory/test_gradient_checkpointing.py::test_on_and_off_are_the_same_bit_for_bit",
    ),
    Mutation(
        "checkpointing off without a margin of memory",
        "sidestep_plugin/memory/estimate.py",
        "self.total * MARGIN * too_low() <= free",
        "self.total <= free",
        "tests/memory/test_estimate.py::test_a_margin_is_left_free",
    ),
    Mutation(
        "a fork that drops conditions by itself goes unnoticed",
        "sidestep_plugin/engine/shapes.py",
        "if _DROPOUT.fullmatch(name):",
        "if name == '':",
        "tests/engine/test_decoder_check.py",
    ),
    Mutation(
        "a batch that is changed behind the hooks goes unnoticed",
        "sidestep_plugin/engine/decoder_check.py",
        'hasattr(handed, "shape") and not _same(handed, given[name])',
        "handed is given",
        "tests/engine/test_decoder_check.py",
    ),
    Mutation(
        "a plugin that only looks is handed the loss itself",
        "sidestep_plugin/engine/wrappers/step.py",
        "loss=loss.detach().clone()",
        "loss=loss",
        "tests/engine/test_decoder_check.py",
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
        "sidestep_plugin/engine/wrappers/engine.py",
        "                seed_apart(training.run)\n",
        "                pass\n",
        "tests/several_gpus/test_equality.py::test_random_numbers_differ_and_songs_are_divided",
    ),
    Mutation(
        "songs in the order of seed 0, whatever the run's seed",
        "sidestep_plugin/engine/devices.py",
        '        shuffle=True,\n        seed=int(getattr(run.training_config, "seed", 0)),\n',
        "        shuffle=True,\n",
        "tests/several_gpus/test_equality.py",
    ),
    Mutation(
        "a stop that all processes have to ask for",
        "sidestep_plugin/engine/processes.py",
        "op=dist.ReduceOp.MAX",
        "op=dist.ReduceOp.MIN",
        "tests/several_gpus/test_equality.py::test_a_stop_in_one_process_ends_all_after_the_same_step",
    ),
    Mutation(
        "resumed with the random numbers of the first process everywhere",
        "sidestep_plugin/resuming/plugin.py",
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
