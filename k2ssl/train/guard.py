"""What stands between a diverging run and its weights: steps that are dropped, roll-backs, and a stop."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from k2ssl import distributed
from k2ssl.atomic_file import atomic_file

_WINDOW = 100  # steps over which dropped ones are counted, and accepted norms remembered
_FEWEST_NORMS = 20  # before so many are known, no norm counts as exploded
_RICH = 4.0  # a code usage that was never richer than this cannot collapse

IncidentKind = Literal["non_finite_loss", "non_finite_gradient", "exploded_gradient", "collapsed_scale", "collapsed_codes"]
_KINDS: tuple[IncidentKind, ...] = ("non_finite_loss", "non_finite_gradient", "exploded_gradient")  # as numbered on the device, from 1


@dataclass(frozen=True)
class GuardConfig:
    """When a run counts as diverging, and what is done about it.

    Attributes:
        max_skipped: so many dropped steps within the last 100 make training roll back.
        explode_factor: a gradient norm above so many times the median of the last 100 accepted ones makes its step dropped; 0: never.
        max_rollbacks: how often a run is rolled back; the next time it is stopped instead.
        lr_factor: factor on the learning rate at every roll-back.
        min_scale: float16 loss scale below which training rolls back; 0: never.
        min_perplexity_share: the perplexity of the predicted codes, as a share of its best so far, below which training rolls back (once
            that best was 4 or more); 0: never.

    Raises:
        ValueError: a value out of range.
    """

    max_skipped: int = 5
    explode_factor: float = 1000.0
    max_rollbacks: int = 3
    lr_factor: float = 0.5
    min_scale: float = 1e-5
    min_perplexity_share: float = 0.1

    def __post_init__(self) -> None:
        def check(name: str, valid: bool, allowed: str) -> None:
            if not valid:
                raise ValueError(f"GuardConfig: {name} is {getattr(self, name)}, {allowed} is needed")

        check("max_skipped", 1 <= self.max_skipped <= _WINDOW, f"a number of steps from 1 to {_WINDOW}")
        factor = self.explode_factor
        check("explode_factor", factor == 0 or (math.isfinite(factor) and factor > 1), "0 or a finite number > 1")
        check("max_rollbacks", self.max_rollbacks >= 0, "an integer >= 0")
        check("lr_factor", 0 < self.lr_factor <= 1, "a number > 0, at most 1,")
        check("min_scale", math.isfinite(self.min_scale) and self.min_scale >= 0, "a finite number >= 0")
        check("min_perplexity_share", 0 <= self.min_perplexity_share < 1, "a number >= 0 and < 1")


@dataclass(frozen=True)
class Incident:
    """One thing that went wrong.

    Attributes:
        step: as given to `Guard.poll` or `Guard.check_log`.
        kind: what went wrong; the first three dropped the step.
        ids: utterances of this rank in that step; empty for a collapse, which no single batch causes.
        loss, grad_norm, median: of that step, and the median of accepted norms before it (NaN before any); None for a collapse.
        value, limit: for a collapse, the scale or perplexity and the value that it fell below.
    """

    step: int
    kind: IncidentKind
    ids: tuple[str, ...] = ()
    loss: float | None = None
    grad_norm: float | None = None
    median: float | None = None
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What to do now, and what is newly known to have gone wrong."""

    action: Literal["continue", "roll_back", "stop"] = "continue"
    incidents: tuple[Incident, ...] = ()


@dataclass(frozen=True)
class _Record:
    """What `judge` found in one step (kind, loss, norm, median), on its way to the host."""

    step: int
    ids: tuple[str, ...]
    values: Tensor
    copied: torch.cuda.Event | None = None

    def arrived(self) -> Tensor:
        if self.copied is not None:
            self.copied.synchronize()
        return self.values


class Guard:
    """Drops steps that would spoil the model, and tells when dropping is not enough.

    In every step, `judge` decides on the device, before the optimizer's step, and `poll` tells the host what was decided in the step
    before. That lag of one step is fixed, so nothing depends on timing, and the host waits at most for a step before the last one.

        accept = guard.judge(loss, grad_norm)
        optimizer.found_inf = (~accept).float()
        ...
        verdict = guard.poll(step, ids)

    All ranks decide alike, without exchanging anything, because all get the same numbers: the loss summed over ranks, the norm of
    gradients averaged over ranks, the perplexity of counts summed over ranks. Give them nothing else. Only ids are a rank's own.

    Args:
        config: limits.
        folder: where `write_incident` writes, below "incidents"; None writes nothing.
        device: where losses and norms are.
        overflows: gradients are those of a scaled loss, which overflows now and then by design: such steps are dropped, but they are no
            incidents; `min_scale` tells when there are too many.

    Attributes:
        sound_step: the last step of which `check_log` knows that nothing had collapsed: a collapse began after it. None before any.
    """

    def __init__(self, config: GuardConfig, folder: Path | None, device: torch.device | str, overflows: bool = False) -> None:
        self.config = config
        self.sound_step: int | None = None
        self._overflows = overflows
        self.folder = None if folder is None else Path(folder) / "incidents"
        self.rollbacks = 0
        self._device = torch.device(device)
        self._lowest = self._best = math.nan  # perplexity; the best since it first doubled
        self._norms: Tensor
        self._num_accepted: Tensor
        self._judged: Tensor | None
        self._record: _Record | None
        self._recent: list[Incident]
        self._forget()

    @property
    def recent(self) -> tuple[Incident, ...]:
        """The dropped steps that are counted, oldest first: whose data to leave out after a roll-back."""
        return tuple(self._recent)

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether the model may take this step; waits for nothing.

        Args:
            loss: scalar, the same on all ranks.
            grad_norm: scalar, over all parameters, the same on all ranks.

        Returns:
            Scalar bool on the device: loss and norm are finite, and the norm is at most `explode_factor` times the median of the last
            100 accepted ones. The last part holds once 20 norms were accepted, if their median is not zero.
        """
        loss, norm = loss.float(), grad_norm.float()
        median = self._median()
        no = torch.zeros((), dtype=torch.bool, device=self._device)
        # NaN, while there is no median, compares as False
        exploded = (norm > self.config.explode_factor * median) & (median > 0) if self.config.explode_factor > 0 else no
        exploded = exploded & (self._num_accepted >= _FEWEST_NORMS)
        kind = torch.where(~loss.isfinite(), 1.0, torch.where(~norm.isfinite(), 2.0, torch.where(exploded, 3.0, 0.0)))
        accept = kind == 0
        is_slot = torch.arange(_WINDOW, device=self._device) == self._num_accepted % _WINDOW
        self._norms = torch.where(is_slot & accept, norm, self._norms)
        self._num_accepted = self._num_accepted + accept
        self._judged = torch.stack([kind, loss, norm, median])
        return accept

    def poll(self, step: int, ids: Sequence[str]) -> Verdict:
        """What is known of the step before; call once after every `judge`.

        Args:
            step: number of the step that was judged, greater than that of the one before.
            ids: this rank's utterances in it.

        Raises:
            RuntimeError: nothing was judged since the last call.
        """
        if self._judged is None:
            raise RuntimeError("Guard.poll: no step was judged since the last call")
        before, self._record = self._record, _start_copy(step, tuple(ids), self._judged)
        self._judged = None
        return self._examine(before)

    def flush(self) -> Verdict:
        """What is known of the last step; waits for it. For the end of training, where no other step follows."""
        before, self._record = self._record, None
        return self._examine(before)

    def check_log(self, step: int, perplexity: float | None = None, loss_scale: float | None = None) -> Verdict:
        """Whether code usage or loss scale have collapsed; to be called with what is logged anyway.

        Args:
            step: number of the step.
            perplexity: of the codes that the model predicts, over all ranks: exp of their entropy; None where there is none. An untrained
                model may seem to use many codes, and soon predicts the most frequent one only. So perplexity counts as learnt once it
                has risen to twice its lowest value so far; a best of 4 or more from then on is what later values are held against.
            loss_scale: None without one.
        """
        self._recent = [earlier for earlier in self._recent if earlier.step > step - _WINDOW]
        incidents = []
        if loss_scale is not None and loss_scale < self.config.min_scale:
            incidents.append(Incident(step, "collapsed_scale", value=loss_scale, limit=self.config.min_scale))
        if perplexity is not None and math.isfinite(perplexity):
            self._lowest = min(perplexity, self._lowest)
            if perplexity >= 2 * self._lowest:
                self._best = max(perplexity, self._best)
            limit = self.config.min_perplexity_share * self._best
            if self._best >= _RICH and perplexity < limit:
                incidents.append(Incident(step, "collapsed_codes", value=perplexity, limit=limit))
        if incidents:
            return Verdict(self._remedy(), tuple(incidents))
        if perplexity is None or math.isfinite(perplexity):
            self.sound_step = step
        return Verdict()

    def rolled_back(self, step: int) -> float:
        """Count a roll-back to a step and forget norms and dropped steps; returns the factor on the learning rate from now on, over all
        roll-backs.

        Call it after the earlier state was loaded and `recent` was read. Save a checkpoint soon: an earlier one does not know of this.
        Whether the state of that step was sound is for `check_log` to say; if it was not, the next roll-back is to an earlier one.
        """
        self.rollbacks += 1
        self.sound_step = step - 1
        self._forget()
        return self.lr_factor

    @property
    def lr_factor(self) -> float:
        """The factor on the learning rate, over all roll-backs so far."""
        return self.config.lr_factor**self.rollbacks

    def write_incident(self, incident: Incident, extra: Mapping[str, Any]) -> Path | None:
        """Write a small JSON file of this rank about `incident`, beside those of earlier ones.

        Args:
            incident: from a verdict.
            extra: further plain values, such as the first module that computed something that is not finite.

        Returns:
            The file, or None where there is no folder to write to.

        Raises:
            ValueError: `extra` has a key of the incident's own.
            OSError: the file cannot be written.
        """
        if self.folder is None:
            return None
        rank = distributed.rank()
        own = {**asdict(incident), "rank": rank, "rollbacks": self.rollbacks, "time": datetime.now(timezone.utc).isoformat()}
        if taken := own.keys() & extra.keys():
            raise ValueError(f"Guard.write_incident: extra has {sorted(taken)}, which the incident has itself")
        self.folder.mkdir(parents=True, exist_ok=True)
        name, number = f"step-{incident.step:09d}-{incident.kind}-rank{rank}", 1
        while (path := self.folder / f"{name}{'' if number == 1 else f'-{number}'}.json").exists():
            number += 1  # the same step, after a roll-back
        with atomic_file(path) as file:
            file.write((json.dumps(_plain({**own, **extra}), indent=1, allow_nan=False) + "\n").encode())
        return path

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly: plain values and tensors. Ids are those of this rank. Waits for the last step."""
        record = self._record
        return {
            "rollbacks": self.rollbacks,
            "sound_step": self.sound_step,
            "lowest": self._lowest,
            "best": self._best,
            "norms": self._norms,
            "num_accepted": self._num_accepted,
            "recent": [{**asdict(incident), "ids": list(incident.ids)} for incident in self._recent],
            "record": None if record is None else {"step": record.step, "ids": list(record.ids), "values": record.arrived().clone()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, except that roll-backs never become fewer: the state may be that of the checkpoint to which
        training is rolled back.

        Raises:
            ValueError: keys are missing or unknown.
        """
        expected = {"rollbacks", "sound_step", "lowest", "best", "norms", "num_accepted", "recent", "record"}
        if set(state) | {"sound_step"} != expected:  # the first checkpoints of this format do not know it
            raise ValueError(f"Guard.load_state_dict: keys are {sorted(state)}, allowed are exactly {sorted(expected)}")
        self.rollbacks = max(self.rollbacks, state["rollbacks"])
        self.sound_step = state.get("sound_step")
        self._lowest, self._best = state["lowest"], state["best"]
        self._norms = state["norms"].to(self._norms, copy=True)
        self._num_accepted = state["num_accepted"].to(self._num_accepted, copy=True)
        self._recent = [Incident(**{**incident, "ids": tuple(incident["ids"])}) for incident in state["recent"]]
        record = state["record"]
        self._record = None if record is None else _Record(record["step"], tuple(record["ids"]), record["values"].cpu().clone())
        self._judged = None

    def ids(self) -> dict[int, list[str]]:
        """This rank's utterances in the steps that the state tells of, by step: all of the state that differs between ranks."""
        found = {incident.step: list(incident.ids) for incident in self._recent}
        return found if self._record is None else {**found, self._record.step: list(self._record.ids)}

    def load_ids(self, ids: Mapping[int, Sequence[str]]) -> None:
        """Put back what `ids` gave, after a state of another rank was loaded; steps that are missing have none."""
        self._recent = [replace(incident, ids=tuple(ids.get(incident.step, ()))) for incident in self._recent]
        if self._record is not None:
            self._record = replace(self._record, ids=tuple(ids.get(self._record.step, ())))

    def _forget(self) -> None:
        self._norms = torch.full((_WINDOW,), math.nan, device=self._device)
        self._num_accepted = torch.zeros((), dtype=torch.int64, device=self._device)
        self._judged = self._record = None
        self._recent = []

    def _median(self) -> Tensor:
        """The lower median of the remembered norms, NaN where there is none."""
        middle = (self._num_accepted.clamp(1, _WINDOW) - 1) // 2
        return self._norms.sort().values.gather(0, middle.view(1)).view(())  # torch.nanmedian would wait for the device; NaN sorts last

    def _examine(self, record: _Record | None) -> Verdict:
        if record is None:
            return Verdict()
        kind, loss, norm, median = record.arrived().tolist()
        if kind == 0 or (self._overflows and _KINDS[int(kind) - 1] == "non_finite_gradient"):
            return Verdict()
        incident = Incident(record.step, _KINDS[int(kind) - 1], record.ids, loss, norm, median)
        self._recent = [earlier for earlier in self._recent if earlier.step > incident.step - _WINDOW] + [incident]
        return Verdict(self._remedy() if len(self._recent) >= self.config.max_skipped else "continue", (incident,))

    def _remedy(self) -> Literal["roll_back", "stop"]:
        return "roll_back" if self.rollbacks < self.config.max_rollbacks else "stop"


def _start_copy(step: int, ids: tuple[str, ...], values: Tensor) -> _Record:
    """Copy `values` to the host, on CUDA without waiting."""
    if not values.is_cuda:
        return _Record(step, ids, values.cpu())
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(values.device))
    return _Record(step, ids, host, event)


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite become their names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
