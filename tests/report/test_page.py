"""The page of a training: that it is true while it trains and afterwards, safe, self-contained, and changes nothing.

The page in a real browser is a slow test.
"""

from __future__ import annotations

import html
import importlib.util
import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy
import pytest
from preview_parts import NAMES, filled

from sidestep_plugin import Refusal, hookimpl
from sidestep_plugin.cli.progress import Progress
from sidestep_plugin.report import live_page
from sidestep_plugin.report.charts import charts
from sidestep_plugin.report.page import FILE_NAME, duration, page, read_page, show_clips

HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)> "&\u202e'
EMPTY = {"br", "meta", "img", "input", "hr", "link", "path", "use", "rect"}


class Parsed(HTMLParser):
    """What is in a page: open and closed elements, addresses, texts outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.addresses, self.players, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in EMPTY:
            self.stack.append(tag)
        given = dict(attributes)
        assert len(given) == len(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in given), (tag, attributes)
        self.addresses += [given[name] for name in ("src", "href", "srcset", "action") if name in given]
        if tag == "audio":
            self.players.append(given["src"])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in EMPTY:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] not in ("script", "style"):
            self.text.append(" ".join(data.split()))

    @property
    def words(self):
        return " ".join(filter(None, self.text))


def on_page(folder):
    return Parsed((folder / FILE_NAME).read_text(encoding="utf-8"))


def data_on(folder):
    return read_page(folder / FILE_NAME)


@pytest.fixture
def every_epoch(monkeypatch):
    """Write the page after every epoch, however short, and collect all of them."""
    monkeypatch.setattr(live_page, "SHARE", float("inf"))
    pages = []
    write = live_page.write_page

    def writing(folder, data):
        pages.append((data["state"], data["epochs_done"], page(data)))
        return write(folder, data)

    monkeypatch.setattr(live_page, "write_page", writing)
    return pages


class Stopper:
    """Presses upstream's stop button after some training steps."""

    def __init__(self, steps):
        self.left = steps

    @hookimpl
    def acestep_step_finished(self, step):
        if step.training:
            self.left -= 1
            if self.left == 0:
                step.run.engine._training.state["should_stop"] = True


class Failing:
    """Fails in some training step."""

    def __init__(self, steps, message="the cable was pulled"):
        self.left, self.message = steps, message

    @hookimpl
    def acestep_step_finished(self, step):
        self.left -= step.training
        if self.left == 0:
            raise RuntimeError(self.message)


# -- what is on it ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_finished_training_is_told_as_a_whole(train):
    options = {"title": "Late Night Jazz", "trigger": "ltnjz", "validate": 2, "validate_every": 1}
    done = train("base", options=options | {"preview_every": 1, "preview_songs": "1", "num_inference_steps": 2})
    found, data = on_page(done.output), data_on(done.output)
    report = json.loads((done.output / "training_report.json").read_text(encoding="utf-8"))
    assert data["state"] == "finished" and (data["epochs_done"], data["epochs"]) == (2, 2)
    assert data["report"]["loss_by_epoch"] == report["loss_by_epoch"] and len(report["loss_by_epoch"]) == 2
    assert data["report"]["validation"] == report["validation"]
    for said in (
        "Late Night Jazz finished",
        "ltnjz",
        "acestep-v15-base, variant base",
        f"{report['loss_by_epoch'][-1]['loss']:.4f}",
        "Best epoch",
        "made-up tensors, number 4",  # the prompt of the song that is heard
        "Without adapter",
        "not decoded yet",
        "Generate with acestep-v15-base: shift 1.0, 2 steps, CFG on",
        str(done.output / "final"),
        "song_01 held out",
    ):
        assert said in found.words, said
    assert "refresh" not in (done.output / FILE_NAME).read_text(encoding="utf-8").split("<title>")[0].replace(
        "data-refresh", ""
    )
    if importlib.util.find_spec("matplotlib"):
        assert found.tags.count("svg") == 4


@pytest.mark.slow
def test_it_is_written_anew_after_every_epoch(train, every_epoch):
    train("base", max_epochs=3, options={"validate": 1, "validate_every": 2})
    assert [(state, epoch) for state, epoch, _ in every_epoch] == [
        *(("training", epoch) for epoch in (0, 0, 1, 2, 3)),
        ("finished", 3),
    ]
    for state, epoch, text in every_epoch:
        assert ('http-equiv="refresh"' in text) == (state == "training")
        data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
        assert [entry["epoch"] for entry in data["report"]["loss_by_epoch"]] == list(range(1, epoch + 1))
        assert 0 in [entry["epoch"] for entry in data["report"]["validation"]["epochs"]]
    assert "2 / 3" in Parsed(every_epoch[3][2]).words


def test_short_epochs_do_not_wait_for_the_page(train, monkeypatch):
    written = []
    write = live_page.write_page
    monkeypatch.setattr(live_page, "SHARE", 1e-9)
    monkeypatch.setattr(live_page, "write_page", lambda *given: written.append(given[1]["state"]) or write(*given))
    train("base", max_epochs=4)
    assert written == ["training", "finished"]


def test_the_announcement_says_where_it_is(train, capsys):
    done = train("base", max_epochs=1)
    assert capsys.readouterr().out.count(f"Page: {done.output / FILE_NAME} (open it in a browser") == 1
    assert any(line.endswith("training_report.json (page: index.html)") for line in done.messages)


@pytest.mark.slow
def test_a_stopped_training_says_so_and_goes_on_saying_it_when_it_is_resumed(train, every_epoch):
    stopped = train("base", max_epochs=4, extra_plugins={"stopper": Stopper(7)})
    found, data = on_page(stopped.output), data_on(stopped.output)
    assert data["state"] == "stopped" and data["saved"] == str(stopped.output / "interrupted")
    assert "The training was stopped after epoch 2." in found.words and "can be resumed" in found.words
    assert "finished" not in found.words.split("Loss")[0]
    resumed = train(
        "base", max_epochs=4, resume_from=str(stopped.output / "interrupted"), output_dir=str(stopped.output)
    )
    assert resumed.losses
    data = data_on(stopped.output)
    assert (data["state"], data["resumed_after"], data["epochs_done"]) == ("finished", 2, 4)
    assert [entry["epoch"] for entry in data["report"]["loss_by_epoch"]] == [1, 2, 3, 4]
    assert "resumed after epoch 2" in on_page(stopped.output).words and data["saved"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "place"),
    [(2, "2 of 12 steps, resumed after step 2"), (7, "7 of 12 steps, resumed after epoch 2, step 7")],
)
def test_the_page_of_a_resumed_training_says_from_its_start_where_it_was(train, every_epoch, steps, place):
    epoch = steps // 3
    stopped = train("base", max_epochs=4, extra_plugins={"stopper": Stopper(steps)})
    every_epoch.clear()
    again = {"resume_from": str(stopped.output / "interrupted"), "output_dir": str(stopped.output)}
    train("base", max_epochs=4, extra_plugins={"stopper": Stopper(1)}, **again)
    state, done, text = every_epoch[0]
    assert (state, done) == ("training", epoch) and f"Epoch {epoch} / 4 {place}" in Parsed(text).words


def test_a_failed_training_says_why(train):
    done = train("base", max_epochs=3, extra_plugins={"failing": Failing(5, "no <b>power</b>")})
    assert done.messages[-1].startswith("❌")
    found, data = on_page(done.output), data_on(done.output)
    assert data["state"] == "failed" and "no <b>power</b>" in data["reason"]
    assert "The training failed." in found.words and "no <b>power</b>" in found.words
    assert data["saved"] == str(done.output / "interrupted") and "finished" not in found.words.split("Loss")[0]


@pytest.mark.slow
def test_patience_is_no_last_epoch(train):
    options = {"validate": 1, "validate_every": 1, "patience": 1}
    done = train("base", options=options, max_epochs=9, batch_size=6, learning_rate=0.0)
    data = data_on(done.output)
    assert (data["state"], data["epochs_done"], data["epochs"]) == ("finished", 2, 9)
    assert "It ended after epoch 2 of 9" in on_page(done.output).words


def test_a_training_that_is_refused_leaves_the_page_of_the_one_before(train):
    first = train("base", max_epochs=1)
    before = (first.output / FILE_NAME).read_bytes()
    options = {"preview_every": 1, "preview_songs": "9"}
    refused = train("base", max_epochs=1, options=options, output_dir=str(first.output))
    assert refused.messages[-1].startswith("❌") and not refused.losses
    assert (first.output / FILE_NAME).read_bytes() == before


def test_a_command_can_be_copied_as_it_is(train):
    """Its words are never broken, so each is an element of its own."""
    data = data_on(train("base", max_epochs=1).output)
    command = "acestep-train list 'my  <old> output' --json"
    (typed,) = re.findall("<pre>(.*?)</pre>", page(data | {"commands": [["List it:", command]]}), re.DOTALL)
    assert html.unescape(re.sub("</?span>", "", typed)) == command and typed.count("<span>") == len(command.split(" "))


def test_warnings_are_on_it(train):
    class Warning:
        @hookimpl
        def acestep_between_epochs(self, run, epoch):
            run.engine.announce(f"Warning: <epoch {epoch}> was odd.")

    data = data_on(train("base", max_epochs=1, extra_plugins={"warning": Warning()}).output)
    assert "Warning: <epoch 1> was odd." in data["told"]
    text = page(data)
    assert "&lt;epoch 1&gt; was odd." in text and "<epoch 1>" not in text


# -- times -----------------------------------------------------------------------------------------------------------


class Slow:
    """A training on a clock that goes on 10 seconds with each step, 7 with each save, and between the epochs."""

    def __init__(self, monkeypatch, between=0.0):
        self.now, self.between = 1000.0, between
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    @hookimpl
    def acestep_prepare_batch(self, step):
        self.now += 10.0

    @hookimpl
    def acestep_between_epochs(self, epoch):
        self.now += self.between * (epoch > 0)

    @hookimpl
    def acestep_adapter_saved(self):
        self.now += 7.0


def test_all_times_of_a_training_are_of_one_clock(train, monkeypatch, capsys):
    """The page, its report and the terminal: with saving, and without the time that the page itself takes."""
    slow, progress = Slow(monkeypatch, between=20.0), Progress()
    write = live_page.write_page

    def writing(folder, data):
        slow.now += 100.0 * (data["state"] == "finished")
        return write(folder, data)

    monkeypatch.setattr(live_page, "write_page", writing)
    progress.begin(4, 2)
    done = train("base", max_epochs=2, extra_plugins={"slow": slow, "progress": progress})
    progress.end()
    data, steps = data_on(done.output), len(done.losses)
    saves = sum(1 for _ in done.output.rglob("training_config.json"))
    assert data["seconds"] == 10 * steps + 2 * 20 + 7 * saves
    assert data["report"]["seconds_per_step"] == 10.0 + 7.0 / (steps - 1), "with the checkpoint between two steps"
    minutes, seconds = divmod(int(data["seconds"]), 60)
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"Total time: 0:{minutes:02}:{seconds:02} for {steps} training steps"
    )
    assert f"Time {minutes}:{seconds:02} min" in on_page(done.output).words


@pytest.mark.parametrize(
    ("options", "limit", "left"),
    [
        pytest.param({}, "", lambda steps: (40 * steps - steps) * 10, marks=pytest.mark.slow),
        ({"max_steps": 11}, "--max-steps 11", lambda steps: (11 - steps) * 10),
        ({"max_steps": 300, "time_limit": "2m"}, "--time-limit 2m", lambda steps: 120 - 10 * steps),
    ],
)
def test_the_time_left_counts_what_ends_it_earlier(train, every_epoch, monkeypatch, options, limit, left):
    slow, pages = Slow(monkeypatch), []
    write = live_page.write_page
    monkeypatch.setattr(live_page, "write_page", lambda folder, data: pages.append(data) or write(folder, data))
    stopper = {} if options else {"stopper": Stopper(9)}
    train("base", max_epochs=40, save_every_n_epochs=99, options=options, extra_plugins={"slow": slow, **stopper})
    after_one = next(data for data in pages if data["epochs_done"] == 1)
    steps = after_one["report"]["training_steps"]
    assert steps > 1 and after_one["limit"] == limit
    assert after_one["seconds_left"] == pytest.approx(left(steps))
    assert f"so far{limit and f'; {limit} ends it'} Speed" in Parsed(page(after_one)).words


# -- that it changes nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", pytest.param("lokr", marks=pytest.mark.slow)])
def test_the_training_is_the_same_bit_for_bit(train, equal_bits, every_epoch, monkeypatch, kind):
    """With the page after every epoch, and with none at all."""

    def states():
        return random.getstate(), numpy.random.get_state()[1].tolist()

    random.seed(5), numpy.random.seed(5)
    options = {"validate": 1, "validate_every": 1}
    with_page = train("base", kind, options=options)
    after = states()
    monkeypatch.setattr(live_page.LivePage, "_write", lambda *_: False)
    random.seed(5), numpy.random.seed(5)
    without = train("base", kind, options=options)
    assert len(every_epoch) == 5 and not (without.output / FILE_NAME).exists()
    assert equal_bits(with_page, without) and states() == after


@pytest.mark.slow
def test_drawing_leaves_matplotlib_as_it_was(train):
    matplotlib = pytest.importorskip("matplotlib", reason="curves need matplotlib")
    before = dict(matplotlib.rcParams)
    report = data_on(train("base").output)["report"]
    assert charts(report) == charts(report) and len(charts(report)) == 2
    assert dict(matplotlib.rcParams) == before


@pytest.mark.slow
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a font is missing")])
def test_a_page_that_cannot_be_written_is_told_once_and_ends_nothing(train, monkeypatch, capsys, error):
    def failing(*_):
        raise error

    monkeypatch.setattr(live_page, "SHARE", float("inf"))
    monkeypatch.setattr(live_page, "write_page", failing)
    done = train("base", max_epochs=3)
    told = capsys.readouterr().out
    assert told.count("Warning: index.html, the page of this training, could not be written: ") == 1
    assert str(error.args[-1]) in told and "Page: " not in told
    assert done.tensors and not any("page: index.html" in line for line in done.messages)


def test_somebody_elses_page_is_left_alone(train, tmp_path, capsys):
    (tmp_path / FILE_NAME).write_text("<html>my site</html>", encoding="utf-8")
    done = train("base", max_epochs=1, output_dir=str(tmp_path))
    assert (tmp_path / FILE_NAME).read_text(encoding="utf-8") == "<html>my site</html>"
    assert done.messages[-1].startswith("✅ Training complete")
    assert "is not the page of a training, so it was left as it is. Move it away" in capsys.readouterr().out


# -- safe, and on its own --------------------------------------------------------------------------------------------


def much(data, epochs, songs=4):
    """The data of a longer training: a loss for each epoch, a validation for every second one, and hostile names."""
    made = json.loads(json.dumps(data))
    report = made["report"]
    report["loss_by_epoch"] = [{"epoch": epoch, "loss": 1.0 + 1.0 / epoch} for epoch in range(1, epochs + 1)]
    report["loss_by_epoch"][0]["loss"] = None  # it was not finite
    times = [0.2, 0.4, 0.6, 0.8]
    report["validation"] = {
        "songs": [HOSTILE],
        "timesteps": times,
        "weight_without_condition": 0.15,
        "every": 2,
        "patience": None,
        "best_epoch": 2,
        "epochs": [
            {"epoch": epoch, "loss": 1.0, "change": -0.01, "improved": 3, "loss_by_t": times, "loss_by_song": [1.0]}
            for epoch in range(0, epochs + 1, 2)
        ],
    }
    clips = [f"previews/{number}.wav" for number in range(2)]
    rows = [{"label": "base model", "epoch": 0, "loss": None, "clips": clips, "decoded": True}]
    rows += [
        {"label": f"epoch {epoch}", "epoch": epoch, "loss": 1.0, "clips": clips, "decoded": True}
        for epoch in range(2, epochs + 1, 2)
    ]
    rows.append({"label": HOSTILE, "epoch": None, "loss": None, "clips": clips, "decoded": True})
    report["previews"] = {
        "model_name": HOSTILE,
        "settings": {"shift": 3.0, "steps": 8, "guidance": 1.0, "seed": 1},
        "songs": [
            {"name": HOSTILE, "seconds": 20.0, "prompt": HOSTILE},
            {"name": "夜" * 300, "seconds": 1.0, "prompt": ""},
        ],
        "rows": rows,
    }
    made["songs"] = [HOSTILE, "long" * 100, *(f"song {number}" for number in range(songs))]
    made["facts"]["title"] = made["facts"]["trigger"] = made["facts"]["model_name"] = HOSTILE
    made["told"] = [f"Warning: {HOSTILE}", "\udc80 half a letter", HOSTILE]
    made["commands"] = [[HOSTILE, HOSTILE]]
    made["memory"] = {"peak": 2**34, "total": 2**35, "name": HOSTILE}
    made |= {"epochs_done": epochs, "epochs": epochs, "folder": HOSTILE, "final": HOSTILE, "reason": HOSTILE}
    return made


@pytest.fixture(scope="module")
def shared():
    return {}


@pytest.fixture
def some_data(train, shared):
    if not shared:
        shared.update(data_on(train("base", max_epochs=1).output))
    return shared


@pytest.mark.slow
@pytest.mark.parametrize("state", ["training", "finished", "stopped", "failed"])
@pytest.mark.parametrize("epochs", [2, 80])
def test_texts_of_strangers_are_text_and_nothing_comes_from_elsewhere(some_data, epochs, state):
    text = page(much(some_data, epochs) | {"state": state})
    found = Parsed(text)
    assert found.tags.count("script") == 2 and "img" not in found.tags
    assert "alert(1)" in found.words and "\u202e" not in found.words
    assert "<script>alert" not in text and "\udc80" not in text
    of_clips = {"previews/0.wav", "previews/1.wav"}
    assert set(found.players) == of_clips
    assert all(address in of_clips or address.startswith("#") for address in found.addresses)
    assert not re.search(r"https?:|@import|<link|url\((?!#)", text)
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text)) <= {(name, "") for name in ids} | {
        ("", name) for name in ids
    }
    text.encode("utf-8")


def test_equal_data_is_an_equal_page(some_data):
    assert page(much(some_data, 80)) == page(much(some_data, 80))


def test_without_matplotlib_there_are_tables(some_data, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find(name, *more)
    )
    text = page(much(some_data, 3))
    assert "<svg" not in text and text.count("<details open>") == 2
    assert "1.3333" in Parsed(text).words and "With matplotlib installed" in text


def test_times_are_told_for_people():
    assert [duration(each) for each in (3.21, 42.0, 125.0, 3723.4)] == ["3.2 s", "42 s", "2:05 min", "1:02:03"]


# -- clips of a saved adapter ----------------------------------------------------------------------------------------


def test_clips_that_are_made_later_come_onto_the_page_of_the_training(train):
    done = train("base", max_epochs=1)
    assert "Listen" not in on_page(done.output).words
    made = show_clips(done.output / "previews", filled(done.output / "previews").as_report())
    found = on_page(done.output)
    assert made == done.output / FILE_NAME and len(found.players) == 12
    assert all((done.output / source).is_file() for source in found.players)
    assert {"epoch 10", NAMES[1], "Listen"} <= set(found.text) and data_on(done.output)["state"] == "finished"


def test_clips_without_a_training_have_a_page_of_their_own(tmp_path):
    made = show_clips(tmp_path / "clips", filled(tmp_path / "clips").as_report())
    found = on_page(tmp_path / "clips")
    assert made == tmp_path / "clips" / FILE_NAME and len(found.players) == 12
    assert all((tmp_path / "clips" / source).is_file() for source in found.players)
    (tmp_path / FILE_NAME).write_text("<html>my site</html>", encoding="utf-8")
    made = show_clips(tmp_path / "previews", filled(tmp_path / "previews").as_report())
    assert made == tmp_path / "previews" / FILE_NAME
    (tmp_path / "previews" / FILE_NAME).write_text("<html>mine, too</html>", encoding="utf-8")
    with pytest.raises(Refusal, match="is not the page of a training"):
        show_clips(tmp_path / "previews", filled(tmp_path / "previews").as_report())


# -- in a browser ----------------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --allow-file-access-from-files"
)


@pytest.fixture
def browse(tmp_path):
    """Open a page in a real browser: ``browse(file, script)`` returns what the script has put into the title."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"NOT TESTED in a browser: none of {', '.join(BROWSERS)} is installed (apt-get install chromium)")

    def open_it(file, script):
        more = f'<script>addEventListener("load", () => setTimeout(() => {{ {script} }}, 4000))</script>'
        file.write_text(file.read_text(encoding="utf-8").replace("</body>", f"{more}</body>"), encoding="utf-8")
        line = [
            *(browser, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"),
            *("--virtual-time-budget=15000", "--dump-dom", file.as_uri()),
        ]
        done = subprocess.run(line, capture_output=True, timeout=120, check=False)
        title = re.search(r"<title>seen ([^<]*)</title>", done.stdout.decode("utf-8", "replace"))
        assert title, done.stderr.decode("utf-8", "replace")[-2000:]
        return title[1]

    return open_it


@pytest.mark.slow
def test_every_player_finds_its_clip(browse, tmp_path):
    """From the file system: every player knows how long its clip is, so the clip was found and understood."""
    table = filled(tmp_path / "previews")
    (tmp_path / "previews" / table.rows[-1].clips[0]).write_bytes(b"no sound")
    file = show_clips(tmp_path / "previews", table.as_report())
    seen = browse(
        file,
        'document.title = "seen " + [...document.querySelectorAll("audio")]'
        '.map(a => a.error ? "broken" : a.duration.toFixed(2)).join(" ")',
    )
    assert sorted(seen.split()) == ["0.20"] * 11 + ["broken"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_is_wider_than_the_window(browse, some_data, tmp_path, width):
    """With 80 epochs, 300 songs and names without a place to break a line, and no text of a stranger is run."""
    (tmp_path / "inner.html").write_text(page(much(some_data, 80, songs=300)), encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<title>-</title><body><iframe src="inner.html" style="width:{width}px;height:9in;border:0"></iframe></body>',
        encoding="utf-8",
    )
    seen = browse(
        outer,
        "const inner = frames[0].document.documentElement;"
        'document.title = "seen " + inner.scrollWidth + " " + inner.clientWidth + " "'
        '+ frames[0].document.querySelectorAll("svg path").length',
    )
    scroll, client, drawn = map(int, seen.split())
    assert scroll <= client <= width and drawn > 0
