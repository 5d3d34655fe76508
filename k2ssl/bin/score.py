"""Error rates of decodings: words, characters, sentences; where the errors are; and whether one decoding is better than another.

    python -m k2ssl.bin.score exp/greedy/hypotheses.jsonl --output exp/greedy/score
    python -m k2ssl.bin.score exp/greedy/hypotheses.jsonl exp/beam/hypotheses.jsonl --compare True --output exp/score

Reads files of one JSON object a line, {"id", "ref", "hyp", "score", "duration"} at least, as `k2ssl.bin.decode` writes them. Writes
OUTPUT/report.txt, for people, and OUTPUT/wer.json, for tables; docs/scoring.md explains both. Exit status: 0 done, 1 the run failed, 2 wrong
usage or settings, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2ssl.atomic_file import atomic_file
from k2ssl.bin.decode_arguments import is_settings, with_names
from k2ssl.bin.output_file import check_folder, refuse_existing
from k2ssl.bin.program import run_program
from k2ssl.config import ConfigError
from k2ssl.decode.compare import Comparison, compare
from k2ssl.decode.results import from_line, iterate_results
from k2ssl.decode.score_report import comparison_text, conditions, overview, score_text
from k2ssl.decode.scoring import Casing, Score, TextRule, UnicodeForm, score, score_content
from k2ssl.decode.wer import DRAWS, Unit

_FORMAT = "k2ssl-wer"
_VERSION = 1


@dataclass(frozen=True)
class ScoreJob:
    """Settings of the program.

    Attributes:
        hypotheses: files to score; may also be named before all options. Utterances without a reference are counted and left out.
        output: folder for report.txt and wer.json.
        compare: hold the second of two files against the first: is the difference more than chance?
        casing: as-is: upper and lower case differ; lower, upper: they do not.
        unicode: nfc: different code points for the same character are the same (an accented letter in one or two); nfkc: so are full-width
            forms and ligatures; as-is: code points are compared.
        unit: what the tables, the utterances shown and the comparison count: word or char. Both rates are always reported.
        top: longest that a table of the report gets; 0 for none.
        worst: how many utterances the report shows.
        seed: of the draws behind intervals and comparison.
        overwrite: replace report.txt and wer.json if they exist.
    """

    hypotheses: tuple[str, ...]
    output: str
    compare: bool = False
    casing: Casing = "as-is"
    unicode: UnicodeForm = "nfc"
    unit: Unit = "word"
    top: int = 20
    worst: int = 20
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.hypotheses:
            raise ValueError("ScoreJob: hypotheses names no file, at least one is needed")
        if self.compare and len(self.hypotheses) != 2:
            raise ValueError(f"ScoreJob: compare is True with {len(self.hypotheses)} files in hypotheses, two are needed")
        for name in ("top", "worst", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"ScoreJob: {name} is {getattr(self, name)}, allowed is >= 0")

    def rule(self) -> TextRule:
        """How texts are compared."""
        return TextRule(self.casing, self.unicode)


def run(job: ScoreJob) -> None:
    """Do the job."""
    _check(job)
    scores = [(path, _scored(path, job)) for path in job.hypotheses]
    comparison = _compared(scores, job) if job.compare else None
    output = check_folder(job.output)  # after what may be refused, which takes seconds, so that no empty folder is left
    _write(output / "report.txt", report_text(scores, comparison, job))
    _write(output / "wer.json", json.dumps(report_content(scores, comparison, job), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print("\n".join(f"{path}\n{result.word.text()}" for path, result in scores))
    if comparison is not None:
        print(comparison.text())
    print(f"report in {output / 'report.txt'}")


def report_text(scores: Sequence[tuple[str, Score]], comparison: Comparison | None, job: ScoreJob) -> str:
    """What report.txt holds."""
    parts = [conditions(job.rule(), job.seed)]
    if len(scores) > 1:
        parts.append(overview(scores))
    if comparison is not None:
        (one, first), (two, second) = scores
        parts.append(comparison_text((one, two), (first, second), comparison, job.seed, job.worst))
    parts += [score_text(path, result, job.unit, job.top, job.worst) for path, result in scores]
    return "\n\n".join(parts) + "\n"


def report_content(scores: Sequence[tuple[str, Score]], comparison: Comparison | None, job: ScoreJob) -> dict[str, Any]:
    """What wer.json holds."""
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "casing": job.casing,
        "unicode": job.unicode,
        "unit": job.unit,
        "bootstrap": {"draws": DRAWS, "seed": job.seed, "share": 0.95},
        "files": [{"path": path, **score_content(result, job.unit)} for path, result in scores],
        "comparison": None if comparison is None else comparison.to_dict(),
    }


def _check(job: ScoreJob) -> None:
    for number, path in enumerate(job.hypotheses):
        if not Path(path).is_file():
            raise ConfigError(f"hypotheses: {path} is not a file")
        for earlier in job.hypotheses[:number]:
            if Path(path).samefile(earlier):
                raise ConfigError(f"hypotheses: {path} is the same file as {earlier}, different ones are needed")
    for name in ("report.txt", "wer.json"):
        refuse_existing(Path(job.output) / name, job.overwrite)


def _scored(path: str, job: ScoreJob) -> Score:
    results = iterate_results(path)
    try:
        return score(results, job.rule(), job.seed)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(path) else f"{path}: {message}") from error


def _compared(scores: Sequence[tuple[str, Score]], job: ScoreJob) -> Comparison:
    (_, first), (_, second) = scores
    try:
        return compare(first, second, job.unit, job.seed)
    except ValueError as error:
        raise ValueError(f"first {scores[0][0]}, second {scores[1][0]}: {error}") from error


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _holds_results(path: str) -> bool:
    """Whether a file begins with a result; settings may have the same ending."""
    try:
        with open(path, encoding="utf-8") as file:
            from_line(file.readline())
    except (OSError, ValueError):
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if "--hypotheses" not in given:
        given = with_names(given, "hypotheses", "hypotheses", lambda name: is_settings(name) and not _holds_results(name))
    return run_program(run, ScoreJob, given, "score", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
