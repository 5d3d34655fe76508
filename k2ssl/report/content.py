"""A whole report, from what was found."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k2ssl import __version__
from k2ssl.report.chain import Chain, cost_of, follow
from k2ssl.report.document import Block, Heading, Items, Picture, Table, Text, csv_text, latex, markdown, plain, web_page
from k2ssl.report.experiments import Experiments, Run
from k2ssl.report.origin import command_shown
from k2ssl.report.pictures import loss_curves, wer_by_hours
from k2ssl.report.references import Reference, reference_tables
from k2ssl.report.tables import (
    System,
    compare,
    comparison_table,
    cost_numbers,
    cost_table,
    distinct,
    results_table,
    set_names,
    wer_tables,
)
from k2ssl.train.json_lines import read_json_lines

_TAG = "Ours measured: every row outside of the section on the literature."
_LM = {False: "without a language model", True: "with a language model"}
_CAPTIONS = {
    "loss_curves.png": "Training (lines) and validation (dots, dashed).",
    "wer_by_hours.png": "Word error rate with its 95 % interval over the hours of the whole chain; systems whose cost is not wholly recorded are left out.",
}


@dataclass(frozen=True)
class Report:
    """Files by name, and what is told in the terminal."""

    texts: Mapping[str, str]
    pictures: Mapping[str, bytes]
    blocks: tuple[Block, ...]


def build(
    experiments: Experiments, references: tuple[Reference, ...], title: str, baselines: Sequence[str], roots: Sequence[str]
) -> Report:
    """
    Args:
        experiments: what was found.
        references: rows of the literature.
        title: of the report.
        baselines: the systems that others are compared with.
        roots: where was looked, for the record.

    Raises:
        ValueError: there is no such baseline.
        OSError: a file cannot be read any more.
    """
    chains = {run.name: follow(run, experiments.runs) for run in experiments.runs.values()}
    systems = [System(run.name, run.card, cost_of(chains[run.name]), distinct(run.card.results)) for run in experiments.runs.values()]
    if experiments.orphans:
        systems.append(System("(run not found)", None, None, distinct(experiments.orphans)))
    tables = _tables(systems, baselines)  # first, as it refuses a baseline that is not there
    pictures = _pictures(experiments, systems)
    drawn = [Picture(name, caption) for name, caption in _CAPTIONS.items() if name in pictures]
    labels = [Picture(_label_file(name), f"Labels {name}") for name in experiments.label_pictures]
    blocks: list[Block] = [Heading(title, 1), Text(f"Made by k2ssl.bin.report {__version__} from {', '.join(roots)}. {_TAG}")]
    blocks += tables
    blocks += _section("Pictures", drawn)
    blocks += _lineage(tuple(experiments.runs.values()), chains)
    blocks += _section("Label quality", labels)
    blocks += _references(references)
    blocks += _section("Passed over", [Items(experiments.remarks)] if experiments.remarks else [])
    texts = {
        "tables.tex": latex(blocks),
        "wer.csv": csv_text(results_table(systems)),
        "cost.csv": csv_text(cost_numbers(systems)),
        "report.html": web_page(blocks, pictures),
        "report.md": markdown(blocks),
    }
    return Report(texts, pictures, tuple(blocks))


def terminal(report: Report, width: int) -> str:
    """The tables of error rates and cost, in lines of at most `width` characters where that can be."""
    parts, title = [], ""
    for block in report.blocks:
        if isinstance(block, Heading):
            title = block.text
        elif isinstance(block, Table) and not block.name.startswith("references"):
            parts.append(f"{title}\n{plain(block, width)}")
    return "\n\n".join(parts) + "\n"


def _section(title: str, blocks: Sequence[Block]) -> list[Block]:
    return [Heading(title), *blocks] if blocks else []


def _tables(systems: Sequence[System], baselines: Sequence[str]) -> list[Block]:
    blocks: list[Block] = []
    for with_lm, table in wer_tables(systems).items():
        blocks += [Heading(f"Word error rates {_LM[with_lm]}"), table]
    for number, baseline in enumerate(dict.fromkeys(baselines)):
        comparisons, names = compare(systems, baseline), set_names(systems)
        tables = {with_lm: comparison_table(comparisons, names, with_lm, number) for with_lm in _LM}
        for with_lm, compared in tables.items():
            if compared is not None:
                blocks += [Heading(f"Against {baseline}, {_LM[with_lm]}"), compared]
        if not comparisons:
            blocks += [Heading(f"Against {baseline}"), Text("No other result has the same utterances, search and language model.")]
    return [*blocks, Heading("Cost"), cost_table(systems)]


def _lineage(runs: Sequence[Run], chains: Mapping[str, Chain]) -> list[Block]:
    blocks: list[Block] = []
    for run in runs:
        code = run.card.code
        version = f"k2ssl {code.k2ssl or 'of unknown release'}"
        if code.commit is not None:
            version += f", commit {code.commit[:12]}{' with changes' if code.dirty else ''}"
        lines = [*chains[run.name].steps_text, f"code: {version}"]
        lines += [] if run.card.command is None else [f"command: {shlex.join(command_shown(run.card.command))}"]
        blocks += [Heading(run.name, 3), Items(tuple(lines))]
    return [Heading("Where each run comes from"), *blocks] if blocks else []


def _references(rows: tuple[Reference, ...]) -> list[Block]:
    blocks: list[Block] = []
    for kind, table in reference_tables(rows).items():
        blocks += [Heading(f"Reference rows not measured here, {kind}", 3), table]
    return _section("From the literature, not measured here", blocks)


def _pictures(experiments: Experiments, systems: Sequence[System]) -> dict[str, bytes]:
    metrics = {}
    for run in experiments.runs.values():
        path = run.folder / "metrics.jsonl"
        metrics[run.name] = (run.card.program, read_json_lines(path)[0] if path.is_file() else [])
    made = {"loss_curves.png": loss_curves(metrics), "wer_by_hours.png": wer_by_hours(systems)}
    pictures = {name: picture for name, picture in made.items() if picture is not None}
    return pictures | {_label_file(name): path.read_bytes() for name, path in experiments.label_pictures.items()}


def _label_file(name: str) -> str:
    return f"labels_{name.replace('/', '_')}.png"
