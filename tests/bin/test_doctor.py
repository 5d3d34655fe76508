"""The doctor sees each thing that is broken, says which command mends it, and never breaks itself."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from k2ssl.bin import doctor, doctor_checks, doctor_machine
from k2ssl.bin.doctor import examine
from k2ssl.bin.doctor_checks import Finding

REPOSITORY = Path(__file__).parents[2]
Check = Callable[[], Iterator[Finding]]


def of(check: Check) -> list[Finding]:
    return [finding for _, finding in examine({"it": check})]


def only(check: Check) -> Finding:
    (finding,) = of(check)
    return finding


def test_nothing_is_wrong_here_and_the_report_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "doctor.json"
    status = doctor.main(["--folder", str(tmp_path / "not" / "yet"), "--json", str(report)])
    printed = capsys.readouterr().out
    told = json.loads(report.read_text())
    assert status == 0 and told["errors"] == 0, printed
    lines = [line for line in printed.splitlines() if line.startswith(("ok", "warning", "error"))]
    assert [line.split()[:2] for line in lines] == [[entry["status"], entry["check"]] for entry in told["findings"]]
    assert {entry["check"] for entry in told["findings"]} == set(doctor.checks(tmp_path))
    assert printed.splitlines()[-1] == f"0 errors, {told['warnings']} warnings"
    assert f"free at {tmp_path};" in printed and torch.__version__ in printed


def test_an_error_gives_status_1_and_the_command_that_mends_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"a": lambda: iter([Finding("ok", "fine")]), "b": lambda: iter([Finding("error", "not fine", "do this")])}
    monkeypatch.setattr(doctor, "checks", lambda folder: found)
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.split("\n")[:3] == [
        "ok       a             fine",
        "error    b             not fine",
        f"{'':22} mend: do this",
    ]
    monkeypatch.setattr(doctor, "checks", lambda folder: {"b": lambda: iter([Finding("warning", "so so")])})
    assert doctor.main([]) == 0


def test_a_report_that_cannot_be_written_gives_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "checks", lambda folder: {})
    assert doctor.main(["--json", str(tmp_path / "none" / "x.json")]) == 1
    assert f"{tmp_path / 'none' / 'x.json'} cannot be written" in capsys.readouterr().err


def test_it_works_where_no_package_is_installed() -> None:
    bare = [sys.executable, "-S", "-m", "k2ssl.bin.doctor"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(bare, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and not done.stderr
    assert "error    torch         does not load: No module named 'torch'" in done.stdout
    assert "warning  gpu           not looked at: torch does not load" in done.stdout
    assert "install -c constraints.txt -e ." in done.stdout and "cores " in done.stdout


def test_a_check_that_breaks_is_an_error_and_the_others_go_on() -> None:
    def breaks() -> Iterator[Finding]:
        yield Finding("ok", "so far")
        raise KeyError("whatever")

    found = list(examine({"a": breaks, "b": lambda: iter([Finding("ok", "fine")])}))
    assert [(name, finding.status) for name, finding in found] == [("a", "ok"), ("a", "error"), ("b", "ok")]
    assert "KeyError: 'whatever'" in found[1][1].text


@pytest.mark.parametrize(
    ("check", "package"),
    [
        (doctor_checks.torch, "torch"),
        (doctor_checks.torchaudio, "torchaudio"),
        (doctor_checks.audio, "soundfile"),
        (doctor_checks.scoring, "kaldialign"),
        (functools.partial(doctor_checks.other_package, "tyro", "tyro"), "tyro"),
        (doctor_checks.versions, "packaging.requirements"),
    ],
)
def test_a_package_that_does_not_load_is_an_error(check: Check, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    finding = only(check)
    assert finding.status == "error" and "load" in finding.text and package in finding.text and "pip install" in finding.fix


def test_lhotse_that_does_not_load_is_an_error_behind_audio_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lhotse", None)
    assert [finding.status for finding in of(doctor_checks.audio)] == ["ok", "ok", "error"]


@pytest.mark.parametrize(("here", "status"), [((3, 9, 18), "error"), ((3, 10, 0), "ok"), ((3, 13, 2), "ok"), ((3, 14, 0), "warning")])
def test_pythons_that_are_too_old_or_not_tested_are_told(here: tuple[int, ...], status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", here)
    finding = only(doctor_checks.python)
    assert finding.status == status and ".".join(map(str, here)) in finding.text and bool(finding.fix) == (status != "ok")


def test_another_copy_in_the_current_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert only(doctor_checks.package).status == "ok"
    (tmp_path / "k2ssl").mkdir()
    (tmp_path / "k2ssl" / "__init__.py").touch()
    finding = only(doctor_checks.package)
    assert finding.status == "warning" and str(tmp_path) in finding.text


def test_a_torchaudio_of_another_release_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.1+cu150")
    finding = only(doctor_checks.torchaudio)
    assert finding.status == "warning" and finding.fix.endswith("torch==2.99.1 torchaudio==2.99.1")


class Cuda(SimpleNamespace):
    """A torch.cuda with one GPU that computes, as far as the checks look."""

    def __init__(self, **changed: Any) -> None:
        properties = SimpleNamespace(name="Some GPU", total_memory=80 * 2**30, major=9, minor=0)
        has = {"is_available": lambda: True, "device_count": lambda: 1, "get_device_properties": lambda number: properties}
        super().__init__(**{**has, "mem_get_info": lambda number: (70 * 2**30, 80 * 2**30), "properties": properties, **changed})


def fake_torch(monkeypatch: pytest.MonkeyPatch, cuda: Any, built: str | None = "13.0", **changed: Any) -> None:
    ones = lambda *shape, device: torch.ones(*shape)  # noqa: E731
    module = SimpleNamespace(__version__="2.11.0+cu130", version=SimpleNamespace(cuda=built), cuda=cuda, **{"ones": ones, **changed})
    monkeypatch.setitem(sys.modules, "torch", module)


def test_a_gpu_is_described_with_the_formats_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    fake_torch(monkeypatch, cuda)
    assert [finding.status for finding in of(doctor_checks.gpus)] == ["ok", "ok"]
    assert of(doctor_checks.gpus)[1].text == ("0: Some GPU, 80 GiB, compute capability 9.0, 70 GiB free; float16, bfloat16, tf32, fp8")
    cuda.properties.major, cuda.properties.minor = 8, 6
    assert of(doctor_checks.gpus)[1].text.endswith("; float16, bfloat16, tf32")
    cuda.properties.major, cuda.properties.minor = 7, 5
    assert of(doctor_checks.gpus)[1].text.endswith("; float16")


def failing(message: str) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError(message)

    return fail


@pytest.mark.parametrize(
    ("message", "status", "said"),
    [
        ("CUDA error: no kernel image is available\nmore", "error", "no kernel image is available"),
        ("CUDA out of memory", "warning", "another process"),
    ],
)
def test_a_gpu_that_does_not_compute_is_told(message: str, status: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch, Cuda(), ones=failing(message))
    finding = of(doctor_checks.gpus)[1]
    assert finding.status == status and said in finding.text and finding.fix and "more" not in finding.text


def test_a_gpu_that_computes_wrongly_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch, Cuda(), ones=lambda *shape, device: torch.full(shape, 1.5))
    assert of(doctor_checks.gpus)[1].status == "error"


@pytest.mark.parametrize(
    ("driver", "built", "status", "said"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed",
            "13.0",
            "error",
            "driver 470.82.01, but torch cannot use it: too old",
        ),
        ("NVRM version: 580.65.06", None, "warning", "580.65.06"),
        (None, "13.0", "ok", "no driver"),
        (None, None, "ok", "CPU only"),
    ],
)
def test_driver_and_torch_are_held_against_each_other(
    driver: str | None, built: str | None, status: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_checks, "_DRIVER", tmp_path / "version")
    if driver:
        (tmp_path / "version").write_text(driver)
    fake_torch(monkeypatch, Cuda(is_available=lambda: False, init=failing("too old")), built)
    finding = only(doctor_checks.gpus)
    assert finding.status == status and said in finding.text and bool(finding.fix) == (status != "ok")


@pytest.mark.parametrize(("gloo", "nccl", "status"), [(True, True, "ok"), (True, False, "error"), (False, True, "error")])
def test_missing_ways_of_exchange_are_errors(gloo: bool, nccl: bool, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = SimpleNamespace(is_available=lambda: True, is_gloo_available=lambda: gloo, is_nccl_available=lambda: nccl)
    fake_torch(monkeypatch, Cuda(nccl=SimpleNamespace(version=lambda: (2, 28, 9))), distributed=distributed)
    finding = only(doctor_checks.exchange)
    assert finding.status == status
    assert status == "error" or "NCCL 2.28.9" in finding.text


def test_triton_is_held_against_pytorch_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch, Cuda())
    monkeypatch.setattr(doctor_checks, "_what_triton_lacks", lambda: "Triton finds no C compiler")
    finding = only(doctor_checks.triton)
    assert finding.status == "warning" and "in PyTorch, slower: Triton finds no C compiler" in finding.text
    monkeypatch.setattr(doctor_checks, "_what_triton_lacks", lambda: None)
    for difference, status in ((0.0, "ok"), (0.1, "error"), (float("nan"), "error")):
        monkeypatch.setattr(doctor_checks, "_kernel_difference", lambda module, it=difference: it)
        assert only(doctor_checks.triton).status == status
    monkeypatch.setattr(doctor_checks, "_kernel_difference", failing("no C compiler"))
    finding = only(doctor_checks.triton)
    assert finding.status == "error" and "no C compiler" in finding.text
    monkeypatch.setattr(doctor_checks, "find_spec", lambda name: None)
    assert only(doctor_checks.triton).status == "warning"


@pytest.mark.parametrize("form", ["FLAC", "OGG"])
def test_a_format_that_libsndfile_lacks_or_garbles_is_an_error(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import soundfile

    read, write = soundfile.read, soundfile.write

    def refuse(file: Any, samples: Any, rate: int, format: str) -> None:
        if format == form:
            raise RuntimeError("Format not recognised.")
        write(file, samples, rate, format=format)

    monkeypatch.setattr(soundfile, "write", refuse)
    errors = [finding for finding in of(doctor_checks.audio) if finding.status == "error"]
    assert len(errors) == 1 and f"cannot do {form}: Format not recognised." in errors[0].text and "soundfile" in errors[0].fix
    monkeypatch.setattr(soundfile, "write", write)
    monkeypatch.setattr(soundfile, "read", lambda *args, **kwargs: (read(*args, **kwargs)[0] * 0.5, 16000))
    assert [finding.status for finding in of(doctor_checks.audio)][:2] == ["error", "error"]


def test_a_kaldialign_that_miscounts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kaldialign", SimpleNamespace(edit_distance=lambda *_: {"total": 2}))
    assert only(doctor_checks.scoring).status == "error"


def spec_of(*installed: str) -> Callable[[str], object]:
    return lambda name: object() if name in installed else None


def test_optional_packages_may_be_missing_and_are_warned_of_when_they_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "find_spec", spec_of())
    missing = [only(doctor_checks.flashlight), only(doctor_checks.k2)]
    assert [finding.status for finding in missing] == ["ok", "ok"]
    assert "ctc-lexicon" in missing[0].text and f"torch {torch.__version__.partition('+')[0]}" in missing[1].text
    monkeypatch.setattr(doctor_checks, "find_spec", spec_of("flashlight", "k2"))
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder.kenlm", None)
    broken = only(doctor_checks.flashlight)
    assert broken.status == "warning" and broken.fix.endswith("flashlight-text")


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        ("mutual_information_recursion, with_cuda = 1, False", "ok", "can be chosen"),
        ("raise ImportError('undefined symbol: _ZN3c10')", "warning", "undefined symbol: _ZN3c10"),
        ("old = 1", "warning", "mutual_information_recursion"),
        ("import os; os.abort()", "warning", "ended with status -6"),
    ],
)
def test_k2_is_tried_where_it_cannot_take_the_doctor_with_it(
    content: str, status: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "k2.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor_checks, "find_spec", spec_of("k2"))
    finding = only(doctor_checks.k2)
    assert finding.status == status and said in finding.text and bool(finding.fix) == (status != "ok")


def test_other_versions_than_those_tested_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    numpy, tqdm = doctor_checks.version("numpy"), doctor_checks.version("tqdm")
    lines = [f"numpy=={numpy}", "tqdm==0.0.1", "torch==0.0.2 ; python_full_version < '3.0'", "no-such-package-here==1.0"]
    (tmp_path / "constraints.txt").write_text("# why\n" + "\n".join(lines))
    finding = only(doctor_checks.versions)
    assert (
        finding.status == "warning" and finding.text == f"not the versions of {tmp_path / 'constraints.txt'}: tqdm {tqdm} (tested: 0.0.1)"
    )
    (tmp_path / "constraints.txt").write_text(f"numpy=={numpy}\ntorch=={torch.__version__.partition('+')[0]}\n")
    assert only(doctor_checks.versions).text.startswith("2 packages are those of")


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("gib", "status"), [(0.5, "error"), (5, "warning"), (50, "ok")])
def test_room_on_the_disk_is_held_against_what_checkpoints_take(
    gib: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda place: Usage(0, 0, gib * 2**30))
    assert only(lambda: doctor_machine.disk(tmp_path / "exp")).status == status


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = only(lambda: doctor_machine.disk(tmp_path / "file"))
    assert finding.status == "error" and "cannot be written to" in finding.text


def machine(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], own: str = "0::/job/step") -> None:
    monkeypatch.setattr(doctor_machine, "_CGROUP", folder / "cgroup")
    monkeypatch.setattr(doctor_machine, "_OWN_CGROUP", folder / "own")
    monkeypatch.setattr(doctor_machine, "_MEMINFO", folder / "meminfo")
    files = {"own": own, "meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable: {60 * 2**20} kB\n", **files}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")


@pytest.mark.parametrize(
    ("files", "status", "said"),
    [
        ({}, "ok", "64.0 GiB with"),
        ({"cgroup/job/step/memory.max": "max", "cgroup/memory.max": "max"}, "ok", "64.0 GiB with"),
        (
            {"cgroup/job/step/memory.max": "max", "cgroup/job/memory.max": str(2 * 2**30)},
            "warning",
            "2.0 GiB, a limit of the control group,",
        ),
        ({"cgroup/memory/memory.limit_in_bytes": str(8 * 2**30)}, "ok", "8.0 GiB, a limit of the control group,"),
        ({"cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}, "ok", "64.0 GiB with"),
        ({"meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable: {2**20} kB\n"}, "warning", "1.0 GiB free"),
    ],
)
def test_memory_is_the_least_of_machine_and_control_groups(
    files: dict[str, str], status: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, monkeypatch, files)
    finding = only(doctor_machine.memory)
    assert finding.status == status and said in finding.text


@pytest.mark.parametrize(("mib", "status"), [(32, "error"), (64, "warning"), (2048, "ok")])
def test_shared_memory_is_held_against_a_batch(mib: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = SimpleNamespace(f_frsize=4096, f_blocks=mib * 256, f_bavail=mib * 128)
    monkeypatch.setattr(doctor_machine.os, "statvfs", lambda place: stat)
    finding = only(doctor_machine.shared_memory)
    assert finding.status == status and bool(finding.fix) == (status != "ok")


def test_missing_shared_memory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "_SHM", tmp_path / "none")
    assert only(doctor_machine.shared_memory).status == "error"


@pytest.mark.parametrize(("soft", "status"), [(256, "warning"), (1024, "ok"), (-1, "ok")])
def test_few_open_files_are_told(soft: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda which: (soft, 4096))
    finding = only(doctor_machine.open_files)
    assert finding.status == status and finding.fix == ("ulimit -n 4096" if status == "warning" else "")


@pytest.mark.parametrize(
    ("files", "threads", "status", "said"),
    [
        ({}, None, "ok", "16 visible"),
        ({}, "4", "ok", "OMP_NUM_THREADS is 4"),
        ({}, "32", "warning", "OMP_NUM_THREADS=16"),
        ({}, "many", "warning", "not a number of threads"),
        ({"cgroup/job/cpu.max": "250000 100000"}, None, "warning", "OMP_NUM_THREADS=2"),
        ({"cgroup/job/cpu.max": "250000 100000"}, "2", "ok", "a quota of 2.5"),
        ({"cgroup/cpu.max": "max 100000"}, None, "ok", "16 visible"),
        ({"cgroup/cpu/cpu.cfs_quota_us": "400000", "cgroup/cpu/cpu.cfs_period_us": "100000"}, None, "warning", "OMP_NUM_THREADS=4"),
        ({"cgroup/cpu/cpu.cfs_quota_us": "-1", "cgroup/cpu/cpu.cfs_period_us": "100000"}, None, "ok", "16 visible"),
    ],
)
def test_threads_are_held_against_the_cores_that_may_be_used(
    files: dict[str, str], threads: str | None, status: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, monkeypatch, files)
    monkeypatch.setattr(doctor_machine.os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    finding = only(doctor_machine.cores)
    assert finding.status == status and said in f"{finding.text} {finding.fix}"
