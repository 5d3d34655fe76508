"""Checkpoints that are whole or absent, in folders that stay small."""

from __future__ import annotations

import logging
import math
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from k2ssl.nn.schedule import Clock
from k2ssl.optim.scaled_adam import ScaledAdam
from k2ssl.train import checkpoint as module
from k2ssl.train.checkpoint import CheckpointFolder, DamagedError, KeepConfig, load_checkpoint, step_of

REPOSITORY = Path(__file__).parents[2]
ALL = KeepConfig(save_every=1, keep_last=100)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.pt"))


def equal(left: Any, right: Any) -> bool:
    """The same structure, types and bits."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, Mapping):
        return isinstance(right, Mapping) and list(left) == list(right) and all(equal(value, right[key]) for key, value in left.items())
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(equal, left, right))
    return type(left) is type(right) and (left == right or (left != left and right != right))


@pytest.fixture
def hold_writing(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Background writes stop before their first byte until the event is set, as it is at the end of the test."""
    go_on, write = threading.Event(), module.save_atomically

    def save(*arguments: Any) -> None:
        assert go_on.wait(30)
        write(*arguments)

    monkeypatch.setattr(module, "save_atomically", save)
    yield go_on
    go_on.set()


# --- what is in it -------------------------------------------------------------------------------------------------------------------------


def training_state() -> dict[str, Any]:
    """State of everything that a run has, after three steps."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizers = [ScaledAdam(model.named_parameters(), clipping_scale=2.0), torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9))]
    for _ in range(3):
        model(torch.randn(5, 3)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    clock = Clock(3)
    clock.generator(torch.device("cpu"))
    return {
        "config": {"width": 4, "rates": [0.1, math.inf, math.nan], "name": "x", "none": None, "yes": True, "pair": (1, 2.5)},
        "model": model.state_dict(),
        "optimizer": [optimizer.state_dict() for optimizer in optimizers],
        "clock": clock.state_dict(),
        "generators": {"torch": torch.get_rng_state(), "python": list(random.getstate()[1])},
        "types": [torch.randn(3).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.complex64)],
        "odd shapes": [torch.tensor(2.5), torch.zeros(0, 3), torch.arange(6).reshape(2, 3).T, torch.ones(1).expand(4)],
        "wide": {7: 2**80},
    }


@pytest.mark.parametrize("background", [False, True])
def test_everything_that_a_run_has_comes_back_bit_by_bit(tmp_path: Path, background: bool) -> None:
    content = training_state()
    folder = CheckpointFolder(tmp_path / "new" / "run", ALL, background=background)
    path = folder.save(1200, content)
    folder.wait()
    assert path.name == "step-000001200.pt" and step_of(path) == 1200
    loaded = load_checkpoint(path)
    assert {key: loaded.pop(key) for key in ("format", "version", "step")} == {"format": "k2ssl-checkpoint", "version": 1, "step": 1200}
    assert equal(loaded, {**content, "model": dict(content["model"])})
    assert isinstance(content["model"], OrderedDict)  # plain in the file, and only there


def test_the_loaded_state_is_one_that_optimizers_and_generators_take(tmp_path: Path) -> None:
    content = training_state()
    loaded = load_checkpoint(CheckpointFolder(tmp_path, ALL, background=False).save(3, content))
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model.load_state_dict(loaded["model"])
    for number, optimizer in enumerate((ScaledAdam(model.named_parameters()), torch.optim.AdamW(model.parameters()))):
        optimizer.load_state_dict(loaded["optimizer"][number])
        assert equal(optimizer.state_dict(), content["optimizer"][number])
    Clock().load_state_dict(loaded["clock"])
    torch.set_rng_state(loaded["generators"]["torch"])


def test_training_may_go_on_while_the_file_is_written(tmp_path: Path, hold_writing: threading.Event) -> None:
    model = nn.Linear(3, 3)
    content = {"model": model.state_dict(), "history": [1], "nested": {"a": {"b": 1}}}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folder = CheckpointFolder(tmp_path, ALL)
    path = folder.save(1, content)
    with torch.no_grad():
        model.weight.zero_()
    content["history"].append(2)
    content["nested"]["a"]["b"] = 2
    assert not path.exists() and folder.paths() == []  # save has returned before anything was written
    hold_writing.set()
    folder.wait()
    loaded = load_checkpoint(path)
    assert equal(loaded["model"], before) and loaded["history"] == [1] and loaded["nested"] == {"a": {"b": 1}}


def test_views_are_saved_without_what_they_do_not_show_and_shared_tensors_once(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, ALL, background=False)
    stack = torch.randn(100, 1000)
    views = folder.save(1, {"rows": [stack[i] for i in range(10)], "columns": [stack[:, i] for i in range(100)]})
    shared = nn.Linear(100, 1000)
    tied = folder.save(2, {"model": {"a": shared.weight, "b": shared.weight, "c": shared.weight.detach()}})
    assert views.stat().st_size < 1.5 * 4 * 20000  # the stack has 400 kB, and many views
    assert tied.stat().st_size < 1.1 * 4 * 100000
    assert equal(load_checkpoint(views)["rows"], list(stack[:10])) and equal(load_checkpoint(views)["columns"], list(stack.T[:100]))
    loaded = load_checkpoint(tied)["model"]
    assert all(torch.equal(value, shared.weight) for value in loaded.values())
    # the same place and size, seen otherwise, is another tensor
    square = torch.arange(4.0).reshape(2, 2)
    both = load_checkpoint(folder.save(3, {"x": [square, square.T, square.view(torch.int32), square.flatten(), square[0], square[1]]}))["x"]
    assert [value.tolist() for value in both[:2]] == [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]
    assert both[2].dtype == torch.int32 and both[3].shape == (4,) and both[5].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": {"b": [1, {2, 3}]}}, r"content\['a'\]\['b'\]\[1\]: is of type set"),
        ({"a": Path("x")}, r"content\['a'\]: is of type PosixPath"),
        ({"a": (np.float64(1.0),)}, r"content\['a'\]\[0\]: is of type float64"),
        ({"a": torch.Size([1])}, r"is of type Size"),
        ({"a": np.zeros(3)}, r"is of type ndarray"),
        ({"a": torch.zeros(2, device="meta")}, r"content\['a'\]: is of type Tensor; .*plain dense"),
        ({"a": torch.eye(2).to_sparse()}, r"content\['a'\]: is of type Tensor; .*plain dense"),
        ({"a": {(1, 2): 3}}, r"content\['a'\]: has the key \(1, 2\) of type tuple"),
        ({"step": 3}, r"content has the keys \['step'\]"),
    ],
)
def test_what_could_not_be_loaded_is_refused_by_its_keys(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    folder = CheckpointFolder(tmp_path, ALL)
    with pytest.raises(ValueError, match=message):
        folder.save(1, content)
    folder.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [-1, 1.0, True])
def test_a_step_is_a_whole_number(tmp_path: Path, step: Any) -> None:
    with pytest.raises(ValueError, match="step is"):
        CheckpointFolder(tmp_path, ALL).save(step, {})


def test_the_step_is_read_from_the_name_only_of_checkpoints(tmp_path: Path) -> None:
    assert step_of("a/step-12345678901.pt") == 12345678901
    for name in ("step-12.pt", "step-000000012.pt.part", ".step-000000012.pt", "model.pt", "xstep-000000012.pt"):
        with pytest.raises(ValueError, match="not the name of a checkpoint"):
            step_of(tmp_path / name)


def test_checkpoints_are_listed_by_step_and_other_files_are_not(tmp_path: Path) -> None:
    for name in ("step-1000000000.pt", "step-000000002.pt", "step-999999999.pt", "step-2.pt", "step-000000003.pt.bak", "model.pt"):
        (tmp_path / name).touch()
    folder = CheckpointFolder(tmp_path, ALL)
    assert [step_of(path) for path in folder.paths()] == [2, 999999999, 1000000000]


# --- failures ------------------------------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, *which: int) -> list[Path]:
    folder = CheckpointFolder(tmp_path, ALL, background=False)
    return [folder.save(step, {"model": {"w": torch.full((300,), float(step))}}) for step in which]


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_in_weights(path: Path) -> None:
    weight = torch.full((300,), float(step_of(path))).numpy().tobytes()
    flip(path, path.read_bytes().index(weight) + 601)


@pytest.mark.parametrize("damage", [cut, flip_in_weights, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 5000)])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    paths = saved(tmp_path, 1, 2, 3)
    folder = CheckpointFolder(tmp_path, KeepConfig(save_every=1, keep_last=2))
    assert folder.latest() == paths[2] and not caplog.records
    damage(paths[2])
    with pytest.raises(DamagedError, match=r"step-000000003\.pt: damaged"):
        load_checkpoint(paths[2])
    assert folder.latest() == paths[1]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "step-000000003.pt: damaged" in caplog.text and caplog.text.strip().endswith("passed over")
    # training goes on from step 2: the damaged one is in nobody's way, and goes when there is another
    assert steps(tmp_path) == [1, 2, 3]
    folder = CheckpointFolder(tmp_path, KeepConfig(save_every=1, keep_last=2))  # another than the one that was asked for the latest
    folder.save(2, {"again": True})
    folder.wait()
    assert steps(tmp_path) == [1, 2]
    assert folder.latest() == paths[1] and load_checkpoint(paths[1])["again"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    paths = saved(tmp_path, 1, 2)
    cut(paths[1])
    folder = CheckpointFolder(tmp_path, ALL)
    assert folder.latest() == paths[0]
    folder.save(2, {"again": True})
    assert folder.latest() == paths[1] and steps(tmp_path) == [1, 2]
    folder.save(3, {})
    folder.wait()
    assert steps(tmp_path) == [1, 2, 3]


def test_any_flipped_bit_is_either_found_or_changes_nothing(tmp_path: Path) -> None:
    content = {"model": {"w": torch.randn(40), "v": torch.arange(30)}, "config": {"width": 3, "rates": [0.5, 0.25]}}
    path = CheckpointFolder(tmp_path, ALL, background=False).save(1, content)
    whole = path.read_bytes()
    loaded, found = load_checkpoint(path), 0
    draw = random.Random(0)
    for position in range(0, len(whole), 3):
        flip(path, position, draw.randrange(8))
        try:
            assert equal(load_checkpoint(path), loaded), f"byte {position} of {len(whole)}"
        except ValueError:
            found += 1
        path.write_bytes(whole)
    assert found > 200


def test_to_begin_anew_where_all_checkpoints_are_damaged_would_be_no_resume(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "empty", ALL).latest() is None
    for path in saved(tmp_path, 1, 2):
        cut(path)
    with pytest.raises(ValueError, match="holds 2 checkpoints, all of them damaged"):
        CheckpointFolder(tmp_path, ALL).latest()


def test_files_that_are_whole_but_no_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)[0]
    for content, message in (
        ({"format": "k2ssl-model", "version": 1, "config": {}, "model": {}}, "not a training checkpoint: a model file"),
        ({"model": {}, "optimizer": 1}, "not a training checkpoint: it holds model, optimizer"),
        ({}, "it holds nothing"),
        ([1], "it holds list"),
        ({"format": "k2ssl-checkpoint", "version": 2}, "version is 2, this release reads version 1"),
        ({"format": "k2ssl-checkpoint", "version": 1, "x": np.float64(1.0)}, "holds other things than plain values"),
    ):
        torch.save(content, path)
        for read in (load_checkpoint, lambda _: CheckpointFolder(tmp_path, ALL).latest()):
            with pytest.raises(ValueError, match=message) as caught:
                read(path)
            assert str(path) in str(caught.value) and not isinstance(caught.value, DamagedError)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        load_checkpoint(tmp_path / "none.pt")


def test_what_is_written_is_read_back_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path, ALL)
    forget = module._forget_pages

    def decay(file: Any) -> None:
        forget(file)
        flip(Path(file.name), Path(file.name).read_bytes().index(torch.full((300,), 7.0).numpy().tobytes()))

    folder.save(1, {})
    folder.wait()
    monkeypatch.setattr(module, "_forget_pages", decay)
    folder.save(2, {"w": torch.full((300,), 7.0)})
    with pytest.raises(DamagedError, match="checksum"):
        folder.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.pt"]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[object]]:
    """A block in which nothing can be written."""

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "x.pt")

    @contextmanager
    def full() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(module, "save_atomically", fail)
            yield

    return full


def test_an_error_of_the_background_is_logged_at_once_and_raised_once_by_who_waits(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[object]], caplog: pytest.LogCaptureFixture
) -> None:
    folder = CheckpointFolder(tmp_path, ALL)
    with full_disk():
        folder.save(1, {})
        assert folder.latest() is None  # waits, and does not raise what concerns saving
    assert "step-000000001.pt was not written: [Errno 28]" in caplog.text
    with pytest.raises(OSError, match="No space left"):
        folder.wait()
    folder.wait()
    assert list(tmp_path.iterdir()) == []


def test_what_comes_after_a_checkpoint_that_could_not_be_written_is_tried_at_once(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[object]]
) -> None:
    folder = CheckpointFolder(tmp_path, ALL)
    with full_disk():
        folder.save(1, {})
        with pytest.raises(OSError, match="No space left"):
            folder.save(2, {})
        folder.save(3, {})
        assert folder.latest() is None
    assert folder.save(4, {}) == tmp_path / "step-000000004.pt"  # there is room again, and training goes on
    assert steps(tmp_path) == [4]
    folder.wait()
    folder.save(5, {})
    folder.wait()
    assert steps(tmp_path) == [4, 5]


def test_a_score_may_come_after_its_checkpoint(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, KeepConfig(keep_last=1, keep_best=1))
    for step, score in ((1, 3.0), (2, 2.0), (3, 2.5), (4, math.nan)):
        folder.save(step, {})
        assert not folder.has_score(step)
        folder.rate(step, score)
        assert folder.has_score(step)
    assert steps(tmp_path) == [2, 4]
    assert folder.told()[1].endswith("step-000000002.pt (2 in validation)")


def test_a_later_save_waits_for_the_one_before(tmp_path: Path, hold_writing: threading.Event) -> None:
    folder = CheckpointFolder(tmp_path, ALL)
    folder.save(1, {})
    second = threading.Thread(target=folder.save, args=(2, {}))
    second.start()
    time.sleep(0.1)
    assert second.is_alive() and steps(tmp_path) == []
    hold_writing.set()
    second.join(30)
    assert not second.is_alive() and 1 in steps(tmp_path)
    folder.wait()
    assert steps(tmp_path) == [1, 2]


def test_the_newest_includes_the_one_that_is_being_written(tmp_path: Path, hold_writing: threading.Event) -> None:
    folder = CheckpointFolder(tmp_path, ALL)
    path = folder.save(1, {})
    threading.Timer(0.1, hold_writing.set).start()
    assert folder.latest() == path


def run_child(script: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


_KILLED = """
import io, sys, time
from pathlib import Path
import torch
from k2ssl.train.checkpoint import CheckpointFolder, KeepConfig

folder = CheckpointFolder(Path(sys.argv[1]), KeepConfig(save_every=1, keep_last=1))
folder.save(1, {"w": torch.ones(1000)}, score=2.5)
folder.wait()
write = torch.save

def half(content, file):
    whole = io.BytesIO()
    write(content, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    print("half", flush=True)
    time.sleep(60)

torch.save = half
folder.save(2, {"w": torch.zeros(1000)}, score=1.5)
print("training goes on", flush=True)
folder.wait()
"""


def test_a_process_killed_while_it_writes_leaves_the_previous_checkpoint_and_the_next_to_write_cleans_up(tmp_path: Path) -> None:
    child = run_child(_KILLED, tmp_path)
    assert child.stdout is not None
    assert {child.stdout.readline(), child.stdout.readline()} == {"half\n", "training goes on\n"}
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=30)
    assert child.returncode == -signal.SIGKILL
    leftovers = list(tmp_path.glob(".*.part"))
    assert len(leftovers) == 1 and leftovers[0].stat().st_size > 1000 and steps(tmp_path) == [1]
    other = tmp_path / ".other.7.part"
    other.touch()
    folder = CheckpointFolder(tmp_path, KeepConfig(save_every=1, keep_last=2))
    latest = folder.latest()
    assert latest is not None and torch.equal(load_checkpoint(latest)["w"], torch.ones(1000))
    assert set(tmp_path.glob(".*.part")) == {other, *leftovers}  # who only looks may have company
    folder.save(2, {})
    folder.wait()
    assert list(tmp_path.glob(".*.part")) == [other]  # not ours


_DISK_FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from k2ssl.train.checkpoint import CheckpointFolder, KeepConfig

folder = CheckpointFolder(Path(sys.argv[1]), KeepConfig(save_every=1, keep_last=1))
folder.save(1, {"w": torch.ones(1000)})
folder.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
folder.save(2, {"w": torch.zeros(100000), "v": torch.zeros(100000)})
try:
    folder.wait()
except OSError as error:
    print(error)
folder.save(3, {"w": torch.zeros(10)})
folder.wait()
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs limits on the size of files")
@pytest.mark.parametrize("limit", [20_000, 450_000])
def test_a_full_disk_is_named_with_the_file_and_costs_only_that_checkpoint(tmp_path: Path, limit: int) -> None:
    child = run_child(_DISK_FULL, tmp_path, limit)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert "File too large" in out and "step-000000002.pt" in out
    assert "step-000000002.pt was not written" in err
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003.pt"]


def test_a_program_that_ends_waits_for_its_checkpoint(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
import torch
from k2ssl.train.checkpoint import CheckpointFolder, KeepConfig
write = torch.save
def slowly(*arguments):
    time.sleep(0.5)
    write(*arguments)
torch.save = slowly
CheckpointFolder(Path(sys.argv[1]), KeepConfig()).save(5, {"w": torch.ones(1000)})
print("last line", flush=True)
"""
    out, err = run_child(script, tmp_path).communicate(timeout=60)
    assert (out, err) == ("last line\n", "")
    assert load_checkpoint(tmp_path / "step-000000005.pt")["w"].sum() == 1000


def test_folders_that_cannot_be_written_to_are_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write into this folder"):
        CheckpointFolder(tmp_path / "file", ALL)
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(ValueError, match=r"scores\.json: cannot be read"):
        CheckpointFolder(tmp_path, ALL)


def test_ranks_other_than_0_open_a_folder_without_touching_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, 1)[0]
    being_written = tmp_path / ".step-000000002.pt.77.part"
    being_written.touch()
    monkeypatch.setattr("k2ssl.distributed.is_main", lambda: False)
    assert CheckpointFolder(tmp_path, ALL).latest() == path and being_written.exists()
    assert CheckpointFolder(tmp_path / "none", ALL).latest() is None and not (tmp_path / "none").exists()


# --- which are kept ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"save_every": 0}, "save_every is 0, allowed is a whole number >= 1"),
        ({"keep_last": 0}, "keep_last is 0, allowed is a whole number >= 1"),
        ({"keep_every": -1}, "keep_every is -1"),
        ({"keep_best": 1.5}, "keep_best is 1.5"),
        ({"save_every": 1000, "keep_every": 2500}, "keep_every is 2500, allowed is a multiple of save_every, which is 1000"),
    ],
)
def test_policies_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"KeepConfig: {message}"):
        KeepConfig(**change)


policies = st.builds(
    lambda save, last, every, best: KeepConfig(save, last, every * save, best),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 3),
)
saves = st.lists(st.tuples(st.integers(1, 4), st.none() | st.sampled_from([0.1, 0.2, 0.3, 0.4, math.nan, math.inf])), max_size=14)


@settings(max_examples=60, deadline=None)
@given(keep=policies, history=saves, restart=st.integers(0, 14))
def test_those_stay_that_the_policy_names_and_disk_use_stays_within_what_was_said(
    tmp_path_factory: pytest.TempPathFactory, keep: KeepConfig, history: list[tuple[int, float | None]], restart: int
) -> None:
    """Held against the policy read out over all saves there ever were; with irregular steps, as interruptions cause, and a restart."""
    path = tmp_path_factory.mktemp("run")
    folder = CheckpointFolder(path, keep, background=False)
    done: list[tuple[int, float | None]] = [(0, None)]
    folder.save(0, {})
    most = 1
    for number, (gap, score) in enumerate(history):
        if number == restart:
            folder = CheckpointFolder(path, keep, background=False)
        step = done[-1][0] + gap
        most = max(most, len(steps(path)) + 1)
        folder.save(step, {}, score)
        done.append((step, score))
        expected = {step for step, _ in done[-keep.keep_last :]}
        expected |= {step for step, _ in done if keep.keep_every and step and step % keep.keep_every == 0}
        best = sorted((score, step) for step, score in done if score is not None and math.isfinite(score))
        expected |= {step for _, step in best[: keep.keep_best]}
        assert set(steps(path)) == expected
    assert most * 10 <= folder.bytes_needed(10, done[-1][0])


def test_the_stated_disk_use_is_reached_and_never_exceeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = KeepConfig(save_every=3, keep_last=2, keep_every=6, keep_best=2)
    folder = CheckpointFolder(tmp_path, keep)
    used: list[int] = []
    check = module.check_records

    def look(path: Path) -> None:
        used.append(sum(file.stat().st_size for file in tmp_path.iterdir() if file.name != "scores.json"))
        check(path)

    monkeypatch.setattr(module, "check_records", look)
    # 7 and 8 are interruptions; 1 and 3 the best
    for step, score in ((1, 0.1), (3, 0.2), (6, 0.5), (9, 0.5), (12, 0.5), (13, 0.5), (14, 0.5), (15, 0.5)):
        path = folder.save(step, {"w": torch.zeros(1000)}, score)
    folder.wait()
    size = path.stat().st_size
    assert max(used) == 7 * size == folder.bytes_needed(size, 15)
    assert steps(tmp_path) == [1, 3, 6, 12, 14, 15]
    assert folder.bytes_needed(1, 12) == 6  # the one at step 12 is the one being written
    assert KeepConfig().keep_every == 0 and CheckpointFolder(tmp_path, KeepConfig()).bytes_needed(5, 10**6) == 20


def test_a_step_saved_again_without_a_score_keeps_the_one_it_had(tmp_path: Path) -> None:
    keep = KeepConfig(save_every=1, keep_last=1, keep_best=1)
    folder = CheckpointFolder(tmp_path, keep, background=False)
    folder.save(1, {}, 0.5)
    folder.save(1, {})
    folder.save(2, {}, 0.7)
    folder.save(3, {})
    assert steps(tmp_path) == [1, 3]
    folder.save(3, {}, 0.3)
    folder.save(4, {})
    assert steps(tmp_path) == [3, 4]
    folder.save(4, {}, 0.2)
    folder.save(4, {}, math.nan)
    folder.save(5, {})
    assert steps(tmp_path) == [5]


def test_a_score_goes_with_its_checkpoint(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, KeepConfig(save_every=1, keep_last=1, keep_best=1), background=False)
    for step, score in ((1, 0.5), (2, 0.1)):
        folder.save(step, {}, score)
    folder.drop_after(0)
    folder.save(2, {})
    folder.save(3, {}, 0.9)
    folder.save(4, {})
    assert steps(tmp_path) == [3, 4]


def test_the_best_are_known_before_they_are_written(tmp_path: Path, hold_writing: threading.Event) -> None:
    folder = CheckpointFolder(tmp_path, KeepConfig(save_every=1, keep_last=1, keep_best=2))
    assert folder.is_among_best(9.0) and not folder.is_among_best(math.nan) and not folder.is_among_best(math.inf)
    folder.save(1, {}, 0.5)
    hold_writing.set()
    assert folder.is_among_best(9.0)
    folder.save(2, {}, 0.7)
    assert folder.is_among_best(0.6) and not folder.is_among_best(0.7) and not folder.is_among_best(math.nan)
    folder.save(3, {})
    assert not folder.is_among_best(0.8)
    assert not CheckpointFolder(tmp_path, KeepConfig(save_every=1, keep_best=0)).is_among_best(0.1)


def test_what_was_opened_does_not_change_with_its_file_nor_the_file_with_it(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, KeepConfig(save_every=1, keep_last=1, keep_best=0), background=False)
    path = folder.save(1, {"w": torch.arange(5000.0), "v": torch.ones(5000)})
    opened = module.open_checkpoint(path)
    opened["v"].add_(1)
    assert load_checkpoint(path)["v"].sum() == 5000 and opened["v"].sum() == 10000
    folder.save(1, {"w": torch.zeros(5000)})  # replaces it
    folder.save(2, {})  # removes it
    assert not path.exists() and torch.equal(opened["w"], torch.arange(5000.0))


def test_a_later_checkpoint_is_not_overtaken_unless_it_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = saved(tmp_path, 1, 2, 3)
    folder = CheckpointFolder(tmp_path, ALL)
    with pytest.raises(ValueError, match=r"step 1 cannot be saved, the folder holds step-000000002\.pt, step-000000003\.pt"):
        folder.save(1, {})
    folder.drop_after(2)
    assert folder.paths() == paths[:2] and "step-000000003.pt: removed, training goes on from step 2" in caplog.text
    folder.save(2, {"new": 1})
    folder.wait()
    assert load_checkpoint(paths[1])["new"] == 1


def test_scores_of_another_shape_are_refused_by_name_and_numbers_that_are_none_are_never_the_best(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, KeepConfig(keep_last=1, keep_best=1))
    for step, score in ((1, 3.0), (2, math.nan), (3, None)):
        folder.save(step, {}, score)
        folder.wait()
    assert [path.name for path in folder.paths()] == ["step-000000001.pt", "step-000000003.pt"]
    for wrong in ("[]", '{"step-000000001.pt": "x"}'):
        (tmp_path / "scores.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"scores\.json: holds other things than scores"):
            CheckpointFolder(tmp_path, KeepConfig())
