"""Finds runs, decodings, scores and label stores below folders, and which decoding is of which run."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2ssl.report.card import PLAIN_RULE, Card, Wer, base_of, card_of
from k2ssl.report.origin import output_in, read_json, sha256_of, shown
from k2ssl.structure import from_dict
from k2ssl.train.ledger import LEDGER, total

PROGRAMS = ("pretrain", "finetune")
Interval = Callable[[Path], tuple[float, float]]

_SKIPPED = {"checkpoints", "tensorboard", "incidents"}  # large, and nothing of ours to find there
# Options at values that change nothing.
_NEUTRAL = {"max_symbols_per_frame": 1, "blank_penalty": 0.0, "temperature": 1.0, "token_score": 0.0, "word_score": 0.0}
_IN_WORDS = {"errors": "errors", "reference": "words"}

_STEP = re.compile(r"step-0*(\d+)\.pt")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A training run: its folder, what it is called among the others, and its card."""

    folder: Path
    name: str
    card: Card


@dataclass(frozen=True)
class Decoding:
    """A finished decoding: its folder, the content of decode.json, and its word errors."""

    folder: Path
    record: Mapping[str, Any]
    wer: Wer


@dataclass(frozen=True)
class Experiments:
    """What was found.

    Attributes:
        runs: by folder, with the results that belong to each.
        orphans: results whose run was not found.
        label_pictures: pictures of label quality, by the name of the store.
        remarks: what was passed over, and why.
    """

    runs: Mapping[Path, Run]
    orphans: tuple[Wer, ...]
    label_pictures: Mapping[str, Path]
    remarks: tuple[str, ...]


def find(roots: Sequence[str], interval: Interval) -> Experiments:
    """Look through folders.

    Args:
        roots: folders; what lies below several of them is found once.
        interval: 95 % interval of the word error rate of a file of hypotheses, for decodings that nobody has scored.

    Raises:
        ValueError: a root is no folder, or nothing at all was found.
    """
    remarks: list[str] = []
    folders = list(_folders(roots))
    found = {folder: card for folder in folders if (card := read_run(folder, remarks)) is not None}
    names = _short_names(list(found))
    runs = {folder: Run(folder, names[folder], card) for folder, card in found.items()}
    scores = _scores(folders, remarks)
    decodings = [one for folder in folders if (one := _decoding(folder, scores, interval, remarks)) is not None]
    if not runs and not decodings:
        raise ValueError(f"{', '.join(roots)}: no runs (settings.json and ledger.jsonl) and no decodings (decode.json) are below")
    of_run: dict[Path, list[Wer]] = {folder: [] for folder in runs}
    orphans: list[Wer] = []
    for one in decodings:
        owner = run_of_decoding(one, runs, remarks)
        (orphans if owner is None else of_run[owner]).append(one.wer)
    runs = {
        folder: dataclasses.replace(run, card=dataclasses.replace(run.card, results=tuple(of_run[folder]))) for folder, run in runs.items()
    }
    return Experiments(runs, tuple(orphans), _label_pictures(folders), tuple(remarks))


def read_run(folder: Path, remarks: list[str]) -> Card | None:
    """The card of the training run in a folder; None if there is none. What is damaged is added to `remarks`."""
    if not (folder / "settings.json").is_file() or not (folder / LEDGER).is_file():
        return None
    used = total(folder)
    if used.damaged_lines:
        remarks.append(
            f"{shown(folder / LEDGER)}: {used.damaged_lines} damaged line(s) passed over, and the run with them where nothing is left"
        )
    programs = [program for program in PROGRAMS if program in used.by_program]
    if not programs:
        return None
    settings = read_json(folder / "settings.json")
    if not settings:
        remarks.append(f"{shown(folder / 'settings.json')}: damaged; this run is passed over")
        return None
    if len(programs) > 1:
        remarks.append(f"{shown(folder / LEDGER)}: of both {' and '.join(programs)}; this run is passed over")
        return None
    return card_of(folder, settings, programs[0])


def run_of_decoding(decoding: Decoding, runs: Mapping[Path, Run], remarks: list[str]) -> Path | None:
    """The folder of the run whose weights were decoded with; None if it is not among `runs`."""
    settings, what = decoding.record["settings"], decoding.record["what"]
    base = base_of(decoding.folder, settings)
    hashes = [sha for sha in what.get("checkpoints") or () if isinstance(sha, str)]
    paths = [base / path for path in (*settings.get("checkpoints", ()), *([settings["after"]] if settings.get("after") else []))]
    if not paths or len(paths) != len(hashes):
        return None
    for path, sha in zip(paths, hashes, strict=True):
        if path.is_file() and sha256_of(path) != sha:
            remarks.append(
                f"{shown(decoding.folder)}: {shown(path)} has changed since it was decoded with, so these results are of no run that is there"
            )
            return None
    by_path = [run_of_file(path, base) for path in paths]
    if by_path[0] is not None and by_path[0] in runs:
        return by_path[0]
    return _by_hash(paths[0].name, hashes[0], runs)


def run_of_file(path: Path, base: Path) -> Path | None:
    """Folder of the run that a checkpoint or an average of checkpoints is from; None: it cannot be told."""
    if path.parent.name == "checkpoints":
        return path.parent.parent.resolve()
    said = output_in(path) if path.is_file() else None
    return None if said is None else (base / said).resolve()


def _by_hash(name: str, sha: str, runs: Mapping[Path, Run]) -> Path | None:
    """The run that holds a checkpoint of this name and content."""
    for folder in runs:
        path = folder / "checkpoints" / name
        if path.is_file() and sha256_of(path) == sha:
            return folder
    return None


def _folders(roots: Sequence[str]) -> Iterator[Path]:
    seen: set[Path] = set()
    for root in roots:
        if not Path(root).is_dir():
            raise ValueError(f"{root}: there is no such folder")
        for path, below, _ in os.walk(root):
            below[:] = sorted(name for name in below if name not in _SKIPPED and not name.startswith("."))
            folder = Path(path).resolve()
            if folder not in seen:
                seen.add(folder)
                yield folder


def _short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Of every folder as many of the last parts of its path as tell it from the others."""
    names: dict[Path, str] = {}
    for folder in folders:
        for length in range(1, len(folder.parts) + 1):
            tail = folder.parts[-length:]
            if sum(other.parts[-length:] == tail for other in folders) == 1:
                names[folder] = str(Path(*tail))
                break
    return names


# --- decodings and scores ------------------------------------------------------------------------------------------------------------------


def _decoding(folder: Path, scores: Mapping[Path, Mapping[str, Any]], interval: Interval, remarks: list[str]) -> Decoding | None:
    path = folder / "decode.json"
    if not path.is_file():
        return None
    record = read_json(path)
    if not all(isinstance(record.get(key), Mapping) for key in ("what", "settings")) or "result" not in record:
        remarks.append(f"{shown(path)}: damaged, or not of k2ssl.bin.decode; passed over")
        return None
    if record["result"] is None:
        remarks.append(f"{shown(folder)}: this decoding is not finished; passed over")
        return None
    try:
        if "wer" not in record["result"]:
            remarks.append(f"{shown(folder)}: without transcripts, so there is no error rate")
            return None
        return Decoding(folder, record, _wer(folder, record, scores.get(folder / "hypotheses.jsonl"), interval, remarks))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        remarks.append(f"{shown(path)}: damaged ({error!r}); passed over")
        return None


def _wer(folder: Path, record: Mapping[str, Any], score: Mapping[str, Any] | None, interval: Interval, remarks: list[str]) -> Wer:
    what, result = record["what"], record["result"]
    counts = {**result["words"], "rate": result["wer"], "rule": PLAIN_RULE}
    unlike = [] if score is None else [name for name in _same_for(score["rule"]) if score["word"].get(name) != counts[name]]
    if score is not None and unlike:
        remarks.append(
            f"{shown(score['file'])}: counts {score['word'].get(unlike[0])} {_IN_WORDS[unlike[0]]} of {shown(folder)}, which has "
            f"{counts[unlike[0]]}: made of an earlier one"
        )
        score = None
    if score is not None:
        counts = {**score["word"], "rule": score["rule"]}
    else:
        counts["low"], counts["high"] = _interval(folder, interval, remarks)
    lm = record["settings"]["search"].get("lm")
    facts = {
        "test_set": "+".join(map(_set_name, record["settings"]["cuts"])),
        "cuts": what["cuts"],
        "search": _search_text(what["method"], what["search"]),
        "lm": None if lm is None else Path(lm).name,
        "lm_scale": what["search"].get("lm_scale") if lm is not None else None,
        "files": what["files"],
        "weights": _weights_text(what["weights"], record["settings"]["checkpoints"]),
        "rule": counts["rule"],
        "wer": counts["rate"],
        **{name: counts.get(name) for name in ("low", "high")},
        **{name: counts[name] for name in ("errors", "substitutions", "insertions", "deletions")},
        "words": counts["reference"],
        **{name: result[name] for name in ("utterances", "audio_seconds", "real_time_factor")},
        "device": f"{result['ranks']} x {result['device']}",
        "decoding": shown(folder),
    }
    for name, value in facts.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    return from_dict(Wer, facts)


def _same_for(rule: str) -> tuple[str, ...]:
    """The counts in which a score by a rule and the decoding itself must agree: casing can change errors, but no number of words."""
    return ("errors", "reference") if rule == PLAIN_RULE else ("reference",)


def _interval(folder: Path, interval: Interval, remarks: list[str]) -> tuple[float | None, float | None]:
    try:
        return interval(folder / "hypotheses.jsonl")
    except (ValueError, OSError) as error:
        remarks.append(f"{shown(folder)}: no interval: {error}")
        return None, None


def _scores(folders: Sequence[Path], remarks: list[str]) -> dict[Path, dict[str, Any]]:
    """What wer.json files say, by the file of hypotheses; of several about one file that of plain comparison, or else the first."""
    found: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        path = folder / "wer.json"
        if not path.is_file():
            continue
        content = read_json(path)
        files = content.get("files")
        whole = isinstance(files, list) and all(isinstance(entry, Mapping) and isinstance(entry.get("word"), Mapping) for entry in files)
        if content.get("format") != "k2ssl-wer" or content.get("version") != 1 or not whole:
            remarks.append(f"{shown(path)}: damaged, or not of k2ssl.bin.score; passed over")
            continue
        rule = f"{content.get('casing')}, {content.get('unicode')}"
        for entry in content["files"]:
            hypotheses = _hypotheses(str(entry.get("path")), folder)
            if hypotheses is not None and (hypotheses not in found or rule == PLAIN_RULE):
                found[hypotheses] = {**entry, "rule": rule, "file": path}
    return found


def _hypotheses(path: str, folder: Path) -> Path | None:
    """The file that a score names: as seen from the score's folder or one above it, which may have been moved together, or from here."""
    for base in (folder, *folder.parents, Path.cwd()):
        if (base / path).is_file():
            return (base / path).resolve()
    return None


def _search_text(method: str, options: Mapping[str, Any]) -> str:
    """The search in words, without the language model, and without the number of alternatives, which changes nothing of the best one."""
    words = []
    for name, value in options.items():
        if name in ("lm", "lm_scale", "nbest") or value is None or value is False or (name in _NEUTRAL and value == _NEUTRAL[name]):
            continue
        name = name.replace("_", " ")
        words.append(name if value is True else f"{name} {Path(value).name if isinstance(value, str) else f'{value:g}'}")
    return ", ".join([method, *words])


def _weights_text(weights: str, paths: Sequence[str]) -> str:
    """With the steps of checkpoints; of a model file, whose weights may themselves be an average, the name."""
    found = [_STEP.fullmatch(Path(path).name) for path in paths]
    steps = sorted(int(match[1]) for match in found if match)
    if len(steps) == len(paths) > 1:
        return f"{weights}, steps {steps[0]:,} to {steps[-1]:,}"
    if weights != "raw weights":  # it says which steps
        return weights
    return f"raw weights at step {steps[0]:,}" if steps else f"as in {Path(paths[0]).name}"


def _set_name(manifest: str) -> str:
    return Path(manifest).name.removesuffix(".gz").removesuffix(".jsonl").removeprefix("cuts_")


def _label_pictures(folders: Sequence[Path]) -> dict[str, Path]:
    found = [folder for folder in folders if (folder / "contract.json").is_file() and (folder / "quality.png").is_file()]
    names = _short_names(found)
    return {names[folder]: folder / "quality.png" for folder in found}
