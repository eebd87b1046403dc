"""The kinds of adapter: what each says about sizes and strengths is what its library does, and they are data alike."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sidestep_plugin.adapters.kinds import BY_NAME, KINDS, NAMES
from sidestep_plugin.adapters.kinds.lokr import LOKR

ROOT = Path(__file__).parents[2]

# -- LoKr, as LyCORIS makes it -----------------------------------------------------------------------------------------

SIZES = [(64, 64), (64, 32), (2048, 2048), (2048, 1024), (6144, 2048), (2560, 9728), (7, 30), (97, 64), (1, 5)]
SETTINGS = {
    "the defaults": {},
    "a small rank": {"linear_dim": 4},
    "a rank at the bound": {"linear_dim": 32},
    "a rank below the bound": {"linear_dim": 31},
    "a factor": {"linear_dim": 16, "factor": 8},
    "a factor that divides nothing": {"linear_dim": 3, "factor": 5},
    "both decomposed": {"linear_dim": 2, "decompose_both": True},
    "both decomposed, another factor": {"linear_dim": 2, "decompose_both": True, "factor": 16},
    "unbalanced": {"linear_dim": 8, "unbalanced_factorization": True, "factor": 4},
    "full matrices": {"linear_dim": 4, "full_matrix": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_lokr_of_full_matrices_is_known_as_one(settings):
    lokr = pytest.importorskip("lycoris.modules.lokr", reason="LoKr needs lycoris-lora")
    settings = {"linear_dim": 64, "linear_alpha": 128} | settings
    config = SimpleNamespace(**settings)
    more = {name: value for name, value in settings.items() if not name.startswith("linear_")}
    for rows, columns in SIZES:
        module = lokr.LokrModule(
            "x", torch.nn.Linear(columns, rows), lora_dim=config.linear_dim, alpha=config.linear_alpha, **more
        )
        told = LOKR.without_effect(config, {"x": (rows, columns)})
        whole = module.use_w1 and module.use_w2
        assert bool(told) is whole, (rows, columns)
        assert LOKR.effective_alpha(config, {"x": (rows, columns)}) == module.alpha.item()
        if config.linear_alpha != 128 or whole or settings.keys() - {"linear_dim", "linear_alpha"}:
            continue
        trained = sum(weight.numel() for weight in module.parameters())
        assert LOKR.parameters((rows, columns), config.linear_dim) == trained, (rows, columns)


def test_settings_without_effect_are_told_with_the_rank_that_has_one():
    config = SimpleNamespace(linear_dim=64, linear_alpha=128)
    (told,) = LOKR.without_effect(config, {"q": (2048, 2048), "v": (1024, 2048)})
    assert "rank 64 and alpha 128 change nothing in all trained layers" in told and "below rank 32" in told
    assert LOKR.without_effect(SimpleNamespace(linear_dim=31, linear_alpha=128), {"q": (2048, 2048)}) == []
    (some,) = LOKR.without_effect(config, {"q": (2048, 2048), "big": (2048, 2048 * 97)})
    assert "in 1 of 2 trained layers" in some
    assert LOKR.effective_alpha(config, {"q": (2048, 2048), "big": (2048, 2048 * 97)}) == 128
    assert LOKR.without_effect(SimpleNamespace(linear_dim=64, linear_alpha=64), {"q": (2048, 2048)}) == []


def test_a_training_tells_settings_without_effect_before_its_first_step(train, require_kind, capsys):
    require_kind("lokr")
    output = train("base", "lokr", max_epochs=1).output
    said = capsys.readouterr().out.splitlines()
    (line,) = [number for number, text in enumerate(said) if text.startswith("LoKr: rank 4 and alpha 8 change nothing")]
    assert line < next(number for number, text in enumerate(said) if text.startswith("Memory:"))
    (file,) = output.glob("final/**/training_config.json")
    assert '"alpha": 4,' in file.read_text(encoding="utf-8")


def test_a_lora_tells_nothing(train, capsys):
    train("base", max_epochs=1)
    assert "change nothing" not in capsys.readouterr().out


# -- one list ----------------------------------------------------------------------------------------------------------

OTHER_MEANINGS = {
    # Modes of upstream's preprocessing have the same names.
    "sidestep_plugin/engine/song_files.py",
    "sidestep_plugin/engine/wrappers/preprocessing.py",
    "sidestep_plugin/preparing/planning.py",
    "sidestep_plugin/songs/making.py",
    # What was measured on a GPU: a table of finished jobs.
    "sidestep_plugin/gpu_report/jobs.py",
    "sidestep_plugin/measured/reading.py",
}


def words_in(tree):
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_no_code_but_its_own_names_a_kind():
    """A third kind is one file and one line."""
    named = {
        file.relative_to(ROOT).as_posix()
        for folder in ("sidestep_plugin", "hooks")
        for file in (ROOT / folder).rglob("*.py")
        if not {"miniature", "kinds"} & set(file.parts)
        if set(NAMES) & words_in(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert named - OTHER_MEANINGS == set()
    assert named, "the rule finds nothing any more"


def test_every_kind_says_everything_in_its_own_words():
    for values in zip(*(vars(kind).items() for kind in KINDS), strict=True):
        assert len({name for name, _ in values}) == 1
    for field in ("name", "title", "module_class", "config_class", "weight_name", "copy_name", "package"):
        assert len({getattr(kind, field) for kind in KINDS}) == len(KINDS), field
    assert {kind.name: kind for kind in KINDS} == BY_NAME


THIRD = """
import dataclasses, sys
import sidestep_plugin.adapters.kinds as kinds
third = dataclasses.replace(
    kinds.LOKR, name="loha", title="LoHa", module_class="PreprocessedLoHaModule", config_class="LoHaConfig",
    trainer_class="LoHaTrainer", weight_files=("loha_weights.safetensors",), copy_name="comfyui_loha.safetensors",
    fields={"rank": "loha_dim", "alpha": "loha_alpha"}, default_rank=16,
)
kinds.KINDS = (*kinds.KINDS, third)
kinds.BY_NAME, kinds.NAMES = {kind.name: kind for kind in kinds.KINDS}, tuple(kind.name for kind in kinds.KINDS)
from sidestep_plugin.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--help"], "lora|lokr|loha"),
        (["recommended", "--adapter-type", "loha"], "--rank 64"),
        (
            ["estimate", "--model", "base", "--seconds", "60", "--adapter-type", "loha", "--plugin", "none"],
            "Adapter: LoHa of rank 16",
        ),
    ],
    ids=["train", "recommended", "estimate"],
)
def test_a_third_kind_is_known_everywhere_once_it_is_in_the_list(words, says, tmp_path):
    words = words if words[0] != "--help" else ["train", "--help"]
    done = subprocess.run(
        [sys.executable, "-c", THIRD, *words], capture_output=True, text=True, encoding="utf-8", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout, done.stdout
