"""What people type about a song, in the words that the model knows."""

import pytest

from sidestep_plugin.songs import vocabulary

KEYS = {
    "A minor": ["Am", "A minor", "a minor", "A min", "A min.", "a-Moll", "A_minor", "A:min", "8A", " Am "],
    "C major": ["C", "C major", "C Major", "Cmaj", "CM", "C-Dur", "8B"],
    "F# minor": ["F#m", "F# Minor", "F sharp minor", "Fis-Moll", "11A"],
    "Bb major": ["Bb", "Bb Major", "B flat major", "6B"],
    "Ab major": ["As-Dur", "A flat", "Ab"],
    "Eb major": ["Es-Dur", "Eb maj"],
    "B minor": ["H-Moll", "Bm"],
    "C♯ minor": ["C♯ minor"],
    "": ["", "N/A", "none", None],
}


@pytest.mark.parametrize(("key", "typed"), [(key, typed) for key, all_typed in KEYS.items() for typed in all_typed])
def test_a_key_becomes_note_and_mode(key, typed):
    assert vocabulary.keyscale(typed) == vocabulary.Word(key)


@pytest.mark.parametrize("typed", ["a", "f#", "B-Dur", "b-moll", "D dorian", "Am/C", "13A", "0B", "X", "A minor major"])
def test_a_key_that_may_mean_several_things_stays_as_typed(typed):
    assert vocabulary.keyscale(typed) == vocabulary.Word(typed, known=False)


@pytest.mark.parametrize("number", range(1, 13))
def test_a_djs_wheel_has_relative_keys_beside_each_other_and_fifths_in_a_row(number):
    notes = ["C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"]

    def place(typed):
        return notes.index(str(vocabulary.keyscale(typed).value).split()[0])

    assert (place(f"{number}A") - place(f"{number}B")) % 12 == 9
    assert (place(f"{number % 12 + 1}B") - place(f"{number}B")) % 12 == 7


@pytest.mark.parametrize(
    ("typed", "told"),
    [("4/4", "4"), (4, "4"), (4.0, "4"), ("4 / 4", "4"), ("2/4", "2"), ("2/2", "2"), ("3/4", "3"), ("6/8", "6")],
)
def test_a_time_signature_becomes_its_beats(typed, told):
    assert vocabulary.timesignature(typed) == vocabulary.Word(told)


@pytest.mark.parametrize("typed", ["5/4", "12/8", "7", "common"])
def test_a_time_signature_that_the_model_does_not_know_stays_as_typed(typed):
    assert vocabulary.timesignature(typed) == vocabulary.Word(typed, known=False)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        *[("english", "en"), ("EN", "en"), ("en-US", "en"), ("eng", "en"), ("pt_BR", "pt"), ("Deutsch", "de")],
        *[("zh-CN", "zh"), ("zh-HK", "yue"), ("Cantonese", "yue"), ("jp", "ja"), ("français", "fr"), ("no", "no")],
        *[("instrumental", "unknown"), ("unknown", "unknown"), ("auto", "unknown"), ("", ""), (None, "")],
    ],
)
def test_a_language_becomes_its_code(typed, told):
    assert vocabulary.language(typed) == vocabulary.Word(told)


@pytest.mark.parametrize("typed", ["klingon", "en/es", "xx", "english and german"])
def test_a_language_that_the_model_does_not_know_stays_as_typed(typed):
    assert vocabulary.language(typed) == vocabulary.Word(typed, known=False)


def test_every_name_of_a_language_leads_to_a_code_that_the_model_knows():
    assert set(vocabulary._CODE_OF.values()) <= vocabulary.LANGUAGES
    assert len(vocabulary.LANGUAGES) == 51


@pytest.mark.parametrize(
    ("typed", "told"),
    [(120, 120), (120.0, 120), ("120 bpm", 120), ("119.6", 120), ("99,5", 100), ("", None), (0, None)],
)
def test_beats_per_minute_become_a_whole_number(typed, told):
    assert vocabulary.bpm(typed) == vocabulary.Word(told)


@pytest.mark.parametrize(
    ("typed", "kept"), [("120-125", "120-125"), ("fast", "fast"), ("nan", "nan"), (25, 25), (400, 400)]
)
def test_beats_that_the_model_does_not_know_are_kept(typed, kept):
    assert vocabulary.bpm(typed) == vocabulary.Word(kept, known=False)
