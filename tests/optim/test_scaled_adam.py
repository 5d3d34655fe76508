from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from k2ssl.optim.scaled_adam import ScaledAdam

SHAPES = {"w": (3, 4), "u": (3, 4), "bias": (3,), "s": (), "one": (1,), "conv": (2, 3, 2), "v": (3, 4), "tiny": (5,)}


def naive_scaled_adam(
    params: dict[str, np.ndarray], grads: Callable[[int, dict], dict], steps: int, lr: float, clipping: float | None
) -> dict[str, np.ndarray]:
    """The update rule in float64, one tensor after the other; written from its description only."""
    p = {n: x.astype(np.float64) for n, x in params.items()}
    m, v, sv, history = dict.fromkeys(p, 0.0), dict.fromkeys(p, 0.0), dict.fromkeys(p, 0.0), []
    rms, collected, limit = {n: math.sqrt(np.mean(x**2)) for n, x in p.items()}, {n: [0.0] * 4 for n in p}, math.inf
    for t in range(steps):
        g = grads(t, p)
        history.append(math.sqrt(sum(np.sum((g[n] * (rms[n] if g[n].size > 1 else 0.1)) ** 2) for n in p)))
        if clipping and (t in (10, 20, 40) or (t and t % 100 == 0)):
            recent = sorted(history[1:][-100:])
            limit = clipping * recent[len(recent) // 4 * 2] * (2 if t < 100 else 1)
        for n in p:
            grad = g[n] * (min(1.0, limit / history[-1]) if t else 1.0)
            v[n] = 0.98 * v[n] + 0.02 * grad**2
            correction = 1 - 0.98 ** (t + 1)
            step = -lr * grad / (np.sqrt(v[n] / (correction if correction < 0.99 else 1.0)) + 1e-8)
            collected[n][t % 4] = np.sum(p[n] * grad)
            rms[n] = math.sqrt(np.mean(p[n] ** 2)) if t % 4 == 3 else rms[n]
            step = step * (max(rms[n], 1e-5) if p[n].size > 1 else 0.1)
            if t % 4 == 3 and p[n].size > 1:
                sv[n] = 0.98**4 * sv[n] + (1 - 0.98**4) * np.mean(np.square(collected[n]))
                size = -0.1 * lr * math.sqrt(1 - 0.98 ** (t + 1)) * sum(collected[n]) / (math.sqrt(sv[n]) + 1e-8)
                step = step + p[n] * (0.0 if rms[n] < 1e-5 else min(max(size, -0.1), 0.1, (3 - rms[n]) / rms[n]))
            m[n] = 0.9 * m[n] + 0.1 * step
            p[n] = p[n] + m[n] if p[n].size > 1 else np.clip(p[n] + m[n], -10, 10)
    return p


def make_params(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    start = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    start["tiny"] *= 1e-6  # below param_min_rms
    return {name: torch.nn.Parameter(value.to(dtype)) for name, value in start.items()}


def toy_gradient(name: str, t: int, value: np.ndarray) -> np.ndarray:
    """Gradient of a quadratic with its minimum elsewhere, noisy, and now and then far too large."""
    noise = np.random.default_rng([t, *name.encode()]).standard_normal(value.shape)
    return (value - 0.3 + noise) * (100.0 if t % 17 == 13 else 1.0)


def set_gradients(params: dict[str, torch.nn.Parameter], t: int) -> None:
    for name, param in params.items():
        gradient = np.asarray(toy_gradient(name, t, param.detach().double().numpy()))
        param.grad = torch.from_numpy(gradient.reshape(param.shape)).to(param.dtype)


def train(params: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        set_gradients(params, t)
        optimizer.step()


def values(params: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in params.items()}


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_parameters_follow_the_recorded_ones(golden, agreement) -> None:
    recorded = golden("scaled_adam")
    names = [key.removeprefix("init.") for key in recorded if key.startswith("init.")]
    params = {name: torch.nn.Parameter(recorded[f"init.{name}"].clone()) for name in names}
    optimizer = ScaledAdam(params.items(), lr=0.045, clipping_scale=2.0)
    marks = recorded["marks"].tolist()
    for t in range(marks[-1] + 1):
        for name, param in params.items():
            param.grad = recorded[f"grads.{name}"][t].clone()
        optimizer.step()
        if t in marks:
            for name, param in params.items():
                agreement.relative("scaled_adam parameters, worst tensor and step", param, recorded[f"params.{name}"][marks.index(t)], 1e-5)
    assert optimizer.clipping_report()["clipped"] == 43  # as in a float64 loop over the same gradients


@pytest.mark.parametrize("clipping", [None, 1.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_steps_agree_with_an_independent_loop(clipping: float | None, dtype: torch.dtype, tolerance: float) -> None:
    params = make_params(dtype)
    start = {name: param.detach().double().numpy().copy() for name, param in params.items()}

    def grads(t: int, p: dict) -> dict:
        return {n: toy_gradient(n, t, x) for n, x in p.items()}

    expected = naive_scaled_adam(start, grads, 250, 0.05, clipping)
    train(params, ScaledAdam(params.items(), lr=0.05, clipping_scale=clipping), range(250))
    for name, param in params.items():
        error = np.abs(param.detach().double().numpy() - expected[name]).max() / np.abs(expected[name]).max()
        assert error < tolerance, (name, error)


def test_gradients_are_left_as_they_are() -> None:
    params = make_params()
    optimizer = ScaledAdam(params.items(), clipping_scale=0.1)
    train(params, optimizer, range(30))
    set_gradients(params, 30)
    before = {name: param.grad.clone() for name, param in params.items()}
    optimizer.step()
    assert_equal(before, {name: param.grad for name, param in params.items()})


def test_order_of_parameters_changes_nothing() -> None:
    params, others = make_params(torch.float32), make_params(torch.float32)
    first = ScaledAdam(params.items(), clipping_scale=1.5)
    second = ScaledAdam(reversed(list(others.items())), clipping_scale=1.5)
    train(params, first, range(60))
    train(others, second, range(60))
    assert_equal(values(params), values(others))
    one, two = first.state_dict(), second.state_dict()
    assert list(one["state"]) == list(two["state"])
    assert one["param_groups"][0]["params"] == two["param_groups"][0]["params"]
    for name in params:
        assert_equal(one["state"][name], two["state"][name])


@pytest.mark.parametrize("stop", [1, 15, 41, 130])
def test_state_reloaded_in_another_order_continues_equally(stop: int) -> None:
    params = make_params(torch.float32)
    optimizer = ScaledAdam(params.items(), lr=0.02, clipping_scale=1.5)
    train(params, optimizer, range(stop))
    others = {name: torch.nn.Parameter(value) for name, value in values(params).items()}
    resumed = ScaledAdam(reversed(list(others.items())), lr=1.0)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert resumed.param_groups[0]["lr"] == 0.02 and resumed.param_groups[0]["clipping_scale"] == 1.5
    train(params, optimizer, range(stop, stop + 70))
    train(others, resumed, range(stop, stop + 70))
    assert_equal(values(params), values(others))
    assert optimizer.clipping_report() | {"groups": 0} == resumed.clipping_report() | {"groups": 0}


def test_a_loaded_state_shares_no_memory_with_its_source() -> None:
    params = make_params()
    optimizer = ScaledAdam(params.items(), clipping_scale=1.5)
    train(params, optimizer, range(30))
    others = {name: torch.nn.Parameter(value) for name, value in values(params).items()}
    resumed = ScaledAdam(others.items())
    resumed.load_state_dict(optimizer.state_dict())
    norms = optimizer.state_dict()["param_groups"][0]["clipping"]["norms"].clone()
    train(others, resumed, range(30, 60))
    assert torch.equal(norms, optimizer.state_dict()["param_groups"][0]["clipping"]["norms"])
    train(params, optimizer, range(30, 60))
    assert_equal(values(params), values(others))


def test_state_grouped_otherwise_continues_equally_without_clipping() -> None:
    params = make_params()
    optimizer = ScaledAdam(params.items(), lr=0.02)
    train(params, optimizer, range(26))
    others = {name: torch.nn.Parameter(value) for name, value in values(params).items()}
    pairs = list(others.items())
    resumed = ScaledAdam([{"params": pairs[:2]}, {"params": pairs[2:]}], lr=0.02)
    with pytest.warns(UserWarning, match="grouped otherwise"):
        resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(params, optimizer, range(26, 60))
    train(others, resumed, range(26, 60))
    for name in params:
        torch.testing.assert_close(params[name], others[name], rtol=1e-13, atol=0)


def test_several_groups_are_reloaded_whatever_their_order() -> None:
    params = make_params()
    pairs = list(params.items())
    optimizer = ScaledAdam([{"params": pairs[:3], "lr": 0.01}, {"params": pairs[3:], "lr": 0.05}], clipping_scale=2.0)
    train(params, optimizer, range(50))
    others = {name: torch.nn.Parameter(value) for name, value in values(params).items()}
    pairs = list(others.items())
    resumed = ScaledAdam([{"params": pairs[3:]}, {"params": pairs[:3]}])
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert [group["lr"] for group in resumed.param_groups] == [0.05, 0.01]
    train(params, optimizer, range(50, 90))
    train(others, resumed, range(50, 90))
    assert_equal(values(params), values(others))


def test_state_saved_before_the_first_step_loads() -> None:
    params, others = make_params(), make_params()
    resumed = ScaledAdam(others.items())
    resumed.load_state_dict(saved_and_loaded(ScaledAdam(params.items(), lr=0.02).state_dict()))
    train(params, ScaledAdam(params.items(), lr=0.02), range(10))
    train(others, resumed, range(10))
    assert_equal(values(params), values(others))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_a_copy_continues_like_the_original(copied: Callable[[Any], Any]) -> None:
    params = make_params()
    optimizer = ScaledAdam(params.items(), clipping_scale=1.5)
    train(params, optimizer, range(21))
    params_copy, optimizer_copy = copied((params, optimizer))
    train(params, optimizer, range(21, 50))
    train(params_copy, optimizer_copy, range(21, 50))
    assert_equal(values(params), values(params_copy))


def test_loading_names_what_does_not_fit() -> None:
    params = make_params()
    optimizer = ScaledAdam(params.items())
    train(params, optimizer, range(2))
    state = optimizer.state_dict()
    renamed = {("new" if name == "w" else name): param for name, param in make_params().items()}
    with pytest.raises(ValueError, match=r"missing from the saved state: \['new'\]; unknown ones in it: \['w'\]"):
        ScaledAdam(renamed.items()).load_state_dict(state)
    reshaped = make_params() | {"bias": torch.nn.Parameter(torch.ones(7))}
    with pytest.raises(ValueError, match=r"bias is \(7,\), saved \(3,\)"):
        ScaledAdam([("w", reshaped["w"]), *[(n, p) for n, p in reshaped.items() if n != "w"]]).load_state_dict(state)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("clipping", [None, 2.0])
@pytest.mark.parametrize("when", [0, 3, 25])
def test_a_step_that_is_not_finite_acts_like_zero_gradients(poison: float, clipping: float | None, when: int) -> None:
    params, others = make_params(), make_params()
    optimizer, expected = ScaledAdam(params.items(), clipping_scale=clipping), ScaledAdam(others.items(), clipping_scale=clipping)
    train(params, optimizer, range(when))
    train(others, expected, range(when))
    set_gradients(params, when)
    params["u"].grad[1, 2] = poison
    for param in others.values():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    expected.step()
    assert_equal(values(params), values(others))
    name, share = optimizer.clipping_report()["groups"][0]["dominating"][0]
    assert name == "u" and math.isnan(share)
    train(params, optimizer, range(when + 1, when + 5))
    train(others, expected, range(when + 1, when + 5))
    assert_equal(values(params), values(others))
    assert optimizer.clipping_report()["non_finite"] == 1 and expected.clipping_report()["non_finite"] == 0


@pytest.mark.parametrize("clipping", [None, 2.0])
@pytest.mark.parametrize("when", [0, 3, 25])
@pytest.mark.parametrize("gradient", [1.0, 1e6, float("nan")])
def test_a_step_dropped_on_request_acts_like_one_that_is_not_finite(clipping: float | None, when: int, gradient: float) -> None:
    params, others = make_params(), make_params()
    optimizer, expected = ScaledAdam(params.items(), clipping_scale=clipping), ScaledAdam(others.items(), clipping_scale=clipping)
    for t in range(130):  # past the renewal of the threshold at step 100
        set_gradients(params, t)
        set_gradients(others, t)
        optimizer.found_inf = torch.tensor(float(t == when))
        if t == when:
            for param, other in zip(params.values(), others.values(), strict=True):
                param.grad.fill_(gradient)
                other.grad.fill_(float("inf"))
        optimizer.step()
        expected.step()
    assert_equal(values(params), values(others))
    one, two = optimizer.clipping_report(), expected.clipping_report()
    assert one["non_finite"] == two["non_finite"] == 1 and one["clipped"] == two["clipped"]
    assert str(saved_and_loaded(optimizer.state_dict())) == str(saved_and_loaded(expected.state_dict()))


def test_a_request_drops_the_step_in_every_group() -> None:
    params, others = make_params(), make_params()
    optimizer = ScaledAdam([{"params": list(params.items())[:3]}, {"params": list(params.items())[3:]}])
    expected = ScaledAdam([{"params": list(others.items())[:3]}, {"params": list(others.items())[3:]}])
    train(params, optimizer, range(5))
    train(others, expected, range(5))
    set_gradients(params, 5)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for param in others.values():
        param.grad = torch.zeros_like(param)
    expected.step()
    assert_equal(values(params), values(others))
    assert "found_inf" not in str(optimizer.state_dict())


@pytest.mark.parametrize("found_inf", [None, 0.0])
def test_no_request_changes_no_bit(found_inf: float | None) -> None:
    params, others = make_params(torch.float32), make_params(torch.float32)
    optimizer = ScaledAdam(params.items(), clipping_scale=1.5)
    optimizer.found_inf = None if found_inf is None else torch.tensor(found_inf)
    train(params, optimizer, range(130))
    train(others, ScaledAdam(others.items(), clipping_scale=1.5), range(130))
    assert_equal(values(params), values(others))


def test_a_request_is_not_read_by_the_host() -> None:
    reads = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            reads.append(function is torch.ops.aten._local_scalar_dense.default)
            return function(*args, **(kwargs or {}))

    params = make_params()
    optimizer = ScaledAdam(params.items(), clipping_scale=1.5)
    optimizer.found_inf = torch.tensor(1.0)
    for t in range(12):
        set_gradients(params, t)
        with Watch():
            optimizer.step()
    assert len(reads) > 100 and not any(reads)
    with Watch():
        assert optimizer.found_inf.item() == 1.0 and reads[-1]


def test_report_counts_clipped_steps_and_names_the_culprit() -> None:
    params = make_params()
    optimizer = ScaledAdam(params.items(), clipping_scale=2.0)
    for t in range(30):
        for param in params.values():
            param.grad = torch.ones_like(param)
        if t == 25:
            params["conv"].grad *= 1000.0
        optimizer.step()
    (group,) = optimizer.clipping_report()["groups"]
    assert (group["steps"], group["clipped"], group["non_finite"]) == (30, 1, 0)
    assert group["dominating"][0][0] == "conv" and group["dominating"][0][1] > 0.99
    assert math.isclose(group["threshold"], 4.0 * group["median_norm"], rel_tol=0.2)  # early thresholds are doubled


def test_parameters_without_gradient_rest_and_then_go_on_alone() -> None:
    params, others = make_params(), make_params()
    optimizer = ScaledAdam(params.items())
    train(params, optimizer, range(8))
    before = copy.deepcopy(values(params)), copy.deepcopy(optimizer.state_dict()["state"])
    for t in range(8, 12):  # with a size update at the end
        set_gradients(params, t)
        for name in ("w", "bias", "s"):
            params[name].grad = None
        optimizer.step()
    assert_equal({n: before[0][n] for n in ("w", "bias", "s")}, {n: values(params)[n] for n in ("w", "bias", "s")})
    for name in ("w", "bias", "s"):
        kept = before[1][name].keys() - {"scale_grads"}
        after = optimizer.state_dict()["state"][name]
        assert_equal({key: before[1][name][key] for key in kept}, {key: after[key] for key in kept})
    expected = ScaledAdam(others.items())
    train(others, expected, range(12))
    assert_equal({n: values(others)[n] for n in ("u", "one", "v")}, {n: values(params)[n] for n in ("u", "one", "v")})


def test_a_parameter_that_joins_later_gets_its_own_bias_correction() -> None:
    params, fresh = make_params(), make_params()
    optimizer = ScaledAdam(params.items(), lr=0.01)
    for t in range(40):
        set_gradients(params, t)
        params["w"].grad = params["s"].grad = None
        optimizer.step()
    set_gradients(params, 40)
    optimizer.step()
    alone = ScaledAdam([(name, fresh[name]) for name in ("w", "s")], lr=0.01)
    set_gradients(fresh, 40)
    alone.step()
    for name in ("w", "s"):
        torch.testing.assert_close(params[name], fresh[name], rtol=1e-12, atol=0)


def test_frozen_groups_do_not_take_part() -> None:
    params = make_params()
    pairs = list(params.items())
    optimizer = ScaledAdam([{"params": pairs[:3]}, {"params": pairs[3:]}], clipping_scale=2.0)
    before = values(params)
    for t in range(5):
        set_gradients(params, t)
        for _, param in pairs[:3]:
            param.grad = None
        optimizer.step()
    assert_equal({name: before[name] for name, _ in pairs[:3]}, {name: param.detach() for name, param in pairs[:3]})
    assert len(optimizer.clipping_report()["groups"]) == 1


def test_limits_on_sizes_and_scalars_hold() -> None:
    params = {
        "big": torch.nn.Parameter(torch.full((4, 4), 2.9)),
        "zero": torch.nn.Parameter(torch.zeros(5)),
        "s": torch.nn.Parameter(torch.tensor(9.9)),
    }
    optimizer = ScaledAdam(params.items(), lr=0.1, scalar_lr_scale=0.5)
    for _ in range(100):
        params["big"].grad = -params["big"].detach()
        params["zero"].grad = torch.zeros(5)
        params["s"].grad = torch.tensor(-1.0)
        optimizer.step()
    assert params["s"].item() == 10.0
    assert torch.equal(params["zero"], torch.zeros(5))
    assert 2.9 < params["big"].square().mean().sqrt() < 60  # the size update stops, only the relative step goes on


def test_the_size_update_never_grows_past_the_limit() -> None:
    param = torch.nn.Parameter(torch.full((4, 4), 2.99))
    optimizer = ScaledAdam([("p", param)], lr=1e-6, scalar_lr_scale=1e4)
    for _ in range(200):
        param.grad = -param.detach()
        optimizer.step()
    assert 2.99 < param.square().mean().sqrt() < 3.05


def test_exchanged_parameter_data_is_what_gets_updated() -> None:
    params = make_params()
    optimizer = ScaledAdam(params.items())
    train(params, optimizer, range(3))
    params["w"].data = params["w"].data.clone() + 1.0
    before = params["w"].detach().clone()
    train(params, optimizer, range(3, 4))
    assert not torch.equal(before, params["w"])


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_steps_scale_with_the_parameters_and_not_with_the_gradients(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    grads = torch.randn(6, 4, 3, generator=generator, dtype=torch.float64)
    plain, scaled = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start * 0.01)
    options = {"eps": 1e-30, "param_min_rms": 1e-30, "param_max_rms": 1e30}
    one, two = ScaledAdam([("p", plain)], **options), ScaledAdam([("p", scaled)], **options)
    for grad in grads:
        plain.grad, scaled.grad = grad.clone(), grad * scale
        one.step()
        two.step()
    torch.testing.assert_close(plain * 0.01, scaled, rtol=1e-9, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(list(SHAPES)), missing=st.lists(st.sets(st.sampled_from(list(SHAPES))), min_size=12, max_size=12))
def test_any_order_and_any_missing_gradients_give_the_same_steps(order: list[str], missing: list[set[str]]) -> None:
    params, others = make_params(torch.float32), make_params(torch.float32)
    one = ScaledAdam(params.items(), clipping_scale=1.5)
    two = ScaledAdam([(name, others[name]) for name in order], clipping_scale=1.5)
    for t, absent in enumerate(missing):
        for each, optimizer in ((params, one), (others, two)):
            set_gradients(each, t)
            for name in absent:
                each[name].grad = None
            optimizer.step()
    assert_equal(values(params), values(others))
    assert all(torch.isfinite(param).all() for param in params.values())
