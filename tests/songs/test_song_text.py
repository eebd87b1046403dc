"""What the model is told about each song: every form of file, which wins, what is changed, and what is missing."""

import json
import os
import subprocess
import sys
import unicodedata

import pytest
from song_files import a_song, save

from sidestep_plugin import Refusal
from sidestep_plugin.songs.song_text import SongText, Trigger, find_texts, holds, text_of_song, trigger_of
from sidestep_plugin.songs.triggers import not_held, trigger_of_songs


def write(folder, **files):
    """Files of a folder; "__" in a name is a folder, "_" a full stop."""
    return put(folder, {name.replace("__", "/").replace("_", "."): content for name, content in files.items()})


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        raw = content if isinstance(content, bytes) else content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode("utf-8"))
    return folder


def text(folder, name="song.wav", **options):
    file = folder / name
    return find_texts(folder, [file], **options).songs[file]


# -- forms -------------------------------------------------------------------------------------------------------------


def test_a_song_without_any_file_is_told_by_its_name_and_says_so(tmp_path):
    told = text(tmp_path, "night_2.wav")
    assert (told.caption, told.lyrics, told.language, told.bpm) == ("night 2", "[Instrumental]", "unknown", None)
    assert told.problems == (
        'no lyrics: "[Instrumental]" is told. Write night_2.lyrics.txt, with [Instrumental] in it where nobody sings',
        'no caption: the file\'s name, "night 2", is told. Write night_2.caption.txt',
    )
    assert set(told.sources.values()) == {"default"}


def test_caption_and_lyrics_in_a_file_each(tmp_path):
    write(
        tmp_path,
        song_caption_txt="jazz, brushes\n",
        song_lyrics_txt="[Verse]\r\nla la\r\n",
        song_json={"language": "en"},
    )
    told = text(tmp_path)
    assert (told.caption, told.lyrics, told.instrumental) == ("jazz, brushes", "[Verse]\nla la", False)
    assert (told.sources["caption"], told.sources["lyrics"]) == ("song.caption.txt", "song.lyrics.txt")
    assert told.problems == () and told.changes == ()


def test_a_plain_text_file_is_lyrics_as_ace_step_reads_it(tmp_path):
    write(tmp_path, song_caption_txt="jazz", song_txt="[Verse]\nKey: is what I lost\nla", song_json={"language": "en"})
    told = text(tmp_path)
    assert told.lyrics == "[Verse]\nKey: is what I lost\nla" and told.sources["lyrics"] == "song.txt, lyrics alone"
    assert not told.problems


def test_a_plain_text_file_of_one_line_may_be_a_caption_and_that_is_said(tmp_path):
    told = text(write(tmp_path, song_txt="smoky jazz, brushes, walking bass"))
    assert told.lyrics == "smoky jazz, brushes, walking bass"
    assert any("song.caption.txt" in problem and "single line" in problem for problem in told.problems)


SIDE_STEP = """caption: dark techno, driving
genre: techno
bpm: 128
key: F# Major
signature: 4/4
is_instrumental: false
lyrics:
[Verse]
Time: it runs
bpm: my heart
"""


def test_side_steps_form_has_the_lyrics_last_and_keeps_what_has_a_colon_in_them(tmp_path):
    told = text(write(tmp_path, song_txt=SIDE_STEP))
    assert (told.caption, told.genre, told.bpm, told.keyscale) == ("dark techno, driving", "techno", 128, "F# major")
    assert told.timesignature == "4" and told.lyrics == "[Verse]\nTime: it runs\nbpm: my heart"
    assert told.sources["bpm"] == "song.txt, Side-Step's form"
    assert any('has "bpm: my heart" below the lyrics' in problem for problem in told.problems)


def test_side_steps_form_with_empty_fields_and_a_caption_of_two_lines(tmp_path):
    told = text(write(tmp_path, song_txt="caption: warm pads,\nslow\ngenre:\nbpm:\nkey:\nsignature:\nlyrics:\n"))
    assert (told.caption, told.genre, told.bpm, told.instrumental) == ("warm pads,\nslow", "", None, True)


def test_side_steps_form_without_a_line_for_the_lyrics(tmp_path):
    told = text(write(tmp_path, song_txt="caption: pop\nbpm: 100\n\n[Verse]\nla la"))
    assert (told.caption, told.bpm, told.lyrics) == ("pop", 100, "[Verse]\nla la")
    assert any('without a line "lyrics:"' in problem for problem in told.problems)


def test_a_field_that_nobody_knows_is_said(tmp_path):
    told = text(write(tmp_path, song_txt="caption: pop\nmy_field: 3\nlyrics: [Instrumental]"))
    assert any('"my_field:"' in problem for problem in told.problems) and told.caption == "pop"


@pytest.mark.parametrize(
    "lyrics", ["Title: Blue\nKey: C\nTempo: 90\n\n[Verse]\nla", "Love: a word\nla", "bpm: 3\nla la"]
)
def test_lyrics_that_begin_with_a_colon_stay_lyrics(lyrics, tmp_path):
    assert text(write(tmp_path, song_txt=lyrics)).lyrics == lyrics


def test_ai_toolkits_form(tmp_path):
    tags = "<CAPTION>pop, bright</CAPTION>\n<LYRICS>\n[Verse]\nüben\n</LYRICS>\n<BPM>99.7</BPM>"
    tags += "<KEYSCALE>C major</KEYSCALE><TIMESIGNATURE>4</TIMESIGNATURE><DURATION>9</DURATION><LANGUAGE>de</LANGUAGE>"
    told = text(write(tmp_path, song_txt=tags))
    assert (told.caption, told.lyrics, told.bpm, told.language) == ("pop, bright", "[Verse]\nüben", 100, "de")
    assert told.changes == ('bpm: "99.7" becomes "100" (song.txt, ai-toolkit\'s form)',) and not told.problems


def test_ai_toolkits_form_with_a_tag_that_is_not_closed(tmp_path):
    told = text(write(tmp_path, song_txt="<caption>pop</caption><LYRICS>[Verse]\nla"))
    assert (told.caption, told.lyrics) == ("pop", "[Verse]\nla")


def test_a_json_file_with_names_of_several_programs(tmp_path):
    fields = {"prompt": "pop", "tempo": "120 bpm", "key": "Am", "time_signature": "3/4", "vocal_language": "german"}
    told = text(write(tmp_path, song_json={**fields, "lyrics": "[Verse]\nla"}))
    assert (told.caption, told.bpm, told.keyscale, told.timesignature) == ("pop", 120, "A minor", "3")
    assert told.language == "de" and told.lyrics == "[Verse]\nla"
    assert len(told.changes) == 4 and all(change.endswith("(song.json)") for change in told.changes)


def test_a_json_file_with_values_of_a_wrong_type(tmp_path):
    told = text(
        write(tmp_path, song_json={"caption": {"en": "pop"}, "bpm": True, "genre": ["a", "b"], "keyscale": None})
    )
    assert told.caption == "a, b"  # the genre in place of the caption
    assert any("caption is a object" in problem or "caption is an object" in problem for problem in told.problems)
    assert any("bpm is a truth value" in problem for problem in told.problems)


def test_a_json_file_without_a_field_of_a_song(tmp_path):
    assert any("none of the fields" in problem for problem in text(write(tmp_path, song_json={"x": 1})).problems)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table(separator, tmp_path):
    rows = [["File", "BPM", "Key", "Caption", "Language"], ["song.wav", "120", "Am", '"pop, bright; wide"', "en"]]
    put(tmp_path, {"meta.csv": "\n".join(separator.join(row) for row in rows)})
    told = text(tmp_path)
    assert (told.caption, told.bpm, told.keyscale, told.language) == ("pop, bright; wide", 120, "A minor", "unknown")
    assert told.sources["caption"] == "meta.csv, row 2"


def test_a_table_with_too_many_cells_says_so(tmp_path):
    told = text(put(tmp_path, {"meta.csv": "File,Caption\nsong.wav,pop, bright\n"}))
    assert told.caption == "pop" and any("more cells than the header" in problem for problem in told.problems)


def test_a_table_without_a_column_of_files_is_named(tmp_path):
    put(tmp_path, {"meta.csv": "Name,Caption\nsong.wav,pop\n", "empty.csv": ""})
    notes = find_texts(tmp_path, [tmp_path / "song.wav"]).notes
    assert any("meta.csv has no column File" in note for note in notes)
    assert any("empty.csv has no column File" in note for note in notes)


def a_dataset(*samples, **metadata):
    return {"metadata": metadata, "samples": list(samples)}


def test_the_dataset_json_of_ace_steps_tab(tmp_path):
    sample = {"audio_path": "/elsewhere/song.wav", "filename": "song.wav", "caption": "pop", "lyrics": "[Verse]\nla"}
    sample |= {"bpm": 120, "keyscale": "C major", "timesignature": "4", "language": "en", "is_instrumental": False}
    put(tmp_path, {"dataset.json": a_dataset({**sample, "custom_tag": "trg"}, custom_tag="trg", tag_position="append")})
    told = text(tmp_path)
    assert (told.prompt, told.lyrics, told.language) == ("pop, trg", "[Verse]\nla", "en")
    assert told.sources["caption"] == told.sources["trigger"] == "dataset.json" and not told.problems


def test_a_dataset_json_that_is_named_wins_wherever_it_lies(tmp_path):
    put(
        tmp_path,
        {"a/song.caption.txt": "typed", "other/data.json": a_dataset({"filename": "song.wav", "caption": "labeled"})},
    )
    file = tmp_path / "a" / "song.wav"
    told = find_texts(tmp_path / "a", [file], dataset=tmp_path / "other" / "data.json").songs[file]
    assert told.caption == "labeled" and told.sources["caption"] == "data.json"
    assert "caption: data.json is used, song.caption.txt says something else" in told.problems


@pytest.mark.parametrize("content", ["{", "[1]", '{"samples": ["a.pt"]}', "{}", "", '{"samples": [{}]}'])
def test_a_named_file_that_is_no_dataset_json_is_refused(content, tmp_path):
    put(tmp_path, {"data.json": content})
    with pytest.raises(Refusal, match=r"data\.json .*expected"):
        text(tmp_path, dataset=tmp_path / "data.json")


def test_lyrics_that_a_dataset_json_has_and_does_not_use_are_said(tmp_path):
    sample = {"filename": "song.wav", "caption": "pop", "lyrics": "[Instrumental]", "raw_lyrics": "[Verse]\nla"}
    told = text(put(tmp_path, {"dataset.json": [sample]}))
    assert told.instrumental and any("raw_lyrics" in problem for problem in told.problems)


def test_songs_told_by_their_genre_are_those_that_upstream_chooses(tmp_path):
    samples = [{"filename": f"{n}.wav", "caption": f"caption {n}", "genre": f"genre {n}"} for n in range(10)]
    put(tmp_path, {"dataset.json": a_dataset(*samples, genre_ratio=30)})
    files = [tmp_path / f"{n}.wav" for n in range(10)]
    found = find_texts(tmp_path, files).songs
    # What upstream's select_genre_indices gives for ten songs and 30 percent: seed 42, shuffle, the first three.
    assert [file.stem for file in files if found[file].use == "genre"] == ["2", "3", "7"]
    assert found[files[7]].prompt == "genre 7"


def test_a_song_can_ask_for_its_genre(tmp_path):
    told = text(write(tmp_path, song_txt="caption: pop\ngenre: dance\nprompt_override: genre\nlyrics: [Instrumental]"))
    assert (told.prompt, told.use) == ("dance", "genre") and not told.problems


# -- precedence --------------------------------------------------------------------------------------------------------

SOURCES = {
    "meta.csv": "File,Caption\nsong.wav,from csv\n",
    "song.json": {"caption": "from json"},
    "song.caption.txt": "from caption",
    "song.txt": "caption: from txt\nlyrics: [Instrumental]",
    "dataset.json": {"samples": [{"filename": "song.wav", "caption": "from dataset"}]},
}


@pytest.mark.parametrize("first", range(len(SOURCES)))
def test_the_first_file_that_says_something_wins_and_contradictions_are_told(first, tmp_path):
    names = list(SOURCES)
    told = text(put(tmp_path, {name: SOURCES[name] for name in names[first:]}))
    assert told.caption == f"from {['csv', 'json', 'caption', 'txt', 'dataset'][first]}"
    contradictions = [problem for problem in told.problems if "else" in problem]
    assert len(contradictions) == (first < len(SOURCES) - 1)
    assert all(name.split(",")[0] in "".join(contradictions) for name in names[first + 1 :])


def test_each_field_is_looked_for_on_its_own(tmp_path):
    told = text(
        write(tmp_path, song_json={"bpm": 90}, song_txt="caption: pop\nbpm: 120\nkey: Am\nlyrics: [Instrumental]")
    )
    assert (told.bpm, told.caption, told.keyscale) == (90, "pop", "A minor")
    assert told.problems == ("bpm: song.json is used, song.txt, Side-Step's form says something else",)


def test_the_same_said_twice_is_no_contradiction(tmp_path):
    put(tmp_path, {"song.json": {"bpm": 120.0, "keyscale": "Am", "language": "english", "caption": "Pop  song"}})
    put(
        tmp_path,
        {"meta.csv": "File,BPM,Key,Language,Caption\nsong.wav,120,A minor,en,pop song\n", "song.lyrics.txt": "[V]\nla"},
    )
    assert text(tmp_path).problems == ()


def test_what_side_step_writes_where_it_knows_nothing_contradicts_nothing(tmp_path):
    sample = {"filename": "my_song.wav", "caption": "my song", "lyrics": "[Instrumental]", "bpm": None, "keyscale": ""}
    put(tmp_path, {"my_song.caption.txt": "pop", "my_song.lyrics.txt": "[V]\nla", "my_song.json": {"language": "en"}})
    put(tmp_path, {"dataset.json": {"samples": [{**sample, "language": "unknown", "is_instrumental": True}]}})
    told = text(tmp_path, "my_song.wav")
    assert told.caption == "pop" and told.problems == (
        "instrumental according to dataset.json, with lyrics in my_song.lyrics.txt: the lyrics are told",
    )


# -- which song --------------------------------------------------------------------------------------------------------


def test_songs_of_one_name_in_two_folders_do_not_get_each_others_files(tmp_path):
    put(tmp_path, {"a/song.caption.txt": "one", "b/song.caption.txt": "two"})
    files = [tmp_path / "a" / "song.wav", tmp_path / "b" / "song.wav", tmp_path / "song.wav"]
    found = find_texts(tmp_path, files).songs
    assert [found[file].caption for file in files] == ["one", "two", "song"]


def test_a_table_names_songs_by_path_and_by_name_only_where_one_song_has_it(tmp_path):
    put(
        tmp_path,
        {"meta.csv": "File,Caption\nsong.wav,which?\na\\song.wav,one\nother.wav,two\nlost.wav,three\nThird,four\n"},
    )
    files = [tmp_path / name for name in ("a/song.wav", "b/song.wav", "b/other.wav", "b/third.flac")]
    found = find_texts(tmp_path, files)
    assert [found.songs[file].caption for file in files] == ["one", "song", "two", "four"]
    assert any("meta.csv names lost.wav: no such song" in note for note in found.notes)
    assert any("meta.csv names song.wav, and several songs are called so" in note for note in found.notes)


def test_a_table_in_a_songs_own_folder_comes_before_one_above(tmp_path):
    put(tmp_path, {"meta.csv": "File,Caption\na/song.wav,outer\n", "a/meta.csv": "File,Caption\nsong.wav,inner\n"})
    assert text(tmp_path, "a/song.wav").caption == "inner"


def test_a_path_of_another_machine_is_found_by_its_end(tmp_path):
    put(
        tmp_path,
        {
            "d.json": [
                {"audio_path": "C:\\music\\a\\song.wav", "caption": "one"},
                {"audio_path": "/x/b/song.wav", "caption": "two"},
            ]
        },
    )
    files = [tmp_path / "a" / "song.wav", tmp_path / "b" / "song.wav", tmp_path / "song.wav"]
    found = find_texts(tmp_path, files).songs
    assert [found[file].caption for file in files] == ["one", "two", "song"]


def test_a_song_that_a_table_names_twice_is_said(tmp_path):
    told = text(put(tmp_path, {"meta.csv": "File,Caption\nsong.wav,one\nsong.wav,two\n"}))
    assert told.caption == "one" and any("names this song 2 times" in problem for problem in told.problems)


def test_files_that_belong_to_no_song_are_named_once(tmp_path):
    put(
        tmp_path,
        {
            "sogn.caption.txt": "pop",
            "song.caption.txt": "pop",
            "README.txt": "x",
            ".hidden.txt": "x",
            "._song.txt": "x",
        },
    )
    notes = find_texts(tmp_path, [tmp_path / "song.wav"]).notes
    assert notes == ("No song belongs to sogn.caption.txt",)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("song.lyric.txt", "song.lyrics.txt"),
        ("song_lyrics.txt", "song.lyrics.txt"),
        ("song.lyrics", "song.lyrics.txt"),
        ("song.LRC", "song.lyrics.txt"),
        ("song.captions.txt", "song.caption.txt"),
        ("song.wav.txt", "song.txt"),
        ("song.wav.json", "song.json"),
        ("sogn.caption.txt", "song.caption.txt"),
        ("song.captoin.txt", "song.caption.txt"),
        ("other.txt", None),
        ("song_7.txt", None),  # of another song
        ("songbook.lyrics.txt", None),
    ],
)
def test_a_file_of_nearly_the_right_name_is_told_which_name_was_expected(tmp_path, name, expected):
    put(tmp_path, {name: "{}" if name.endswith("json") else "la", "a/b.txt": "x"})
    files = [tmp_path / "song.wav", tmp_path / "song_1.wav"]
    told = f"{name} (expected {expected})" if expected else name
    assert find_texts(tmp_path, files).notes == (f"No song belongs to {told}",)


def test_a_picture_and_a_readme_beside_a_song_are_not_told(tmp_path):
    put(tmp_path, {"song.jpg": "x", "README.md": "x", "notes.md": "x"})
    assert find_texts(tmp_path, [tmp_path / "song.wav"]).notes == ()


def test_capitals_and_composed_letters_of_a_name_do_not_matter(tmp_path):
    name = unicodedata.normalize("NFD", "Lücke")
    put(tmp_path, {f"{name}.caption.txt": "pop", "SONG.Caption.TXT": "rock"})
    files = [tmp_path / unicodedata.normalize("NFC", "Lücke.wav"), tmp_path / "song.wav"]
    found = find_texts(tmp_path, files).songs
    assert [found[file].caption for file in files] == ["pop", "rock"]


def test_a_name_with_full_stops_and_an_emoji(tmp_path):
    put(tmp_path, {"01. song feat. 😀.caption.txt": "pop 😀"})
    assert text(tmp_path, "01. song feat. 😀.mp3").caption == "pop 😀"


# -- encodings and bad files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_text_in_unicode_is_read_without_its_byte_order_mark(encoding, tmp_path):
    put(tmp_path, {"song.lyrics.txt": "[Verse]\nmüde Straße, said the cat\n".encode(encoding)})
    assert text(tmp_path).lyrics == "[Verse]\nmüde Straße, said the cat"


def test_a_text_in_windows_1252_is_read_and_the_words_are_shown(tmp_path):
    told = text(put(tmp_path, {"song.lyrics.txt": "[Verse]\nmüde Straße – “so”".encode("cp1252")}))
    assert told.lyrics == "[Verse]\nmüde Straße – “so”"
    assert any('read as Windows-1252 ("müde", "Straße"' in problem for problem in told.problems)


BAD = {
    "Japanese in Shift-JIS": ("song.lyrics.txt", "夜を歩く".encode("shift-jis"), "encoding cannot be told"),
    "Russian in Windows-1251": ("song.lyrics.txt", "в ночи мы идём".encode("cp1251"), "encoding cannot be told"),
    "Chinese in GBK": ("song.caption.txt", "夜晚的歌".encode("gbk"), "encoding cannot be told"),
    "a picture": ("song.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), "bytes of value 0, expected text"),
    "half a UTF-16": ("song.txt", b"\xff\xfe\x41", "does not go on so"),
    "a broken JSON": ("song.json", '{"caption": "pop",}', "is no JSON"),
    "a JSON list": ("song.json", "[1, 2]", "holds a list, expected an object"),
    "an empty JSON": ("song.json", "", "is no JSON"),
    "a JSON too deep": ("song.json", "[" * 100_000, "nested too deeply"),
    "a text of 2 MB": ("song.lyrics.txt", "la " * 700_000, "larger than 1 MiB"),
    "a table with a giant cell": ("meta.csv", 'File,Caption\nsong.wav,"' + "x" * 200_000 + '"', "is no table"),
    "a table that is a workbook": ("meta.csv", b"PK\x03\x04\0\0\0\0\0\x01", "bytes of value 0, expected text"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_file_that_cannot_be_read_is_refused_by_its_name(bad, tmp_path):
    name, content, says = BAD[bad]
    with pytest.raises(Refusal) as refused:
        text(put(tmp_path, {name: content}))
    assert name in str(refused.value) and says in str(refused.value) and len(str(refused.value)) < 500


def test_all_files_that_cannot_be_read_are_named_at_once(tmp_path):
    put(tmp_path, {"a.json": "{", "b.lyrics.txt": b"\0\1\2", "b.caption.txt": "pop"})
    with pytest.raises(Refusal, match=r"a\.json is no JSON .*b\.lyrics\.txt holds bytes"):
        find_texts(tmp_path, [tmp_path / "a.wav", tmp_path / "b.wav"])


def test_a_folder_named_like_a_text_is_refused_by_its_name(tmp_path):
    (tmp_path / "song.caption.txt").mkdir()
    with pytest.raises(Refusal, match=r"song\.caption\.txt is a folder, not a file"):
        text(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a named pipe")
def test_a_named_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "song.txt")
    with pytest.raises(Refusal, match=r"song\.txt is a named pipe"):
        text(tmp_path)


def test_a_broken_json_file_of_somebody_else_stops_nothing(tmp_path):
    put(tmp_path, {"settings.json": "{", "song.caption.txt": "pop"})
    found = find_texts(tmp_path, [tmp_path / "song.wav"])
    assert any("settings.json is no JSON" in note for note in found.notes)


def test_nothing_is_written_into_a_folder_that_may_only_be_read(tmp_path):
    put(tmp_path, SOURCES)
    before = sorted((file.name, file.stat().st_mtime_ns) for file in tmp_path.iterdir())
    tmp_path.chmod(0o555)
    try:
        assert text(tmp_path).caption == "from csv"
    finally:
        tmp_path.chmod(0o755)
    assert sorted((file.name, file.stat().st_mtime_ns) for file in tmp_path.iterdir()) == before


def test_reading_texts_imports_no_torch():
    code = "import sys, sidestep_plugin.songs.{}; sys.exit('torch' in sys.modules)"
    for module in ("song_text", "song_names", "vocabulary", "audio"):
        assert subprocess.run([sys.executable, "-c", code.format(module)], timeout=60).returncode == 0


# -- words, lyrics, language -------------------------------------------------------------------------------------------


def test_each_change_is_a_line_and_as_typed_makes_none(tmp_path):
    fields = {
        "caption": "pop",
        "bpm": 120.0,
        "keyscale": "Am",
        "timesignature": "4/4",
        "language": "english",
        "lyrics": "[V]\nla",
    }
    put(tmp_path, {"song.json": fields})
    assert text(tmp_path).changes == (
        'bpm: "120.0" becomes "120" (song.json)',
        'keyscale: "Am" becomes "A minor" (song.json)',
        'timesignature: "4/4" becomes "4" (song.json)',
        'language: "english" becomes "en" (song.json)',
    )
    typed = text(tmp_path, as_typed=True)
    assert (typed.bpm, typed.keyscale, typed.timesignature, typed.language) == ("120.0", "Am", "4/4", "english")
    assert typed.changes == () and typed.problems == ()


def test_words_that_the_model_does_not_know_are_told_and_kept(tmp_path):
    fields = {"caption": "pop", "bpm": "120-125", "keyscale": "D dorian", "timesignature": "5/4", "lyrics": "[V]\nla"}
    told = text(put(tmp_path, {"song.json": {**fields, "language": "klingon"}}))
    assert (told.bpm, told.keyscale, told.timesignature, told.language) == ("120-125", "D dorian", "5/4", "klingon")
    assert len(told.problems) == 4 and all("the model does not know" in problem for problem in told.problems)


def test_lyrics_without_a_language_say_so(tmp_path):
    told = text(write(tmp_path, song_caption_txt="pop", song_lyrics_txt="[V]\nla"))
    assert told.language == "unknown" and [problem.split(":")[0] for problem in told.problems] == ["no language"]


@pytest.mark.parametrize("said", [{"instrumental": True}, {"is_instrumental": "true"}, {"language": "instrumental"}])
def test_a_song_that_is_said_to_be_instrumental_lacks_nothing(said, tmp_path):
    told = text(put(tmp_path, {"song.json": {"caption": "pop", **said}}))
    assert (told.lyrics, told.language, told.instrumental, told.problems) == ("[Instrumental]", "unknown", True, ())


def test_nobody_sings_in_a_language(tmp_path):
    told = text(put(tmp_path, {"song.json": {"caption": "pop", "lyrics": "(instrumental)", "language": "en"}}))
    assert (told.lyrics, told.language) == ("[Instrumental]", "unknown")
    assert told.changes == (
        'lyrics: "(instrumental)" becomes "[Instrumental]" (song.json)',
        'language: "en" becomes "unknown", because nobody sings',
    )


# -- trigger word ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "prompt"), [("before", "trg, pop"), ("after", "pop, trg"), ("instead", "trg")])
def test_a_trigger_word_stands_where_it_is_to(position, prompt):
    assert SongText("pop", trigger="trg", position=position).prompt == prompt


def test_a_trigger_word_alone_and_one_that_is_there_already():
    assert SongText("", trigger="trg").prompt == "trg"
    assert SongText("pop by trg", trigger="trg").prompt == "pop by trg"
    assert SongText("pop by trgs", trigger="trg").prompt == "trg, pop by trgs"
    assert holds("TRG", "trg") is False and holds("a trg.", "trg") is True


def test_a_trigger_word_comes_from_the_command_line_the_song_or_the_folder(tmp_path):
    put(tmp_path, {"manifest.json": {"metadata": {"custom_tag": "folder", "tag_position": "append"}, "samples": []}})
    put(tmp_path, {"song.caption.txt": "pop", "other.txt": "caption: rock\ncustom_tag: own\nlyrics:"})
    assert text(tmp_path).prompt == "pop, folder" and text(tmp_path).sources["trigger"] == "manifest.json"
    assert text(tmp_path, "other.wav").prompt == "rock, own"
    said = Trigger("said", "before")
    assert (
        text(tmp_path, trigger=said).prompt == "said, pop"
        and text(tmp_path, "other.wav", trigger=said).prompt == "said, rock"
    )
    assert text(tmp_path, trigger=said).sources["trigger"] == "--trigger"


def test_a_trigger_word_of_side_steps_folder(tmp_path):
    put(tmp_path, {"preprocess_meta.json": {"custom_tag": "trg", "tag_position": "replace", "model_variant": "turbo"}})
    assert trigger_of(tmp_path) == Trigger("trg", "instead", "preprocess_meta.json")
    told = text(tmp_path)
    assert told.prompt == "trg" and not any("caption" in problem for problem in told.problems)


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": []}', '{"metadata": {"custom_tag": 3}}', ""])
def test_a_manifest_without_a_trigger_word_names_none(content, tmp_path):
    assert trigger_of(put(tmp_path, {"manifest.json": content})) is None
    assert trigger_of(tmp_path / "nowhere") is None


# -- finished songs ----------------------------------------------------------------------------------------------------

METADATA = {"audio_path": "/music/a/song.wav", "filename": "song.wav", "caption": "trg, pop", "lyrics": "[V]\nla"}


def test_a_finished_song_tells_its_own_text_and_what_it_lacks():
    told = text_of_song({**METADATA, "bpm": 120, "keyscale": "Am", "timesignature": "4/4"}, "1f.pt")
    assert (told.caption, told.lyrics, told.keyscale, told.timesignature) == ("trg, pop", "[V]\nla", "A minor", "4")
    assert told.sources["caption"] == "1f.pt itself"
    assert [problem.split(":")[0] for problem in told.problems] == ["no language"]
    assert text_of_song({}, "1f.pt").caption == "1f"


def test_the_tag_that_upstream_put_into_a_finished_songs_caption_is_not_doubled(tmp_path):
    put(tmp_path, {"manifest.json": {"metadata": {"custom_tag": "trg"}, "samples": ["1f.pt"]}})
    file = tmp_path / "1f.pt"
    told = find_texts(tmp_path, [file], known={file: METADATA}).songs[file]
    assert told.prompt == "trg, pop" and told.trigger == "trg"


def test_another_trigger_word_takes_the_place_of_the_one_that_upstream_put_into_the_caption(tmp_path):
    put(tmp_path, {"manifest.json": {"metadata": {"custom_tag": "trg", "tag_position": "prepend"}, "samples": []}})
    file = tmp_path / "1f.pt"
    told = find_texts(tmp_path, [file], known={file: METADATA}, trigger=Trigger("new", "after")).songs[file]
    assert told.prompt == "pop, new" and 'the trigger word "trg" is taken out of the caption' in told.changes
    put(tmp_path, {"1f.caption.txt": "trg, typed"})
    told = find_texts(tmp_path, [file], known={file: METADATA}, trigger=Trigger("new", "after")).songs[file]
    assert told.prompt == "trg, typed, new"  # what somebody typed stays


def test_the_place_of_a_trigger_word_is_kept_in_a_prepared_song():
    record = {"trigger": "trg", "trigger_position": "after"}
    told = text_of_song({"caption": "pop", "custom_tag": "trg", "prepared": record}, "a.pt")
    assert (told.trigger, told.position, told.prompt) == ("trg", "after", "pop, trg")


def test_files_beside_finished_songs_are_named_after_them_or_after_their_audio(tmp_path):
    put(tmp_path, {"1f.json": {"language": "en"}, "song.caption.txt": "new", "meta.csv": "File,BPM\nsong.wav,99\n"})
    file = tmp_path / "1f.pt"
    told = find_texts(tmp_path, [file], known={file: METADATA}).songs[file]
    assert (told.caption, told.language, told.bpm, told.lyrics) == ("new", "en", 99, "[V]\nla")


def test_texts_of_finished_songs_may_lie_where_the_audio_is(tmp_path):
    put(tmp_path, {"music/a/song.json": {"language": "en"}, "music/b/song.json": {"language": "de"}, "old/x": ""})
    files = [tmp_path / "old" / name for name in ("1.pt", "2.pt", "3.pt")]
    paths = ["/other/music/a/song.wav", "D:\\music\\b\\song.wav", ""]
    known = {file: {**METADATA, "audio_path": path} for file, path in zip(files, paths, strict=True)}
    found = find_texts(tmp_path / "old", files, known=known, texts=tmp_path / "music").songs
    assert [found[file].language for file in files] == ["en", "de", "unknown"]


def test_one_file_is_not_given_to_two_finished_songs_whose_audio_has_one_name(tmp_path):
    put(tmp_path, {"song.json": {"language": "en"}})
    files = [tmp_path / "1.pt", tmp_path / "2.pt"]
    found = find_texts(tmp_path, files, known=dict.fromkeys(files, METADATA))
    assert [found.songs[file].language for file in files] == ["unknown", "unknown"]
    assert found.notes == ("No song belongs to song.json",)


def test_the_trigger_word_of_finished_songs(tmp_path):
    for name, caption in (("a.pt", "trg, pop"), ("b.pt", "rock, trg"), ("c.pt", "jazz")):
        save(
            tmp_path,
            name,
            a_song(metadata={"caption": caption, "prepared": {"trigger": "trg", "trigger_position": "after"}}),
        )
    files = [tmp_path / name for name in ("a.pt", "b.pt", "c.pt")]
    assert trigger_of_songs(tmp_path, files) == Trigger("trg", "after", "the songs")
    assert not_held("trg", files) == '1 caption without the trigger word "trg": c.pt'
    assert not_held("trg", files[:2]) is None
    assert "No caption of the songs holds" in str(not_held("other", files))
    save(tmp_path, "d.pt", a_song(metadata=None))
    assert not_held("trg", [tmp_path / "d.pt"]) is None and trigger_of_songs(tmp_path, [tmp_path / "d.pt"]) is None
