"""The quickstart's spoken corpus: its sentences and acoustics by themselves, and all of it where the speech synthesiser is installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from k2ssl.data.audio_layouts import chapter_items, chapter_splits

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart"
MODULES = ("acoustics", "espeak", "prompts", "make_corpus")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The program as a module; it finds its neighbours as it does when it is run."""
    monkeypatch.syspath_prepend(RECIPE)
    import make_corpus

    yield make_corpus
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def prompts(recipe: ModuleType) -> ModuleType:
    return sys.modules["prompts"]


@pytest.fixture
def acoustics(recipe: ModuleType) -> ModuleType:
    return sys.modules["acoustics"]


def make(recipe: ModuleType, out: Path, *arguments: object) -> int:
    sizes = ("--train-minutes", 0.1, "--dev-minutes", 0.1, "--test-minutes", 0.2)
    return recipe.main([str(argument) for argument in ("--out", out, "--quiet", *sizes, *arguments)])


# Sentences


@pytest.mark.parametrize("seed", range(5))
def test_no_sentence_is_in_two_parts_and_all_words_are_learnt_in_training(prompts: ModuleType, seed: int) -> None:
    parts = prompts.sentences(seed)
    assert {part: len(set(parts[part])) for part in parts} == {"train": 480, "dev": 60, "test": 100}
    assert len({sentence for part in parts for sentence in parts[part]}) == 640
    words = {part: {word for sentence in parts[part] for word in sentence.split()} for part in parts}
    assert words["dev"] <= words["train"] and words["test"] <= words["train"]
    assert 60 <= len(words["train"]) <= 120


def test_the_first_sentence_of_each_training_voice_together_hold_all_words(prompts: ModuleType, recipe: ModuleType) -> None:
    for seed in range(5):
        train = prompts.sentences(seed)["train"]
        first = train[: len(recipe.VARIANTS["train"])]
        assert {word for sentence in first for word in sentence.split()} == {word for sentence in train for word in sentence.split()}


def test_sentences_are_of_three_to_nine_upper_case_words_none_twice_for_the_same_place(prompts: ModuleType) -> None:
    everything = [sentence for part in prompts.sentences(0).values() for sentence in part]
    assert all(re.fullmatch(r"[A-Z]+( [A-Z]+){2,8}", sentence) for sentence in everything)
    for kind in ("name", "weather"):
        words = prompts.WORDS[kind].split()
        said = [[word for word in sentence.split() if word in words] for sentence in everything]
        assert max(map(len, said)) == 2 and all(len(set(some)) == len(some) for some in said)


def test_the_seed_decides_the_sentences(prompts: ModuleType) -> None:
    assert prompts.sentences(3) == prompts.sentences(3)
    assert prompts.sentences(3)["test"] != prompts.sentences(4)["test"]


def test_the_order_goes_through_all_sentences_before_one_comes_again(prompts: ModuleType) -> None:
    some = [f"S{number}" for number in range(20)]
    said = list(islice(prompts.order(some, 0, "train"), 60))
    assert said[:20] == some
    assert sorted(said[20:40]) == sorted(said[40:]) == sorted(some)
    assert said[20:40] != some and said[20:40] != said[40:]


# Voices


def test_parts_share_neither_variants_nor_numbers(recipe: ModuleType) -> None:
    voices = recipe.speakers(0)
    variants = {part: {voice.variant for voice in voices if voice.part == part} for part in ("train", "dev", "test")}
    assert [len(variants[part]) for part in variants] == [32, 4, 4]
    assert len(set.union(*variants.values())) == 40
    assert [voice.number for voice in voices] == list(range(1, 41))
    assert set.union(*variants.values()) >= recipe.FEMALE


# Acoustics


@pytest.mark.parametrize("hertz", [100, 1000, 6000])
def test_a_tone_keeps_frequency_phase_and_height_at_another_rate(acoustics: ModuleType, hertz: int) -> None:
    def tone(rate: int) -> np.ndarray:
        seconds = np.arange(rate) / rate
        return np.sin(2 * np.pi * hertz * seconds) * np.hanning(rate)

    resampled = acoustics.resample(tone(22050), 22050, 16000)
    assert len(resampled) == 16000
    np.testing.assert_allclose(resampled[100:-100], tone(16000)[100:-100], atol=2e-4)


def test_what_the_new_rate_cannot_hold_is_taken_out(acoustics: ModuleType) -> None:
    seconds = np.arange(22050) / 22050
    resampled = acoustics.resample(np.sin(2 * np.pi * 9500 * seconds) * np.hanning(22050), 22050, 16000)
    assert np.abs(resampled).max() < 1e-3


def test_a_room_decays_by_60_db_in_its_time_and_is_as_weak_as_asked(acoustics: ModuleType) -> None:
    response = acoustics.room(np.random.default_rng(0), 16000, decay=0.3, direct_to_reverberant=6.0)
    tail = response[1:] ** 2
    assert response[0] == 1 and len(response) == 4800
    assert 10 * np.log10(1 / tail.sum()) == pytest.approx(6.0)
    fall = 10 * np.log10(tail[:800].sum() / tail[2400:3200].sum())  # 0.15 s apart: half of 60 dB
    assert fall == pytest.approx(30, abs=1.0)


def test_sound_arrives_directly_and_again_after_the_delay(acoustics: ModuleType) -> None:
    audio = np.random.default_rng(0).standard_normal(1000)
    response = np.zeros(301)
    response[[0, 300]] = 1.0, 0.5
    arrived = acoustics.convolve(audio, response)
    assert len(arrived) == 1000
    np.testing.assert_allclose(arrived[300:], audio[300:] + 0.5 * audio[:-300], atol=1e-9)
    np.testing.assert_allclose(arrived[:300], audio[:300], atol=1e-9)


@pytest.mark.parametrize(("pink", "octave"), [(0.0, 0.0), (1.0, 3.0)])
def test_noise_has_unit_power_and_pink_noise_falls_by_3_db_an_octave(acoustics: ModuleType, pink: float, octave: float) -> None:
    background = acoustics.noise(np.random.default_rng(0), 160000, 16000, pink)
    assert np.mean(background**2) == pytest.approx(1.0)
    power = np.abs(np.fft.rfft(background)) ** 2
    low, high = power[5000:10000].mean(), power[40000:80000].mean()  # 500 to 1000 Hz and 4 to 8 kHz, three octaves apart
    assert 10 * np.log10(low / high) == pytest.approx(3 * octave, abs=0.4)


def test_noise_is_so_much_weaker_than_the_audio(acoustics: ModuleType) -> None:
    audio = 0.01 * np.random.default_rng(0).standard_normal(16000)
    background = acoustics.noise(np.random.default_rng(1), 16000, 16000, 0.5)
    added = acoustics.add_noise(audio, background, 20.0) - audio
    assert 10 * np.log10(np.mean(audio**2) / np.mean(added**2)) == pytest.approx(20.0)


def test_the_level_is_as_asked_and_peaks_are_never_clipped(acoustics: ModuleType) -> None:
    audio = np.sin(np.arange(16000) / 10)
    samples = acoustics.to_16_bit(audio, -25.0) / 32767
    assert samples.dtype == np.float64 and 20 * np.log10(np.sqrt(np.mean(samples**2))) == pytest.approx(-25.0, abs=0.01)
    click = np.zeros(16000)
    click[500] = -1.0
    loud = acoustics.to_16_bit(click, -25.0)
    assert loud.dtype == np.int16 and loud.min() == -round(0.95 * 32767)


# Refusals


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--train-minutes", "0"),
        ("--dev-minutes", "-1"),
        ("--test-minutes", "inf"),
        ("--seed", "-1"),
        ("--num-workers", "0"),
        ("--loud", "1"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(recipe: ModuleType, tmp_path: Path, option: str, value: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        make(recipe, tmp_path / "corpus", option, value)
    assert stopped.value.code == 2 and not (tmp_path / "corpus").exists()


def test_without_the_synthesiser_the_command_that_gets_it_is_named(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe.importlib.util, "find_spec", lambda name: None)
    assert make(recipe, tmp_path / "corpus") == 1
    assert "pip install -c constraints.txt -e '.[quickstart]'" in capsys.readouterr().err
    assert not (tmp_path / "corpus").exists()


def test_a_folder_with_another_corpus_is_refused(recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "SPEAKERS.TXT").write_text("mine")
    assert make(recipe, tmp_path) == 1
    assert "SPEAKERS.TXT, but no corpus.json" in capsys.readouterr().err
    (tmp_path / "corpus.json").write_text("[]")
    assert make(recipe, tmp_path) == 1
    assert "not written by this program" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["corpus.json", "corpus.unfinished.json"])
def test_other_settings_are_refused_by_name(recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    settings = {"train_minutes": 0.1, "dev_minutes": 7.0, "test_minutes": 0.2, "seed": 5, "format": recipe.FORMAT}
    (tmp_path / name).write_text(json.dumps({"settings": settings} if name == "corpus.json" else settings))
    assert make(recipe, tmp_path, "--seed", 6) == 1
    said = capsys.readouterr().err
    assert "dev_minutes is 7, not 0.1" in said and "seed is 5, not 6" in said and "train" not in said


def test_a_synthesiser_that_ends_early_is_an_error_with_its_words(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "espeak.py"
    beginning = "import sys\nprint('{\"sample_rate\": 22050}', flush=True)\nsys.stdin.readline()\n"
    program.write_text(beginning + "sys.stdout.buffer.write(b'\\x09\\0\\0\\0abc')\nsys.exit('out of voice')\n")
    monkeypatch.setattr(recipe, "__file__", str(tmp_path / "make_corpus.py"))
    with recipe.Synthesiser("en+m1") as synthesiser, pytest.raises(ValueError, match="out of voice"):
        synthesiser.say("hello", 160, 50, 50)
    program.write_text(beginning + "sys.stdout.buffer.write(b'\\4\\0\\0\\0' + bytes(4))\n")
    with recipe.Synthesiser("en+m1") as synthesiser, pytest.raises(ValueError, match="silence for 'hello'"):
        synthesiser.say("hello", 160, 50, 50)
    program.write_text("")
    with pytest.raises(ValueError, match="status 0"):
        recipe.Synthesiser("en+m1")


# With the synthesiser


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of one utterance a training voice, some more of the others, made as its users do."""
    pytest.importorskip("espeakng_loader", reason="the speech synthesiser is missing: pip install -c constraints.txt -e '.[quickstart]'")
    out = tmp_path_factory.mktemp("spoken") / "corpus"
    sizes = ("--train-minutes", "0.1", "--dev-minutes", "0.1", "--test-minutes", "0.2")
    command = [sys.executable, str(RECIPE / "make_corpus.py"), "--out", str(out), *sizes]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "32 voices, 32 utterances" in finished.stdout
    return out


def test_the_corpus_reads_as_one_with_chapters(corpus: Path) -> None:
    splits = chapter_splits(corpus)
    assert set(splits) == {"train-clean-quick", "dev-clean-quick", "test-clean-quick"}
    said, voices = {}, {}
    for name, folder in splits.items():
        listing = list(chapter_items(folder))
        assert len(listing) == len(list(folder.rglob("*.flac")))
        texts = dict(line.split(" ", 1) for path in folder.rglob("*.trans.txt") for line in path.read_text().splitlines())
        assert set(texts) == {path.stem for path in folder.rglob("*.flac")}
        said[name], voices[name] = set(texts.values()), {path.name for path in folder.iterdir()}
    for name, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert said[f"{name}-clean-quick"].isdisjoint(said[f"{other}-clean-quick"])
        assert voices[f"{name}-clean-quick"].isdisjoint(voices[f"{other}-clean-quick"])
    words = {name: {word for text in texts for word in text.split()} for name, texts in said.items()}
    assert words["test-clean-quick"] <= words["train-clean-quick"]


def test_every_file_is_audible_speech_without_clipping(corpus: Path) -> None:
    for path in corpus.rglob("*.flac"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16") and 0.9 < info.duration < 5
        audio, _ = soundfile.read(path)
        frames = audio[: len(audio) // 400 * 400].reshape(-1, 400)
        loudness = 10 * np.log10(np.mean(frames**2, axis=1) + 1e-12)
        assert np.abs(audio).max() < 0.96
        assert -45 < 10 * np.log10(np.mean(audio**2)) < -19
        assert np.quantile(loudness, 0.9) - np.quantile(loudness, 0.05) > 8  # the loud parts stand out from the background


def test_parts_last_as_long_as_asked_within_a_sentence_a_voice(corpus: Path) -> None:
    parts = json.loads((corpus / "corpus.json").read_text())["subsets"]
    assert not (corpus / "corpus.unfinished.json").exists()
    for part, minutes in (("dev", 0.1), ("test", 0.2)):
        seconds = sum(soundfile.info(path).duration for path in (corpus / f"{part}-clean-quick").rglob("*.flac"))
        assert parts[f"{part}-clean-quick"]["minutes"] == pytest.approx(seconds / 60, abs=0.002)
        assert abs(parts[f"{part}-clean-quick"]["minutes"] - minutes) < 4 * 2.5 / 60
    assert parts["test-clean-quick"]["utterances"] >= 4
    rows = [[field.strip() for field in line.split("|")] for line in (corpus / "SPEAKERS.TXT").read_text().splitlines()]
    assert len(rows) == 41 and rows[1][:3] == ["1", "M", "train-clean-quick"] and rows[34][:3] == ["34", "F", "dev-clean-quick"]
    assert sum(float(row[3]) for row in rows[1:33]) == pytest.approx(parts["train-clean-quick"]["minutes"], abs=0.2)


def test_an_interrupted_corpus_is_finished_with_the_same_bytes_whatever_the_workers(
    corpus: Path, recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "corpus", recipe.make_chapter

    def interrupted(*arguments: object) -> None:
        if len(list(out.rglob("*.trans.txt"))) == 3:
            raise KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(recipe, "make_chapter", interrupted)
    assert make(recipe, out, "--num-workers", 1) == 130
    assert not (out / "corpus.json").exists()
    kept = next(out.rglob("*.trans.txt"))
    first = kept.stat().st_mtime_ns
    begun = out / "train-clean-quick" / "4" / "1"  # a chapter that a killed run left
    begun.mkdir(parents=True, exist_ok=True)
    (begun / ".4-1-0000.flac.77.part").write_bytes(b"half")
    (begun / "4-1-0000.flac").write_bytes(b"old")

    monkeypatch.setattr(recipe, "make_chapter", whole)
    assert make(recipe, out, "--num-workers", 3) == 0
    files = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert files == {path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file()}
    assert all((out / path).read_bytes() == (corpus / path).read_bytes() for path in files)
    assert kept.stat().st_mtime_ns == first

    capsys.readouterr()
    monkeypatch.setattr(recipe, "make_chapter", None)
    assert make(recipe, out) == 0
    assert "this corpus is finished" in capsys.readouterr().out


def test_all_voices_exist_and_differ(recipe: ModuleType) -> None:
    data = Path(pytest.importorskip("espeakng_loader", reason="the speech synthesiser is missing").get_data_path())
    assert all((data / "voices" / "!v" / voice.variant).is_file() for voice in recipe.speakers(0))
    audio = []
    for voice in ("en-us+m1", "en-us+f1", "en+m1"):
        with recipe.Synthesiser(voice) as synthesiser:
            audio.append(synthesiser.say("open the door", 160, 50, 50).tobytes())
    assert len(set(audio)) == 3
    for voice in ("en+nobody", "xx+m1"):
        with pytest.raises(ValueError, match=f"no voice {re.escape(voice)}"):
            recipe.Synthesiser(voice)


def test_breathy_voices_sound_the_same_at_another_time_of_day(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("espeakng_loader", reason="the speech synthesiser is missing")
    said = []
    for _ in range(2):
        with recipe.Synthesiser("en+f5") as synthesiser:
            said.append(synthesiser.say("open the door", 160, 50, 50).tobytes())
        time.sleep(1.05 - time.time() % 1)  # the library's own seed is the time in seconds
    assert said[0] == said[1]
