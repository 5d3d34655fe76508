"""What a training run tells: a bar or lines for people, metrics.jsonl for programs, TensorBoard for curves."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from k2ssl.atomic_file import atomic_file
from k2ssl.distributed import is_main
from k2ssl.train.json_lines import JsonLines, read_json_lines
from k2ssl.train.status_line import StatusLine, bar, clock_time

if TYPE_CHECKING:  # slow to import, and perhaps not installed
    from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"

_REDRAW_EVERY = 0.2  # seconds
_RESERVED = ("kind", "step", "time", "text")
# Which values people are shown, in this order around the remaining time.
_BEFORE_TIME_LEFT = {
    "loss": "loss {:.4g}",
    "accuracy_masked": "masked accuracy {:.1%}",
    "lr": "lr {:.3g}",
    "audio_hours": "{:,.2f} h of audio",
    "hours_per_second": "{:.3g} h/s",
}
# Validation has no remaining time, and says only how good the model is.
_OF_VALIDATION = {**{name: _BEFORE_TIME_LEFT[name] for name in ("loss", "accuracy_masked")}, "wer": "word error rate {:.2%}"}
_AFTER_TIME_LEFT = {"data_wait": "{:.0%} waiting for data", "memory_gib": "{:.2f} GiB"}


class TrainingLog:
    """Where numbers of a run go. Rank 0 writes and shows, the others are silent; a context manager that closes itself.

    `FOLDER/metrics.jsonl` has one JSON object a line, in the order of writing: `kind` ("train", "valid" or "event"), `step`, `time`
    (UTC), then the values, or the `text` of an event; NaN and infinities are null. `FOLDER/tensorboard` holds the same values under
    train/NAME and valid/NAME.

    People are shown, of the values: `loss`, `accuracy_masked`, `lr`, `audio_hours` (done so far), `hours_per_second` (audio-hours per
    second), `data_wait` (share of the time, 0 to 1), `memory_gib`, and `dropped_batches` when there were any.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        total_steps: int | None,
        resumed_at: int,
        quiet: bool,
        tensorboard: bool = True,
        validated: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            folder: made if need be; None writes no files.
            total_steps: optimizer steps of the whole run; None or 0 if that is not known, then no remaining time is shown.
            resumed_at: steps done before this start, 0 at first. What an earlier attempt wrote about later steps is removed, as `rewind`
                does.
            quiet: plain lines even in a terminal.
            tensorboard: whether to write for it; without the package a line says that it is left out.
            validated: whether the validation of `resumed_at` is done; if not, what is there of it is removed, too.
            stream: where lines and the bar go, standard error by default.
            clock: seconds.

        Raises:
            OSError: the folder cannot be written to.
        """
        self._total, self._clock = total_steps, clock
        self._folder = folder if is_main() else None
        self._status = StatusLine(stream, quiet=quiet, silent=not is_main())
        self._values: Mapping[str, float] = {}
        self._lines: JsonLines | None = None
        self._curves: SummaryWriter | None = None
        self._wants_curves = tensorboard
        self._drawn = float("-inf")
        self._start(resumed_at, validated)

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Values of the steps since the last call, at the end of `step`.

        Raises:
            ValueError: a value is named kind, step, time or text.
            OSError: the disk is full.
        """
        self._record("train", step, values)
        self._values = values
        self._draw(step)
        if not self._status.redraws:
            self._status.say(self._line(step))

    def valid(self, step: int, values: Mapping[str, float]) -> None:
        """Values on the validation set after `step`; see `train`."""
        self._record("valid", step, values)
        if self._curves is not None:
            self._curves.flush()
        self._status.say(", ".join([f"step {step:,}: validation", *_shown(_OF_VALIDATION, values)]))

    def event(self, step: int, text: str) -> None:
        """Something that happened at `step` and is worth remembering: a checkpoint, a skipped step, an interruption."""
        self._write({"kind": "event", "step": step, "time": _now(), "text": text})
        if self._curves is not None:
            self._curves.add_text("event", text, step)
        self._status.say(f"step {step:,}: {text}")

    def tick(self, step: int) -> None:
        """`step` is done: moves the bar and the remaining time, a few times a second at most. Host work only, call it every step."""
        if self._status.redraws and self._clock() - self._drawn >= _REDRAW_EVERY:
            self._draw(step)

    def rewind(self, step: int) -> None:
        """Training goes on from the end of `step`: what was written about later steps is removed, so that curves have one value a step.

        Events stay: they tell why. TensorBoard is told to hide the later steps.
        """
        if self._lines is not None:
            self._lines.close()
        if self._curves is not None:
            self._curves.close()
        self._start(step)

    def close(self) -> None:
        """Finish the files. May be called again."""
        if self._lines is not None:
            self._lines.close()
        if self._curves is not None:
            self._curves.close()
        self._status.close()

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _start(self, step: int, validated: bool = True) -> None:
        self._first, self._started = step, self._clock()
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / METRICS
        if path.exists():
            _remove_later(path, step, validated)
        self._lines = JsonLines(path)
        if self._wants_curves:
            self._curves = self._open_curves(self._folder / TENSORBOARD, step)

    def _open_curves(self, folder: Path, step: int) -> SummaryWriter | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._status.say(f"TensorBoard is not installed: curves are in {METRICS} only")
            self._wants_curves = False
            return None
        return SummaryWriter(folder, purge_step=step + 1 if folder.exists() else None, flush_secs=30)

    def _record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        taken = sorted(set(values) & set(_RESERVED))
        if taken:
            raise ValueError(f"TrainingLog.{kind}: a value is named {taken[0]!r}, allowed are names other than {', '.join(_RESERVED)}")
        self._write({"kind": kind, "step": step, "time": _now(), **values})
        if self._curves is not None:
            for name, value in values.items():
                self._curves.add_scalar(f"{kind}/{name}", value, step)

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._lines is not None:
            self._lines.append(record)

    def _draw(self, step: int) -> None:
        self._drawn = self._clock()
        self._status.draw(self._line(step))

    def _line(self, step: int) -> str:
        parts = [f"step {step:,}"]
        if self._total:
            share = step / self._total
            parts = [f"{bar(share) + ' ' if self._status.redraws else ''}step {step:,} of {self._total:,} ({share:.0%})"]
        parts += _shown(_BEFORE_TIME_LEFT, self._values)
        if self._total and step > self._first:
            per_step = (self._clock() - self._started) / (step - self._first)
            parts.append(f"{clock_time(max(0, self._total - step) * per_step)} left")
        return ", ".join(parts + _shown(_AFTER_TIME_LEFT, self._values))


def _shown(forms: Mapping[str, str], values: Mapping[str, float]) -> list[str]:
    shown = [form.format(values[name]) for name, form in forms.items() if name in values]
    if "loss" in forms and values.get("dropped_batches"):
        shown.append(f"{values['dropped_batches']:.0f} batches without a finite loss")
    return shown


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _remove_later(path: Path, step: int, validated: bool) -> None:
    """Leave in the file only whole records up to `step`, with its validation or without, and events."""
    records, damaged = read_json_lines(path)
    known = [record for record in records if record.get("kind") == "event" or isinstance(record.get("step"), int)]
    damaged += len(records) - len(known)
    if damaged:
        _log.warning("%s: %d damaged lines are removed", path, damaged)
    end = (step, validated)
    kept = [record for record in known if record["kind"] == "event" or (record["step"], record["kind"] == "valid") <= end]
    if damaged or len(kept) < len(records):
        with atomic_file(path) as file:
            file.write(b"".join(json.dumps(record).encode() + b"\n" for record in kept))
