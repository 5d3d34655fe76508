"""From a listing of audio files to a finished manifest: in parts, on several processes, resumable, never half-written.

The listing is cut into parts of a fixed number of files. Each part is read by one process and stored under `cuts_NAME.parts/` under a name
made of its position and a hash of its files and of the settings; a part that is there is not read again unless an unreadable file of it has
changed, so that an interrupted run continues where it was, and a changed listing repeats only the parts that changed. (Other files that
change without a change of their names are not noticed.) At the end the compressed parts are put one after the other (gzip allows it), the
result is read back once and renamed, and the parts are deleted.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from k2ssl.atomic_file import atomic_file, writable_folder
from k2ssl.data.audio_layouts import AUDIO_SUFFIXES, Listing, Speaker, folder_items, read_transcript_table, what_is_in
from k2ssl.data.audio_scan import AudioItem, ScanReport, ScanSettings, Unreadable, scan
from k2ssl.data.cut_summary import CutSummary
from k2ssl.data.cuts import COMPRESSION, check_manifest, is_checked, read_summary, write_summary
from k2ssl.file_hash import file_sha256

FILES_PER_PART = (
    2000  # a few seconds of work: little is lost by an interruption, and 60,000 hours in files of one sentence are 11,000 parts
)
_FORMAT = 1  # of parts; raised when what a part holds changes, so that older ones are not taken


@dataclass(frozen=True)
class Prepared:
    """What became of a split.

    `existed` is True if the manifest was there already and nothing was done; `resumed` counts files taken from parts of an earlier run.
    """

    manifest: Path
    summary: CutSummary
    notes: tuple[str, ...]
    unreadable: int
    unreadable_list: Path
    existed: bool = False
    resumed: int = 0

    def __str__(self) -> str:
        resumed = [f"continued: {self.resumed:,} files were read by an earlier run"] if self.resumed else []
        return "\n".join([self.summary.table(str(self.manifest)), *(f"  {note}" for note in (*resumed, *self.notes))])


def prepare_folder(
    root: str | Path,
    out: str | Path,
    *,
    split: str = "all",
    speaker: Speaker = "none",
    text_suffix: str | None = ".txt",
    table: str | Path | None = None,
    settings: ScanSettings | None = None,
    num_jobs: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> Prepared:
    """Cuts from any folder of audio; see `folder_items` for the layout and `prepare_split` for what is written.

    Raises:
        ValueError: `root` is not a folder or holds no audio; see also `read_transcript_table` and `prepare_split`.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: a folder of audio is needed; {what_is_in(root)}")
    transcripts = read_transcript_table(Path(table)) if table is not None else None
    return prepare_split(
        lambda: folder_items(root, speaker=speaker, text_suffix=text_suffix, table=transcripts),
        out,
        split,
        source=root,
        expected=f"{root}: audio files ({', '.join(AUDIO_SUFFIXES)}) are expected here or in folders below; {what_is_in(root)}",
        settings=settings,
        more_settings={"speaker": speaker, "text_suffix": text_suffix, "table": None if table is None else file_sha256(Path(table))},
        num_jobs=num_jobs,
        overwrite=overwrite,
        progress=progress,
        recount=True,
    )


def prepare_split(
    listing: Callable[[], Listing],
    out: str | Path,
    split: str,
    *,
    source: str | Path,
    expected: str,
    settings: ScanSettings | None = None,
    more_settings: Mapping[str, Any] | None = None,
    num_jobs: int = 1,
    files_per_part: int = FILES_PER_PART,
    overwrite: bool = False,
    progress: bool = False,
    recount: bool = False,
) -> Prepared:
    """Write `cuts_SPLIT.jsonl.gz`, `summary_SPLIT.json` and `unreadable_SPLIT.tsv` into `out`.

    Nothing is done if the manifest is there, made of the same source with the same settings. Memory does not grow with the number of files, but for 8 bytes a cut at the end.

    Args:
        listing: called twice (to count, to read), gives the same files in the same order each time.
        out: folder to write to.
        split: name of the split.
        source: where the files come from; a manifest made of another source is not taken for this one.
        expected: message if the listing is empty: what was expected where, and what was found.
        settings: how files become cuts.
        more_settings: what else `listing` depends on, by name, as JSON can hold it; a manifest that was made with other values is not taken.
        num_jobs: processes that read headers.
        files_per_part: see above.
        overwrite: make it again, from the beginning; the old manifest stays until the new one is whole.
        progress: show a progress bar, if standard error is a terminal.
        recount: where the manifest is there, call `listing` to count, and remark on another number of files than it was made of. For folders
            that people add to, whose listing opens no file; a published corpus stays what it is, and its listing may read transcripts.

    Raises:
        ValueError: the manifest is there, made of another source or with other settings; nothing is listed or no cut remains, ids are not unique, the folder cannot be written to, a process died.
        OSError: the disk is full. Whatever is raised, finished parts are kept.
    """
    if num_jobs < 1:
        raise ValueError(f"num_jobs is {num_jobs}, at least one process is needed")
    if not split or "/" in split or split.startswith("."):
        raise ValueError(f"split is {split!r}; it becomes part of a file name, so it must not be empty, hold / or begin with a dot")
    settings = settings or ScanSettings()
    described = {"source": str(Path(source).resolve()), **dataclasses.asdict(settings), **(more_settings or {})}
    manifest = writable_folder(out) / f"cuts_{split}.jsonl.gz"
    if manifest.exists() and not overwrite:
        return _finished(manifest, described, listing if recount else None)
    parts = manifest.with_name(f"cuts_{split}.parts")
    if overwrite:
        shutil.rmtree(parts, ignore_errors=True)
    total = sum(1 for _ in listing())
    if not total:
        raise ValueError(expected)
    writable_folder(parts)
    with tqdm(total=total, unit="file", desc=split, disable=None if progress else True, dynamic_ncols=True) as bar:
        names, resumed = _read_parts(listing(), parts, settings, num_jobs, files_per_part, bar.update)
    prepared = _assemble(manifest, parts, names, settings, described, resumed)
    shutil.rmtree(parts)
    return prepared


def _finished(manifest: Path, asked: dict[str, Any], listing: Callable[[], Listing] | None) -> Prepared:
    """What is known of a manifest that exists, and how many files there are now, where there is a listing to count."""
    content = read_summary(manifest)
    if "summary" not in content or not is_checked(manifest):
        raise ValueError(
            f"{manifest} exists, but its summary does not lie beside it, so it is not known to be whole; remove or overwrite it"
        )
    had = content.get("settings", {})
    # a manifest of an older version does not tell all of it
    changed = [f"{name} {had[name]} (now {value})" for name, value in asked.items() if name in had and had[name] != value]
    if changed:
        raise ValueError(f"{manifest} exists, made with {', '.join(changed)}; overwrite it or name another folder")
    notes = ["exists already: nothing was done", *content.get("notes", ())]
    if listing is not None and "files" in content and (now := sum(1 for _ in listing())) != content["files"]:
        notes.append(
            f"there are {now:,} files now, it was made of {content['files']:,}: --overwrite makes it again, of those that are there"
        )
    listed = manifest.with_name(f"unreadable_{_split_of(manifest)}.tsv")
    return Prepared(manifest, CutSummary.from_dict(content["summary"]), tuple(notes), content.get("unreadable", 0), listed, existed=True)


def _read_parts(
    items: Listing, folder: Path, settings: ScanSettings, num_jobs: int, size: int, done: Callable[[int], object]
) -> tuple[list[str], int]:
    """Make sure that every part is there. Returns their names, in order, and the number of files in those that already were."""
    names: list[str] = []
    resumed = 0
    pending: dict[Future[None], int] = {}
    pool: ProcessPoolExecutor | None = None
    try:
        for chunk in iter(lambda: list(islice(items, size)), []):
            name = _part_name(len(names), chunk, settings)
            names.append(name)
            if _is_read(folder / f"{name}.json"):
                resumed += len(chunk)
                done(len(chunk))
            elif num_jobs == 1 or (len(names) == 1 and len(chunk) < size):  # one part is read sooner than processes start
                read_part(chunk, settings, folder, name)
                done(len(chunk))
            else:
                pool = pool or _pool(num_jobs)
                pending[pool.submit(read_part, chunk, settings, folder, name)] = len(chunk)
                _collect(pending, 2 * num_jobs, done)
        _collect(pending, 0, done)
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that read audio headers died (out of memory?); finished parts are kept, run again to continue"
        ) from error
    finally:
        if pool:
            pool.shutdown(wait=True, cancel_futures=True)
    return names, resumed


def _pool(num_jobs: int) -> ProcessPoolExecutor:
    """Processes forked from a fresh one: this one may hold threads, and starting each from nothing takes seconds for lhotse's imports."""
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    if hasattr(context, "set_forkserver_preload"):
        context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(num_jobs, mp_context=context)


def _collect(pending: dict[Future[None], int], at_most: int, done: Callable[[int], object]) -> None:
    """Wait until no more than so many parts are being read; raises what their reading raised."""
    while len(pending) > at_most:
        finished, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in finished:
            count = pending.pop(future)
            future.result()
            done(count)


def _part_name(position: int, items: list[AudioItem | Unreadable], settings: ScanSettings) -> str:
    content = repr((_FORMAT, settings, items)).encode(errors="surrogatepass")
    return f"{position:07}-{hashlib.blake2b(content, digest_size=8).hexdigest()}"


def _is_read(report: Path) -> bool:
    """Whether there is a part of which no file that could not be read has changed since."""
    if not report.exists():
        return False
    made = report.stat().st_mtime_ns
    unreadable = [Path(path) for path, _ in json.loads(report.read_bytes())["unreadable"]]
    return not any(path.exists() and path.stat().st_ctime_ns > made for path in unreadable)


def read_part(items: list[AudioItem | Unreadable], settings: ScanSettings, folder: Path, name: str) -> None:
    """Store the cuts of some files as `NAME.jsonl.gz`, then what is to be said about the files as `NAME.json`, which makes the part whole."""
    lines, report = scan(items, settings)
    with atomic_file(folder / f"{name}.jsonl.gz") as file:
        file.write(gzip.compress(b"".join(lines), COMPRESSION, mtime=0) if lines else b"")
    with atomic_file(folder / f"{name}.json") as file:
        file.write(json.dumps(report.to_dict()).encode())


def _assemble(manifest: Path, parts: Path, names: list[str], settings: ScanSettings, described: dict[str, Any], resumed: int) -> Prepared:
    """Join the parts. The manifest gets its name last: where it is, all else is."""
    split = _split_of(manifest)
    listed = manifest.with_name(f"unreadable_{split}.tsv")
    total = ScanReport()
    unreadable, example = 0, ""
    with atomic_file(listed) as table:
        table.write(b"path\treason\n")
        for name in names:
            stored = json.loads((parts / f"{name}.json").read_bytes())
            total.merge(stored)
            unreadable += len(stored["unreadable"])
            example = example or next((f"the first is {path}: {reason}" for path, reason in stored["unreadable"]), "")
            table.writelines(_row(path, reason) for path, reason in stored["unreadable"])
    notes = _notes(total, settings, unreadable, listed)
    if not total.counter.cuts:
        shutil.rmtree(parts)  # they would only repeat their refusals after a repair
        raise ValueError(f"{manifest}: not written, for none of the files gives a cut; {'; '.join([*notes, example])}")
    with atomic_file(manifest) as file:
        for name in names:
            with open(parts / f"{name}.jsonl.gz", "rb") as part:
                shutil.copyfileobj(part, file, 1 << 20)
        file.flush()
        check_manifest(Path(file.name), called=manifest)
        summary = total.counter.summary()
        content = {"summary": summary.to_dict(), "notes": notes, "unreadable": unreadable, "files": total.files, "settings": described}
        write_summary(manifest, Path(file.name), content)
    return Prepared(manifest, summary, tuple(notes), unreadable, listed, resumed=resumed)


def _notes(report: ScanReport, settings: ScanSettings, unreadable: int, listed: Path) -> list[str]:
    """What a person should know about the files, each thing once however many files it holds for."""
    notes = []
    other = {
        rate: count for rate, count in sorted(report.rates.items(), key=lambda pair: int(pair[0])) if int(rate) != settings.sampling_rate
    }
    if other:
        rates = ", ".join(f"{count:,} at {rate} Hz" for rate, count in other.items())
        notes.append(f"resampled to {settings.sampling_rate} Hz whenever they are loaded: {sum(other.values()):,} files ({rates})")
    several = sum(count for channels, count in report.channels.items() if channels != "1")
    if several:
        notes.append(f"more than one channel: {several:,} files, of which channel {settings.channel} (counted from 0) is used")
    if report.too_short:
        notes.append(
            f"left out, shorter than {settings.min_duration:g} s: {report.too_short:,} cuts, {report.too_short_seconds / 3600:.3f} h"
        )
    if report.too_long:
        notes.append(f"left out, longer than {settings.max_duration:g} s: {report.too_long:,} cuts, {report.too_long_seconds / 3600:.3f} h")
    kind = "decoded to their end" if settings.verify else "headers read"
    notes.append(f"files: {report.files:,} ({kind}); unreadable or unusable, listed in {listed.name} and skipped: {unreadable:,}")
    return notes


def _row(path: str, reason: str) -> bytes:
    cells = (cell.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r") for cell in (path, reason))
    return ("\t".join(cells) + "\n").encode(errors="backslashreplace")


def _split_of(manifest: Path) -> str:
    return manifest.name.removeprefix("cuts_").removesuffix(".jsonl.gz")


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
