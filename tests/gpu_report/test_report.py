"""The report on a GPU: what is measured first, when it stops, what it adds to; and, slowly, all of it on a CPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from measured_table import tables

from sidestep_plugin import Refusal
from sidestep_plugin.engine.shapes import sampler_style
from sidestep_plugin.gpu_report import __main__ as report
from sidestep_plugin.gpu_report.jobs import SIZES, WAYS, Job, jobs
from sidestep_plugin.gpu_report.models import model_code, size_of
from sidestep_plugin.measured.reading import ALONE, PLUGIN, read
from sidestep_plugin.memory.known import TWO_B, XL
from sidestep_plugin.memory.sizes import DecoderSize
from sidestep_plugin.registry import Registry

SETTINGS = {"rank": 64, "songs": 8, "device": "cuda"}
CARD = {"name": "Made-up 24", "memory_bytes": 24 * 2**30, "compute_capability": [8, 9]}


def found_for(job, card=CARD, torch="2.11.0"):
    """What a process would have measured."""
    memory = {"peak_allocated_bytes": 5 * 2**30, "peak_reserved_bytes": 6 * 2**30}
    about = {"size": job.size, "song_seconds": job.song_seconds, "decoder_parameters": 10**9} | memory
    outer = {"card": dict(card), "versions": {"torch": torch, "sidestep-plugin": "0.1.0"}}
    if job.kind == "training":
        way = {"rank": job.rank, "adapter": job.adapter, "way": job.way}
        return about | way | {"seconds_per_step": 0.5, "estimate_bytes": 4 * 2**30} | outer
    if job.kind == "hooks":
        return {"what": "hooks", "size": "tiny", "microseconds_without": 900.0, "microseconds_added": 80.0} | outer
    looked = {"clips_per_minute": 9.0, "clip_seconds": 20.0, "seconds": 4.0, "in_steps": 8.0, "songs": 2, "losses": 16}
    return {"what": job.kind} | about | looked | outer


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the report without measuring: ``run("--only", "plugin")`` returns the result and what is in the file."""
    measured = []

    def apart(job, seconds):
        measured.append(job)
        answer = monkeypatched["answer"](job)
        return (answer, "") if isinstance(answer, dict) else (None, answer)

    monkeypatched = {"answer": found_for}
    monkeypatch.setattr(report, "_apart", apart)
    monkeypatch.setattr(
        report, "_outer_versions", lambda root: {"driver": "580.1", "commit": "a", "acestep_commit": "b"}
    )

    def call(*words, answer=found_for):
        monkeypatched["answer"] = answer
        file = tmp_path / "report.json"
        done = CliRunner().invoke(report.main, ["--out", str(file), *words])
        return done, json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    call.measured = measured
    return call


@pytest.fixture
def rooted(run, checkout):
    return lambda *words, **more: run("--acestep-root", str(checkout.root), *words, **more)


# -- what is measured --------------------------------------------------------------------------------------------------


def test_the_most_telling_is_measured_first_and_what_takes_minutes_last():
    listed = list(jobs(["2b", "xl"], [180.0, 60.0], (), **SETTINGS))
    assert [(job.way, job.size, job.song_seconds) for job in listed[:2]] == [
        (PLUGIN, "2b", 180.0),
        (ALONE, "2b", 180.0),
    ]
    assert {job.way for job in listed[-2:]} == {"compile"}
    for size in ("2b", "xl"):
        for seconds in (180.0, 60.0):
            here = [job for job in listed if (job.size, job.song_seconds, job.kind) == (size, seconds, "training")]
            pairs = [(job.way, job.adapter) for job in here]
            assert len(set(pairs)) == len(pairs) and {(ALONE, "lokr"), (PLUGIN, "lokr"), ("int8", "lora")} <= set(pairs)
    assert {way for job in listed for way in [job.way]} == set(WAYS)
    assert {"validation", "previews", "hooks"} < {job.kind for job in listed}
    assert len({job.name for job in listed}) == len(listed), "names tell jobs apart in what was not measured"


def test_only_what_is_asked_for_is_measured():
    listed = list(jobs(["2b"], [180.0], ("int8", "previews"), **SETTINGS))
    assert [(job.kind, job.way) for job in listed] == [("training", "int8"), ("previews", PLUGIN)]


def test_every_way_is_made_of_options_that_the_plugin_has():
    registry = Registry.load(("sidestep",))
    for options in WAYS.values():
        registry.resolve_options(options or {})


def test_models_are_as_large_as_the_official_ones(tmp_path):
    assert (SIZES["2b"], SIZES["xl"]) == (TWO_B, XL)
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1024, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    xl = Job("training", "xl", PLUGIN, "lora", 60.0, **SETTINGS, xl_config=str(tmp_path / "config.json"))
    assert (size_of(xl).width, size_of(xl).layers) == (512, 3)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_is_one_that_the_tables_are_made_of(rooted, tmp_path):
    done, content = rooted("--size", "2b", "--size", "xl")
    assert done.exit_code == 0, done.output
    assert "lora, plugin, 2b, songs of 180 s ... 0.5 s per step, peak 5.0 GiB (estimate 4.0)" in done.output
    measured = read(tmp_path / "report.json")
    assert measured.card.name == "Made-up 24" and not measured.missing
    assert measured.versions["driver"] == "580.1" and measured.versions["acestep_commit"] == "b"
    assert len(measured.trainings) == 30 and len(measured.others) == 5
    assert "| XL, 60 s | LoKr 64 | ACE-Step alone | 0.5 | 5.0 GiB | 6.0 GiB | 4.0 GiB |" in tables([measured])
    assert content["device"] == "cuda"


def test_what_failed_is_said_and_the_rest_is_measured(rooted):
    done, content = rooted(
        "--song-seconds", "60", answer=lambda job: "it ran out" if job.way == "int8" else found_for(job)
    )
    assert done.exit_code == 0 and "lora, int8, 2b, songs of 60 s ... not measured: it ran out" in done.output
    assert content["not_measured"] == [{"what": "lora, int8, 2b, songs of 60 s", "why": "it ran out"}]
    assert len(content["trainings"]) == 7


def test_where_nothing_can_be_measured_it_fails(rooted):
    done, content = rooted("--only", PLUGIN, answer=lambda job: "no GPU")
    assert done.exit_code == 1 and "Nothing was measured" in done.output and not content["trainings"]


def test_after_the_budget_nothing_is_begun(rooted, run, monkeypatch):
    now = iter(range(0, 10_000, 40))
    monkeypatch.setattr(report.time, "monotonic", lambda: next(now))
    done, content = rooted("--budget", "100", "--song-seconds", "60")
    assert done.exit_code == 0 and len(run.measured) == len(content["trainings"]) == 2
    assert "Out of time: 9 of 11 not measured." in done.output
    assert len(content["not_measured"]) == 9
    assert content["not_measured"][0]["why"] == "no time left of --budget 100"


def test_a_second_report_adds_and_replaces(rooted):
    rooted("--only", PLUGIN, answer=lambda job: "broken" if job.adapter == "lokr" else found_for(job))
    done, content = rooted("--only", PLUGIN, "--only", "int8", "--song-seconds", "180")
    assert done.exit_code == 0
    ways = [(entry["way"], entry["adapter"], entry["song_seconds"]) for entry in content["trainings"]]
    assert sorted(ways) == sorted(
        [(PLUGIN, "lora", 60.0), (PLUGIN, "lora", 180.0), ("int8", "lora", 180.0), (PLUGIN, "lokr", 180.0)]
    )
    assert [entry["what"] for entry in content["not_measured"]] == ["lokr, plugin, 2b, songs of 60 s"]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"card": CARD | {"name": "Made-up 80"}}, "was measured on Made-up 24"),
        ({"torch": "2.12.0"}, "was measured with another torch"),
    ],
)
def test_numbers_of_another_card_or_version_are_not_mixed(rooted, other, says):
    _, before = rooted("--only", "hooks")
    done, content = rooted("--only", "hooks", answer=lambda job: found_for(job, **other))
    assert done.exit_code == 1 and says in done.output and "Choose another --out" in done.output
    assert content == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--device", "cpu"], "Use it with --size tiny alone."),
        (["--acestep-root", "nowhere"], "Give your checkout's folder with --acestep-root DIR."),
        (["--size", "tiny", "--out", __file__], "cannot be added to"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_measured(run, words, says):
    done, _ = run(*words)
    assert done.exit_code == 2 and says in " ".join(done.output.split()) and not run.measured


@pytest.mark.upstream
@pytest.mark.parametrize("size", list(SIZES))
def test_models_of_a_real_checkout_are_as_large_as_said(checkout, trainer, size, tmp_path):
    """At full size on torch's meta device, where weights take no memory."""
    import torch

    job = Job("training", size, PLUGIN, "lora", 60.0, **SETTINGS, root=str(checkout.root))
    try:
        model_class, config = model_code(trainer, job, tmp_path)
    except Refusal as refusal:
        pytest.skip(str(refusal))
    code = importlib.import_module(model_class.__module__)
    with torch.device("meta"):
        decoder = code.AceStepDiTModel(config)
    assert DecoderSize.from_config(config.to_dict()) == SIZES[size]
    assert sum(weight.numel() for weight in decoder.parameters()) == SIZES[size].parameters
    assert config._attn_implementation == "sdpa" and config.name_or_path == str(tmp_path)
    assert not config.is_turbo


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["training", "validation", "previews", "hooks"])
def test_each_kind_is_measured(trainer, load, tmp_path, monkeypatch, kind):
    """In this process, on the miniature's model and four short songs."""
    from sidestep_plugin.gpu_report import measuring
    from sidestep_plugin.gpu_report.models import write_songs

    job = Job(kind, "tiny", PLUGIN, "lora", 0.8, rank=4, songs=4, device="cpu")
    handler = load("base")
    if kind == "hooks":
        if sampler_style(trainer.sample_discrete_timestep) == "device and dtype":
            pytest.skip("this version steps in bf16 on every device")
        monkeypatch.setattr(measuring, "_ROUNDS", 2)
        assert measuring._hooks(trainer, handler, job)["microseconds_without"] > 0
        return
    songs = write_songs(tmp_path / "songs", job, handler.model.null_condition_emb.shape[-1])
    found = measuring._training(trainer, handler, songs, tmp_path / "output", job)
    if kind == "training":
        assert found["seconds_per_step"] > 0 and found["estimate_bytes"] > found["frozen_bytes"] > 0
        assert found["trained_parameters"] > 0 and found["first_loss"] > 0
    else:
        assert found["what"] == kind and found["seconds"] > 0
        assert found.get("losses") == 32 or found.get("forward_passes", 0) >= 2 * 50


# -- really ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dry_run_measures_everything_on_a_cpu(checkout, tmp_path):
    """Real processes. On a real checkout its own model code is used, else the miniature."""
    file = tmp_path / "report.json"
    root = ["--acestep-root", str(checkout.root)] if checkout.real else []
    short = ["--song-seconds", "2", "--songs", "4", "--budget", "500"]
    ways = [word for way in (PLUGIN, "int8", "validation", "previews", "hooks") for word in ("--only", way)]
    line = [sys.executable, "-m", "sidestep_plugin.gpu_report", "--size", "tiny", "--device", "cpu", "--out", str(file)]
    done = subprocess.run(
        [*line, *root, *short, *ways], capture_output=True, encoding="utf-8", cwd=tmp_path, timeout=550
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["not_measured"] == [], done.stdout
    assert [(entry["way"], entry["adapter"]) for entry in content["trainings"]] == [
        (PLUGIN, "lora"),
        ("int8", "lora"),
        (PLUGIN, "lokr"),
    ]
    assert all(entry["seconds_per_step"] > 0 and entry["estimate_bytes"] > 0 for entry in content["trainings"])
    assert any("int8 instead of" in line for line in content["trainings"][1]["said"])
    others = {entry["what"]: entry for entry in content["others"]}
    assert others["validation"]["songs"] == 2 and others["validation"]["losses"] > 2
    assert others["previews"]["clips"] == 2 and others["previews"]["forward_passes"] >= 2 * 50
    assert others["previews"]["clips_per_minute"] == pytest.approx(120 / others["previews"]["seconds"])
    assert others["hooks"]["microseconds_without"] > 0
    assert content["card"]["name"] == "CPU (dry run)" and content["versions"]["torch"]


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    line = [
        sys.executable,
        "-m",
        "sidestep_plugin.gpu_report",
        "--size",
        "tiny",
        "--only",
        PLUGIN,
        "--song-seconds",
        "2",
    ]
    done = subprocess.run(line, capture_output=True, encoding="utf-8", cwd=tmp_path, timeout=200)
    assert done.returncode == 1 and "not measured: torch sees no CUDA GPU here" in done.stdout
