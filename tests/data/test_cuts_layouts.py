"""Which audio a folder holds, in which order, with which ids, speakers and transcripts; nothing here is opened, so files are empty."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from k2ssl.data.audio_layouts import (
    Transcript,
    chapter_items,
    chapter_splits,
    folder_items,
    listed_items,
    read_transcript_table,
    segmented_items,
    what_is_in,
)
from k2ssl.data.audio_scan import AudioItem, Unreadable


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def split(listing: object) -> tuple[dict[str, AudioItem], dict[str, str]]:
    items = list(listing)  # type: ignore[call-overload]
    good = [item for item in items if isinstance(item, AudioItem)]
    assert len({item.id for item in good}) == len(good)
    return {item.id: item for item in good}, {Path(item.path).name: item.reason for item in items if isinstance(item, Unreadable)}


def test_audio_is_found_at_any_depth_in_a_fixed_order(tmp_path: Path) -> None:
    touch(
        tmp_path, "b/c/z.OGG", "b/a.mp3", "k.wav", "a.flac", "b/notes.md", ".hidden.wav", ".git/x.wav", "b/._a.mp3", "é ö/ü.opus", "x.y.wav"
    )
    items, bad = split(folder_items(tmp_path))
    assert list(items) == ["a", "k", "x.y", "b/a", "b/c/z", "é ö/ü"]
    assert items["b/c/z"].path == str(tmp_path / "b/c/z.OGG")
    assert not bad


def test_ids_do_not_depend_on_how_the_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "in/b/a.wav")
    monkeypatch.chdir(tmp_path)
    listings = [list(folder_items(root)) for root in (tmp_path / "in", Path("in"), Path("in/../in"), Path("./in/"))]
    assert all(listing == listings[0] for listing in listings)


def test_two_files_that_would_share_an_id_are_told(tmp_path: Path) -> None:
    touch(tmp_path, "a.flac", "a.wav", "a.flac.wav", "b.wav")
    items, bad = split(folder_items(tmp_path))
    assert list(items) == ["a", "a.flac", "b"]
    assert bad == {"a.wav": "would have the same id as a.flac"}


def test_audio_that_cannot_be_read_is_told_and_other_files_are_not(tmp_path: Path) -> None:
    touch(tmp_path, "a.m4a", "b.SPH", "c.jpg", "d.wav", "d.sph")
    items, bad = split(folder_items(tmp_path))
    assert list(items) == ["d"]
    assert sorted(bad) == ["a.m4a", "b.SPH"]
    assert "convert" in bad["a.m4a"]


def test_links_are_followed_once_even_in_circles(tmp_path: Path) -> None:
    touch(tmp_path, "corpus/a.wav", "elsewhere/b.wav")
    os.symlink(tmp_path / "elsewhere", tmp_path / "corpus" / "link")
    os.symlink(tmp_path / "corpus", tmp_path / "corpus" / "self")
    items, _ = split(folder_items(tmp_path / "corpus"))
    assert list(items) == ["a", "link/b"]


def test_a_folder_that_cannot_be_read_is_told_and_the_rest_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.flac", "b/c.flac", "d/e.flac")
    original = os.scandir

    def closed(path: str) -> object:
        if str(path).endswith("/b"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return original(path)

    monkeypatch.setattr(os, "scandir", closed)
    for listing in (folder_items(tmp_path), segmented_items(tmp_path)):
        items, bad = split(listing)
        assert list(items) == ["a", "d/e"]
        assert bad == {"b": "this folder cannot be read (Permission denied)"}
    assert split(chapter_items(tmp_path))[1]["b"] == "this folder cannot be read (Permission denied)"


@pytest.mark.parametrize(
    ("speaker", "expected"),
    [("none", [None, None]), ("folder", [None, "book"]), ("top-folder", [None, "anna"]), ("name", ["19", "ben"])],
)
def test_the_speaker_is_taken_from_where_it_is_asked_for(tmp_path: Path, speaker: str, expected: list[str | None]) -> None:
    touch(tmp_path, "19-198-0000.wav", "anna/book/ben_7.wav")
    items, _ = split(folder_items(tmp_path, speaker=speaker))  # type: ignore[arg-type]
    assert [item.speaker for item in items.values()] == expected


def test_transcripts_lie_beside_the_audio_or_in_a_table_which_wins(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "a.txt", "d/b.wav", "d/b.txt", "c.wav", "c.lab")
    items, bad = split(
        folder_items(tmp_path, text_suffix=".txt", table={"a": Transcript("HI", "me"), "gone": Transcript("")}, speaker="name")
    )
    assert (items["a"].text, items["a"].speaker, items["a"].text_path) == ("HI", "me", None)
    assert items["d/b"].text_path == str(tmp_path / "d/b.txt")
    assert (items["c"].text, items["c"].text_path, items["c"].speaker) == (None, None, "c")
    assert bad == {"gone": "has a transcript in the table, but there is no such audio"}
    assert split(folder_items(tmp_path, text_suffix=".lab"))[0]["c"].text_path == str(tmp_path / "c.lab")
    assert all(item.text_path is None for item in split(folder_items(tmp_path))[0].values())


def test_tables_are_read_by_position_or_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("b/a.wav\t HELLO \nc\t\tanna\r\n\n./d.flac\tX\t \n", encoding="utf-8")
    assert read_transcript_table(path) == {"b/a": Transcript("HELLO"), "c": Transcript("", "anna"), "d": Transcript("X")}
    path.write_text("speaker\tpath\tage\ttext\nanna\ta.b.mp3\t7\tÜBER\n", encoding="utf-8")
    assert read_transcript_table(path) == {"a.b": Transcript("ÜBER", "anna")}
    path.write_text("\ufeffid\ttext\na\tX\n", encoding="utf-8")
    assert read_transcript_table(path) == {"a": Transcript("X")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tX\nb\n", "line 2 has 1 column"),
        (b"a.wav\tX\na.flac\tY\n", "line 2 names 'a', as an earlier line does"),
        (b"id\tsentence\na\tX\n", "names no column `text`, only id, sentence"),
        (b"a\t\xff\n", "cannot be read"),
    ],
)
def test_bad_tables_are_refused_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=f"t.tsv.*{message}"):
        read_transcript_table(tmp_path / "t.tsv")


def test_an_absent_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t\.tsv: cannot be read \(No such file"):
        read_transcript_table(tmp_path / "t.tsv")


def test_chapters_give_transcripts_and_speakers_and_tell_what_does_not_match(tmp_path: Path) -> None:
    touch(tmp_path, *(f"19/198/19-198-000{i}.flac" for i in (0, 1, 3)), "26/495/26-495-0000.flac")
    (tmp_path / "19/198/19-198.trans.txt").write_text("19-198-0000 HELLO  WORLD\n19-198-0001\n19-198-0002 GONE\n19-198-0000 AGAIN\n\n")
    items, bad = split(chapter_items(tmp_path))
    assert {name: (item.text, item.speaker) for name, item in items.items()} == {
        "19-198-0000": ("HELLO  WORLD", "19"),
        "19-198-0001": ("", "19"),
    }
    assert bad == {
        "19-198.trans.txt": "line 4 is for 19-198-0000, as an earlier one is; the earlier one counts",
        "19-198-0002.flac": "has a transcript, but there is no such file",
        "19-198-0003.flac": "no *.trans.txt beside it has a line for it",
        "26-495-0000.flac": "no *.trans.txt beside it has a line for it",
    }


def test_chapter_files_that_are_not_text_are_told(tmp_path: Path) -> None:
    touch(tmp_path, "19/198/19-198-0000.flac")
    (tmp_path / "19/198/19-198.trans.txt").write_bytes(b"19-198-0000 \xff")
    items, bad = split(chapter_items(tmp_path))
    assert not items
    assert "transcripts cannot be read" in bad["19-198.trans.txt"]


def test_parts_of_a_chapter_corpus_are_found_with_and_without_part_folders(tmp_path: Path) -> None:
    touch(tmp_path, "train/19/198/19-198.trans.txt", "dev/1/2/1-2-3.flac", "docs/readme.txt", "SPEAKERS.TXT", "7/8/notes.txt")
    assert chapter_splits(tmp_path) == {"dev": tmp_path / "dev", "train": tmp_path / "train"}
    assert chapter_splits(tmp_path / "train") == {"train": tmp_path / "train"}
    assert chapter_splits(tmp_path / "docs") == {}


def test_segmented_recordings_have_ids_below_the_corpus(tmp_path: Path) -> None:
    touch(tmp_path, "small/100/book/ch_1.flac", "small/100/book/ch_1.json", "small/100/book/cover.jpg")
    items, _ = split(segmented_items(tmp_path / "small", id_root=tmp_path))
    assert items["small/100/book/ch_1"].segments_path == str(tmp_path / "small/100/book/ch_1.json")
    assert list(split(segmented_items(tmp_path / "small"))[0]) == ["100/book/ch_1"]


def lists(root: Path, file_ids: str, transcription: str) -> tuple[Path, Path, Path]:
    (root / "x.fileids").write_text(file_ids)
    (root / "x.transcription").write_text(transcription)
    return root / "x.fileids", root / "x.transcription", root / "flac"


def test_lists_give_transcripts_without_sentence_marks(tmp_path: Path) -> None:
    touch(tmp_path, "flac/train/ann/a.flac", "flac/train/bob/b.wav", "flac/train/bob/e.wav")
    paths = lists(
        tmp_path, "train/ann/a\ntrain/bob/b\ntrain/bob/d\ntrain/bob/e\n", "<s> HELLO (IT) SAID </s> (a)\n(b)\nX (d)\n<s>  </s> (other)\n"
    )
    items, bad = split(listed_items(*paths))
    assert {name: (item.text, item.speaker, item.path) for name, item in items.items()} == {
        "a": ("HELLO (IT) SAID", "ann", str(tmp_path / "flac/train/ann/a.flac")),
        "b": ("", "bob", str(tmp_path / "flac/train/bob/b.wav")),
    }
    assert "no such file" in bad["d"]
    assert bad["e.wav"] == "x.transcription has no line for it"


@pytest.mark.parametrize(
    ("file_ids", "transcription", "message"),
    [
        ("a\n", "HELLO\n", "x.transcription: line 1 is not `TEXT"),
        ("a\n", "X (a)\nY (a)\n", "x.transcription: line 2 names 'a', as an earlier line does"),
        ("p/a\nq/a\n", "X (a)\n", "x.fileids: names must be unique, but a occur"),
    ],
)
def test_bad_lists_are_refused(tmp_path: Path, file_ids: str, transcription: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(listed_items(*lists(tmp_path, file_ids, transcription)))


def test_absent_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t\.transcription: cannot be read"):
        list(listed_items(tmp_path / "t.fileids", tmp_path / "t.transcription", tmp_path))


def test_what_a_folder_holds_is_said_in_words(tmp_path: Path) -> None:
    assert what_is_in(tmp_path) == "it is empty"
    touch(tmp_path, *(f"f{i}" for i in range(8)), "d/x")
    assert what_is_in(tmp_path) == "found d/, f0, f1, f2, f3, f4 and 3 more"
    assert what_is_in(tmp_path / "f0") == "it is a file"
    assert what_is_in(tmp_path / "none") == "there is no such folder"


def test_chapters_in_capitals_and_texts_with_other_separators_are_read(tmp_path: Path) -> None:
    touch(tmp_path, "1/2/1-2-3.FLAC", "1/2/1-2-4.flac")
    (tmp_path / "1/2/1-2.trans.txt").write_text("\ufeff1-2-3 HELLO\u2028WORLD\r\n1-2-4 MORE\n", encoding="utf-8")
    items, bad = split(chapter_items(tmp_path))
    assert not bad and {name: item.text for name, item in items.items()} == {"1-2-3": "HELLO\u2028WORLD", "1-2-4": "MORE"}
    assert items["1-2-3"].path.endswith("1-2-3.FLAC")
    assert chapter_splits(tmp_path)
