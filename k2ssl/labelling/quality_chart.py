"""A picture of label quality: usage of classes, lengths of runs, and, where phones are known, which class goes with which phone."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from k2ssl.labelling.quality import LONGEST_RUN, LabelQuality, PhoneScores

Floats = npt.NDArray[np.float64]

_WIDTH = 1000  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 24, 40, 46  # room around a panel for its texts
_BARS = 240  # height of a panel of bars
_ROW = 13  # height of a phone
_INK, _FAINT, _BLUE, _ORANGE = (32, 32, 32), (208, 208, 208), (46, 100, 168), (214, 100, 20)


def quality_png(quality: LabelQuality) -> bytes:
    """The picture as a PNG file's content."""
    phones = quality.phones
    panels = [_TOP + _BARS + _BOTTOM] * 2 + ([] if phones is None else [_TOP + _ROW * phones.num_phones + _BOTTOM])
    image = Image.new("RGB", (_WIDTH, sum(panels)), "white")
    canvas = ImageDraw.Draw(image)
    _draw_usage(canvas, 0, quality)
    _draw_runs(canvas, panels[0], quality)
    if phones is not None:
        _draw_phones(image, canvas, panels[0] + panels[1], phones)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _draw_usage(canvas: ImageDraw.ImageDraw, y: int, quality: LabelQuality) -> None:
    use = quality.usage
    shares = 100 * np.sort(np.array(use.histogram, np.float64))[::-1] / use.num_labels
    num_classes = len(shares)
    title = f"{num_classes} classes by use: perplexity {use.perplexity:.1f}, {use.dead_classes} unused"
    top = _bars(canvas, y, shares, title, "% of labels")
    even = y + _TOP + _BARS * (1 - 100 / num_classes / top)
    canvas.line([(_LEFT, even), (_WIDTH - _RIGHT, even)], fill=_ORANGE, width=1)
    _text(canvas, _WIDTH - _RIGHT, even - 3, f"equal use, {100 / num_classes:.2g} %", anchor="rb", fill=_ORANGE)
    _places(canvas, y, [(i - 1, str(i)) for i in _round_numbers(num_classes)], num_classes)


def _draw_runs(canvas: ImageDraw.ImageDraw, y: int, quality: LabelQuality) -> None:
    use = quality.usage
    runs = np.array(use.run_histogram, np.float64)
    title = f"Runs of equal labels: mean {use.mean_run:.2f} labels, {1000 * use.mean_run / use.frame_rate:.0f} ms"
    _bars(canvas, y, 100 * runs / runs.sum(), title, "% of runs")
    names = [(i - 1, str(i) if i < LONGEST_RUN else f">= {i}") for i in (1, 5, 10, 20, 30, 40, LONGEST_RUN)]
    _places(canvas, y, names, len(runs))


def _draw_phones(image: Image.Image, canvas: ImageDraw.ImageDraw, y: int, scores: PhoneScores) -> None:
    """Rows are phones, columns classes, beside each other those that mean the same phone; dark where a class is that phone alone."""
    joint = np.array(scores.joint, np.float64)
    joint = joint[:, joint.any(axis=0)]
    of_class = joint / joint.sum(axis=0)
    order = np.lexsort((-of_class.max(axis=0), of_class.argmax(axis=0)))
    _text(canvas, _LEFT, y + 10, f"Phones in each class: PNMI {scores.pnmi:.3f}, phone purity {scores.phone_purity:.3f}", size=15)
    shades = (255 * (1 - of_class[:, order])).astype(np.uint8)
    box = (_WIDTH - _LEFT - _RIGHT, _ROW * len(joint))
    image.paste(Image.fromarray(shades).resize(box, Image.Resampling.NEAREST).convert("RGB"), (_LEFT, y + _TOP))
    canvas.rectangle([_LEFT - 1, y + _TOP - 1, _LEFT + box[0], y + _TOP + box[1]], outline=_FAINT)
    for i, phone in enumerate(scores.phones):
        _text(canvas, _LEFT - 6, y + _TOP + _ROW * i + _ROW // 2, phone, anchor="rm", size=11)
    _text(canvas, _LEFT + box[0] // 2, y + _TOP + box[1] + 8, f"{joint.shape[1]} classes, by their most frequent phone", anchor="ma")


def _bars(canvas: ImageDraw.ImageDraw, y: int, values: Floats, title: str, unit: str) -> float:
    """Bars with a title and a scale; returns the value at the upper edge."""
    top = _upper_edge(float(values.max()))
    _text(canvas, _LEFT, y + 10, title, size=15)
    for part in range(5):
        height = y + _TOP + _BARS * (1 - part / 4)
        canvas.line([(_LEFT, height), (_WIDTH - _RIGHT, height)], fill=_INK if part == 0 else _FAINT)
        _text(canvas, _LEFT - 6, height, f"{top * part / 4:.3g}", anchor="rm")
    _text(canvas, 8, y + _TOP - 24, unit)
    width = (_WIDTH - _LEFT - _RIGHT) / len(values)
    gap = 1 if width > 4 else 0
    for i, value in enumerate(values):
        if value > 0:
            left, right = _LEFT + i * width, _LEFT + (i + 1) * width - gap
            canvas.rectangle([left, y + _TOP + _BARS * (1 - value / top), max(left, right - 1), y + _TOP + _BARS], fill=_BLUE)
    return top


def _places(canvas: ImageDraw.ImageDraw, y: int, names: Sequence[tuple[int, str]], number: int) -> None:
    """Names under bars, by the number of the bar."""
    width = (_WIDTH - _LEFT - _RIGHT) / number
    for place, name in names:
        _text(canvas, _LEFT + (place + 0.5) * width, y + _TOP + _BARS + 6, name, anchor="ma")


def _text(
    canvas: ImageDraw.ImageDraw, x: float, y: float, text: str, *, anchor: str = "la", size: int = 13, fill: tuple[int, int, int] = _INK
) -> None:
    canvas.text((x, y), text, fill=fill, font=ImageFont.load_default(size), anchor=anchor)


def _upper_edge(largest: float) -> float:
    """The next larger of 1, 2, 4, 6, 8 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(largest))
    return next(float(step * power) for step in (1, 2, 4, 6, 8, 10) if step * power >= largest * (1 - 1e-9))


def _round_numbers(most: int) -> list[int]:
    """About five round numbers up to `most`."""
    step = max(1, int(_upper_edge(most / 6)))
    return list(range(step, most + 1, step))
