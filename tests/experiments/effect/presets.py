"""Sizes of the experiment: what is trained, how long, and what is measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One way of training an adapter.

    Attributes:
        name: how tables and files call it.
        timestep_mode, cfg_ratio: the plugin's options of these names.
        lr_factor: multiplies the learning rate; 0 learns nothing (for tests of the experiment itself).
        stream: another number gives other noise and another order of the songs (for tests, too).
        high_share: share of the timesteps that are drawn uniformly from 0.9 to 1 instead; needs "continuous".
        padded: whether the training songs' conditions are padded and lack their opening, as upstream's preprocessing
            encodes songs; generations and held-out songs always have theirs as the base model knows them.
    """

    name: str
    timestep_mode: str
    cfg_ratio: float
    lr_factor: float = 1.0
    stream: int = 0
    high_share: float = 0.0
    padded: bool = False


UPSTREAM = Arm("eight", "discrete", 0.0)
EIGHT_DROP = Arm("eight+drop", "discrete", 0.15)
LAW = Arm("law", "continuous", 0.0)
LAW_DROP = Arm("law+drop", "continuous", 0.15)
ARMS = (UPSTREAM, EIGHT_DROP, LAW, LAW_DROP)
MEANS = {"tenth": 18, "third": 4, "half": 2}
"""Means over the steps of a training, by the part of it that they are as old as: step k counts as k to this power."""
EXACT = "third"
"""The one of them that songs are generated with, and that is also taken of B A instead of A and B."""
HIGH = Arm("law+drop+high", "continuous", 0.15, high_share=0.3)
PADDED = Arm("law+drop+padded", "continuous", 0.15, padded=True)


@dataclass(frozen=True)
class Preset:
    """All settings that the numbers depend on.

    Attributes:
        hidden, layers, heads: of the decoder; `kv_heads` key-value heads, feed-forward twice as wide as `hidden`.
        channels, frames: of a song's latents.
        base_steps, base_refined, base_batch, base_rate: how the base model is trained (`base_refined` more steps at a
            third of the rate).
        judged: songs in each set when the base model is judged.
        domains, songs: kinds of target domain, and numbers of training songs ("few", "many").
        seeds: each draws a target domain, its songs, the initial adapter, the order and the noise.
        lengths: optimizer steps after which an adapter is measured, in one training.
        batch, rate, rank: of the adapter's training.
        held_out: held-out songs, and generated songs, of each measurement.
        guidances: of the generations at the last length; `early`: at the others. At the guidance `adapter_off` songs
            are also generated with the adapter off on the null pass.
        generation_steps, bands: steps of a generation; bands of t of the held-out loss.
        guide: "plain" guidance, or "apg": the checkout's own, as ACE-Step generates with.
        means: names in `MEANS`, which are measured at each length beside the adapter itself.
    """

    name: str
    device: str = "cpu"
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    channels: int = 12
    frames: int = 24
    base_steps: int = 5000
    base_refined: int = 2500
    base_batch: int = 64
    base_rate: float = 3e-3
    judged: int = 256
    domains: tuple[str, ...] = ("near", "far")
    songs: tuple[int, ...] = (8, 48)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    lengths: tuple[int, ...] = (40, 120)
    batch: int = 4
    rate: float = 1e-2
    rank: int = 8
    held_out: int = 32
    guidances: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0)
    early: tuple[float, ...] = (1.0,)
    adapter_off: float = 3.0
    generation_steps: int = 50
    bands: int = 16
    arms: tuple[Arm, ...] = ARMS
    guide: str = "plain"
    means: tuple[str, ...] = ()

    def described(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)


CPU = Preset("cpu")
APG = replace(CPU, name="cpu-apg", guide="apg", arms=(*ARMS, HIGH), lengths=(120,), guidances=(1.0, 3.0, 5.0, 7.0))
"""A second look after the first run: ACE-Step's own guidance, and a share of draws at high t."""
CONDITIONS = replace(
    CPU, name="cpu-conditions", arms=(UPSTREAM, LAW_DROP, PADDED), lengths=(120,), guidances=(1.0, 3.0)
)
"""Conditions padded and without their opening, against conditions as generated."""
AVERAGE = replace(
    CPU,
    name="cpu-average",
    arms=(LAW_DROP,),
    lengths=(60, 120),
    guidances=(1.0, 3.0),
    early=(1.0, 3.0),
    means=("tenth", "third", "half"),
)
"""Means of the adapter over its training, half way and at the end; songs are generated with one of them."""
GPU = Preset(
    "gpu",
    device="cuda",
    hidden=1024,
    layers=12,
    heads=16,
    kv_heads=8,
    channels=64,
    frames=256,
    base_steps=40000,
    base_refined=10000,
    base_rate=3e-4,
    judged=512,
    seeds=tuple(range(8)),
    lengths=(250, 1000, 4000),
    rate=3e-4,
    rank=32,
    held_out=256,
)
TINY = replace(
    CPU,
    name="tiny",
    layers=2,
    base_steps=20,
    base_refined=0,
    base_batch=8,
    judged=16,
    domains=("far",),
    songs=(4,),
    lengths=(4, 8),
    held_out=8,
    guidances=(1.0, 3.0),
    generation_steps=4,
    bands=4,
    rank=2,
)
"""For the test of the pipeline: its numbers mean nothing."""
PRESETS = {preset.name: preset for preset in (CPU, APG, CONDITIONS, AVERAGE, GPU, TINY)}
