"""Tables of error rates and costs, and comparisons with a baseline: which rows may stand beside each other, and what must be said of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from k2ssl.report.card import PLAIN_RULE, Card, Wer
from k2ssl.report.chain import Cost, Part
from k2ssl.report.document import Table

UNKNOWN = "-"  # in tables, where something is not known or does not exist
_TUNED = re.compile(r", (?:token|word) score [^,]+")  # with a language model these are found on other data, like its weight


@dataclass(frozen=True)
class System:
    """A training run as the tables show it; of decodings whose run was not found only the name is known."""

    name: str
    card: Card | None
    cost: Cost | None
    results: tuple[Wer, ...]


@dataclass(frozen=True)
class Comparison:
    """A result held against the baseline's with the same utterances, search and language model.

    Attributes:
        system: that is compared.
        wer, baseline: the two results; no baseline: it has several, of other weights.
        reduction: relative reduction of the word error rate; negative if it is higher.
        pretraining_speed_up: the baseline's hours of pre-training over those of the system; None: not comparable.
        total_speed_up: the same of all hours, labels and fine-tuning included.
        updates_ratio: the system's updates of pre-training over the baseline's.
        notes: why something is not compared, or unequal.
    """

    system: str
    wer: Wer
    baseline: Wer | None
    reduction: float | None
    pretraining_speed_up: float | None
    total_speed_up: float | None
    updates_ratio: float | None
    notes: tuple[str, ...]


def distinct(results: Iterable[Wer]) -> tuple[Wer, ...]:
    """Results without those that repeat an earlier one: same conditions, same weights, same errors."""
    seen: dict[tuple[object, ...], Wer] = {}
    for wer in results:
        seen.setdefault((conditions(wer), _tuning(wer), wer.weights, wer.errors, wer.substitutions, wer.insertions, wer.words), wer)
    return tuple(seen.values())


def set_names(systems: Sequence[System]) -> dict[tuple[str, str], str]:
    """What each set of utterances (name, hash) is called: its name, with the beginning of the hash where other utterances share it."""
    sets = list(dict.fromkeys((wer.test_set, wer.cuts) for system in systems for wer in system.results))
    shared = {name for name, _ in sets if sum(name == other for other, _ in sets) > 1}
    return {(name, cuts): f"{name} [{cuts.partition(':')[2][:6]}]" if name in shared else name for name, cuts in sets}


def wer_tables(systems: Sequence[System]) -> dict[bool, Table]:
    """Error rates of systems by set and what they cost in all; results with a language model (True) and without (False) in tables of their own."""
    names = set_names(systems)
    rules = sorted({wer.rule for system in systems for wer in system.results})
    return {with_lm: table for with_lm in (False, True) if (table := _wer_table(systems, names, with_lm, rules)) is not None}


def results_table(systems: Sequence[System]) -> Table:
    """Every result in a row of its own, with counts and speed; numbers are not rounded."""
    names = set_names(systems)
    header = (
        *("system", "set", "utterances_sha256", "search", "language_model", "lm_scale", "weights", "text_rule", "wer", "low", "high"),
        *(
            "errors",
            "substitutions",
            "insertions",
            "deletions",
            "words",
            "utterances",
            "audio_seconds",
            "real_time_factor",
            "device",
            "decoding",
        ),
    )
    rows = []
    for system in systems:
        for wer in system.results:
            values = (system.name, names[wer.test_set, wer.cuts], wer.cuts, wer.search, wer.lm, wer.lm_scale, wer.weights, wer.rule)
            rates = (wer.wer, wer.low, wer.high, wer.errors, wer.substitutions, wer.insertions, wer.deletions, wer.words, wer.utterances)
            rows.append(tuple(map(_raw, (*values, *rates, wer.audio_seconds, wer.real_time_factor, wer.device, wer.decoding))))
    return Table("results", header, tuple(rows))


def cost_table(systems: Sequence[System]) -> Table:
    """Size and cost of every run and of what it was made from."""
    header = (
        "System",
        "Program",
        "Parameters",
        "Device",
        "Updates",
        "Audio",
        "Labels",
        "Pre-training",
        "Fine-tuning",
        "Sum",
        "Peak memory",
    )
    rows = [_cost_row(system.name, system.card, system.cost) for system in systems if system.card is not None and system.cost is not None]
    notes = ["Hours are summed along the chain: a run, the model it began with, its labels, and what these were made from."]
    notes += _unlike_hours(systems)
    for system in systems:
        if system.cost is not None and system.cost.missing:
            notes.append(f"≥ in {system.name}: {'; '.join(system.cost.missing)}.")
    return Table("cost", header, tuple(rows), tuple(notes))


def cost_numbers(systems: Sequence[System]) -> Table:
    """The same for programs; numbers are not rounded."""
    parts: Mapping[str, Callable[[Cost], Part]] = {
        "labels": lambda cost: cost.labels,
        "pretraining": lambda cost: cost.pretraining,
        "finetuning": lambda cost: cost.finetuning,
        "total": lambda cost: cost.total,
    }
    header = (
        *("system", "program", "parameters", "devices", "updates", "audio_hours", "peak_gpu_bytes", "peak_host_bytes"),
        *(f"{name}_{unit}_hours" for name in parts for unit in ("gpu", "cpu")),
        *("pretraining_updates", "finetuning_updates", "complete"),
    )
    rows = []
    for system in systems:
        card, cost = system.card, system.cost
        if card is None or cost is None:
            continue
        own = (system.name, card.program, card.parameters, "; ".join(card.usage.devices), card.updates, card.usage.audio_hours)
        hours = [hours for part in parts.values() for hours in (part(cost).gpu_hours, part(cost).cpu_hours)]
        ends = (cost.pretraining_updates, cost.finetuning_updates, not cost.missing)
        rows.append(tuple(map(_raw, (*own, card.usage.peak_gpu_bytes, card.usage.peak_host_bytes, *hours, *ends))))
    return Table("cost", header, tuple(rows))


def compare(systems: Sequence[System], baseline: str) -> list[Comparison]:
    """Hold every result against that of the baseline under the same conditions.

    Args:
        systems: all of them.
        baseline: name of one.

    Raises:
        ValueError: there is no such system, or it has no results; names those that have.
    """
    with_results = [system for system in systems if system.results]
    chosen = next((system for system in with_results if system.name == baseline), None)
    if chosen is None:
        raise ValueError(
            f"baseline is {baseline!r}, allowed are those with results: {', '.join(s.name for s in with_results) or 'none has any'}"
        )
    found = []
    for system in with_results:
        if system is chosen:
            continue
        for wer in system.results:
            same = [other for other in chosen.results if conditions(other) == conditions(wer)]
            same = [other for other in same if _tuning(other) == _tuning(wer)] or same
            same = [other for other in same if other.weights == wer.weights] or same
            if len(same) == 1:
                found.append(_compare(system, wer, chosen, same[0]))
            elif same:
                why = f"not compared: the baseline has {len(same)} results, none of which is like this one in weights and scales alone"
                found.append(Comparison(system.name, wer, None, None, None, None, None, (why,)))
    return found


def comparison_table(
    comparisons: Sequence[Comparison], names: Mapping[tuple[str, str], str], with_lm: bool, number: int = 0
) -> Table | None:
    """The comparisons with a language model, or those without; None if there are none. `number` tells the tables of several baselines apart."""
    chosen = [one for one in comparisons if (one.wer.lm is not None) == with_lm]
    header = (
        "System",
        "Set",
        "Search",
        "WER %",
        "Baseline %",
        "Relative reduction",
        "Pre-training speed-up",
        "Total speed-up",
        "Pre-training updates",
        "Remarks",
    )
    rows = [
        (
            *(one.system, names[one.wer.test_set, one.wer.cuts], _search(one.wer)),
            *(f"{100 * one.wer.wer:.2f}", UNKNOWN if one.baseline is None else f"{100 * one.baseline.wer:.2f}"),
            UNKNOWN if one.reduction is None else f"{100 * one.reduction:.1f} %",
            *(UNKNOWN if ratio is None else f"{ratio:.2f}x" for ratio in (one.pretraining_speed_up, one.total_speed_up, one.updates_ratio)),
            "; ".join(one.notes),
        )
        for one in chosen
    ]
    name = f"compared-{'lm' if with_lm else 'no-lm'}{f'-{number + 1}' if number else ''}"
    return Table(name, header, tuple(rows)) if rows else None


def conditions(wer: Wer) -> tuple[object, ...]:
    """What must be equal for two results to be compared: utterances, search, language model, and how texts are compared.

    The weight of the language model and the scores beside it are not among that: each system has its own, found on other data.
    """
    search = wer.search if wer.lm is None else _TUNED.sub("", wer.search)
    return (wer.cuts, search, wer.lm is not None, tuple(sorted(wer.files.items())), wer.rule)


def hours_text(part: Part) -> str:
    """GPU-hours and CPU-hours, whichever there are."""
    shown = [f"{hours:,.{3 if hours < 1 else 2}f} {unit}-h" for hours, unit in ((part.gpu_hours, "GPU"), (part.cpu_hours, "CPU")) if hours]
    return " + ".join(shown) or UNKNOWN


def _wer_table(systems: Sequence[System], names: Mapping[tuple[str, str], str], with_lm: bool, rules: Sequence[str]) -> Table | None:
    """`rules`: all by which texts were compared anywhere in the report."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    sets: list[str] = []
    shown = [replace(system, results=tuple(wer for wer in system.results if (wer.lm is not None) == with_lm)) for system in systems]
    results = [wer for system in shown for wer in system.results]
    for system in shown:
        for wer in system.results:
            name = names[wer.test_set, wer.cuts]
            sets = [*sets, name] if name not in sets else sets
            search = _search(wer)
            if len({tuple(sorted(other.files.items())) for other in results if _search(other) == search}) > 1:  # of one name
                search += f" [{', '.join(sha[:6] for _, sha in sorted(wer.files.items()))}]"
            search += f" ({wer.rule})" if len(rules) > 1 else ""
            row = cells.setdefault((system.name, search, wer.weights, _hours(system.cost)), {})
            row[name] = f"{row[name]}; {_rate(wer)}" if name in row else _rate(wer)
    if not cells:
        return None
    rows = [(*words, *(row.get(name, UNKNOWN) for name in sets), hours) for (*words, hours), row in cells.items()]
    header = ("System", "Search", "Weights", *(f"{name}: WER % [95 % interval] errors/words" for name in sets), "Hours in all")
    return Table(f"wer-{'lm' if with_lm else 'no-lm'}", header, tuple(rows), tuple(_differences(shown, names, rules)))


def _differences(systems: Sequence[System], names: Mapping[tuple[str, str], str], rules: Sequence[str]) -> list[str]:
    """What keeps rows from being comparable."""
    notes = []
    several = [name for (test_set, _), name in names.items() if name != test_set]
    if several:
        notes.append(f"Not comparable: {', '.join(several)} have the same name and hold other utterances.")
    if len(rules) > 1:
        notes.append(f"Not comparable: texts were compared by different rules ({'; '.join(rules)}).")
    elif rules and rules[0] != PLAIN_RULE:
        notes.append(f"Texts were compared by the rule {rules[0]}.")
    notes += _unlike_hours([system for system in systems if system.results])
    by_updates: dict[int, list[str]] = {}
    for system in systems:
        if system.results and system.cost is not None and system.cost.finetuning_updates is not None:
            by_updates.setdefault(system.cost.finetuning_updates, []).append(system.name)
    if len(by_updates) > 1:
        groups = "; ".join(f"{updates:,}: {', '.join(names)}" for updates, names in sorted(by_updates.items()))
        notes.append(f"Fine-tuning updates differ: {groups}.")
    return notes


def _unlike_hours(systems: Sequence[System]) -> list[str]:
    devices = sorted({device for system in systems if system.cost is not None for device in _kinds(system.cost.total.devices)})
    return [f"Not comparable: hours of different devices ({'; '.join(devices)})."] if len(devices) > 1 else []


def _cost_row(name: str, card: Card, cost: Cost) -> tuple[str, ...]:
    memory = [f"{card.usage.peak_gpu_bytes / 2**30:.2f} GiB GPU"] if card.usage.peak_gpu_bytes else []
    memory += [f"{card.usage.peak_host_bytes / 2**30:.2f} GiB"] if card.usage.peak_host_bytes else []
    return (
        *(name, card.program),
        UNKNOWN if card.parameters is None else f"{card.parameters / 1e6:.2f} M",
        "; ".join(card.usage.devices) or UNKNOWN,
        UNKNOWN if card.updates is None else f"{card.updates:,}",
        f"{card.usage.audio_hours:,.2f} h",
        *(hours_text(part) for part in (cost.labels, cost.pretraining, cost.finetuning)),
        _hours(cost),
        ", ".join(memory) or UNKNOWN,
    )


def _hours(cost: Cost | None) -> str:
    """Of the whole chain."""
    return UNKNOWN if cost is None else f"{'≥ ' if cost.missing else ''}{hours_text(cost.total)}"


def _compare(system: System, wer: Wer, baseline: System, other: Wer) -> Comparison:
    notes = []
    if wer.weights != other.weights:
        notes.append(f"weights: {wer.weights} against {other.weights}")
    if _tuning(wer) != _tuning(other):
        notes.append(f"tuned: {_tuning(wer)} against {_tuning(other)}")
    pretraining = total = updates = None
    one, two = system.cost, baseline.cost
    if one is None or two is None:
        notes.append("cost unknown")
    else:
        if one.finetuning_updates != two.finetuning_updates:
            notes.append(f"fine-tuning updates: {_raw(one.finetuning_updates)} against {_raw(two.finetuning_updates)}")
        if one.pretraining_data and two.pretraining_data and one.pretraining_data != two.pretraining_data:
            notes.append("pre-trained on other manifests")
        updates = _ratio(one.pretraining_updates, two.pretraining_updates)
        if one.missing or two.missing:
            notes.append("hours not compared: not all were recorded")
        elif _kinds(one.total.devices) != _kinds(two.total.devices):
            notes.append("hours not compared: different devices")
        else:
            pretraining, total = _speed_up(one.pretraining, two.pretraining), _speed_up(one.total, two.total)
    if system.card is not None and baseline.card is not None and system.card.data_hashes() != baseline.card.data_hashes():
        notes.append("trained on other manifests")
    reduction = (other.wer - wer.wer) / other.wer if other.wer else None
    return Comparison(system.name, wer, other, reduction, pretraining, total, updates, tuple(notes))


def _speed_up(part: Part, baseline: Part) -> float | None:
    """In GPU-hours where both have such, in CPU-hours where neither has."""
    if bool(part.gpu_hours) != bool(baseline.gpu_hours):
        return None
    return _ratio(baseline.gpu_hours, part.gpu_hours) if part.gpu_hours else _ratio(baseline.cpu_hours, part.cpu_hours)


def _ratio(one: float | None, two: float | None) -> float | None:
    return one / two if one and two else None


def _kinds(devices: Sequence[str]) -> set[str]:
    """Kinds of devices without how many there were: hours count each."""
    return {device.partition(" x ")[2] or device for device in devices}


def _search(wer: Wer) -> str:
    scale = "" if wer.lm_scale is None else f" x {wer.lm_scale:g}"
    return wer.search if wer.lm is None else f"{wer.search}, {wer.lm}{scale}"


def _tuning(wer: Wer) -> str:
    """What was found for a system on other data, so that it may differ between two results that are compared."""
    if wer.lm is None:
        return ""
    scores = "".join(_TUNED.findall(wer.search))
    return f"language model x {UNKNOWN if wer.lm_scale is None else f'{wer.lm_scale:g}'}{scores}"


def _rate(wer: Wer) -> str:
    interval = "" if wer.low is None or wer.high is None else f" [{100 * wer.low:.2f}, {100 * wer.high:.2f}]"
    return f"{100 * wer.wer:.2f}{interval} {wer.errors:,}/{wer.words:,}"


def _raw(value: object) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)
