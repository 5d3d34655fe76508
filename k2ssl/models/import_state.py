"""Weights of other projects' checkpoints into our models, wholly or not at all, with an account of every name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from k2ssl.models.frontend import WaveformConfig
from k2ssl.models.hubert import HubertConfig
from k2ssl.models.import_names import PARTS, SOURCES, Place, Source, count_known, guess_source, is_dead, looks_like, translate
from k2ssl.models.prediction_head import HeadConfig

_ENCODER = "encoder."
_ALL_HEADS = "heads.*."
_NAMES_IN_ERROR = 20


@dataclass(frozen=True)
class ImportReport:
    """What became of every name on both sides.

    Attributes:
        matched: pairs (source's name, our name); a fused or divided tensor appears in several.
        missing: our names that got nothing and keep their values.
        left_over: the source's names that were not used.
        dead: the source's names that the source never uses itself.
    """

    matched: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    dead: tuple[str, ...]

    def summary(self, limit: int | None = None) -> str:
        """Counts, and the names of everything that was not matched; of each list at most `limit` names."""
        used = len({theirs for theirs, _ in self.matched})
        lines = [f"matched: {used} tensors of the source, {len({ours for _, ours in self.matched})} of ours"]
        lines += _listed("missing, ours that got nothing", self.missing, limit)
        lines += _listed("left over, the source's that were not used", self.left_over, limit)
        lines += _listed("dead, the source's that it never uses itself", self.dead, limit)
        return "\n".join(lines)

    def __str__(self) -> str:
        """`summary`, and a table of all pairs."""
        width = max((len(theirs) for theirs, _ in self.matched), default=0)
        return "\n".join([self.summary(), "pairs:", *(f"  {theirs:{width}} -> {ours}" for theirs, ours in self.matched)])


@dataclass
class _Plan:
    """Tensors found for names of ours, and why others were not used; nothing is written yet."""

    values: dict[str, Tensor] = field(default_factory=dict)
    matched: list[tuple[str, str]] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    met: set[str] = field(default_factory=set)  # our names that something is for, whether it fits or not


def import_state_dict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: Source,
    strict: bool = True,
    allow_missing: Collection[str] = (),
    allow_left_over: Collection[str] = (),
) -> ImportReport:
    """Copy another project's weights into `model`; on an error the model is as it was.

    Names that begin with `module.` or `model.` (trainers), `w2v_encoder.w2v_model.` (fairseq, fine-tuned), `wav2vec2.` (torchaudio) or
    `hubert.` (Hugging Face, fine-tuned) are understood without that beginning. The state dictionary of an encoder alone fits an encoder
    alone: icefall's names that start with `encoders.` a bare `Zipformer`.

    Args:
        model: a `HubertModel`, `Zipformer` or `TransformerEncoder` of the sizes that the weights have.
        state: name -> tensor of any floating type; converted to the types and devices of the model's parameters.
        source: whose names they are; `guess_source(state)` tells.
        strict: refuse anything missing or left over. Wrong shapes are refused always.
        allow_missing: beginnings of our names that may be missing all the same, such as "heads.".
        allow_left_over: beginnings of the source's names that may be left over all the same, such as "lm_head.".

    Raises:
        ValueError: an unknown source; an empty state dictionary or one of something other than tensors; no name that fits; tensors of
            other shapes than ours, all of them listed; two tensors for one of ours; with `strict` anything missing or left over.
    """
    for name, given in (("allow_missing", allow_missing), ("allow_left_over", allow_left_over)):
        if isinstance(given, str) or "" in given:  # the letters of a text, or nothing at all, would begin nearly every name
            raise ValueError(f"{name} is {given!r}, a list of beginnings of names is needed")
    _check_state(state, source)
    ours = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    plan = _make_plan(ours, state, source)
    if not plan.values and not plan.misfits:
        raise ValueError(
            f"nothing in the state dictionary, read as {source}'s, belongs in this model: {looks_like(state)}{_hint(state, source)}"
        )
    report = ImportReport(
        matched=tuple(plan.matched),
        missing=tuple(key for key in ours if key not in plan.met),
        left_over=tuple(plan.left_over),
        dead=tuple(key for key in state if is_dead(key, source)),
    )
    differences = _differences(report, tuple(allow_missing), tuple(allow_left_over)) if strict else []
    if plan.misfits or differences:
        lines = [f"the state dictionary does not fit the model{_hint(state, source)}", *(f"  {misfit}" for misfit in plan.misfits)]
        raise ValueError("\n".join(lines + differences))
    with torch.no_grad():
        for key, value in plan.values.items():
            ours[key].copy_(value)
    return report


def fit_config(config: HubertConfig, state: Mapping[str, Tensor], source: Source) -> HubertConfig:
    """`config` with what the state dictionary itself tells, if it does: the head's kind and classes (one label set, unless those of
    `config` add up to as many), and the normalisation and biases of a waveform frontend. Everything else stays; attention heads and rates
    cannot be told from weights.

    Raises:
        ValueError: see `import_state_dict`.
    """
    _check_state(state, source)
    shapes = {place.key: state[key].shape for key in state if (place := translate(key, source)) is not None}
    head = config.head
    codes, weight = (tuple(shapes.get(f"heads.*.{name}", ())) for name in ("codes", "projection.weight"))
    if len(codes) == 2:
        head = replace(head, similarity="cosine", num_classes=_classes(head, codes[0]), code_dim=codes[1])
    elif len(weight) == 2:
        head = replace(head, similarity="linear", num_classes=_classes(head, weight[0]))
    frontend = config.frontend
    if isinstance(frontend, WaveformConfig) and "frontend.layers.0.conv.weight" in shapes:
        layer_norms = any(re.fullmatch(r"frontend\.layers\.[1-9]\d*\.norm\.weight", key) for key in shapes)
        frontend = replace(frontend, norm="layer" if layer_norms else "group", bias="frontend.layers.0.conv.bias" in shapes)
    return replace(config, head=head, frontend=frontend)


def _classes(head: HeadConfig, total: int) -> tuple[int, ...]:
    return head.num_classes if sum(head.num_classes) == total else (total,)


def _check_state(state: Mapping[str, Tensor], source: Source) -> None:
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}, allowed are {', '.join(SOURCES)}")
    if not state:
        raise ValueError("the state dictionary is empty")
    if others := [f"{key} ({type(value).__name__})" for key, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"not a state dictionary, which holds tensors only; it has {', '.join(others[:_NAMES_IN_ERROR])}")
    guess_source(state)  # which refuses names that nobody knows


def _hint(state: Mapping[str, Tensor], source: Source) -> str:
    """Says so if another source knows more of the names."""
    best, known = guess_source(state), count_known(state, source)
    if (known_to_best := count_known(state, best)) > known:
        return f"; of its {len(state)} names {known} are {source}'s and {known_to_best} are {best}'s, is the source {best}?"
    return ""


def _differences(report: ImportReport, allow_missing: tuple[str, ...], allow_left_over: tuple[str, ...]) -> list[str]:
    """Lines that list the names that nobody allowed to be missing or left over."""
    missing = tuple(key for key in report.missing if not key.startswith(allow_missing))
    left_over = tuple(key for key in report.left_over if not key.startswith(allow_left_over))
    lines = _listed("missing in the source (allow_missing admits it)", missing, _NAMES_IN_ERROR) if missing else []
    return lines + (_listed("left over of the source (allow_left_over admits it)", left_over, _NAMES_IN_ERROR) if left_over else [])


def _make_plan(ours: Mapping[str, Tensor], state: Mapping[str, Tensor], source: Source) -> _Plan:
    plan = _Plan()
    pieces: dict[str, dict[str, str]] = {}  # our name -> part -> source's name
    for key in state:
        place = _in_model(translate(key, source), ours)
        if place is None:
            plan.left_over += [] if is_dead(key, source) else [key]
        elif place.part not in (found := pieces.setdefault(place.key, {})):
            found[place.part] = key
        else:
            plan.misfits.append(f"{found[place.part]} and {key} are both for {place.key}")
    for our_key, found in pieces.items():
        if our_key.startswith(_ALL_HEADS):
            _divide(plan, our_key, found[""], ours, state)
        elif set(found) in ({""}, set(PARTS)):
            _assign(plan, our_key, [found[part] for part in (PARTS if len(found) > 1 else ("",))], ours, state)
        else:
            plan.left_over += found.values()  # queries without keys, say
    return plan


def _in_model(place: Place | None, ours: Mapping[str, Tensor]) -> Place | None:
    """The place under the model's own name, None where the model has no such place."""
    if place is None:
        return None
    if place.key.startswith(_ALL_HEADS):
        return place if any(_of_heads(place.key, ours)) else None
    if not any(key.startswith(_ENCODER) for key in ours):  # the model is an encoder alone
        if not place.key.startswith(_ENCODER):
            return None
        place = place._replace(key=place.key.removeprefix(_ENCODER))
    return place if place.key in ours else None


def _of_heads(pattern: str, ours: Iterable[str]) -> Iterator[str]:
    """Our names that `heads.*.NAME` stands for, in the order of the heads."""
    number = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
    found = {int(match[1]): key for key in ours if (match := number.fullmatch(key))}
    return (found[i] for i in sorted(found))


def _divide(plan: _Plan, pattern: str, key: str, ours: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """One tensor for all heads: its rows in the heads' order, or the whole for each where the source ties them."""
    names = list(_of_heads(pattern, ours))
    plan.met.update(names)
    tensor, rows = state[key], [ours[name].shape[0] for name in names]
    tied = all(tensor.shape == ours[name].shape for name in names)
    whole = tensor.shape if tied else torch.Size([sum(rows), *ours[names[0]].shape[1:]])
    if reason := _misfit(tensor, whole, ours[names[0]]):
        plan.misfits.append(f"{key} {reason} of {pattern}")
        return
    for name, value in zip(names, [tensor] * len(names) if tied else tensor.split(rows), strict=True):
        plan.values[name] = value
        plan.matched.append((key, name))


def _assign(plan: _Plan, our_key: str, keys: list[str], ours: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """The tensors of `keys`, stacked along the first axis, for one of ours."""
    plan.met.add(our_key)
    target = ours[our_key]
    shape = target.shape if len(keys) == 1 else torch.Size([target.shape[0] // len(keys), *target.shape[1:]])
    reasons = [f"{key} {reason} of {our_key}" for key in keys if (reason := _misfit(state[key], shape, target))]
    plan.misfits += reasons
    if not reasons:
        plan.values[our_key] = state[keys[0]] if len(keys) == 1 else torch.cat([state[key] for key in keys])
        plan.matched += [(key, our_key) for key in keys]


def _misfit(tensor: Tensor, shape: torch.Size, target: Tensor) -> str:
    """What keeps `tensor` from filling `shape` of `target`, or nothing."""
    if tensor.shape != shape:
        return f"has shape {tuple(tensor.shape)}, not the {tuple(shape)}"
    if not tensor.is_floating_point():
        return f"has type {tensor.dtype}, not a floating type for the place"
    if tensor.is_meta and not target.is_meta:
        return "is on the meta device, it has no values for the place"
    return ""


def _listed(title: str, names: tuple[str, ...], limit: int | None) -> list[str]:
    shown = names if limit is None else names[:limit]
    more = [f"  ... and {len(names) - len(shown)} more"] if len(shown) < len(names) else []
    return [f"{title}: {len(names)}", *(f"  {name}" for name in shown), *more]
