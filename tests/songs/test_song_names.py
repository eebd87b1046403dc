"""Names of prepared songs: the same in every run, on every system, and never two the same."""

import random
import unicodedata
from pathlib import Path

from sidestep_plugin.songs.song_names import song_names

FOLDER = Path("music").absolute()


def names(*paths):
    files = [FOLDER / path for path in paths]
    return [song_names(FOLDER, files)[file] for file in files]


def test_a_name_is_the_path_without_its_ending():
    assert names("song.wav", "rock/01 Song.wav", "a/b/c.live.mp3") == ["song", "rock__01 Song", "a__b__c.live"]


def test_songs_of_one_name_in_two_folders_keep_apart():
    assert names("a/song.wav", "b/song.wav", "song.wav") == ["a__song", "b__song", "song"]


def test_songs_that_differ_in_their_ending_get_it():
    assert names("song.wav", "song.mp3", "other.mp3") == ["song_wav", "song_mp3", "other"]


def test_songs_that_differ_in_capitals_alone_keep_apart_on_every_system():
    found = names("Song.wav", "song.wav", "SONG.mp3")
    assert len({name.casefold() for name in found}) == 3


def test_a_path_that_reads_like_another_one_keeps_apart():
    found = names("a/b.wav", "a__b.wav")
    assert len(set(found)) == 2 and all(name.startswith("a__b_") for name in found)


def test_the_order_in_which_songs_are_found_changes_no_name():
    paths = ["a/b.wav", "a__b.wav", "song.wav", "song.mp3", "Song.flac", "x.ogg", "CON.wav", "x?.ogg"]
    whole = dict(zip(paths, names(*paths), strict=True))
    for seed in range(5):
        shuffled = random.Random(seed).sample(paths, len(paths))
        assert dict(zip(shuffled, names(*shuffled), strict=True)) == whole


def test_names_are_names_on_windows():
    found = names(
        "What?.wav",
        'a:b<c>|"d*.wav',
        "con.wav",
        "nul.live.wav",
        "com1/x.wav",
        "dots....wav",
        "tab\there.wav",
        "x\\y.wav",
    )
    for name in found:
        assert not set(name) & set('<>:"/\\|?*\t') and not name.endswith((".", " "))
        assert name.split(".")[0].lower() not in ("con", "nul", "com1")
    assert found[0] == "What_" and found[2] == "_con"


def test_letters_written_in_two_ways_are_one_name_in_the_usual_way():
    composed, apart = (unicodedata.normalize(form, "Fürwahr") for form in ("NFC", "NFD"))
    assert names(f"{apart}.wav") == [composed]
    assert len(set(names(f"{apart}.wav", f"{composed}.wav"))) == 2


def test_a_very_long_name_is_cut_and_keeps_apart():
    found = names("😀" * 80 + "a.wav", "😀" * 80 + "b.wav")
    assert len(set(found)) == 2 and all(len(name.encode()) <= 120 for name in found)


def test_a_name_that_is_no_utf_8_and_a_name_of_dots():
    found = names("a\udcff.wav", "...wav")
    assert all(name.encode() for name in found) and all(found)


def test_a_file_outside_of_the_folder_has_its_own_name():
    outside = Path("elsewhere").absolute() / "song.wav"
    assert song_names(FOLDER, [outside]) == {outside: "song"}
