"""Which model is this, from what evidence, and what follows from it for training and for generating."""

import json
from types import SimpleNamespace

import pytest

from sidestep_plugin import Refusal
from sidestep_plugin.run import ModelFacts, read_config
from sidestep_plugin.timesteps.treatment import decide_treatment, decide_variant, law_of

SHIFT_3 = (1.0, 0.955, 0.9, 0.833, 0.75, 0.643, 0.5, 0.3)
SHIFT_1 = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
CONTINUOUS = ()
OFFICIAL = {  # folder: variant, timesteps, dropout, shift, steps
    "acestep-v15-turbo": ("turbo", SHIFT_3, 0.0, 3.0, 8),
    "acestep-v15-turbo-shift1": ("turbo", SHIFT_1, 0.0, 1.0, 8),
    "acestep-v15-turbo-shift3": ("turbo", SHIFT_3, 0.0, 3.0, 8),
    "acestep-v15-turbo-continuous": ("turbo", SHIFT_3, 0.0, 3.0, 8),
    "acestep-v15-base": ("base", CONTINUOUS, 0.15, 1.0, 50),
    "acestep-v15-sft": ("sft", CONTINUOUS, 0.15, 1.0, 50),
    "acestep-v15-xl-turbo": ("turbo", SHIFT_3, 0.0, 3.0, 8),
    "acestep-v15-xl-base": ("base", CONTINUOUS, 0.15, 1.0, 50),
    "acestep-v15-xl-sft": ("sft", CONTINUOUS, 0.15, 1.0, 50),
}


def facts_of(name, **config):
    config = {"timestep_mu": -0.4, "timestep_sigma": 1.0, **config}
    return ModelFacts(name, config, config)


def write(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


# -- treatment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flagged", [True, False], ids=["is_turbo given", "is_turbo missing"])
@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_model_gets_its_treatment(name, flagged):
    variant, timesteps, dropout, shift, steps = OFFICIAL[name]
    flag = {"is_turbo": variant == "turbo"} if flagged else {}
    treatment = decide_treatment(facts_of(name, **flag))
    assert treatment.model_name == name
    assert treatment.variant == variant
    assert tuple(round(t, 3) for t in treatment.schedule) == timesteps
    assert treatment.timestep_mode == ("continuous" if timesteps is CONTINUOUS else "discrete")
    assert (treatment.mu, treatment.sigma) == ((-0.4, 1.0) if timesteps is CONTINUOUS else (None, None))
    assert treatment.cfg_ratio == dropout
    assert (treatment.shift, treatment.num_inference_steps) == (shift, steps)
    assert treatment.is_upstreams_own == (timesteps is SHIFT_3)
    assert ("is_turbo" in treatment.decision.evidence) == flagged
    assert name in treatment.decision.evidence
    assert treatment.decision.note is None


@pytest.mark.parametrize("name", OFFICIAL)
def test_shift_and_steps_change_nothing_that_is_trained(name):
    def trained(treatment):
        return (treatment.timestep_mode, treatment.schedule, treatment.mu, treatment.sigma, treatment.cfg_ratio)

    plain = decide_treatment(facts_of(name))
    asked = decide_treatment(facts_of(name), shift=7.5, num_inference_steps=31)
    assert trained(asked) == trained(plain)
    assert (asked.shift, asked.num_inference_steps) == (7.5, 31)


def test_turbo_asked_for_continuous_timesteps_is_trained_like_its_forward():
    treatment = decide_treatment(facts_of("acestep-v15-turbo"), timestep_mode="continuous")
    assert (treatment.mu, treatment.sigma, treatment.cfg_ratio) == (-0.4, 1.0, 0.15)
    assert (treatment.shift, treatment.num_inference_steps) == (3.0, 8)


def test_base_asked_for_discrete_timesteps_gets_upstreams():
    treatment = decide_treatment(facts_of("acestep-v15-base"), timestep_mode="discrete")
    assert treatment.is_upstreams_own
    assert (treatment.shift, treatment.num_inference_steps) == (1.0, 50)


@pytest.mark.parametrize("name", ["acestep-v15-turbo-shift10", "acestep-v15-turbo-shift13", "my-turbo-upshift1"])
def test_only_the_word_shift1_means_the_schedule_of_shift_one(name):
    assert decide_treatment(facts_of(name)).shift == 3.0


# -- order of evidence -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "is_turbo", "variant"),
    [
        ("my-songs", True, "turbo"),
        ("my-songs", False, "base"),
        ("", True, "turbo"),
        ("my-sft-songs", None, "sft"),
        ("MyModel_SFT.v2", None, "sft"),
        ("Turbo tuned", None, "turbo"),
        ("base-then-sft", None, "sft"),
        ("sft-from-turbo", False, "sft"),
        ("turbo-from-base", True, "turbo"),
    ],
)
def test_the_file_and_the_words_of_the_name_are_evidence(name, is_turbo, variant):
    assert decide_variant(facts_of(name, is_turbo=is_turbo)).variant == variant


@pytest.mark.parametrize("name", ["basement-tapes", "turbocharged", "sftp", "my-database", "xturbo", "turbo2", "", "m"])
def test_parts_of_words_are_no_evidence(name):
    with pytest.raises(Refusal, match=r"Cannot tell the variant.*--variant turbo, --variant base or --variant sft"):
        decide_variant(facts_of(name))
    assert decide_variant(facts_of(name, is_turbo=True)).evidence == "config.json: is_turbo = true"


def test_a_model_version_is_no_evidence():
    with pytest.raises(Refusal, match=r"Cannot tell the variant"):
        decide_variant(facts_of("my-songs", model_version="turbo"))
    assert decide_variant(facts_of("acestep-v15-base", model_version="turbo")).variant == "base"


def test_only_what_the_file_says_is_evidence_and_not_the_defaults_of_the_config_class():
    live = {"model_version": "turbo", "is_turbo": True}
    assert decide_variant(ModelFacts("my-base", live, written={})).variant == "base"
    with pytest.raises(Refusal, match=r"config\.json has no is_turbo"):
        decide_variant(ModelFacts("my-songs", live, written={}))


def test_without_a_file_the_live_config_is_all_there_is():
    decision = decide_variant(ModelFacts("my-songs", {"is_turbo": False}, written=None))
    assert (decision.variant, decision.evidence) == ("base", "config: is_turbo = false")


@pytest.mark.parametrize(
    ("name", "is_turbo"),
    [("acestep-v15-base", True), ("acestep-v15-sft", True), ("acestep-v15-turbo", False), ("xl-turbo-shift1", False)],
)
def test_a_contradiction_stops_and_says_both_sides(name, is_turbo):
    with pytest.raises(Refusal, match=f"is_turbo = {str(is_turbo).lower()}.*{name}.*contradict.*--variant"):
        decide_variant(facts_of(name, is_turbo=is_turbo))


def test_a_name_with_both_kinds_stops_when_it_is_the_only_evidence():
    with pytest.raises(Refusal, match=r"'turbo-to-sft' names more than one variant.*--variant"):
        decide_variant(facts_of("turbo-to-sft"))


@pytest.mark.parametrize("is_turbo", ["true", "false", "", 1, 0, 1.0, [], {}])
@pytest.mark.parametrize("said", [None, "base"])
def test_an_is_turbo_that_is_neither_true_nor_false_stops(is_turbo, said):
    with pytest.raises(Refusal, match=r"is_turbo = .*expected true or false"):
        decide_variant(facts_of("acestep-v15-base", is_turbo=is_turbo), said)


@pytest.mark.parametrize("said", ["turbo", "base", "sft"])
def test_the_users_word_settles_what_nothing_tells(said):
    decision = decide_variant(facts_of("my-songs"), said)
    assert (decision.variant, decision.evidence, decision.note) == (said, f"--variant {said}", None)


@pytest.mark.parametrize(
    ("name", "is_turbo", "said", "reported"),
    [
        ("acestep-v15-turbo", True, "base", ["is_turbo = true", "acestep-v15-turbo"]),
        ("acestep-v15-turbo", False, "base", ["acestep-v15-turbo"]),
        ("my-songs", True, "sft", ["is_turbo = true"]),
        ("my-songs", False, "turbo", ["is_turbo = false"]),
        ("acestep-v15-base", None, "sft", ["acestep-v15-base"]),
    ],
)
def test_the_users_word_wins_and_the_contradiction_is_reported(name, is_turbo, said, reported):
    decision = decide_variant(facts_of(name, is_turbo=is_turbo), said)
    assert decision.variant == said
    assert all(text in decision.note for text in reported)
    assert ("is_turbo" in decision.note) == any("is_turbo" in text for text in reported)


@pytest.mark.parametrize(("name", "is_turbo"), [("acestep-v15-sft", False), ("sft-from-turbo", None)])
def test_the_users_word_that_agrees_needs_no_note(name, is_turbo):
    assert decide_variant(facts_of(name, is_turbo=is_turbo), "sft").note is None


# -- mu and sigma ----------------------------------------------------------------------------------------------------

NO_NUMBERS = [None, float("nan"), float("inf"), float("-inf"), "-0.4", "", True, False, [1.0], 10**400]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize("key", ["timestep_mu", "timestep_sigma"])
def test_a_mu_or_sigma_that_is_no_number_stops(key, value):
    with pytest.raises(Refusal, match=f"acestep-v15-base has .* for {key} in its config, expected a number"):
        decide_treatment(facts_of("acestep-v15-base", **{key: value}))


@pytest.mark.parametrize("key", ["timestep_mu", "timestep_sigma"])
def test_a_missing_mu_or_sigma_stops_even_if_the_config_class_has_a_default(key):
    live = {"timestep_mu": -0.4, "timestep_sigma": 1.0}
    written = {name: value for name, value in live.items() if name != key}
    with pytest.raises(Refusal, match=f"no value for {key}"):
        decide_treatment(ModelFacts("acestep-v15-base", live, written))


@pytest.mark.parametrize("sigma", [0, 0.0, -0.0, -1.0])
def test_a_sigma_that_is_not_positive_stops(sigma):
    with pytest.raises(Refusal, match=r"timestep_sigma = .*expected a number above 0"):
        decide_treatment(facts_of("acestep-v15-base", timestep_sigma=sigma))


@pytest.mark.parametrize(
    ("mu", "sigma", "says"),
    [
        (30.0, 1.0, "100 % of its timesteps are within 0.001 of 1"),
        (-200.0, 1.0, "100 % of its timesteps are within 0.001 of 0"),
        (1e300, 1.0, "100 % of its timesteps are within 0.001 of 1"),
        (-1.7e308, 5e-324, "100 % of its timesteps are within 0.001 of 0"),
        (-0.4, 1e300, "100 % of its timesteps are within 0.001 of 0 or 1"),
        (1.7e308, 1.7e308, "of its timesteps are within 0.001 of"),
        (-0.4, 1e-300, "its timesteps are all about 0.401"),
        (0.0, 0.01, "its timesteps are all about 0.501"),
    ],
)
def test_a_law_that_no_model_was_trained_with_stops(mu, sigma, says):
    facts = facts_of("acestep-v15-base", timestep_mu=mu, timestep_sigma=sigma)
    with pytest.raises(Refusal, match=rf"which is no training law: .*{says}.*Correct config\.json"):
        decide_treatment(facts)
    assert law_of(facts) is None


@pytest.mark.parametrize(("mu", "sigma"), [(-0.4, 1.0), (0.0, 0.1), (3.0, 1.0), (-3.0, 1.0), (0.0, 5.0), (1.5, 2.0)])
def test_laws_that_are_only_unusual_are_the_models_own(mu, sigma):
    treatment = decide_treatment(facts_of("acestep-v15-base", timestep_mu=mu, timestep_sigma=sigma))
    assert (treatment.mu, treatment.sigma) == (mu, sigma)


def test_whole_numbers_are_numbers():
    treatment = decide_treatment(facts_of("acestep-v15-base", timestep_mu=0, timestep_sigma=2))
    assert (treatment.mu, treatment.sigma) == (0.0, 2.0)


def test_turbo_needs_no_mu_and_sigma_on_its_own_schedule():
    facts = ModelFacts("acestep-v15-turbo", {"is_turbo": True}, {"is_turbo": True})
    assert decide_treatment(facts).mu is None
    with pytest.raises(Refusal, match=r"timestep_mu"):
        decide_treatment(facts, timestep_mode="continuous")


# -- facts of a loaded model -----------------------------------------------------------------------------------------


def a_model(**config):
    return SimpleNamespace(config=SimpleNamespace(**config))


def test_a_loaded_model_is_known_by_its_folder_and_its_file(tmp_path):
    folder = write(tmp_path / "acestep-v15-sft", {"is_turbo": False})
    facts = ModelFacts.from_model(a_model(_name_or_path=str(folder), model_version="turbo"))
    assert facts.name == "acestep-v15-sft"
    assert facts.written == {"is_turbo": False}
    assert facts.config["model_version"] == "turbo"


def test_live_numbers_count_but_the_variant_is_what_the_file_says(tmp_path):
    folder = write(tmp_path / "m", {"is_turbo": False, "timestep_mu": -0.4, "timestep_sigma": 1.0})
    live = a_model(_name_or_path=str(folder), is_turbo=True, timestep_mu=0.7, timestep_sigma=1.3)
    treatment = decide_treatment(ModelFacts.from_model(live))
    assert treatment.variant == "base"
    assert (treatment.mu, treatment.sigma) == (0.7, 1.3)


def test_a_model_whose_folder_is_gone_is_known_by_its_live_config(tmp_path):
    facts = ModelFacts.from_model(a_model(_name_or_path=str(tmp_path / "my-base"), is_turbo=False))
    assert (facts.name, facts.written) == ("my-base", None)
    assert facts.config["is_turbo"] is False


def test_a_config_object_is_asked_for_its_own_dictionary(tmp_path):
    config = SimpleNamespace(_name_or_path=str(tmp_path), to_dict=lambda: {"timestep_mu": 0.1})
    assert ModelFacts.from_model(SimpleNamespace(config=config)).config == {"timestep_mu": 0.1}


@pytest.mark.parametrize(
    ("origin", "name"),
    [
        (r"C:\Users\me\checkpoints\acestep-v15-base", "acestep-v15-base"),
        ("D:\\models\\acestep-v15-xl-sft\\", "acestep-v15-xl-sft"),
        ("C:/models/acestep-v15-turbo/", "acestep-v15-turbo"),
        ("./checkpoints/acestep-v15-sft/.", "acestep-v15-sft"),
        ("someone/their-model", "their-model"),
        ("", ""),
        (None, ""),
    ],
)
def test_a_models_name_is_its_folders_and_never_a_path(origin, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ModelFacts.from_model(a_model(_name_or_path=origin)).name == name


def test_an_unknown_origin_never_reads_a_config_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path, {"is_turbo": True}))
    assert ModelFacts.from_model(a_model()).written is None
    assert ModelFacts.from_model(a_model(_name_or_path="")).written is None


# -- config.json -----------------------------------------------------------------------------------------------------


def test_a_folders_facts_are_its_name_and_its_file(tmp_path):
    facts = ModelFacts.from_folder(write(tmp_path / "acestep-v15-base", {"is_turbo": False}))
    assert facts == ModelFacts("acestep-v15-base", {"is_turbo": False}, {"is_turbo": False})


def test_a_relative_folder_is_known_by_its_real_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "acestep-v15-base", {}))
    assert ModelFacts.from_folder(tmp_path.__class__(".")).name == "acestep-v15-base"


def test_a_link_is_known_by_its_own_name(tmp_path):
    (tmp_path / "acestep-v15-sft").symlink_to(write(tmp_path / "d41d8c", {}), target_is_directory=True)
    assert ModelFacts.from_folder(tmp_path / "acestep-v15-sft").name == "acestep-v15-sft"


def test_a_missing_config_is_refused_by_its_folder(tmp_path):
    with pytest.raises(Refusal, match=r"No config\.json in .*acestep-v15-base.*Expected"):
        read_config(tmp_path / "acestep-v15-base" / "config.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"not json", b'{"a": "\xff\xfe"}', b"\x80\x04\x95", b"[" * 100_000, b"1" * 5000],
    ids=["empty", "cut off", "text", "not UTF-8", "binary", "too deep", "too long a number"],
)
def test_a_config_that_is_no_json_is_refused_by_its_name(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(Refusal, match=r"config\.json is not JSON"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize(("content", "kind"), [([], "list"), ("text", "str"), (3, "int"), (None, "NoneType")])
def test_a_config_that_is_no_object_is_refused_with_what_it_is(content, kind, tmp_path):
    write(tmp_path, content)
    with pytest.raises(Refusal, match=f"holds a {kind}, expected a JSON object"):
        ModelFacts.from_folder(tmp_path)


def test_a_config_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(Refusal, match=r"Cannot read .*config\.json"):
        read_config(tmp_path / "config.json")


def test_a_damaged_file_of_a_loaded_model_is_refused(tmp_path):
    write(tmp_path / "acestep-v15-base", [])
    with pytest.raises(Refusal, match=r"expected a JSON object"):
        ModelFacts.from_model(a_model(_name_or_path=str(tmp_path / "acestep-v15-base")))
