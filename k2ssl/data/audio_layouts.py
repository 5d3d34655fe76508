"""How corpora lie on disk: each function lists the audio of one layout, in a fixed order and without opening any of it.

They yield `AudioItem`, and `Unreadable` for what the layout promises and the disk does not hold. All are generators over a sorted walk: of a folder
with millions of files no more than one directory is in memory.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from k2ssl.data.audio_scan import AudioItem, Unreadable

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")
# Audio that libsndfile, and hence most of lhotse, cannot read: worth a word where it is left aside.
OTHER_AUDIO_SUFFIXES = (".m4a", ".mp4", ".aac", ".wma", ".sph", ".raw", ".pcm", ".amr", ".webm", ".mkv", ".shn")

Listing = Iterator[AudioItem | Unreadable]
Speaker = Literal["none", "folder", "top-folder", "name"]


@dataclass(frozen=True)
class Transcript:
    """A line of a transcript table."""

    text: str
    speaker: str | None = None


def folder_items(
    root: Path,
    *,
    speaker: Speaker = "none",
    text_suffix: str | None = None,
    table: Mapping[str, Transcript] | None = None,
) -> Listing:
    """Every audio file under `root`, however deep; the id is the path relative to `root` without its suffix, with `/` between folders.

    Args:
        root: hidden files and folders (`.name`) are left aside; links to folders are followed, once each.
        speaker: taken from nowhere, from the folder the file lies in, from the topmost folder below `root`, or from the file's name up to its
            first `-` or `_`.
        text_suffix: of transcripts beside the audio, such as ".txt"; None looks for none.
        table: transcripts by id, from `read_transcript_table`; those without audio are listed as unreadable at the end.
    """
    unused = set(table or ())
    closed: list[Unreadable] = []
    for folder, names in walk(root, closed):
        present = set(names)
        prefix = _prefix(folder, root)
        owner: dict[str, str] = {}
        for name in names:
            stem, suffix = os.path.splitext(name)
            path = os.path.join(folder, name)
            if suffix.lower() in OTHER_AUDIO_SUFFIXES and not any(stem + other in present for other in AUDIO_SUFFIXES):
                yield Unreadable(path, f"{suffix} files are not read; convert it to FLAC or WAV")
            if suffix.lower() not in AUDIO_SUFFIXES:
                continue
            if stem in owner:
                yield Unreadable(path, f"would have the same id as {owner[stem]}")
                continue
            owner[stem] = name
            item_id = prefix + stem
            unused.discard(item_id)
            known = table.get(item_id) if table else None
            beside = f"{stem}{text_suffix}"
            yield AudioItem(
                id=item_id,
                path=path,
                text=known.text if known else None,
                speaker=known.speaker if known and known.speaker else _speaker_of(item_id, speaker),
                text_path=os.path.join(folder, beside) if not known and text_suffix and beside in present else None,
            )
    yield from closed
    for item_id in sorted(unused):
        yield Unreadable(os.path.join(root, item_id), "has a transcript in the table, but there is no such audio")


def _prefix(folder: str, root: Path) -> str:
    """What ids of files in this folder begin with."""
    below = Path(os.path.relpath(folder, root)).as_posix()
    return "" if below == "." else f"{below}/"


def _speaker_of(item_id: str, speaker: Speaker) -> str | None:
    *folders, stem = item_id.split("/")
    if speaker == "name":
        return stem.replace("_", "-").split("-")[0] or None
    if speaker == "none" or not folders:
        return None
    return folders[-1] if speaker == "folder" else folders[0]


def read_transcript_table(path: Path) -> dict[str, Transcript]:
    """Transcripts from a table with tabs: path or id, text and, if there is a third column, speaker. It is held in memory.

    Paths are relative to the audio folder, with or without suffix. A first line that begins with `id` or `path` names the columns, which may then
    be in any order: `id` or `path`, `text`, `speaker`; others are left aside.

    Raises:
        ValueError: the file cannot be read, has a line with too few columns, or names an audio file twice.
    """
    try:
        lines = _read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    columns = {"path": 0, "text": 1, "speaker": 2}
    head = lines[0].rstrip("\r").split("\t")
    has_head = head[0] in ("id", "path") or ("text" in head and {"id", "path"} & set(head))
    if has_head:
        columns = {("path" if name == "id" else name): position for position, name in enumerate(head)}
        if "text" not in columns:
            raise ValueError(f"{path}: its first line names no column `text`, only {', '.join(head)}")
    table: dict[str, Transcript] = {}
    for number, line in enumerate(lines, start=1):
        if (number == 1 and has_head) or not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) <= max(columns["path"], columns["text"]):
            raise ValueError(f"{path}: line {number} has {len(cells)} column(s) between tabs; path and text are needed")
        key = _without_audio_suffix(cells[columns["path"]].strip().removeprefix("./"))
        if key in table:
            raise ValueError(f"{path}: line {number} names {key!r}, as an earlier line does")
        place = columns.get("speaker", len(cells))
        named = cells[place].strip() if place < len(cells) else ""
        table[key] = Transcript(cells[columns["text"]].strip(), named or None)
    return table


def chapter_items(root: Path, *, audio_suffix: str = ".flac") -> Listing:
    """The layout SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac, whose transcripts lie beside it: a file `*.trans.txt` with lines `ID TEXT`.

    The id is the file's name without suffix, the speaker its first field. A line without text is an empty transcript.
    """
    closed: list[Unreadable] = []
    for folder, names in walk(root, closed):
        audio = {os.path.splitext(name)[0]: name for name in names if name.lower().endswith(audio_suffix)}
        texts: dict[str, str] = {}
        for name in names:
            if name.endswith(".trans.txt"):
                yield from _read_chapter(os.path.join(folder, name), texts)
        for utterance in sorted(texts.keys() | audio.keys()):
            path = os.path.join(folder, audio.get(utterance, utterance + audio_suffix))
            if utterance not in texts:
                yield Unreadable(path, "no *.trans.txt beside it has a line for it")
            elif utterance not in audio:
                yield Unreadable(path, "has a transcript, but there is no such file")
            else:
                yield AudioItem(id=utterance, path=path, text=texts[utterance], speaker=utterance.split("-")[0])
    yield from closed


def _read_chapter(path: str, texts: dict[str, str]) -> Iterator[Unreadable]:
    try:
        lines = _read_lines(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        yield Unreadable(path, f"transcripts cannot be read ({error})")
        return
    for number, line in enumerate(lines, start=1):
        utterance, _, text = line.strip().partition(" ")
        if utterance in texts:
            yield Unreadable(path, f"line {number} is for {utterance}, as an earlier one is; the earlier one counts")
        elif utterance:
            texts[utterance] = text.strip()


def chapter_splits(root: Path) -> dict[str, Path]:
    """The parts of a corpus of `chapter_items`: subfolders that hold SPEAKER/CHAPTER, or `root` itself if it holds speakers directly.

    Speakers and chapters are numbers. Empty if there is no such layout.
    """
    splits = {folder.name: folder for folder in _subfolders(root) if not folder.name.isdigit() and _has_chapters(folder)}
    if _has_chapters(root):
        splits[root.resolve().name] = root
    return splits


def _has_chapters(folder: Path) -> bool:
    return any(_is_chapter(chapter) for speaker in _subfolders(folder) if speaker.name.isdigit() for chapter in _subfolders(speaker))


def _is_chapter(folder: Path) -> bool:
    return folder.name.isdigit() and any(path.name.lower().endswith((".trans.txt", ".flac")) for path in folder.iterdir())


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def segmented_items(root: Path, *, id_root: Path | None = None, audio_suffix: str = ".flac") -> Listing:
    """Long recordings, each beside a JSON file of the same name that tells where there is speech (see `AudioItem.segments_path`).

    Ids are paths relative to `id_root` (default: `root`) without suffix.
    """
    closed: list[Unreadable] = []
    for folder, names in walk(root, closed):
        prefix = _prefix(folder, id_root or root)
        for name in names:
            if name.lower().endswith(audio_suffix):
                stem, _ = os.path.splitext(name)
                path = os.path.join(folder, name)
                yield AudioItem(id=prefix + stem, path=path, segments_path=os.path.join(folder, f"{stem}.json"))
    yield from closed


def listed_items(file_ids: Path, transcription: Path, audio_dir: Path) -> Listing:
    """The layout of Sphinx: a file with one path a line, below `audio_dir` and without suffix, and one with lines `TEXT (NAME)`.

    `<s>` and `</s>` around the text are removed; NAME is the last part of the path, and becomes the id; the speaker is the folder's name.

    Raises:
        ValueError: one of the files cannot be read, a line has another form, or a name occurs twice.
    """
    texts: dict[str, str] = {}
    for number, line in enumerate(_lines(transcription), start=1):
        words, opening, name = line.rpartition("(")
        if not opening or not name.endswith(")"):
            raise ValueError(f"{transcription}: line {number} is not `TEXT (NAME)`: {line!r}")
        if name[:-1] in texts:
            raise ValueError(f"{transcription}: line {number} names {name[:-1]!r}, as an earlier line does")
        texts[name[:-1]] = words.strip().removeprefix("<s>").removesuffix("</s>").strip()
    seen = Counter(entry.split("/")[-1] for entry in _lines(file_ids))
    repeated = sorted(name for name, count in seen.items() if count > 1)
    if repeated:
        raise ValueError(f"{file_ids}: names must be unique, but {', '.join(repeated[:3])} occur(s) more than once")
    for entry in _lines(file_ids):
        name = entry.split("/")[-1]
        found = next((f"{audio_dir / entry}{suffix}" for suffix in AUDIO_SUFFIXES if os.path.isfile(f"{audio_dir / entry}{suffix}")), None)
        if found is None:
            yield Unreadable(str(audio_dir / entry), f"there is no such file with suffix {', '.join(AUDIO_SUFFIXES)}")
        elif name not in texts:
            yield Unreadable(found, f"{transcription.name} has no line for it")
        else:
            yield AudioItem(id=name, path=found, text=texts[name], speaker=Path(entry).parent.name or None)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in _read_lines(path) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _read_lines(path: Path) -> list[str]:
    """Lines end with a line feed only, for a text may hold other separators; spreadsheets begin a file with a mark of its encoding."""
    return path.read_text(encoding="utf-8-sig").split("\n")


def walk(root: Path, closed: list[Unreadable]) -> Iterator[tuple[str, list[str]]]:
    """Folders under `root`, itself first, with the names of their files, all sorted; links to folders are followed, each folder is seen once.

    Folders that cannot be read are appended to `closed`.
    """

    def refused(error: OSError) -> None:
        closed.append(Unreadable(str(error.filename), f"this folder cannot be read ({error.strerror})"))

    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(os.path.abspath(root), followlinks=True, onerror=refused):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder, sorted(name for name in names if not name.startswith("."))


def _without_audio_suffix(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in AUDIO_SUFFIXES else path


def what_is_in(root: Path) -> str:
    """What a folder holds, for the message that something else was expected there."""
    if not root.exists():
        return "there is no such folder"
    if not root.is_dir():
        return "it is a file"
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in root.iterdir())
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"found {', '.join(names[:6])}{more}" if names else "it is empty"
