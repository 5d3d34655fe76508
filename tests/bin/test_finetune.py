"""The fine-tuning program on words of tones, each letter a pitch: what it learns, what it leaves behind, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import MonoCut
from torch.utils._pytree import tree_flatten_with_path

from k2ssl.bin import finetune, pretrain
from k2ssl.bin.finetune_data import OpenedTranscripts
from k2ssl.bin.pretrain_remarks import asr_settings_without_effect
from k2ssl.bin.word_errors import WordErrors
from k2ssl.config import load
from k2ssl.data.cuts import read_cuts, write_cuts
from k2ssl.data.loader import asr_loader
from k2ssl.data.tokenizer import LetterTokenizer, NormalizationConfig, load_tokenizer, tokenizer_from_dict
from k2ssl.decode.hypotheses import Hypothesis
from k2ssl.models.asr import AsrConfig, AsrModel
from k2ssl.models.load import load_model
from k2ssl.structure import from_dict
from k2ssl.train.checkpoint import load_checkpoint
from k2ssl.train.plan import BatchPlan

RATE = 16000
LETTERS = "ABCD"
AUGMENTED = ["--data.speeds", "0.9", "1", "1.1", "--data.spec-augment.band-masks", "1", "--data.spec-augment.band-width", "10"]
AUGMENTED += ["--data.spec-augment.time-masks", "2", "--data.spec-augment.time-width", "0.1"]
CHILD = """
import os, signal, sys
from k2ssl.bin import finetune
from k2ssl.train.trainer import Trainer
plain = Trainer.train_step
def train_step(self, batches):
    plain(self, batches)
    if self.progress.step == 5 and self.log is not None:
        self.checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)
Trainer.train_step = train_step
sys.exit(finetune.main(sys.argv[1:]))
"""


class Words:
    """Two splits, `train` and `valid`, of one to three words of one to three letters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = folder / "tokenizer.pt"
        LetterTokenizer(LETTERS, NormalizationConfig()).save(self.tokenizer)
        for seed, (split, num) in enumerate((("train", 40), ("valid", 10))):
            draw = np.random.default_rng(seed)
            texts = [
                " ".join("".join(draw.choice(list(LETTERS), draw.integers(1, 4))) for _ in range(draw.integers(1, 4))) for _ in range(num)
            ]
            self.write(split, texts)

    def cuts(self, split: str) -> str:
        return str(self.folder / f"cuts_{split}.jsonl.gz")

    def write(self, split: str, texts: list[str], sounds: list[str] | None = None) -> str:
        """Sounds that say `sounds`, by default the texts."""
        draw = np.random.default_rng(len(texts))
        cuts = []
        for number, (text, sound) in enumerate(zip(texts, sounds or texts, strict=True)):
            time, gap = np.arange(1920) / RATE, np.zeros(480)
            tones = [np.sin(2 * np.pi * 300 * 2 ** LETTERS.find(c) * time) * np.hanning(1920) * (c in LETTERS) for c in sound]
            audio = np.concatenate([np.zeros(1600), *(part for tone in tones for part in (0.3 * tone, gap))])
            path = self.folder / f"{split}{number:02d}.wav"
            soundfile.write(path, audio + 0.01 * draw.standard_normal(len(audio)), RATE)
            recording = Recording.from_file(path)
            cut = MonoCut(recording.id, 0.0, recording.duration, 0, recording=recording)
            cut.supervisions = [SupervisionSegment(cut.id, recording.id, 0.0, recording.duration, text=text)]
            cuts.append(cut)
        CutSet.from_cuts(cuts).to_file(self.folder / f"cuts_{split}.jsonl.gz")
        return self.cuts(split)

    def command(self, output: Path, *options: str) -> list[str]:
        """A tiny Transformer on log-mel features."""
        return [str(self.folder / "tiny.toml"), "--tokenizer", str(self.tokenizer), "--output", str(output), *options]


TRI_STAGE = [
    "--schedule.name",
    "tri_stage",
    "--schedule.lr-batches",
    "7500",
    "--schedule.warmup-batches",
    "5000",
    "--schedule.warmup-start",
    "0",
    "--schedule.max-batches",
]
RATIO = ["--schedule.phase-ratio", "0.2", "0.3", "0.5"]
TINY = """
device = "cpu"
quiet = true
[model]
vocab_size = 7
heads = "ctc"
input_dropout = 0.0
[model.masking]
probability = 0.0
[model.frontend]
kind = "logmel"
channels = [4, 8, 16]
output_dim = 32
num_bins = 40
[model.encoder]
kind = "transformer"
num_layers = 2
dim = 32
feedforward_dim = 64
num_heads = 4
conv_pos_kernel = 16
conv_pos_groups = 4
dropout = 0.0
attention_dropout = 0.0
layer_drop = 0.0
[schedule]
lr_batches = 1000
warmup_batches = 10
warmup_start = 0.5
[trainer]
tensorboard = false
log_every = 1
valid_every = 4
average_period = 2
[trainer.keep]
save_every = 4
[trainer.batch]
seconds_per_update = 20.0
seconds_per_micro_batch = 10.0
[preflight]
batches = 5
[data]
num_buckets = 2
num_workers = 0
min_seconds = 0.1
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Words:
    folder = tmp_path_factory.mktemp("words")
    made = Words(folder)
    (folder / "tiny.toml").write_text(TINY + f'cuts = ["{made.cuts("train")}"]\nvalid_cuts = ["{made.cuts("valid")}"]\n')
    return made


def environment() -> dict[str, str]:
    """As many threads as here, on which the last bits of sums depend."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(Path(__file__).parents[2])}


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def model_of(command: list[str]) -> AsrConfig:
    return load(finetune.Finetune, command).model


@pytest.fixture(scope="module")
def whole(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps, with everything that is drawn, that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert finetune.main(words.command(output, *AUGMENTED, "--trainer.max-steps", "8")) == 0
    return output


def test_a_checkpoint_holds_its_tokenizer_and_can_be_used_as_a_model(whole: Path, words: Words) -> None:
    path = whole / "checkpoints/step-000000008.pt"
    content = load_checkpoint(path)
    assert tokenizer_from_dict(content["tokenizer"]).encode("AD") == load_tokenizer(words.tokenizer).encode("AD")
    assert load_model(path, of=AsrModel).config == model_of(words.command(whole))
    job = content["job"]
    assert job.pop("lineage") == {"tokenizer_sha256": load_tokenizer(words.tokenizer).sha256}
    assert from_dict(finetune.Finetune, job) == load(finetune.Finetune, [str(whole / "settings.json")])
    assert json.loads((whole / "ledger.jsonl").read_text().splitlines()[-1])["program"] == "finetune"


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(whole: Path, words: Words, tmp_path: Path) -> None:
    command = words.command(tmp_path / "run", *AUGMENTED, "--trainer.max-steps", "8")
    ended = subprocess.run([sys.executable, "-c", CHILD, *command], env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert finetune.main(command) == 0
    ours, theirs = (load_checkpoint(folder / "checkpoints/step-000000008.pt") for folder in (tmp_path / "run", whole))
    for content in (ours, theirs):
        content["job"].pop("output")
        content["ranks"][0].pop("generator")  # torch's own, which pytest seeds and training never draws from
    for (path, one), (other, two) in zip(tree_flatten_with_path(ours)[0], tree_flatten_with_path(theirs)[0], strict=True):
        same = torch.equal(one.nan_to_num(nan=-1.0), two.nan_to_num(nan=-1.0)) if isinstance(one, torch.Tensor) else repr(one) == repr(two)
        assert path == other and same, path
    numbers = [[(record["step"], record["wer"]) for record in lines(folder, "valid")] for folder in (tmp_path / "run", whole)]
    assert numbers[0] == numbers[1] and [step for step, _ in numbers[0]] == [4, 8]


def test_both_heads_learn_to_read_words_they_have_not_heard_and_the_best_checkpoint_is_the_one_with_the_lowest_error_rate(
    words: Words, tmp_path: Path
) -> None:
    options = ["--model.heads", "both", "--model.ctc-scale", "1", "--model.output-downsampling", "2", "--model.warmup-steps", "20"]
    options += ["--trainer.batch.seconds-per-micro-batch", "20", "--trainer.keep.save-every", "60", "--trainer.valid-every", "60"]
    options += ["--trainer.max-steps", "240", "--trainer.log-every", "60", "--seed", "1"]
    assert finetune.main(words.command(tmp_path / "run", *options)) == 0
    valid = {record["step"]: record for record in lines(tmp_path / "run", "valid")}
    assert valid[240]["wer_ctc"] <= 0.05 and valid[240]["wer_transducer"] <= 0.1 < valid[60]["wer_transducer"]
    assert all(record["wer"] == record["wer_transducer"] for record in valid.values())
    scores = json.loads((tmp_path / "run/checkpoints/scores.json").read_text())
    assert scores and all(score == valid[int(name[5:14])]["wer"] for name, score in scores.items())
    assert min(scores.values()) == min(record["wer"] for record in valid.values())


def test_the_encoder_of_a_real_pre_training_run_is_taken_raw_or_averaged(sounds: Any, words: Words, tmp_path: Path) -> None:
    short = ["--preflight.run", "False", "--data.num-workers", "0"]
    before = sounds.command(tmp_path / "before", "--trainer.max-steps", "2", "--trainer.average-period", "1", *short)
    assert pretrain.main(before) == 0
    path = tmp_path / "before/checkpoints/step-000000002.pt"
    trained = load_checkpoint(path)
    # the same frontend and encoder by the same options, without the heads of pre-training
    head = sounds.MODEL.index("--model.head.num-classes")
    encoder = [*sounds.MODEL[:head], *sounds.MODEL[head + 2 :]]
    (tmp_path / "plain.toml").write_text("[trainer]\ntensorboard = false\nmax_steps = 1\n")
    for weights, expected in (("raw", trained["model"]), ("average", trained["average"]["model"])):
        output = tmp_path / weights
        command = words.command(output, "--init", str(path), "--init-weights", weights, "--model.heads", "ctc", "--model.vocab-size", "7")
        command += ["--data.cuts", words.cuts("train"), "--data.min-seconds", "0.1", "--device", "cpu", "--quiet", "True", *encoder, *short]
        assert finetune.main([str(tmp_path / "plain.toml"), *command[1:], "--trainer.batch.seconds-per-update", "4"]) == 0
        begun = load_model(output / "checkpoints/step-000000000.pt", of=AsrModel).state_dict()
        own = {name for name in begun if name.startswith("ctc.")}
        assert begun.keys() - own == {name for name in expected if not name.startswith("heads.")}
        assert all(torch.equal(begun[name].double(), expected[name].double().float().double()) for name in begun.keys() - own)
    raw, average = trained["model"], trained["average"]["model"]
    assert any(not torch.equal(raw[name], average[name].to(raw[name].dtype)) for name in raw if name.startswith("encoder."))


def test_an_estimate_and_the_tuner_say_what_they_found_and_write_nothing(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k2ssl.bin.trials._TIMED", 2)
    monkeypatch.setattr("k2ssl.bin.trials._WARM_UP", 1)
    monkeypatch.setattr("k2ssl.bin.finetune_data.CutLists.seconds", lambda lists: 3600.0)
    options = ["--data.speeds", "0.5", "1", "--trainer.max-epochs", "10"]
    assert finetune.main(words.command(tmp_path / "run", *options, "--estimate", "True")) == 0
    told = capsys.readouterr().out
    assert "1.50 h of audio an epoch" in told and f"{10 * 3600 * 3 // 2 // 20:,} steps will take" in told and "2 steps: " in told
    assert finetune.main(words.command(tmp_path / "run", "--tune", "True", "--preflight.memory-limit-gib", "100")) == 0
    told = capsys.readouterr().out
    (tmp_path / "tuned.json").write_text(told[told.index("\n{") :])
    tuned = load(finetune.Finetune, [str(tmp_path / "tuned.json")])
    assert tuned.trainer.batch.seconds_per_micro_batch == 20.0 and not tuned.tune and not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["inf-check", "statistics"])
def test_a_diagnosis_observes_a_few_steps(words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    options = ["--model.heads", "both", "--trainer.batch.seconds-per-micro-batch", "4", *AUGMENTED]
    assert finetune.main(words.command(tmp_path / "run", *options, "--diagnose", what)) == 0
    told = capsys.readouterr().out
    if what == "inf-check":
        assert "5 steps: every output, gradient and parameter is finite" in told and not (tmp_path / "run").exists()
    else:
        found = json.loads((tmp_path / "run/statistics.json").read_text())
        assert found["steps"] == 5 and found["parameters"]["transducer.joiner.output_linear.weight"]["rms"] > 0


def test_what_a_setting_of_the_data_hides_or_changes_is_what_training_sees(words: Words, tmp_path: Path) -> None:
    def seen(*options: str) -> tuple[list[float], tuple[int, int]]:
        job = load(finetune.Finetune, words.command(tmp_path, "--model.ctc.dropout", "0", *options))
        model = finetune.build_model(job, torch.device("cpu"))
        data = OpenedTranscripts(job.data, job.tokenizer)
        plan, cpu = BatchPlan.of(job.trainer.batch, 1), torch.device("cpu")
        batch = next(iter(data.train_loader(plan, RATE, 0, cpu)))
        valid = next(iter(data.valid_loader(plan, RATE, cpu, drop_incomplete=False) or []))
        losses = []
        for step, training in ((1, True), (1, True), (2, True), (1, False)):
            model.step = 0
            model.train(training).clock.seed(step)
            losses.append(float(model(batch).loss.detach()))
        return losses, (batch.num_samples, valid.num_samples)

    (first, again, other, evaluated), plain = seen()
    assert first == again == other == evaluated, "nothing is drawn"
    (first, again, other, evaluated), masked = seen(*AUGMENTED[4:])
    assert first == again and len({first, other, evaluated}) == 3 and masked == plain
    assert evaluated == seen()[0][3], "evaluation hears everything"
    slower = seen("--data.speeds", "0.8")[1]
    assert slower[0] != plain[0] and slower[1] == plain[1], "validation takes utterances as they are"


def test_errors_of_all_ranks_are_counted(words: Words, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "k2ssl.bin.finetune"]
    options = ["--model.heads", "both", "--trainer.batch.seconds-per-update", "10", "--trainer.batch.seconds-per-micro-batch", "5"]
    command = words.command(tmp_path / "two", *AUGMENTED, *options, "--trainer.max-steps", "2", "--preflight.run", "False")
    done = subprocess.run([*program, *command], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (valid,) = lines(tmp_path / "two", "valid")
    model = load_model(tmp_path / "two/checkpoints/step-000000002.pt", of=AsrModel).eval()
    errors = WordErrors(model, load_tokenizer(words.tokenizer))
    with torch.no_grad():
        for batch in asr_loader(read_cuts(words.cuts("valid")), max_duration=5.0, shuffle=False, drop_incomplete=False):
            errors.add(batch)
    expected = errors.result()
    assert valid["num_words"] == expected["num_words"] and {"wer", "wer_ctc", "wer_transducer"} < expected.keys()
    assert {name: valid[name] for name in expected} == pytest.approx(expected)


def test_words_are_counted_against_the_normalised_transcript() -> None:
    tokenizer = LetterTokenizer(LETTERS.lower(), NormalizationConfig(case="lower"))
    counted = WordErrors(AsrModel(AsrConfig.tiny(7, "both")), tokenizer)
    heard = [Hypothesis(tuple(tokenizer.encode(text)), 0.0) for text in ("ab c", "a")]
    counted._count("ctc", ["AB  C", "A B"], heard)
    counted._count("transducer", ["AB  C", "D D"], heard)
    assert counted.result() == {"wer_ctc": 1 / 4, "wer_transducer": 2 / 4, "wer": 2 / 4, "num_words": 4}


def refusal(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    assert finetune.main(command) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_goes_on_with_another_manifest_of_the_same_name_where_changes_are_accepted(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts, manifest = list(read_cuts(words.cuts("train"))), tmp_path / "cuts.jsonl.gz"
    command = words.command(tmp_path / "run", "--data.cuts", str(manifest), "--data.valid-cuts", "--trainer.max-steps")
    write_cuts(cuts, manifest)
    assert finetune.main([*command, "1"]) == 0
    write_cuts(cuts[3:], manifest)
    assert finetune.main([*command, "2"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "it is another cut set" in said and "--accept-changes True" in said
    assert finetune.main([*command, "2", "--accept-changes", "True"]) == 0
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == [1, 2]


def test_transcripts_with_unknown_symbols_are_refused_by_name_or_marked(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = words.write("unknown", ["AB", "AXB", "CD"], ["AB", "AAB", "CD"])
    command = words.command(tmp_path / "run", "--data.cuts", cuts, "--trainer.max-steps", "1")
    said = refusal(capsys, command)
    assert "utterance 'unknown01'" in said and "'X'" in said and "--data.unknown mark" in said
    assert not (tmp_path / "run").exists()
    assert finetune.main([*command, "--data.unknown", "mark"]) == 0
    assert "3 cuts, 1 unknown characters" in capsys.readouterr().out


def test_transcripts_that_are_empty_are_left_out_and_counted_and_nothing_left_is_refused(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    cuts = words.write("empty", ["AB", "", "CD"], ["AB", "AAB", "CD"])
    assert finetune.main(words.command(tmp_path / "run", "--data.cuts", cuts, "--trainer.max-steps", "1")) == 0
    assert "3 cuts, 1 without a transcript, left out" in capsys.readouterr().out
    nothing = words.write("nothing", ["", ""], ["AB", "A"])
    said = refusal(capsys, words.command(tmp_path / "other", "--data.cuts", nothing))
    assert said.endswith("none of its 2 cuts has a transcript")


def test_targets_longer_than_frames_are_named_before_training_and_counted_while_it_runs(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    cuts = words.write("long", ["AB" * 30, "A" * 20, "CD"], ["A", "AB", "CD"])
    assert finetune.main(words.command(tmp_path / "run", "--data.cuts", cuts, "--trainer.max-steps", "1")) == 0
    assert "2 with too few frames for ctc" in capsys.readouterr().out
    assert any("the ctc loss leaves them out: long00, long01" in message for message in caplog.messages)
    (train,) = lines(tmp_path / "run", "train")
    assert train["count_too_long_ctc"] == 2 and train["num_targets"] == 2
    caplog.clear()
    tight = words.write("tight", ["AB" * 12], ["ABAB"])  # 0.7 s: 34 frames are enough for 24 tokens, 17 are not
    command = words.command(tmp_path / "fast", "--data.cuts", tight, "--data.min-seconds", "0.1", "--diagnose", "inf-check")
    assert finetune.main(command) == 0 and "too few frames" not in caplog.text
    assert finetune.main([*command, "--data.speeds", "1", "2"]) == 0
    assert "too few frames for their tokens at 2 times the speed, so that the ctc loss leaves them out: tight00" in caplog.text


def test_a_checkpoint_without_our_encoder_is_refused(whole: Path, words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = whole / "checkpoints/step-000000008.pt"
    content = dict(torch.load(last, weights_only=True))
    content["model"] = {name: value for name, value in content["model"].items() if name.startswith("ctc.")}
    torch.save(content, tmp_path / "headless.pt")
    command = words.command(tmp_path / "run", "--trainer.max-steps", "1")
    assert "holds no encoder under 'model'" in refusal(capsys, [*command, "--init", str(tmp_path / "headless.pt")])
    (tmp_path / "deeper.toml").write_text("[model.encoder]\nnum_layers = 3\n")
    said = refusal(capsys, [command[0], str(tmp_path / "deeper.toml"), *command[1:], "--init", str(last)])
    assert "another architecture" in said and "encoder.num_layers is 2 there, 3 here" in said
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_the_models_is_refused_even_where_changes_are_accepted(
    whole: Path, words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LetterTokenizer("ABCDE", NormalizationConfig()).save(tmp_path / "larger.pt")
    LetterTokenizer("BACD", NormalizationConfig()).save(tmp_path / "swapped.pt")
    said = refusal(capsys, words.command(tmp_path / "run", "--tokenizer", str(tmp_path / "larger.pt")))
    assert "model.vocab_size is 7, the tokenizer has 8 tokens; give --model.vocab-size 8" in said
    shutil.copytree(whole, tmp_path / "copy")
    command = words.command(tmp_path / "copy", *AUGMENTED, "--tokenizer", str(tmp_path / "swapped.pt"), "--trainer.max-steps", "9")
    for accepting in ([], ["--accept-changes", "True"]):
        said = refusal(capsys, [*command, *accepting])
        assert "lineage.tokenizer_sha256 is" in said
    assert "another tokenizer" in said
    shutil.copy(words.tokenizer, tmp_path / "moved.pt")
    moved = words.command(tmp_path / "copy", *AUGMENTED, "--tokenizer", str(tmp_path / "moved.pt"), "--trainer.max-steps", "9")
    assert finetune.main(moved) == 0, "where it lies does not matter"


def test_settings_that_cannot_be_are_refused(words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = words.command(tmp_path / "run")
    assert "trainer.sharding is 'fsdp'" in refusal(capsys, [*command, "--trainer.sharding", "fsdp"])
    assert "min_seconds is 0.05, at least 0.1" in refusal(capsys, [*command, "--data.min-seconds", "0.05"])
    assert "speeds holds 0.3, allowed are 0.5 to 2.0" in refusal(capsys, [*command, "--data.speeds", "1", "0.3"])
    masks = [*command, "--data.spec-augment.band-masks", "1"]
    assert "band_width is 41, allowed is at most model.frontend.num_bins, 40" in refusal(
        capsys, [*masks, "--data.spec-augment.band-width", "41"]
    )
    (tmp_path / "waveform.toml").write_text('[model.frontend]\nkind = "waveform"\n')
    said = refusal(capsys, [masks[0], str(tmp_path / "waveform.toml"), *masks[1:]])
    assert "which the waveform frontend does not have" in said and "model.masking" in said
    assert "there is no such file" in refusal(capsys, [*command, "--tokenizer", str(tmp_path / "none.pt")])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.simple-scale", "0.7"], "model.simple_scale: no effect with model.heads ctc"),
        (["--model.transducer.prune-range", "4"], "model.transducer: no effect with model.heads ctc"),
        (["--model.heads", "transducer", "--model.ctc.dropout", "0.3"], "model.ctc: no effect with model.heads transducer"),
        (["--model.ctc-scale", "0.3"], "model.ctc_scale: no effect with model.heads ctc"),
        ([*TRI_STAGE, "9", "--schedule.decay-batches", "5"], "schedule.decay_batches: no effect with schedule.max_batches 9"),
        ([*TRI_STAGE, "0", "--schedule.decay-batches", "5", *RATIO], "schedule.phase_ratio: no effect with schedule.max_batches 0"),
        (["--init-weights", "average"], "init_weights: no effect without init"),
        (["--init-batch-count", "3"], "init_batch_count: no effect without init"),
        (["--model.heads", "transducer", "--trainer.max-steps", "1999"], "model.warmup_steps is 2000, more than trainer.max_steps, 1999"),
        (["--data.spec-augment.band-width", "5"], "data.spec_augment.band_width: no effect with data.spec_augment.band_masks 0"),
        (["--data.spec-augment.time-share", "0.5"], "data.spec_augment.time_share: no effect with data.spec_augment.time_masks 0"),
        (["--model.freeze-frontend-steps", "3", "--model.freeze-encoder-steps", "3"], "model.freeze_frontend_steps: no effect below"),
    ],
)
def test_settings_without_effect_are_named(words: Words, tmp_path: Path, options: list[str], said: str) -> None:
    assert list(asr_settings_without_effect(load(finetune.Finetune, words.command(tmp_path)))) == []
    (text,) = asr_settings_without_effect(load(finetune.Finetune, words.command(tmp_path, *options)))
    assert text.startswith(said)
