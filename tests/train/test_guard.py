from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k2ssl.batch import LossOutput
from k2ssl.optim.build import OptimConfig, build_optimizer
from k2ssl.train.guard import Guard, GuardConfig, Incident, Verdict
from k2ssl.train.inf_check import find_nonfinite

DROPPING = "non_finite_loss", "non_finite_gradient", "exploded_gradient"


class Toy(nn.Module):
    """Predicts the mean of its audio."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frontend = nn.Linear(8, 6)
        self.head = nn.Linear(6, 1)

    def forward(self, audio: Tensor) -> LossOutput:
        error = self.head(self.frontend(audio).tanh()).squeeze(1) - audio.mean(dim=1)
        return LossOutput(error.square().sum(), torch.tensor(len(audio)))


def audio_of(step: int, rank: int = 0) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1000 * rank + step))


@dataclass
class Run:
    """A training loop as small as can be, and what the guard said in it."""

    guard: Guard
    optimizer_name: Any = "scaled_adam"
    rank: int = 0
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = Toy()
        self.optimizer = build_optimizer(OptimConfig(name=self.optimizer_name, lr=0.02), self.model)

    def step(self, step: int, fault: Callable[[Tensor], Tensor] | None = None, gradient_factor: float = 1.0) -> Verdict:
        audio = audio_of(step, self.rank)
        self.optimizer.zero_grad()
        loss = self.model(audio if fault is None else fault(audio)).loss
        loss.backward()
        grads = [param.grad for param in self.model.parameters()]
        torch._foreach_mul_(grads, gradient_factor)
        accept = self.guard.judge(loss.detach(), nn.utils.get_total_norm(grads))
        self.optimizer.found_inf = (~accept).float()
        self.optimizer.step()
        self.losses[step] = loss.item()
        self.verdicts[step] = self.guard.poll(step, [f"cut-{step}-{row}" for row in range(4)])
        return self.verdicts[step]

    def steps(self, steps: Sequence[int], **options: Any) -> list[str]:
        return [self.step(step, **options).action for step in steps]


def poison(audio: Tensor) -> Tensor:
    audio = audio.clone()
    audio[2, 3] = math.inf
    return audio


def make(folder: Path | None = None, **options: Any) -> Guard:
    return Guard(GuardConfig(**options), folder, "cpu")


def feed(guard: Guard, norms: Sequence[float], losses: Sequence[float] | None = None, start: int = 0) -> list[Verdict]:
    """Verdicts of so many steps, each with what is known of the step before; the last one's is fetched with `flush`."""
    losses = [1.0] * len(norms) if losses is None else losses
    verdicts = []
    for step, (norm, loss) in enumerate(zip(norms, losses, strict=True), start):
        guard.judge(torch.tensor(loss), torch.tensor(norm))
        verdicts.append(guard.poll(step, [f"cut-{step}"]))
    return [*verdicts[1:], guard.flush()]


def kinds(verdicts: Sequence[Verdict]) -> dict[int, str]:
    return {incident.step: incident.kind for verdict in verdicts for incident in verdict.incidents}


@pytest.mark.parametrize("name", ["scaled_adam", "adamw"])
def test_a_poisoned_batch_is_dropped_and_leaves_one_file(tmp_path: Path, name: str) -> None:
    run = Run(make(tmp_path), name)
    run.steps(range(60))
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    found = find_nonfinite(run.model, lambda: run.model(poison(audio_of(60))).loss)
    run.step(60, poison)
    if name == "adamw":
        assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())
    assert run.verdicts[60] == Verdict()  # not known yet
    run.steps(range(61, 130))
    assert all(math.isfinite(loss) for step, loss in run.losses.items() if step != 60)
    assert sum(run.losses[step] for step in range(105, 130)) < 0.5 * sum(run.losses[step] for step in range(25))
    (incident,) = (incident for verdict in run.verdicts.values() for incident in verdict.incidents)
    assert run.verdicts[61] == Verdict("continue", (incident,))
    assert (incident.step, incident.kind) == (60, "non_finite_loss")
    path = run.guard.write_incident(incident, {"first_non_finite": found, "scores": (1.5, -math.inf)})
    assert path == tmp_path / "incidents" / "step-000000060-non_finite_loss-rank0.json"
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written["ids"] == ["cut-60-0", "cut-60-1", "cut-60-2", "cut-60-3"]
    assert written["first_non_finite"] == "input of the model" and written["scores"] == [1.5, "-inf"]
    assert written["rank"] == 0 and written["rollbacks"] == 0 and not math.isfinite(float(written["loss"]))
    assert written["median"] == incident.median > 0 and written["time"].endswith("+00:00")


def test_a_persistent_fault_rolls_back_and_then_stops() -> None:
    run = Run(make(max_skipped=3, max_rollbacks=2, lr_factor=0.5))
    run.steps(range(40))
    model = {key: value.clone() for key, value in run.model.state_dict().items()}
    step, factors = 40, []
    for _ in range(2):
        assert run.steps(range(step, step + 4), fault=poison) == ["continue"] * 3 + ["roll_back"]
        assert [incident.ids[0] for incident in run.guard.recent] == [f"cut-{number}-0" for number in range(step, step + 3)]
        run.model.load_state_dict(model)
        factors.append(run.guard.rolled_back(0))
        assert run.guard.recent == ()
        step += 4
    assert factors == [0.5, 0.25] and run.guard.lr_factor == 0.25
    assert run.steps(range(step, step + 4), fault=poison) == ["continue"] * 3 + ["stop"]


def test_dropped_steps_count_for_a_hundred_steps() -> None:
    def norms(second: int) -> list[float]:
        return [math.nan if step in (5, second) else 1.0 for step in range(120)]

    assert {verdict.action for verdict in feed(make(max_skipped=2), norms(105))} == {"continue"}
    verdicts = feed(make(max_skipped=2), norms(104))
    assert [step for step, verdict in enumerate(verdicts) if verdict.action == "roll_back"] == [104]


def test_what_is_wrong_is_told_apart() -> None:
    norms, losses = [1.0] * 20 + [math.inf, 1.0, 1e4, math.nan], [1.0] * 20 + [1.0, math.nan, 1.0, math.inf]
    guard = make()
    assert kinds(feed(guard, norms, losses)) == {20: DROPPING[1], 21: DROPPING[0], 22: DROPPING[2], 23: DROPPING[0]}
    assert guard.flush() == Verdict()  # told once


@pytest.mark.parametrize(("norm", "exploded"), [(2000.0, False), (2001.0, True)])
def test_a_norm_explodes_above_a_multiple_of_the_median(norm: float, exploded: bool) -> None:
    norms = [1.0] * 9 + [2.0] * 2 + [3.0] * 9
    verdicts = feed(make(), [*norms, norm])
    assert kinds(verdicts) == ({20: "exploded_gradient"} if exploded else {})
    if exploded:
        assert verdicts[20].incidents == (Incident(20, "exploded_gradient", ("cut-20",), 1.0, norm, 2.0),)


@pytest.mark.parametrize("num_bad", [0, 3])
def test_no_norm_explodes_before_twenty_were_accepted(num_bad: int) -> None:
    bad = [math.nan] * num_bad
    assert kinds(feed(make(), [*bad, *[1.0] * 19, 1e9])) == dict.fromkeys(range(num_bad), DROPPING[1])
    assert kinds(feed(make(), [*bad, *[1.0] * 20, 1e9]))[num_bad + 20] == "exploded_gradient"


def test_the_median_is_of_the_last_hundred_accepted_norms() -> None:
    norms = torch.rand(250, generator=torch.Generator().manual_seed(0)).tolist()
    norms[7::9] = [math.inf] * len(norms[7::9])
    norms[8::50] = [1e6] * len(norms[8::50])
    norms[8] = 0.5
    for step in range(110, 250, 10):  # a norm that was not accepted must not show in the median of the next step
        norms[step : step + 2] = [math.inf] * 2
    guard, accepted = make(max_skipped=100), []
    assert any(math.isinf(one) and math.isinf(two) for one, two in itertools.pairwise(norms))
    for verdict, norm in zip(feed(guard, norms), norms, strict=True):
        if verdict.incidents:
            expected = torch.tensor(accepted[-100:]).median().item() if accepted else math.nan
            assert verdict.incidents[0].median == expected and verdict.incidents[0].grad_norm == norm
        else:
            accepted.append(norm)
    assert len(accepted) > 150


def test_exploding_can_be_switched_off_and_zeros_are_no_measure() -> None:
    assert kinds(feed(make(explode_factor=0.0), [1.0] * 30 + [1e30])) == {}
    assert kinds(feed(make(), [0.0] * 30 + [1.0])) == {}


def test_a_roll_back_forgets_norms() -> None:
    guard = make()
    feed(guard, [1.0] * 30)
    guard.judge(torch.tensor(math.nan), torch.tensor(1.0))
    guard.poll(30, ["cut-30"])
    guard.rolled_back(0)
    assert guard.flush() == Verdict()
    assert kinds(feed(guard, [1e6] * 21 + [1.0, 1e10])) == {22: "exploded_gradient"}


def test_every_judgement_is_polled_once() -> None:
    guard = make()
    with pytest.raises(RuntimeError, match="no step was judged"):
        guard.poll(0, [])
    guard.judge(torch.tensor(1.0), torch.tensor(1.0))
    guard.poll(0, [])
    with pytest.raises(RuntimeError, match="no step was judged"):
        guard.poll(1, [])


def test_judging_reads_nothing_from_the_device() -> None:
    guard = Guard(GuardConfig(), None, "meta")
    accept = guard.judge(torch.ones((), device="meta"), torch.ones((), device="meta"))  # reading a meta tensor raises
    assert accept.dtype == torch.bool and accept.shape == ()


def test_a_collapsed_scale_rolls_back() -> None:
    guard = make(max_rollbacks=1)
    assert guard.check_log(100, loss_scale=1e-5) == guard.check_log(100) == Verdict()
    verdict = guard.check_log(200, loss_scale=9e-6)
    assert verdict == Verdict("roll_back", (Incident(200, "collapsed_scale", value=9e-6, limit=1e-5),))
    guard.rolled_back(0)
    assert guard.check_log(300, loss_scale=9e-6).action == "stop"
    assert make(min_scale=0.0).check_log(100, loss_scale=1e-30) == Verdict()


def actions(guard: Guard, perplexities: Sequence[float]) -> list[str]:
    return [guard.check_log(step, perplexity).action for step, perplexity in enumerate(perplexities)]


def test_collapsed_codes_roll_back() -> None:
    guard = make(max_rollbacks=1)
    assert actions(guard, [1.5, 8.0, 40.0, 30.0, math.nan, math.inf, 4.1]) == ["continue"] * 7
    verdict = guard.check_log(100, 3.9)
    assert verdict == Verdict("roll_back", (Incident(100, "collapsed_codes", value=3.9, limit=4.0),))
    guard.rolled_back(0)
    assert actions(guard, [50.0, 4.9]) == ["continue", "stop"]  # the best so far survives a roll-back
    assert set(actions(make(min_perplexity_share=0.0), [1.0, 100.0, 1.0])) == {"continue"}


def test_few_codes_that_were_always_few_have_not_collapsed() -> None:
    assert set(actions(make(min_perplexity_share=0.5), [1.0, 3.9, 1.0])) == {"continue"}
    assert actions(make(min_perplexity_share=0.5), [1.0, 4.0, 1.9])[-1] == "roll_back"


def test_what_an_untrained_model_seems_to_use_is_no_measure() -> None:
    assert set(actions(make(), [90.0, 5.0, 1.1, 1.5, 2.0])) == {"continue"}
    assert actions(make(), [90.0, 1.1, 20.0, 1.1])[-1] == "roll_back"


@pytest.mark.parametrize("stop", [3, 24, 41, 44, 130])
def test_a_saved_guard_continues_equally(stop: int) -> None:
    def inputs(step: int) -> tuple[Tensor, Tensor]:
        norm = math.nan if step in (2, 23, 40, 42, 43) else 1e5 if step == 60 else 1.0 + step
        return torch.tensor(1.0 / (1 + step)), torch.tensor(norm)

    def drive(guard: Guard, steps: range) -> list[tuple[Verdict, Verdict]]:
        verdicts = []
        for step in steps:
            guard.judge(*inputs(step))
            verdicts.append((guard.poll(step, [f"cut-{step}"]), guard.check_log(step, 5.0 + step % 90)))
        return verdicts

    options = {"max_skipped": 3, "explode_factor": 900.0, "min_perplexity_share": 0.06}
    one, two = make(**options), make(**options)
    drive(one, range(stop))
    one.rollbacks = 1
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    two.load_state_dict(torch.load(buffer, weights_only=True))
    assert str(two.recent) == str(one.recent) and two.lr_factor == 0.5  # as text, where NaN equals NaN
    assert two.sound_step == one.sound_step == (stop - 1 if stop else None)
    straight, resumed = drive(one, range(stop, 200)), drive(two, range(stop, 200))
    assert str(straight) == str(resumed) and str(one.flush()) == str(two.flush())
    assert {log.action for _, log in straight} == {"continue", "roll_back"}
    assert str(one.state_dict()) == str(two.state_dict())


def test_only_the_ids_of_a_state_are_a_ranks_own() -> None:
    ranks = [make(max_skipped=9), make(max_skipped=9)]
    for number, guard in enumerate(ranks):
        for step, norm in ((3, math.nan), (4, 1.0), (5, math.nan)):
            guard.judge(torch.tensor(1.0), torch.tensor(norm))
            guard.poll(step, [f"{number}-{step}"])
    assert ranks[1].ids() == {3: ["1-3"], 5: ["1-5"]}  # step 5 is not looked at yet
    resumed = make(max_skipped=9)
    resumed.load_state_dict(ranks[0].state_dict())
    resumed.load_ids(ranks[1].ids())
    assert str(resumed.state_dict()) == str(ranks[1].state_dict())
    assert resumed.flush().incidents[0].ids == ("1-5",) and resumed.recent[0].ids == ("1-3",)
    resumed.load_ids({})
    assert [incident.ids for incident in resumed.recent] == [(), ()] and resumed.ids() == {3: [], 5: []}


def test_a_loaded_state_is_a_copy() -> None:
    one, two = make(), make()
    feed(one, [1.0] * 30)
    state = one.state_dict()
    two.load_state_dict(state)
    state["norms"].fill_(7.0)
    assert feed(two, [math.nan])[0].incidents[0].median == 1.0


def test_a_state_from_before_sound_steps_were_kept_is_taken() -> None:
    guard, state = make(), make().state_dict()
    guard.check_log(10, 5.0)
    assert guard.sound_step == 10
    del state["sound_step"]
    guard.load_state_dict(state)
    assert guard.sound_step is None


def test_going_back_to_a_checkpoint_does_not_forget_the_roll_back() -> None:
    guard = make(max_skipped=1, max_rollbacks=1)
    checkpoint = guard.state_dict()
    assert feed(guard, [math.nan])[0].action == "roll_back"
    guard.rolled_back(0)
    guard.load_state_dict(checkpoint)
    assert feed(guard, [math.nan])[0].action == "stop"


def test_a_state_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keys are \['rollbacks'\]"):
        make().load_state_dict({"rollbacks": 1})


def test_incident_files_are_never_overwritten(tmp_path: Path) -> None:
    guard, incident = make(tmp_path), Incident(7, "non_finite_loss")
    paths = [guard.write_incident(incident, {"attempt": attempt}) for attempt in range(3)]
    assert [path.name for path in paths] == [f"step-000000007-non_finite_loss-rank0{end}.json" for end in ("", "-2", "-3")]
    assert [json.loads(path.read_text())["attempt"] for path in paths] == [0, 1, 2]
    assert make(None).write_incident(incident, {}) is None
    with pytest.raises(ValueError, match=r"extra has \['step'\]"):
        guard.write_incident(incident, {"step": 8})
    assert len(list((tmp_path / "incidents").iterdir())) == 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("max_skipped", 0), ("max_skipped", 101), ("explode_factor", 1.0), ("explode_factor", math.inf), ("explode_factor", -1.0)),
        *(("max_rollbacks", -1), ("lr_factor", 0.0), ("lr_factor", 1.1), ("min_scale", -1e-9), ("min_scale", math.nan)),
        *(("min_perplexity_share", -0.1), ("min_perplexity_share", 1.0)),
    ],
)
def test_limits_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"GuardConfig: {option} is {value}, .* is needed"):
        GuardConfig(**{option: value})


def test_the_limits_round_trip_through_plain_values() -> None:
    from k2ssl.structure import from_dict

    config = GuardConfig(max_skipped=7, lr_factor=0.25)
    assert from_dict(GuardConfig, asdict(config)) == config
