"""The benchmarks' arithmetic and form, never their times."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def benchmark(scripts: None) -> ModuleType:
    import benchmark  # type: ignore[import-not-found]

    return benchmark


def test_summary_holds_median_and_spread(benchmark: ModuleType) -> None:
    assert benchmark.summary([5.0, 1.0, 2.0, 9.0, 3.0]) == {"median": 3.0, "min": 1.0, "max": 9.0, "runs": 5}


def test_table_has_a_row_for_each_measurement_and_leaves_missing_cells_empty(benchmark: ModuleType) -> None:
    text = benchmark.table([{"model": "a", "seconds": 0.12345}, {"model": "b", "error": "x"}], ["model", "seconds"])
    assert text.splitlines() == ["| model | seconds |", "| --- | --- |", "| a | 0.123 |", "| b |  |"]


def test_a_failed_measurement_is_reported_and_does_not_stop_the_others(benchmark: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import sys\nsys.exit('out of luck')\n")
    assert benchmark.in_own_process(str(script), [])["error"] == "exit status 1: out of luck"


def test_the_beginning_of_a_long_message_is_not_lost(benchmark: ModuleType, tmp_path: Path) -> None:
    program = tmp_path / "fails.py"
    program.write_text("raise MemoryError('CUDA out of memory' + 60 * ' and so on')")
    assert "CUDA out of memory" in benchmark.in_own_process(str(program), [])["error"]


def test_peak_memory_is_what_was_held_at_once(benchmark: ModuleType) -> None:
    code = (
        "import torch, benchmark\n"
        "memory = benchmark.PeakMemory(torch.device('cpu'))\n"
        "big = torch.ones(50_000_000)\n"
        "del big\n"
        "print(memory.gigabytes())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SCRIPTS)
    assert 0.19 < float(done.stdout) < 0.26


def test_json_objects_are_found_on_one_line_and_on_several(scripts: None) -> None:
    import bench_all  # type: ignore[import-not-found]

    text = 'a line\n{"a": 1}\n{\n  "b": {"c": 2}\n}\n| table | {no json} |\n'
    assert bench_all.json_objects(text) == [{"a": 1}, {"b": {"c": 2}}]


def test_an_interrupted_run_of_all_goes_on_with_what_is_missing_or_failed(
    scripts: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_all  # type: ignore[import-not-found]

    def run_all(*arguments: str, codes: dict[str, str]) -> list[dict[str, Any]]:
        made = [bench_all.Benchmark(name, ("-c", code)) for name, code in codes.items()]
        monkeypatch.setattr(bench_all, "benchmarks", lambda options: made)
        monkeypatch.setattr(bench_all, "start_up", lambda runs: [{"what": "import torch", "seconds": 1.0}])
        monkeypatch.setattr(sys, "argv", ["bench_all.py", "--output", str(tmp_path / "lines.jsonl"), *arguments])
        status = bench_all.main()
        lines = [json.loads(text) for text in (tmp_path / "lines.jsonl").read_text().splitlines()]
        assert status == any("error" in line for line in lines)
        return lines

    now = "import json, time; print(json.dumps({'at': time.time()}))"
    first = run_all(codes={"good": now, "bad": "import sys; sys.exit('no luck')"})
    assert [line["benchmark"] for line in first] == ["start-up", "good", "bad"] and "no luck" in first[2]["error"]
    again = run_all("--resume", codes={"good": now, "bad": now, "new": now})
    assert again[:2] == first[:2] and [line["benchmark"] for line in again] == ["start-up", "good", "bad", "new"]
    assert again[2]["at"] > first[1]["at"]
    other = run_all("--resume", codes={"good": now + ";"})
    assert other[-1]["benchmark"] == "good" and other[-1]["at"] > first[1]["at"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_all(codes={"good": now})
    assert "is there already; --resume" in capsys.readouterr().err
    (tmp_path / "lines.jsonl").write_text('{"at": 1}\n')
    with pytest.raises(SystemExit):
        run_all("--resume", codes={"good": now})
    assert "line 1: '{\"at\": 1}' is not a line" in capsys.readouterr().err


def test_a_quick_run_of_some_ends_with_a_table_of_one_line_for_each_measurement(tmp_path: Path) -> None:
    script, output = SCRIPTS / "bench_all.py", tmp_path / "lines.jsonl"
    command = [sys.executable, str(script), "--quick", "--only", "trainer", "searches", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(text) for text in output.read_text().splitlines()]
    assert [line["benchmark"] for line in lines] == ["trainer and checkpoint"] + ["searches"] * 6
    assert len(done.stdout.splitlines()) == 2 + len(lines), done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device: device is 'tpu', allowed are auto, cpu, cuda and cuda:NUMBER"),
        (["--audio-dir", "."], "--audio-dir: no .flac file in ."),
        (["--only", "stepp"], "is called 'stepp'; there are start-up, step, inference"),
    ],
)
def test_what_a_run_of_all_cannot_do_is_refused_before_anything_is_written(
    scripts: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    import bench_all

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_all.py", *arguments])
    with pytest.raises(SystemExit):
        bench_all.main()
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_row_of_the_table_of_all_is_one_line_of_texts_and_figures(scripts: None) -> None:
    import bench_all

    line = {"benchmark": "step", "what": "a\n  b", "fused": True, "quick": False, "sizes": [1, 2], "seconds": 0.12345678, "threads": 2}
    assert bench_all.row(line) == {"benchmark": "step", "case": "a b fused", "figures": "seconds 0.1235"}


@pytest.mark.parametrize("model", ["tiny", "torchaudio_hubert_base"])
def test_one_step_is_measured_in_all_its_stages(
    scripts: None, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_step  # type: ignore[import-not-found]

    from tests.models.test_hubert_parity import torchaudio_model

    monkeypatch.setitem(bench_step.PEERS, "torchaudio_hubert_base", lambda: torchaudio_model(False))
    arguments = ["--utterances", "2", "--seconds", "0.5", "--steps", "2", "--kernels", "3", "--peak-tflops", "0.5"]
    arguments += ["--one", model, "bfloat16", "waveform"]
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *arguments])
    assert bench_step.main() == 0
    line = json.loads(capsys.readouterr().out)
    assert line["runs"] == 2 and line["batch"] == "2 x 0.5 s" and line["precision"] == "bfloat16"
    assert all(line[stage] > 0 for stage in bench_step.STAGES)
    assert line["min"] <= line["seconds"] <= line["max"]
    assert line["utilisation"] == pytest.approx(line["tflop"] / line["seconds"] / 0.5, rel=0.1) and line["tflop"] > 0
    milliseconds = [ms for _, ms, _ in line["kernels"]]
    assert len(milliseconds) == 3 and milliseconds == sorted(milliseconds, reverse=True) and milliseconds[-1] > 0
    assert line["seconds"] == pytest.approx(sum(line[stage] for stage in bench_step.STAGES), rel=0.5)


@pytest.mark.parametrize("inference", [False, True])
def test_a_step_of_a_series_is_a_whole_one(scripts: None, inference: bool) -> None:
    import bench_step

    steps: list[str] = []
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight])
    optimizer.register_step_post_hook(lambda *arguments: steps.append("step"))
    job = SimpleNamespace(infer=lambda: steps.append("forward"), loss=lambda: steps.append("loss") or weight.sum(), optimizer=optimizer)
    assert bench_step.timed_series(job, torch.device("cpu"), nullcontext, inference) > 0
    assert steps == (["forward"] * 4 if inference else ["loss", "step"] * 4)


@pytest.mark.parametrize("model", ["tiny", "torchaudio_hubert_base"])
def test_inference_is_measured_with_its_work(
    scripts: None, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_step

    from tests.models.test_hubert_parity import torchaudio_model

    monkeypatch.setitem(bench_step.PEERS, "torchaudio_hubert_base", lambda: torchaudio_model(False))
    arguments = ["--utterances", "2", "--seconds", "0.5", "--steps", "2", "--inference", "--one", model, "float32", "waveform"]
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *arguments])
    assert bench_step.main() == 0
    line = json.loads(capsys.readouterr().out)
    assert line["what"] == "inference" and line["forward"] > 0 and line["tflop"] > 0 and line["operations"] > 0


def test_the_work_of_a_step_is_its_products_and_the_operations_that_write_memory(scripts: None) -> None:
    import bench_step  # type: ignore[import-not-found]

    left, right, total = torch.ones(5, 7), torch.ones(7, 3), torch.ones(5, 3)
    chain = bench_step.counted(lambda: (left @ right).t().reshape(-1).unsqueeze(0).add(1.0).sum())  # product, copy, addition, sum
    assert chain == {
        "tflop": pytest.approx(2 * 5 * 7 * 3 / 1e12),
        "operations": 4,
        "traffic_gb": pytest.approx(4 * (71 + 30 + 30 + 16) / 1e9),
    }
    in_place = bench_step.counted(lambda: total.addmm_(left, right))  # torch's own counter does not know it
    assert in_place == {"tflop": pytest.approx(2 * 5 * 7 * 3 / 1e12), "operations": 1, "traffic_gb": pytest.approx(4 * (71 + 15) / 1e9)}
    written = bench_step.counted(lambda: torch.mm(left, right, out=total))  # what lay there before is not read
    assert written["traffic_gb"] == pytest.approx(4 * 71 / 1e9)
    listed = bench_step.counted(lambda: torch._foreach_mul_([total, total.clone()], 2.0))
    assert listed["traffic_gb"] == pytest.approx(4 * (30 + 60) / 1e9)  # the clone, and both read and written
    row = torch.ones(1, 3).expand(5, 3)  # is one row in memory
    assert bench_step.counted(lambda: total.copy_(row))["traffic_gb"] == pytest.approx(4 * (3 + 15) / 1e9)


def test_rounded_crops_are_of_the_same_batches_in_fewer_lengths(scripts: None) -> None:
    import bench_crops  # type: ignore[import-not-found]

    cuts = bench_crops.draw_cuts(1500)
    plain, rounded = (bench_crops.shapes(cuts, 60.0, step) for step in (0.0, 0.5))
    assert len(plain) > 100 and [number for number, _ in plain] == [number for number, _ in rounded]
    lost = [before - after for (_, before), (_, after) in zip(plain, rounded, strict=True)]
    assert all(-1e-9 <= seconds < 0.5 for seconds in lost) and sum(lost) > 1
    assert len({seconds for _, seconds in rounded}) <= 32 < len({seconds for _, seconds in plain})


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100, 1000])
def test_the_largest_batch_is_found_with_few_trials(scripts: None, limit: int) -> None:
    import bench_memory  # type: ignore[import-not-found]

    tried: list[int] = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= limit

    found = bench_memory.largest(fits, 512)
    assert found <= min(limit, 512) and min(limit, 512) - found <= found / 8
    assert len(tried) == len(set(tried)) <= 15 and max(tried) <= 512


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        ("exit status 1: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("exit status 1: RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("exit status -9: ", True),
        ("exit status 1: memory = PeakMemory(device)\nRuntimeError: Found no NVIDIA driver on your system", False),
    ],
)
def test_only_want_of_memory_ends_the_search_for_the_largest_batch(
    scripts: None, monkeypatch: pytest.MonkeyPatch, error: str, is_memory: bool
) -> None:
    import bench_memory

    def measured(script: str, arguments: list[str]) -> dict[str, Any]:
        utterances = next(int(word.split("=")[1]) for word in arguments if word.startswith("--utterances="))
        return {"memory_gb": 1.0} if utterances <= 5 else {"error": error}

    monkeypatch.setattr(bench_memory, "in_own_process", measured)
    monkeypatch.setattr(sys, "argv", ["bench_memory.py", "--limit-gb", "2", "--models", "tiny"])
    if is_memory:
        assert bench_memory.main() == 0
    else:
        with pytest.raises(SystemExit, match=r"tiny with 8 utterances failed: exit status 1: .*PeakMemory"):
            bench_memory.main()
