"""What a run cost together with all that it was made from: labels, k-means, the models that it and they began with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k2ssl.report.card import Card, base_of, has_ledger
from k2ssl.report.experiments import PROGRAMS, Run, read_run, run_of_file
from k2ssl.report.origin import Init, labels_of, read_json, shown
from k2ssl.train.ledger import LedgerTotal, total

LABELLING = ("fit_kmeans", "label")


@dataclass
class Chain:
    """Everything behind a run, and the run itself.

    Attributes:
        ledgers: folders whose ledgers count.
        runs: training runs by folder, the run itself first.
        steps_text: the way, in words, one line a link.
        missing: links that cannot be followed, in words; the cost is then a lower bound.
    """

    ledgers: list[Path] = field(default_factory=list)
    runs: dict[Path, Card] = field(default_factory=dict)
    steps_text: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """Cost of some programs in a chain.

    Attributes:
        gpu_hours, cpu_hours, audio_hours: as in `k2ssl.train.ledger.LedgerTotal`.
        devices: on which, as in "8 x NAME".
    """

    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    audio_hours: float = 0.0
    devices: tuple[str, ...] = ()

    def __add__(self, other: Part) -> Part:
        return Part(
            self.gpu_hours + other.gpu_hours,
            self.cpu_hours + other.cpu_hours,
            self.audio_hours + other.audio_hours,
            tuple(sorted({*self.devices, *other.devices})),
        )


@dataclass(frozen=True)
class Cost:
    """Cost of a chain by what it was for.

    Attributes:
        labels, pretraining, finetuning: the parts.
        pretraining_updates: optimizer steps of all pre-training runs, each counted once; None: not known.
        finetuning_updates: of the fine-tuning run; None: not known, or there is none.
        pretraining_data: manifests of all pre-training runs, by hash where that is known.
        missing: links that could not be followed.
    """

    labels: Part
    pretraining: Part
    finetuning: Part
    pretraining_updates: int | None
    finetuning_updates: int | None
    pretraining_data: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def total(self) -> Part:
        """All of them."""
        return self.labels + self.pretraining + self.finetuning


def follow(run: Run, runs: Mapping[Path, Run]) -> Chain:
    """The chain of a run; runs that are not among `runs` are looked for where paths say they lie."""
    chain = Chain()
    _add_run(chain, run.folder, {folder: other.card for folder, other in runs.items()}, run.name)
    return chain


def cost_of(chain: Chain) -> Cost:
    """What a chain cost; every start of every program counts once.

    Raises:
        OSError: a ledger cannot be read.
    """
    by_program = total(*chain.ledgers).by_program if chain.ledgers else {}
    updates = {program: [card.updates for card in chain.runs.values() if card.program == program] for program in PROGRAMS}
    return Cost(
        labels=sum((_part(by_program.get(name)) for name in LABELLING), Part()),
        pretraining=_part(by_program.get("pretrain")),
        finetuning=_part(by_program.get("finetune")),
        pretraining_updates=_sum(updates["pretrain"]),
        finetuning_updates=_sum(updates["finetune"]) if updates["finetune"] else None,
        pretraining_data=tuple(sorted({sha for card in chain.runs.values() if card.program == "pretrain" for sha in card.data_hashes()})),
        missing=tuple(chain.missing),
    )


def _add_run(chain: Chain, folder: Path, cards: Mapping[Path, Card], name: str) -> None:
    if folder in chain.runs:
        return
    card = cards.get(folder) or read_run(folder, chain.missing)
    if card is None:
        _miss(chain, f"the run {shown(folder)} is not there")
        return
    chain.runs[folder] = card
    chain.ledgers.append(folder)
    base = base_of(folder, card.settings)
    data = ", ".join(f"{item.path}{'' if item.hours is None else f' ({item.hours:,.2f} h)'}" for item in card.data)
    begin = "from drawn weights" if card.init is None else f"from {_weights(card.init)}"
    chain.steps_text.append(f"{name}: {card.program} {begin}, on {data or 'unknown data'}")
    if card.init is not None:
        _add_model(chain, base / card.init.path, base, cards, card.init.run)
    for store in card.labels:
        _add_labels(chain, base / store.path, cards)


def _add_model(chain: Chain, path: Path, base: Path, cards: Mapping[Path, Card], said: str | None = None) -> None:
    folder = run_of_file(path, base) or (None if said is None else (base / said).resolve())
    if folder is None:
        _miss(chain, f"{shown(path)} does not say which run it is from")
        return
    _add_run(chain, folder, cards, folder.name)


def _add_labels(chain: Chain, folder: Path, cards: Mapping[Path, Card]) -> None:
    folder = folder.resolve()
    settings = read_json(folder / "settings.json")
    base = base_of(folder, settings)
    labels = labels_of({"data": {"labels": [str(folder)]}}, base)[0]
    chain.steps_text.append(
        f"labels {folder.name}: {labels.num_classes or '?'} classes of {labels.features or 'unknown features'}, k-means {_short(labels.kmeans_sha256)}"
        + (f", features of checkpoint {_short(labels.checkpoint_sha256)}" if labels.checkpoint_sha256 else "")
    )
    _add_ledger(chain, folder, f"the labels in {shown(folder)}")
    if labels.kmeans is not None:
        _add_ledger(chain, (base / labels.kmeans).parent.resolve(), f"the k-means {labels.kmeans}")
    else:
        _miss(chain, f"the labels in {shown(folder)} do not say with which k-means they were made")
    if labels.checkpoint is not None:
        _add_model(chain, base / labels.checkpoint, base, cards)
    elif labels.checkpoint_sha256 is not None:
        _miss(chain, f"labels in {shown(folder)}: the model behind their features is not named")


def _add_ledger(chain: Chain, folder: Path, what: str) -> None:
    if not has_ledger(folder):
        _miss(chain, f"what {what} cost was not recorded")
    elif folder not in chain.ledgers:
        chain.ledgers.append(folder)


def _miss(chain: Chain, what: str) -> None:
    if what not in chain.missing:
        chain.missing.append(what)


def _part(used: LedgerTotal | None) -> Part:
    return Part() if used is None else Part(used.gpu_hours, used.cpu_hours, used.audio_hours, used.devices)


def _sum(numbers: list[Any]) -> int | None:
    return None if None in numbers else sum(numbers)


def _weights(init: Init) -> str:
    """Of a model file, whose weights may themselves be an average, the name alone."""
    return f"{init.weights} weights of {init.path}" if Path(init.path).parent.name == "checkpoints" else init.path


def _short(sha: str | None) -> str:
    return "unknown" if sha is None else sha[:12]
