"""The program transcribe: long recordings put together from windows, any audio, formats that can be read back, files that cannot be read."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from k2ssl.bin import transcribe
from k2ssl.bin.transcribe_audio import AudioReader, Window, joined, recognize, windows
from k2ssl.bin.transcribe_formats import Transcript, captions, formatted
from k2ssl.decode.hypotheses import Hypothesis
from k2ssl.decode.results import Word
from k2ssl.models.asr import AsrConfig, AsrModel
from k2ssl.models.load import config_to_dict

PER_FRAME = 640  # samples
WINDOWS = ("--window-seconds", "3", "--overlap-seconds", "1", "--batch-windows", "2")


@pytest.fixture
def run(reader: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the program and returns what it wrote to standard output."""

    def do(*arguments: str | Path, status: int = 0) -> str:
        assert transcribe.main([str(reader.checkpoint), *map(str, arguments), "--device", "cpu"]) == status
        captured = capsys.readouterr()
        do.error = captured.err  # type: ignore[attr-defined]
        return captured.out

    return do


def join(reader: Any, path: Path, numbers: Sequence[int]) -> list[str]:
    """A recording of these utterances, one after the other; returns their words."""
    soundfile.write(path, np.concatenate([soundfile.read(reader.audio(number))[0] for number in numbers]), 16000)
    return " ".join(reader.texts()[number] for number in numbers).split()


@pytest.mark.parametrize("method", ["ctc-greedy", "ctc-prefix-beam", "greedy", "modified-beam"])
def test_a_long_recording_has_the_words_of_the_utterances_that_it_is_made_of(
    reader: Any, run: Callable[..., str], tmp_path: Path, method: str
) -> None:
    numbers = [*range(10), *range(10)]
    spoken = join(reader, tmp_path / "long.wav", numbers)
    alone = run(*(reader.audio(number) for number in numbers[:10]), "--method", method).split()
    content = json.loads(run(tmp_path / "long.wav", "--method", method, "--format", "json", *WINDOWS))
    heard = content["text"].split()
    assert content["duration"] > 20 and len(spoken) == 50
    assert sum(one != two for one, two in zip(alone, spoken, strict=False)) <= 1
    assert len(heard) == 50 and sum(one != two for one, two in zip(heard, [*alone, *alone], strict=True)) <= 2
    times = [(begin, end) for _, begin, end in content["words"]]
    assert all(begin < end for begin, end in times) and all(one[1] <= two[0] for one, two in pairwise(times))
    starts = np.cumsum([0, *(soundfile.info(reader.audio(number)).duration for number in numbers)])
    firsts = np.cumsum([0, *(len(reader.texts()[number].split()) for number in numbers)])
    assert all(0 <= times[firsts[i]][0] - starts[i] <= 0.3 for i in range(20)), "words lie where their utterance begins"


@pytest.mark.parametrize("window", [48000, 48100])
def test_windows_cover_a_recording_and_begin_with_frames_of_the_whole(window: int) -> None:
    for length in (0, 1, 48000, 48001, 63999, 64000, 64001, 500_123):
        found = windows(length, window, 16000, PER_FRAME)
        assert found[0].begin == 0 and found[-1].end == length
        assert all(part.begin == part.begin_frame * PER_FRAME and part.end - part.begin <= window for part in found)
        for one, two in pairwise(found):
            assert 16000 <= one.end - two.begin <= 16000 + PER_FRAME and two.end > one.end
    assert len(windows(window, window, 16000, PER_FRAME)) == 1 and len(windows(window + 1, window, 16000, PER_FRAME)) == 2


@pytest.mark.parametrize("seed", range(5))
def test_tokens_that_neighbours_hear_alike_are_taken_once(seed: int) -> None:
    draw = np.random.default_rng(seed)
    parts = windows(400_000, 48000, 16000, PER_FRAME)
    frames = np.flatnonzero(draw.random(400_000 // PER_FRAME) < 0.3).tolist()
    heard = []
    for part in parts:
        own = [frame for frame in frames if part.begin_frame <= frame < part.end // PER_FRAME]
        heard.append(Hypothesis(tuple(own), -1.0, tuple(frame - part.begin_frame for frame in own)))
    whole = joined(parts, heard, PER_FRAME)
    assert whole.tokens == whole.frames == tuple(frames) and whole.score == -len(parts)


def test_a_seam_lies_in_the_longest_silence_of_the_middle_half_of_an_overlap() -> None:
    parts = [Window(0, 100, 0), Window(60, 160, 60)]  # the overlap is 60..100, its middle half 70..90

    def tokens(left: Iterable[int], right: Iterable[int]) -> list[int]:
        """Frames of what is kept, those of the right window negative."""
        heard = [
            Hypothesis(tuple(left), 0.0, tuple(left)),
            Hypothesis(tuple(-frame for frame in right), 0.0, tuple(frame - 60 for frame in right)),
        ]
        return list(joined(parts, heard, 1).tokens)

    # both hear tokens near 72, 74 and 88, but a frame apart: the seam is far from all of them, at 81.5
    assert tokens([10, 72, 74, 88], [73, 75, 89, 150]) == [10, 72, 74, -89, -150]
    # a word that straddles the middle of the overlap is taken whole from one of them
    assert tokens([10, 76, 78, 80, 82], [77, 79, 81, 83, 150]) == [10, 76, 78, 80, 82, -150]
    # at its ends a window is not believed, whatever the silence there
    assert tokens([10, 99], [61, 150]) == [10, -150]
    speech = range(70, 90, 3)
    assert tokens(speech, speech) == [70, 73, 76, 79, -82, -85, -88]
    # where nobody pauses, near the middle, and nothing twice
    assert tokens(range(60, 100), range(60, 100)) == [*range(60, 81), *range(-81, -100, -1)]


def test_audio_is_not_written_over_and_names_in_a_ctm_differ(
    reader: Any, run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = tmp_path / "one.wav"
    content = reader.audio(0).read_bytes()
    audio.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    run(audio, "--output", "one.wav", status=2)
    assert "output is one.wav, which is read" in run.error and audio.read_bytes() == content  # type: ignore[attr-defined]
    (tmp_path / "words.txt").write_text("AB\n")
    lexicon = ("--method", "ctc-lexicon", "--search.lexicon", "words.txt")
    run(audio, *lexicon, "--output", tmp_path / "words.txt", "--overwrite", "True", status=2)
    assert "which is read (search.lexicon: words.txt)" in run.error  # type: ignore[attr-defined]
    assert (tmp_path / "words.txt").read_text() == "AB\n"
    (tmp_path / "mine.txt").write_text("mine")
    run(audio, "--output", "mine.txt", status=2)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    run(audio, "--output", "mine.txt", "--overwrite", "True")
    assert (tmp_path / "mine.txt").read_text() == f"{reader.texts()[0]}\n"
    run(audio, "--output", tmp_path, status=2)
    assert "which is a folder; a file is needed" in run.error  # type: ignore[attr-defined]
    run(audio, "elsewhere/one.flac", "--format", "ctm", status=2)
    assert "two files of audio would have the name 'one'" in run.error  # type: ignore[attr-defined]


def test_a_model_that_gives_nan_is_no_silence() -> None:
    trained = SimpleNamespace(seconds_per_frame=0.04, sample_rate=16000)
    broken = SimpleNamespace(trained=trained, hypotheses=lambda rows, lens: [[Hypothesis((), float("nan"))]])
    with pytest.raises(ValueError, match="the model gives nan"):
        recognize(torch.zeros(16000), broken, 30.0, 2.0, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ({10: 3, 70: 4}, {95: 5, 150: 6}, [3, 4, 2, 5, 6]),  # each window hears a word of its own and silence at its end
        ({10: 3, 70: 4, 91: 2}, {95: 5}, [3, 4, 2, 5]),  # the earlier window hears the end of the word, behind the seam
        ({10: 3, 70: 4}, {71: 4, 72: 2, 95: 5}, [3, 4, 2, 5]),  # the later one hears it, before the seam
        ({10: 3, 70: 4, 91: 5}, {71: 4, 91: 5}, [3, 4, 5]),  # both hear one word, which goes on
        ({10: 3, 70: 4}, {71: 4, 91: 5}, [3, 4, 5]),  # one does
        ({10: 3, 70: 4, 91: 5}, {91: 5}, [3, 4, 5]),  # or the other
        ({10: 3, 70: 4, 72: 2}, {95: 5}, [3, 4, 2, 5]),  # there is one already
        ({}, {95: 5}, [5]),
    ],
)
def test_words_on_both_sides_of_a_seam_stay_two_words(left: dict[int, int], right: dict[int, int], expected: list[int]) -> None:
    parts = [Window(0, 100, 0), Window(60, 160, 60)]
    heard = [
        Hypothesis(tuple(left.values()), 0.0, tuple(left)),
        Hypothesis(tuple(right.values()), 0.0, tuple(frame - 60 for frame in right)),
    ]
    found = joined(parts, heard, 1, delimiter=2)
    assert list(found.tokens) == expected and list(found.frames) == sorted(found.frames)
    if 2 not in [*left.values(), *right.values()]:
        assert list(joined(parts, heard, 1).tokens) == [token for token in expected if token != 2], "pieces need no delimiter"


def word_numbers(ids: Sequence[int]) -> list[int]:
    """Tokens of 10 and more begin a word."""
    return [sum(token >= 10 for token in ids[: place + 1]) - 1 for place in range(len(ids))]


def test_words_of_a_lexicon_are_those_whose_first_tokens_are_kept() -> None:
    parts = [Window(0, 100, 0), Window(60, 160, 60)]  # the seam lies between 70 and 90
    heard = [
        Hypothesis((10, 1, 11, 2, 12), 0.0, (10, 12, 70, 71, 95), ("one", "two", "unsure")),
        Hypothesis((11, 2, 13, 3), 0.0, (11, 12, 33, 35), ("too", "three")),
    ]
    found = joined(parts, heard, 1, None, word_numbers)
    assert found.tokens == (10, 1, 11, 2, 13, 3) and found.words == ("one", "two", "three")
    silent = [*heard, Hypothesis((), 0.0)]
    assert joined([*parts, Window(120, 220, 120)], silent, 1, None, word_numbers).words == ("one", "two", "three")
    for other in (None, ("too",), ("too", "th", "ree")):  # tokens that spell, and lexicons that spell otherwise than in words
        assert joined(parts, [heard[0], Hypothesis((11, 2, 13, 3), 0.0, (11, 12, 33, 35), other)], 1, None, word_numbers).words is None


@pytest.mark.parametrize(
    ("left", "left_words", "right", "right_words", "expected"),
    [  # tokens of 10 and more begin a word, 2 is the delimiter; the overlap is 60..100
        ([(10, 10), (2, 12), (11, 68), (4, 88)], "ab cat", [(11, 68), (4, 88), (2, 90), (12, 110)], "cat d", ("ab cat d", [10, 2, 11, 4, 2, 12])),
        # what its end cuts off a window does not write; the next one has it, though before the seam
        ([(10, 10), (2, 12)], "ab", [(11, 68), (4, 88), (2, 90), (12, 110)], "cat d", ("ab cat d", [10, 2, 11, 4, 2, 12])),
        # what its beginning cuts off
        ([(10, 10), (2, 12), (11, 62), (4, 64), (2, 65)], "ab cat", [(13, 63), (2, 66), (12, 110)], "at d", ("ab cat d", [10, 2, 11, 4, 2, 12])),
        # no delimiter at the end of a window
        ([(10, 10), (2, 12), (11, 62), (4, 64)], "ab cat", [(2, 61), (12, 110)], "d", ("ab cat d", [10, 2, 11, 4, 2, 12])),
    ],
)  # fmt: skip
def test_words_of_a_lexicon_are_not_cut_by_a_seam(
    left: list[tuple[int, int]], left_words: str, right: list[tuple[int, int]], right_words: str, expected: tuple[str, list[int]]
) -> None:
    def numbers(ids: Sequence[int]) -> list[int]:
        return [-1 if token == 2 else number for token, number in zip(ids, word_numbers(ids), strict=True)]

    heard = [
        Hypothesis(tuple(token for token, _ in row), 0.0, tuple(frame - begin for _, frame in row), tuple(words.split()))
        for row, words, begin in ((left, left_words, 0), (right, right_words, 60))
    ]
    found = joined([Window(0, 100, 0), Window(60, 160, 60)], heard, 1, 2, numbers)
    assert found.words == tuple(expected[0].split()) and list(found.tokens) == expected[1]
    assert list(found.frames) == sorted(found.frames)


def test_a_word_of_the_lexicon_is_written_however_it_is_spelled(
    reader: Any, run: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("flashlight.lib.text.decoder")
    spoken = join(reader, tmp_path / "long.wav", range(6))
    lexicon = tmp_path / "lexicon.txt"
    options = ("--method", "ctc-lexicon", "--search.lexicon", lexicon, "--format", "json", *WINDOWS)
    lexicon.write_text("\n".join(f"{word.lower()}x {' '.join(word)}" for word in set(spoken)))
    content = json.loads(run(tmp_path / "long.wav", *options))
    heard = content["text"].split()
    assert [word for word, _, _ in content["words"]] == heard and set(heard) <= {f"{word.lower()}x" for word in spoken}
    assert len(heard) == len(spoken) and sum(one != f"{two.lower()}x" for one, two in zip(heard, spoken, strict=True)) <= 2
    # spelled as two words each: the tokens do not tell where the words of the lexicon begin
    lexicon.write_text("\n".join(f"{word.lower()}x {word[0]} | {' '.join(word[1:])}" for word in set(spoken)))
    assert json.loads(run(tmp_path / "long.wav", *options))["text"]
    assert "tokens do not tell where one begins" in caplog.text


def test_a_recording_may_have_any_rate_and_number_of_channels(reader: Any, run: Callable[..., str], tmp_path: Path) -> None:
    audio, _ = soundfile.read(reader.audio(1))
    time = np.arange(int(len(audio) * 44100 / 16000)) / 44100 * 16000
    fast = np.interp(time, np.arange(len(audio)), audio)
    for name in ("one", "two"):
        soundfile.write(tmp_path / f"{name}.flac", np.stack([2 * fast, np.zeros(len(fast))], axis=1) * 0.5, 44100)
    text = run(tmp_path / "one.flac", tmp_path / "two.flac")
    assert text == f"{reader.texts()[1]}\n" * 2
    samples = AudioReader(16000, True).read(str(tmp_path / "one.flac"))
    assert samples.shape == audio.shape and samples.mean().abs() < 1e-6 and samples.std() == pytest.approx(1, abs=0.01)


def test_what_is_done_to_audio_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left, right = np.full(800, 0.5), np.full(800, -0.25)
    for name in ("one", "two"):
        soundfile.write(tmp_path / f"{name}.wav", np.stack([left, right], axis=1), 8000)
    reader = AudioReader(8000, False)
    for name in ("one", "two"):
        assert torch.allclose(reader.read(str(tmp_path / f"{name}.wav")), torch.full((800,), 0.125))
    AudioReader(16000, False).read(str(tmp_path / "one.wav"))
    assert [message.partition("one.wav ")[2].partition(";")[0] for message in caplog.messages] == [
        "has 2 channels",
        "has 2 channels",
        "is at 8000 Hz",
    ]


def test_standard_input_is_read(reader: Any, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(reader.audio(1).read_bytes())))
    assert run("-") == f"{reader.texts()[1]}\n"


def test_files_that_cannot_be_read_are_named_and_the_others_are_done(
    reader: Any, run: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "noise.wav").write_bytes(b"no audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(800, np.nan), 16000, subtype="FLOAT")
    bad = [tmp_path / "noise.wav", tmp_path / "nowhere.wav", tmp_path / "empty.wav", tmp_path / "nan.wav", tmp_path]
    lines = [reader.texts()[0], *("" for _ in bad), reader.texts()[1]]
    assert run(reader.audio(0), *bad, reader.audio(1), status=1).split("\n") == [*lines, ""]
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    said = ("no audio that can be read (Error opening", "there is no such file", "holds no audio", "not finite", "a folder, not a file")
    assert all(f"{path}: " in error and words in error for path, words, error in zip(bad, said, errors, strict=True))
    assert run.error.endswith("transcribe: 5 of 7 files could not be read, see above\n")  # type: ignore[attr-defined]
    run(*bad, "--output", tmp_path / "none.txt", status=1)
    assert "none of 5 files could be read" in run.error and not list(tmp_path.glob("*none.txt*"))  # type: ignore[attr-defined]
    run(*bad, reader.audio(0), "--format", "json", "--output", tmp_path / "one.jsonl", status=1)
    assert json.loads((tmp_path / "one.jsonl").read_text())["text"] == reader.texts()[0]


def test_a_text_named_like_an_mp3_is_said_to_be_no_audio_and_not_to_be_absent(
    reader: Any, run: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "text.mp3").write_text("this is not audio, whatever its name says" * 10)
    run(tmp_path / "text.mp3", reader.audio(0), status=1)
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert error.endswith("text.mp3': Format not recognised.)")


def test_silence_and_too_little_audio_give_an_empty_text(run: Callable[..., str], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "short.wav", np.zeros(100), 16000)
    assert run(tmp_path / "short.wav") == "\n"
    assert run(tmp_path / "short.wav", "--format", "srt") == run(tmp_path / "short.wav", "--format", "ctm") == ""
    assert json.loads(run(tmp_path / "short.wav", "--format", "json"))["words"] == []


def test_subtitles_and_word_times_can_be_read_back(reader: Any, run: Callable[..., str], tmp_path: Path) -> None:
    words = join(reader, tmp_path / "my talk.wav", range(10))
    content = json.loads(run(tmp_path / "my talk.wav", "--format", "json", *WINDOWS))
    ctm = [line.split() for line in run(tmp_path / "my talk.wav", "--format", "ctm", *WINDOWS).splitlines()]
    assert [[word, pytest.approx(float(b), abs=2e-3), pytest.approx(float(b) + float(d), abs=2e-3)] for _, _, b, d, word in ctm] == content[
        "words"
    ]
    assert {(name, channel) for name, channel, *_ in ctm} == {("my_talk", "1")}
    assert run(tmp_path / "my talk.wav", "--format", "srt", "--output", str(tmp_path / "out.srt"), *WINDOWS) == ""
    blocks = (tmp_path / "out.srt").read_text().strip().split("\n\n")
    clock = r"(\d\d):(\d\d):(\d\d),(\d{3})"
    texts = []
    for number, block in enumerate(blocks, start=1):
        first, times, text = block.split("\n")
        match = re.fullmatch(f"{clock} --> {clock}", times)
        assert first == str(number) and match is not None
        texts.append(text)
    assert " ".join(texts) == content["text"] and len(content["text"].split()) == len(words) and len(blocks) > 1


def test_captions_end_at_pauses_and_before_they_grow_too_long() -> None:
    quick = [Word("abcdefghi", i * 0.1, i * 0.1 + 0.1) for i in range(20)]
    assert [len(caption) for caption in captions(quick)] == [8, 8, 4]  # 8 words and the spaces between: 79 characters
    slow = [Word("a", i * 1.0, i * 1.0 + 1.0) for i in range(10)]
    assert [len(caption) for caption in captions(slow)] == [7, 3]
    pause = [Word("a", 0.0, 0.5), Word("b", 1.4, 1.6), Word("c", 2.6, 3.0)]
    assert [len(caption) for caption in captions(pause)] == [2, 1]
    late = formatted(Transcript("x.wav", 4000.0, (Word("a", 3661.5, 3662.0),)), "srt")
    assert late == "1\n01:01:01,500 --> 01:01:02,000\na\n\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["AUDIO", "AUDIO", "--format", "srt"], "format is 'srt', which is for one file, and audio names 2"),
        (["-", "-"], "audio names standard input (-) more than once"),
        (["AUDIO", "--search.nbest", "2"], "search.nbest is 2, which has no effect here"),
        (["AUDIO", "--method", "greedy", "--search.beam", "2"], "search.beam is 2, which has no effect with method 'greedy'"),
        (["AUDIO", "--search.max-symbols-per-frame", "2"], "which has no effect with method 'modified-beam'"),
        (["AUDIO", "--overlap-seconds", "20"], "at most half of them"),
        (["AUDIO", "--batch-windows", "0"], "batch_windows is 0"),
        (
            ["AUDIO", "--window-seconds", "0.03", "--overlap-seconds", "0.01"],
            "window_seconds is 0.03 and overlap_seconds 0.01; a window must",
        ),
        (["AUDIO", "--window-seconds", "0.06", "--overlap-seconds", "0.03"], "longer than the overlap by one frame (0.04 s)"),
        ([], "audio"),
    ],
)
def test_wrong_settings_are_refused(run: Callable[..., str], reader: Any, options: list[str], said: str) -> None:
    assert run(*(reader.audio(0) if option == "AUDIO" else option for option in options), status=2) == ""
    assert said in run.error  # type: ignore[attr-defined]


def test_a_model_without_a_transducer_is_searched_greedily(reader: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AsrModel(AsrConfig.tiny(7, "ctc"))
    tokenizer = torch.load(reader.checkpoint, weights_only=True)["tokenizer"]
    torch.save({"config": config_to_dict(model.config), "model": model.state_dict(), "tokenizer": tokenizer}, tmp_path / "ctc.pt")
    command = [str(tmp_path / "ctc.pt"), str(reader.audio(0)), "--device", "cpu"]
    assert transcribe.main(command) == 0
    assert transcribe.main([*command, "--method", "modified-beam"]) == 2
    assert "the checkpoint has no transducer head" in capsys.readouterr().err


def test_an_interrupted_run_leaves_no_file(reader: Any, run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(transcribe, "recognize", interrupted)
    assert run(reader.audio(0), "--output", str(tmp_path / "out.txt"), status=130) == ""
    assert not list(tmp_path.iterdir())
