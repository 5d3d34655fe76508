"""The card of a training run: what was run on what, what it cost and how good it is, in one file that outlives the run's other files.

`card.json` lies in the run's folder. The training programs write it when they begin and when they end; `k2ssl.bin.report` adds the error
rates. What is not known is null.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2ssl.atomic_file import atomic_file
from k2ssl.report.origin import Code, Init, Labels, Manifest, code_version, command_shown, init_of, labels_of, manifests_of
from k2ssl.structure import from_dict, to_dict
from k2ssl.train.json_lines import read_json_lines
from k2ssl.train.ledger import LEDGER, LedgerTotal, total

CARD = "card.json"
FORMAT = "k2ssl-card"
VERSION = 1

_log = logging.getLogger(__name__)


PLAIN_RULE = "as-is, nfc"  # how k2ssl.bin.decode itself compares texts


@dataclass(frozen=True)
class Usage:
    """What a run used over all its starts; see `k2ssl.train.ledger.LedgerTotal`."""

    gpu_hours: float
    cpu_hours: float
    wall_hours: float
    audio_hours: float
    steps: int
    peak_gpu_bytes: int
    peak_host_bytes: int
    devices: tuple[str, ...]
    sessions: Mapping[str, int]


@dataclass(frozen=True)
class Wer:
    """Word errors of one decoding.

    Attributes:
        test_set: name of its manifests.
        cuts: hash of the utterances as "COUNT:HEX".
        search: method and options, without the language model.
        lm: file name of the language model; None: there was none.
        lm_scale: its weight.
        files: hash of every file that the search read, by option.
        weights: which weights were used, in words.
        rule: how texts were compared: casing and Unicode form.
        wer, low, high: rate and its 95 % interval, shares; no interval where it was not computed.
        errors, substitutions, insertions, deletions, words: counts; `words` are those of the references.
        utterances: how many were decoded.
        audio_seconds: their length, s.
        real_time_factor: seconds of decoding for a second of audio.
        device: of the decoding.
        decoding: its folder, as it was found.
    """

    test_set: str
    cuts: str
    search: str
    lm: str | None
    lm_scale: float | None
    files: Mapping[str, str]
    weights: str
    rule: str
    wer: float
    low: float | None
    high: float | None
    errors: int
    substitutions: int
    insertions: int
    deletions: int
    words: int
    utterances: int
    audio_seconds: float
    real_time_factor: float | None
    device: str
    decoding: str


@dataclass(frozen=True)
class Card:
    """All that is known of a run.

    Attributes:
        program: pretrain or finetune.
        command: that started it last with something left to train; paths below its working folder as seen from there.
        code: what was run then.
        settings: all of them, as in settings.json; infinities as text.
        parameters: of the model.
        data: manifests it was trained on.
        labels: label stores it was trained on.
        init: the model it began with.
        updates: optimizer steps that the model has seen.
        usage: what it cost.
        results: error rates.
    """

    program: str
    command: tuple[str, ...] | None
    code: Code
    settings: Mapping[str, Any]
    parameters: int | None
    data: tuple[Manifest, ...]
    labels: tuple[Labels, ...]
    init: Init | None
    updates: int | None
    usage: Usage
    results: tuple[Wer, ...] = ()

    def data_hashes(self) -> list[str]:
        """The manifests, by hash where that is known."""
        return sorted(item.sha256 or item.path for item in self.data)


def begin_card(folder: Path, program: str, settings: Mapping[str, Any], command: Sequence[str], parameters: int) -> None:
    """Write the card of a run that begins or goes on; on rank 0, in the working folder of the program.

    Raises:
        OSError: the folder cannot be written to.
    """
    before = earlier_card(folder) if any((folder / "checkpoints").glob("step-*.pt")) else None  # without these it begins anew
    if before is not None and before.settings == _plain(settings) and _was_finished(folder):
        write_card(folder, dataclasses.replace(before, updates=updates_of(folder), usage=usage_of(folder)))
        return  # nothing is left to train, so that what runs now has made nothing of what is there
    init = init_of(settings, Path.cwd())
    if before is not None and init is not None and before.init is not None and before.init.path == init.path:
        init = before.init  # that the run did begin with: the file may have been replaced or removed since
    card = Card(
        program=program,
        command=command_shown(command),
        code=code_version(),
        settings=_plain(settings),
        parameters=parameters,
        data=manifests_of(settings, Path.cwd()),
        labels=labels_of(settings, Path.cwd()),
        init=init,
        updates=updates_of(folder),
        usage=usage_of(folder),  # without results: those of before are not of the model that will be
    )
    write_card(folder, card)


def finish_card(folder: Path) -> None:
    """Write what the run has used by now into its card; on rank 0.

    Raises:
        ValueError: the card has been damaged meanwhile.
        OSError: it cannot be read or written.
    """
    write_card(folder, dataclasses.replace(read_card(folder / CARD), updates=updates_of(folder), usage=usage_of(folder)))


def card_of(folder: Path, settings: Mapping[str, Any], program: str) -> Card:
    """The card of a run as its folder is now: of its card file, if it has a good one, with what the other files tell today.

    Raises:
        OSError: the ledger cannot be read.
    """
    before = earlier_card(folder)
    if before is not None:
        return dataclasses.replace(before, updates=updates_of(folder), usage=usage_of(folder))
    base = base_of(folder, settings)
    return Card(
        program=program,
        command=None,
        code=Code(None, None, None, None, None),
        settings=_plain(settings),
        parameters=None,
        data=manifests_of(settings, base),
        labels=labels_of(settings, base),
        init=init_of(settings, base),
        updates=updates_of(folder),
        usage=usage_of(folder),
    )


def read_card(path: Path) -> Card:
    """
    Raises:
        ValueError: no card, of another version, or damaged; names the file.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{path}: not a card: its format is {content.get('format') if isinstance(content, dict) else None!r}, not {FORMAT!r}"
        )
    if content.get("version") != VERSION:
        raise ValueError(f"{path}: version is {content.get('version')!r}, this release reads version {VERSION}")
    settings = content.get("settings")
    if not isinstance(settings, Mapping):
        raise ValueError(f"{path}: settings is {settings!r}, a table is needed")
    facts = {key: value for key, value in content.items() if key not in ("format", "version")}
    try:
        card = from_dict(Card, {**facts, "settings": {}})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return dataclasses.replace(card, settings=settings)


def write_card(folder: Path, card: Card) -> None:
    """
    Raises:
        OSError: the folder cannot be written to.
    """
    text = json.dumps({"format": FORMAT, "version": VERSION, **to_dict(card)}, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_file(folder / CARD) as file:
        file.write((text + "\n").encode())


def earlier_card(folder: Path) -> Card | None:
    """The card in a folder; None, with a warning where there is one, if it cannot be used."""
    path = folder / CARD
    if not path.exists():
        return None
    try:
        return read_card(path)
    except (ValueError, OSError) as error:
        _log.warning("warning: %s; passed over", error)
        return None


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a card holds them: numbers that JSON does not know (infinities) as text."""
    plain: dict[str, Any] = json.loads(json.dumps(settings), parse_constant=str)
    return plain


def _was_finished(folder: Path) -> bool:
    """Whether the start before this one came to its end. This one has written nothing into the ledger yet."""
    try:
        records, _ = read_json_lines(folder / LEDGER)
    except OSError:
        return False
    return bool(records) and records[-1].get("status") == "done"


def usage_of(folder: Path) -> Usage:
    """From the ledger in the folder.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    used: LedgerTotal = total(folder)
    return Usage(**{item.name: getattr(used, item.name) for item in dataclasses.fields(Usage)})


def updates_of(folder: Path) -> int | None:
    """The last optimizer step of a run, by its checkpoints (the log has lines every so many steps only, checkpoints may have been removed)
    and metrics.jsonl; None where neither tells."""
    numbers = (path.stem.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*.pt"))
    steps = [int(number) for number in numbers if number.isdecimal()]
    with contextlib.suppress(OSError):
        records, _ = read_json_lines(folder / "metrics.jsonl")
        steps += [record["step"] for record in records if record.get("kind") == "train" and isinstance(record.get("step"), int)]
    return max(steps, default=None)


def base_of(folder: Path, settings: Mapping[str, Any]) -> Path:
    """The working folder that a program had, in which its relative paths are meant, seen from where it put its output."""
    output = Path(str(settings.get("output", "")))
    there = folder.resolve()
    if not output.is_absolute() and output.parts and there.parts[-len(output.parts) :] == output.parts:
        return Path(*there.parts[: -len(output.parts)])
    return Path.cwd()


def has_ledger(folder: Path) -> bool:
    """Whether costs are recorded there."""
    return (folder / LEDGER).is_file()
