"""Pictures of training and of results, as PNG."""

from __future__ import annotations

import io
import logging
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from k2ssl.report.card import Wer
from k2ssl.report.tables import System, set_names

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What is drawn of each program: the key in metrics.jsonl, what it is called, and a factor.
_PANELS = {
    "pretrain": (("loss_masked", "loss per masked frame, nats", 1.0), ("accuracy_masked", "accuracy of masked frames, %", 100.0)),
    "finetune": (("loss", "loss per token, nats", 1.0), ("wer", "validation WER, %", 100.0)),
}
_PANEL_INCHES = (5.2, 3.4)
_MARKERS = "osD^vP*X"


def loss_curves(metrics: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]]) -> bytes | None:
    """Training (thin) and validation (dots) over updates.

    Args:
        metrics: program and records of metrics.jsonl by the name of the run.

    Returns:
        None if there is nothing to draw.
    """
    programs = [program for program in _PANELS if any(kind == program and records for kind, records in metrics.values())]
    if not programs:
        return None
    figure, axes = _figure(len(programs), 2)
    for row, program in enumerate(programs):
        chosen = {name: records for name, (kind, records) in metrics.items() if kind == program}
        for panel, (key, title, factor) in zip(axes[row], _PANELS[program], strict=True):
            for number, (name, records) in enumerate(chosen.items()):
                _curve(panel, records, key, factor, f"C{number % 10}", name)
            panel.set(title=f"{program}: {title}", xlabel="updates")
        _legend(axes[row][1])
    return _png(figure)


def wer_by_hours(systems: Sequence[System]) -> bytes | None:
    """Error rates, with their intervals, over hours of the whole chain; panels of their own for every set, with and without a language model.

    Returns:
        None if there is nothing to draw. Systems whose cost is not wholly known are left out.
    """
    names = set_names(systems)
    points = []
    for system in systems:
        if system.cost is None or system.cost.missing:
            continue
        part = system.cost.total
        unit, hours = ("GPU-hours", part.gpu_hours) if part.gpu_hours else ("CPU-hours", part.cpu_hours)
        points += [(names[wer.test_set, wer.cuts], unit, wer.lm is not None, system.name, hours, wer) for wer in system.results if hours]
    panels = sorted({point[:3] for point in points})
    if not panels:
        return None
    systems_drawn = list(dict.fromkeys(point[3] for point in points))
    searches = list(dict.fromkeys(point[5].search for point in points))
    figure, axes = _figure(len(panels), 1, legend=4.0, height=max(_PANEL_INCHES[1], 0.6 + 0.3 * (len(systems_drawn) + len(searches))))
    for (panel,), key in zip(axes, panels, strict=True):
        colors, markers = {}, {}
        for *where, name, hours, wer in points:
            if tuple(where) == key:
                colors[name] = f"C{systems_drawn.index(name) % 10}"
                markers[wer.search] = _MARKERS[searches.index(wer.search) % len(_MARKERS)]
                _point(panel, hours, wer, colors[name], markers[wer.search])
        title = f"{key[0]}, {'with a language model' if key[2] else 'no language model'}"
        panel.set(title=title, xlabel=f"{key[1]}, labels and pre-training included", ylabel="WER, %")
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        _two_legends(panel, colors, markers)
    return _png(figure)


def _point(panel: Axes, hours: float, wer: Wer, color: str, marker: str) -> None:
    low, high = (wer.wer if edge is None else edge for edge in (wer.low, wer.high))
    error = [[100 * max(0.0, wer.wer - low)], [100 * max(0.0, high - wer.wer)]]
    panel.errorbar([hours], [100 * wer.wer], yerr=error, capsize=3, linestyle="none", color=color, marker=marker)


def _two_legends(panel: Axes, colors: Mapping[str, str], markers: Mapping[str, str]) -> None:
    """Colours tell systems, markers searches."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, linewidth=4, label=_wrapped(name)) for name, color in colors.items()]
    handles += [Line2D([], [], color="0.4", marker=marker, linestyle="none", label=_wrapped(name)) for name, marker in markers.items()]
    panel.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, borderaxespad=0.0)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 46)) or text


def _curve(panel: Axes, records: Sequence[Mapping[str, Any]], key: str, factor: float, color: str, name: str) -> None:
    """Training and validation of one run; the legend names it once."""
    label: str | None = name
    style: dict[str, Any]
    for kind, style in (("train", {"linewidth": 1.0}), ("valid", {"marker": ".", "linestyle": "--", "linewidth": 0.8})):
        some = [(r["step"], r[key]) for r in records if r.get("kind") == kind and isinstance(r.get(key), int | float) and "step" in r]
        if some:
            steps, values = zip(*some, strict=True)
            if len(some) == 1:  # a line of one point is none
                style = {"marker": "+"} | style
            panel.plot(steps, [factor * value for value in values], color=color, label=label, **style)
            label = None


def _figure(rows: int, columns: int, legend: float = 2.6, height: float = _PANEL_INCHES[1]) -> tuple[Figure, Any]:
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # else it tells of its font cache
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_PANEL_INCHES[0] * columns + legend, height * rows), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)  # no window, whatever the user's own settings say
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    return figure, axes


def _legend(panel: Axes) -> None:
    """Beside the panel, where it hides nothing; every name once."""
    handles, labels = panel.get_legend_handles_labels()
    if not labels:
        return
    once = dict(zip(labels, handles, strict=True))
    panel.legend(once.values(), once.keys(), loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, borderaxespad=0.0)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
