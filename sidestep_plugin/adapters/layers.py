"""What an adapter's files hold: which layers, of which rank, at which strength. Whoever wrote it, in whichever naming.

The names of the layers are those of ACE-Step's own decoder, such as ``layers.0.self_attn.q_proj``. Nothing here loads
a tensor, and a pickle is never opened.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..errors import Refusal
from ..files import read_json_object
from ..text import shown
from .weights_file import Tensor, WeightsFile, read_weights_file

WEIGHT_NAMES: Final = ("adapter_model.safetensors", "lokr_weights.safetensors")
"""What upstream and PEFT call an adapter's weights."""

DIFFUSERS_KEY: Final = "lora_adapter_metadata"
"""Header key under which diffusers keeps a LoRA's configuration, as JSON (``LORA_ADAPTER_METADATA_KEY`` there)."""

_FOLDERS: Final = ("", "adapter", "final", "final/adapter")
_COPY: Final = re.compile(r"comfyui_.*\.safetensors")

# PEFT / ComfyUI / diffusers, then kohya-style and LyCORIS names, which put underscores for dots.
_DOTTED: Final = re.compile(r"(?:base_model\.model\.|diffusion_model\.decoder\.|transformer\.|decoder\.)?(.+)")
_FLAT: Final = re.compile(r"(?:lora_unet_|lycoris_)(?:decoder_)?(.+)")
_FLAT_LAYER: Final = re.compile(r"layers_(\d+)_(self_attn|cross_attn|mlp)_(.+)")
_LAYER: Final = re.compile(r"layers\.\d+\.((self_attn|cross_attn)\.[qkvo]_proj|mlp\..+)")
_OUTER: Final = re.compile(r"condition_embedder|proj_(in|out)(\.\d)?|time_embed(_r)?\.\w+")
_FLAT_OUTER: Final = re.compile(r"(proj_in|proj_out|time_embed_r|time_embed)_(\w+)")
# Patterns are regular expressions, and come from files of strangers: those that are more than a name are not tried.
_NAME_PATTERN: Final = re.compile(r"\^?((?:[\w-]|\\?\.)+)\$?")
_DIFFUSERS_NAMES: Final = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0"}

# What stands behind a layer's name, and what it is.
_PARTS: Final = (
    (r"\.lora_A(\.default)?\.weight|\.lora_down\.weight|\.lora\.down\.weight", "A"),
    (r"\.lora_B(\.default)?\.weight|\.lora_up\.weight|\.lora\.up\.weight", "B"),
    (r"\.lora_magnitude_vector(\.default)?(\.weight)?|\.dora_scale", "magnitude"),
    (r"\.alpha", "alpha"),
    (r"\.(lokr_\w+)", "lokr"),
    (r"\.(hada_\w+)", "loha"),
    (r"\.(oft_\w+)", "oft"),
    (r"\.scalar", "scalar"),
)
_PART: Final = [(re.compile(f"(?P<layer>.+?)(?:{pattern})"), part) for pattern, part in _PARTS]


@dataclass
class Layer:
    """One adapted layer.

    Attributes:
        name: its name in ACE-Step's decoder.
        parts: its tensors: "A" and "B" of a LoRA, "magnitude" of a DoRA, "alpha"; a LoKr's under their own names.
        rank: rank of a LoRA, or of a LoKr's decomposed factor; None when there is no such number.
        alpha: the effective alpha, so that strength = alpha / rank; None when nothing says it.
    """

    name: str
    parts: dict[str, str] = field(default_factory=dict)
    rank: int | None = None
    alpha: float | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter's weights file and what is beside it.

    Attributes:
        file: the weights.
        kind: "lora", "lokr", "loha" or "oft".
        layers: the adapted layers by name.
        unknown: names of tensors that belong to no known kind of adapter.
        config: PEFT's configuration (adapter_config.json, else the one in the header); empty when there is none.
        config_source: where that was found, None when there is none.
        problems: what is wrong with the files beside the weights.
    """

    file: WeightsFile
    kind: str
    layers: Mapping[str, Layer]
    unknown: tuple[str, ...]
    config: Mapping[str, Any]
    config_source: str | None
    problems: tuple[str, ...]

    @property
    def ranks(self) -> Counter[int]:
        """Number of layers by rank."""
        return Counter(layer.rank for layer in self.layers.values() if layer.rank is not None)

    @property
    def strengths(self) -> Counter[float]:
        """Number of layers by strength (alpha / rank)."""
        return Counter(
            layer.alpha / layer.rank
            for layer in self.layers.values()
            if layer.alpha is not None and layer.rank is not None
        )

    @property
    def is_dora(self) -> bool:
        return any("magnitude" in layer.parts for layer in self.layers.values())

    @property
    def targets(self) -> list[str]:
        """Last parts of the layers' names, such as q_proj, sorted."""
        return sorted({name.rpartition(".")[2] if "." in name else name for name in self.layers})


# -- finding ---------------------------------------------------------------------------------------------------------


def find_weights(path: Path) -> Path:
    """The weights file that a path means: itself, or the one in the folder of an adapter, a checkpoint or a run.

    Raises:
        Refusal: there is none, more than one, only a pickle, or it is a link that leads out of the folder.
    """
    if path.is_dir():
        found = [
            path / folder / name
            for folder in _FOLDERS
            for name in WEIGHT_NAMES
            if (path / folder / name).is_file() or (path / folder / name).is_symlink()
        ]
        found = [file for file in found if file.parent == found[0].parent] or _others_in(path)
        if len(found) != 1:
            raise _not_one(path, found)
        check_inside(found[0], path)
        return found[0]
    if not path.exists():
        raise Refusal(f"No adapter at {path}. Expected a .safetensors file or the folder of an adapter.")
    if not path.is_file() and not path.is_symlink():
        raise Refusal(f"{path} is neither a file nor a folder. Expected a .safetensors file or an adapter's folder.")
    check_inside(path, path.parent)
    return path


def check_inside(file: Path, folder: Path) -> None:
    """Refuse a file that is a link to somewhere outside of the folder. Raises Refusal."""
    try:
        real = file.resolve(strict=True)
        inside = real.is_relative_to(folder.resolve(strict=True))
    except (OSError, RuntimeError):  # a link to nowhere, or to itself
        raise Refusal(f"{file} is a link that leads nowhere. Put the file itself there.") from None
    if not inside:
        raise Refusal(
            f"{file} is a link that leads out of its folder, to {real}; it was not read. Name that file itself."
        )
    if not real.is_file():
        raise Refusal(f"{file} is neither a file nor a link to one. Put the file itself there.")


def _others_in(folder: Path) -> list[Path]:
    files = (file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    return sorted(file for file in files if not _COPY.fullmatch(file.name))


def has_neighbours_of_its_own(weights: Path) -> bool:
    """Whether the JSON files beside a weights file belong to it: beside several, they may describe another one."""
    folder = weights.absolute().parent
    return weights.name in WEIGHT_NAMES or _others_in(folder) == [folder / weights.name]


def _not_one(folder: Path, found: list[Path]) -> Refusal:
    if found:
        names = ", ".join(file.name for file in found[:5])
        return Refusal(f"{folder} holds {len(found)} weights files ({names}). Name one of them.")
    below = sorted(
        file.parent.relative_to(folder)
        for name in WEIGHT_NAMES
        for depth in ("*", "*/*", "*/*/*")
        for file in folder.glob(f"{depth}/{name}")
    )
    if below:
        names = ", ".join(str(place) for place in below[:5]) + (", ..." if len(below) > 5 else "")
        return Refusal(f"{folder} is no adapter, but there are {len(below)} below it: {names}. Name one of them.")
    pickles = sorted(file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{suffix}"))
    if pickles:
        return Refusal(
            f"{folder} holds no .safetensors file, only {pickles[0]}, a pickle file, which may run code when it is "
            "opened, so it was not. Save the adapter as safetensors."
        )
    return Refusal(f"No adapter in {folder}. Expected {' or '.join(WEIGHT_NAMES)} in it.")


def is_known_layer(name: str) -> bool:
    """Whether a layer of ACE-Step 1.5's decoder has this name."""
    return _LAYER.fullmatch(name) is not None or _OUTER.fullmatch(name) is not None


# -- reading ---------------------------------------------------------------------------------------------------------


def read_adapter(path: Path) -> Adapter:
    """Read what an adapter's files hold, without loading a tensor.

    Raises:
        Refusal: no readable weights file, or one that is no adapter for ACE-Step 1.5.
    """
    return understand(read_weights_file(find_weights(path)))


def understand(file: WeightsFile) -> Adapter:
    """Tell layers, ranks and strengths of a weights file. Raises Refusal when it is no adapter for ACE-Step 1.5."""
    layers: dict[str, Layer] = {}
    kinds: Counter[str] = Counter()
    unknown = []
    for key in file.tensors:
        for pattern, part in _PART:
            if match := pattern.fullmatch(key):
                layer = layers.setdefault(name := layer_name(match["layer"]), Layer(name))
                if part in ("lokr", "loha", "oft"):
                    kinds[part] += 1
                    part = key.rpartition(".")[2]
                elif part in ("A", "B"):
                    kinds["lora"] += 1
                if part in layer.parts:
                    raise Refusal(
                        f"{file.path} holds {shown(name)} twice, as {shown(layer.parts[part])} and {shown(key)}: it is "
                        "damaged. Copy or download it again."
                    )
                layer.parts[part] = key
                break
        else:
            unknown.append(key)
    if not kinds:
        raise Refusal(
            f"{file.path} is no adapter: its {len(file.tensors)} tensors have none of the names of a LoRA or LoKr "
            f"({some(file.tensors)}). Expected an adapter for ACE-Step 1.5."
        )
    if not any(_LAYER.fullmatch(name) for name in layers) and not all(_OUTER.fullmatch(name) for name in layers):
        base = file.metadata.get("ss_base_model_version") or file.metadata.get("modelspec.architecture")
        says = f"; its header says {shown(base)}" if base else ""
        raise Refusal(
            f"{file.path} is an adapter for another model than ACE-Step 1.5: it adapts layers such as "
            f"{some(layers)}{says}."
        )
    config, source, problems = _configuration(file)
    adapter = Adapter(file, kinds.most_common(1)[0][0], layers, tuple(unknown), config, source, tuple(problems))
    patterns = _patterns(config)
    for layer in layers.values():
        _measure(adapter, layer, patterns)
    return adapter


def layer_name(prefixed: str) -> str:
    """A layer's name in ACE-Step's decoder, from the name under which some program saved it."""
    if flat := _FLAT.fullmatch(prefixed):
        if parts := _FLAT_LAYER.fullmatch(flat[1]):
            return f"layers.{parts[1]}.{parts[2]}.{parts[3]}"
        outer = _FLAT_OUTER.fullmatch(flat[1])
        return f"{outer[1]}.{outer[2]}" if outer else flat[1]
    match = _DOTTED.fullmatch(prefixed)
    name = match[1] if match else prefixed
    for ours, theirs in _DIFFUSERS_NAMES.items():
        name = name.removesuffix(f".{theirs}") + f".{ours}" if name.endswith(f".{theirs}") else name
    return name


def _measure(adapter: Adapter, layer: Layer, patterns: Mapping[str, tuple[int, Any]] | None) -> None:
    """Fill in a layer's rank and alpha from its tensors and the configuration."""
    tensors = adapter.file.tensors
    if adapter.kind == "lora":
        if "A" in layer.parts and tensors[layer.parts["A"]].shape:
            layer.rank = tensors[layer.parts["A"]].shape[0]
    else:
        for part in ("lokr_w1_b", "lokr_w2_b", "hada_w1_b"):
            if layer.rank is None and part in layer.parts and tensors[layer.parts[part]].shape:
                layer.rank = tensors[layer.parts[part]].shape[0]
    if "alpha" in layer.parts:
        layer.alpha = _number(adapter.file, tensors[layer.parts["alpha"]])
    elif adapter.kind == "lora" and layer.rank:
        layer.alpha = _alpha_by_config(adapter, layer, patterns)


def _alpha_by_config(adapter: Adapter, layer: Layer, patterns: Mapping[str, tuple[int, Any]] | None) -> float | None:
    """The effective alpha by PEFT's rules: ``alpha_pattern``, else ``lora_alpha``; rsLoRA divides by sqrt(r)."""
    config, rank = adapter.config, layer.rank
    if not config:
        said = adapter.file.metadata.get("ss_network_alpha") or adapter.file.metadata.get("sidestep.alpha")
        return _positive(said)
    if patterns is None:
        return None
    alpha = _by_pattern(patterns, layer.name, _positive(config.get("lora_alpha")))
    if alpha is not None and rank and config.get("use_rslora") is True:
        return alpha * math.sqrt(rank)
    return alpha


def _patterns(config: Mapping[str, Any]) -> dict[str, tuple[int, Any]] | None:
    """PEFT's alpha_pattern by plain names, with their order; None when one of them is more than a name."""
    patterns = config.get("alpha_pattern")
    found: dict[str, tuple[int, Any]] = {}
    for order, (pattern, value) in enumerate(patterns.items() if isinstance(patterns, Mapping) else ()):
        name = _NAME_PATTERN.fullmatch(str(pattern))
        if name is None:
            return None
        found.setdefault(name[1].replace("\\", ""), (order, value))
    return found


def _by_pattern(patterns: Mapping[str, tuple[int, Any]], name: str, default: float | None) -> float | None:
    """PEFT's lookup: the first pattern that is the layer's name, or its end after a dot."""
    matching = []
    for candidate in (name, _in_diffusers(name)):
        parts = candidate.split(".")
        ends = (".".join(parts[start:]) for start in range(min(len(parts), 16)))
        matching += [patterns[end] for end in ends if end in patterns]
    return _positive(min(matching, key=lambda match: match[0])[1]) if matching else default


def _configuration(file: WeightsFile) -> tuple[dict[str, Any], str | None, list[str]]:
    """PEFT's configuration of an adapter, where it was found, and what is wrong with it."""
    problems: list[str] = []
    beside = file.path.parent / "adapter_config.json"
    if (beside.is_file() or beside.is_symlink()) and has_neighbours_of_its_own(file.path):
        try:
            check_inside(beside, beside.parent)
            return read_json_object(beside), beside.name, problems
        except Refusal as refusal:
            problems.append(str(refusal))
        except (OSError, ValueError) as error:
            problems.append(f"{beside.name} cannot be read: {error}")
    text = file.metadata.get(DIFFUSERS_KEY)
    if text is not None:
        try:
            value = json.loads(text)
            prefixed = {str(key).removeprefix("transformer."): entry for key, entry in value.items()}
            return prefixed, f"header ({DIFFUSERS_KEY})", problems
        except (ValueError, RecursionError, AttributeError):
            problems.append(f"{DIFFUSERS_KEY} in the header is not a JSON object")
    return {}, None, problems


def _number(file: WeightsFile, tensor: Tensor) -> float | None:
    """The value of a tensor that holds one number."""
    raw = file.read(tensor) if tensor.end - tensor.start <= 8 else b""
    code = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "BF16": "<f"}.get(tensor.dtype)
    if tensor.dtype == "BF16":
        raw = b"\0\0" + raw  # the upper half of a float
    if code is None or len(raw) != struct.calcsize(code):
        return None
    return _positive(struct.unpack(code, raw)[0])


def _positive(value: Any) -> float | None:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number > 0 else None


# -- for diffusers ---------------------------------------------------------------------------------------------------


def diffusers_config(adapter: Adapter) -> dict[str, Any] | None:
    """What diffusers needs to play a LoRA at its trained strength, None when that is not known.

    diffusers gives the entries under the prefix ``transformer.`` to PEFT's ``LoraConfig``, which refuses unknown ones,
    and it renames the layers; so ranks and alphas that differ are listed by the layers' full names there.
    """
    layers = [layer for layer in adapter.layers.values() if layer.rank]
    if adapter.kind != "lora" or not layers or any(layer.alpha is None for layer in layers):
        return None
    rank = Counter(layer.rank for layer in layers).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers).most_common(1)[0][0]
    entries = {
        "r": rank,
        "lora_alpha": _whole(alpha),
        "target_modules": sorted({_target(layer.name) for layer in layers}),
        "rank_pattern": {_in_diffusers(layer.name): layer.rank for layer in layers if layer.rank != rank},
        "alpha_pattern": {_in_diffusers(layer.name): _whole(layer.alpha) for layer in layers if layer.alpha != alpha},
        "use_dora": adapter.is_dora,
    }
    return {f"transformer.{name}": value for name, value in entries.items()}


def _in_diffusers(name: str) -> str:
    before, _, last = name.rpartition(".")
    return f"{before}.{_DIFFUSERS_NAMES[last]}" if last in _DIFFUSERS_NAMES else name


def _target(name: str) -> str:
    last = name.rpartition(".")[2]
    return _DIFFUSERS_NAMES.get(last, name if last.isdigit() else last)


def _whole(number: float | None) -> float | int | None:
    return int(number) if number is not None and number == int(number) else number


# -- showing ---------------------------------------------------------------------------------------------------------


def some(names: Iterable[str], longest: int = 3) -> str:
    """The first few of some names from a file, sorted and safe to print."""
    listed = sorted(names)
    return ", ".join(shown(name, 80) for name in listed[:longest]) + (", ..." if len(listed) > longest else "")
