"""Writes the tables of docs/readers.md: ``python tests/tools/readers_table.py``.

PEFT and LyCORIS make the adapters, of random numbers. PEFT is run; the other programs' rules are those of
``tests/adapters/readers.py``.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from adapters.comfyui_rules import ATTENTION, a_decoder, make_random, measured, weights_of
from adapters.readers import READERS
from safetensors.torch import load_file, save_file

from sidestep_plugin.adapters.comfyui import write_comfyui_copy
from sidestep_plugin.adapters.layers import read_adapter
from sidestep_plugin.adapters.universal import write_universal
from sidestep_plugin.errors import Refusal

PAGE = Path(__file__).parents[2] / "docs" / "readers.md"
BEGIN, END = "<!-- begin of the tables -->\n", "<!-- end of the tables -->\n"
NOT = "–"
OFF = 0.02
"""Above this part of what was trained, what is left beside the strength is told: bf16 rounds by less."""

LORAS = {
    f"LoRA, rank {rank}, alpha {words}": {"r": rank, "lora_alpha": alpha}
    for rank in (4, 8, 64)
    for words, alpha in (("= rank", rank), ("2 × rank", 2 * rank), ("½ × rank", rank // 2))
} | {
    "LoRA, `rank_pattern`": {"rank_pattern": {"q_proj": 2, "v_proj": 7}},
    "LoRA, `alpha_pattern`": {"alpha_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 50}},
    "LoRA, rsLoRA": {"use_rslora": True},
}
LOKRS = {
    "LoKr, full matrices": {"linear_dim": 64, "linear_alpha": 128},
    "LoKr, one factor decomposed": {"linear_dim": 2, "linear_alpha": 8},
    "LoKr, both factors decomposed": {"linear_dim": 2, "linear_alpha": 8, "decompose_both": True, "factor": 8},
    "LoKr, weight decomposition": {"linear_dim": 2, "linear_alpha": 8, "dora_wd": True},
}
Changes = dict[str, torch.Tensor]


def linear_weights() -> dict[str, torch.Tensor]:
    decoder = a_decoder()
    return {name: weight for name, weight in weights_of(decoder).items() if weight.dim() == 2}


def lora(folder: Path, settings: dict, dtype: torch.dtype) -> Changes:
    """Save a LoRA with PEFT. Returns what PEFT adds."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | settings))
    whole = get_peft_model(a_decoder(), config)
    make_random((name, parameter) for name, parameter in whole.named_parameters() if "lora_" in name)
    whole.save_pretrained(folder)
    in_dtype(folder / "adapter_model.safetensors", dtype)
    return by_peft(folder)


def by_peft(folder: Path) -> Changes:
    from peft import PeftModel

    before = linear_weights()
    merged = PeftModel.from_pretrained(a_decoder(), folder).merge_and_unload()
    changes = {name: merged.get_submodule(name).weight.detach() - weight for name, weight in before.items()}
    return {name: change for name, change in changes.items() if change.any()}


def lokr(folder: Path, settings: dict, dtype: torch.dtype) -> Changes:
    """Save a LoKr as LyCORIS and ACE-Step do. Returns what LyCORIS adds."""
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"target_name": [f".*{name}" for name in ATTENTION]})
    decoder, before = a_decoder(), linear_weights()
    network = create_lycoris(decoder, 1.0, algo="lokr", **settings)
    network.apply_to()
    make_random(network.named_parameters())
    folder.mkdir()
    file = folder / "lokr_weights.safetensors"
    tensors = {name: weight.contiguous() for name, weight in network.state_dict().items()}
    save_file(tensors, file, {"format": "pt", "lokr_config": json.dumps(settings)})
    in_dtype(file, dtype)
    network.load_state_dict({name: weight.float() for name, weight in load_file(file).items()}, strict=False)
    after = measured(decoder, before)
    return {name: (weight - before[name]).detach() for name, weight in after.items()}


def in_dtype(file: Path, dtype: torch.dtype) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    tensors = {key: tensor if key.endswith("alpha") else tensor.to(dtype) for key, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors, file, header)


def told(found: Changes, trained: Changes) -> str:
    """The strength found against the one that was trained, and what else is different."""
    dot = sum(float((found[name].double() * trained[name].double()).sum()) for name in trained if name in found)
    whole = sum(float(change.double().square().sum()) for change in trained.values())
    strength = dot / whole
    if not found:
        return NOT
    rest = sum(
        float((found.get(name, 0.0 * change).double() - strength * change.double()).square().sum())
        for name, change in trained.items()
    )
    off = (rest / whole) ** 0.5
    text = f"{strength:.2f}".rstrip("0").rstrip(".")
    return f"{text}, {100 * off:.0f} % wrong" if off > OFF else text


def forms_of(title: str, dtype: torch.dtype, folder: Path) -> tuple[dict[str, Path | None], Changes]:
    """The adapter as trained and its copies, in a folder, None where a copy is refused; and what was trained."""
    make, settings = (lora, LORAS[title]) if title in LORAS else (lokr, LOKRS[title])
    trained = make(folder / "adapter", copy.deepcopy(settings), dtype)
    adapter, before = read_adapter(folder / "adapter"), weights_of(a_decoder())
    forms: dict[str, Path | None] = {"as trained": folder / "adapter"}
    (folder / "ComfyUI").mkdir()
    copies = {
        "ComfyUI copy": (
            folder / "ComfyUI" / "copy.safetensors",
            lambda to: write_comfyui_copy(adapter, to, None, before.get),
        ),
        "universal copy": (folder / "universal", lambda to: write_universal(adapter, to, {})),
    }
    for name, (place, write) in copies.items():
        try:
            write(place)
            forms[name] = place
        except Refusal:
            forms[name] = None
    return forms, trained


def row(title: str, dtype: torch.dtype) -> dict[str, list[str]]:
    """For one adapter, by form (as trained, ComfyUI copy, universal copy), what each program makes of it."""
    before, cells = weights_of(a_decoder()), {}
    with tempfile.TemporaryDirectory() as temporary:
        forms, trained = forms_of(title, dtype, Path(temporary))
        for name, place in forms.items():
            played = [NOT if place is None else told(read(place, dict(before)), trained) for read in READERS.values()]
            own = "1" if title in LOKRS and name == "as trained" else NOT
            if place is not None and title in LORAS and name != "ComfyUI copy":
                own = told(by_peft(place), trained)
            cells[name] = [own, *played]
    return cells


def lines_of(title: str) -> dict[str, str]:
    """The line of an adapter in each of the tables."""
    one, other = (row(title, dtype) for dtype in (torch.float32, torch.bfloat16))
    lines = {}
    for form in one:
        pairs = zip(one[form], other[form], strict=True)
        cells = [exact if exact == rounded else f"{exact} (bf16: {rounded})" for exact, rounded in pairs]
        lines[form] = f"| {title} | {' | '.join(cells)} |"
    return lines


def tables() -> str:
    """The three tables as Markdown."""
    rows: dict[str, list[str]] = {}
    for title in LORAS | LOKRS:
        for form, line in lines_of(title).items():
            rows.setdefault(form, []).append(line)
    names = ["ACE-Step's app, PEFT", *READERS]
    lines = []
    for form, made in rows.items():
        lines += [f"### {form[0].upper()}{form[1:]}", "", f"| adapter | {' | '.join(names)} |"]
        lines += [f"| --- |{' --- |' * len(names)}", *made, ""]
    return "\n".join(lines)


def page() -> str:
    """The page with the tables as they must be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
