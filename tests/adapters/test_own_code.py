"""The programs' rules in ``readers.py`` against the programs' own code, on every adapter of docs/readers.md.

    pytest tests/adapters/test_own_code.py --readers DIR

DIR holds clones named ComfyUI (Comfy-Org), acestep.cpp (ServeurpersoCom), HOT-Step-CPP (scragnog), Wan2GP
(deepbeepmeep), DEMON (daydreamlive) and ggml (ggml-org, built with ``cmake -B build -DBUILD_SHARED_LIBS=OFF
-DGGML_OPENMP=OFF && cmake --build build``). acestep.cpp and HOT-Step need g++ and ``pip install gguf``, Wan2GP
``pip install mmgp``.
"""

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("lycoris")

from readers_table import LOKRS, LORAS, forms_of

from .comfyui_rules import a_decoder, weights_of
from .own_code import programs_in
from .readers import READERS

PROGRAMS = ["ComfyUI", "acestep.cpp", "HOT-Step", "Wan2GP", "DEMON"]


@pytest.fixture(scope="module")
def programs(request, tmp_path_factory):
    said = request.config.getoption("--readers")
    if not said:
        pytest.skip("needs the programs' repositories: pytest tests/adapters/test_own_code.py --readers DIR")
    return programs_in(Path(said).absolute(), tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module", params=[*LORAS, *LOKRS])
def title(request):
    return request.param


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def forms(request, title, programs, tmp_path_factory):
    """The adapter as trained and its copies, those that are not refused."""
    made, _ = forms_of(title, request.param, tmp_path_factory.mktemp("forms"))
    return {form: place for form, place in made.items() if place is not None}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_does_what_its_rules_say(programs, forms, name):
    found, missing = programs
    if name in missing:
        pytest.skip(missing[name])
    before = weights_of(a_decoder())
    # acestep.cpp rounds changes to bf16, and two orders of adding may round to either side.
    rounds = 5e-3 if name in ("acestep.cpp", "HOT-Step") else 1e-5
    for form, place in forms.items():
        by_rules, by_code = READERS[name](place, dict(before)), found[name](place, dict(before))
        assert by_code.keys() == by_rules.keys(), form
        for layer, change in by_rules.items():
            off = rounds * float(change.abs().max())
            torch.testing.assert_close(by_code[layer], change, rtol=rounds, atol=off, msg=f"{form}, {layer}")
