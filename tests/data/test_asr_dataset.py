"""Utterances arrive whole, with their own transcripts; those without one are left out and counted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import MonoCut, MultiCut

from k2ssl.batch import AsrBatch
from k2ssl.data.asr_dataset import AsrDataset
from k2ssl.data.audio import read_utterance
from k2ssl.data.audio_dataset import Request
from k2ssl.data.intake import Intake, transcript
from k2ssl.data.loader import asr_loader
from k2ssl.data.tokenizer import LetterTokenizer, NormalizationConfig

RATE = 16000


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    path = tmp_path_factory.mktemp("asr") / "noise.flac"
    soundfile.write(path, np.random.default_rng(0).normal(0.01, 0.1, 10 * RATE).clip(-1, 1), RATE, subtype="PCM_16")
    return Recording.from_file(path)


def utterance(recording: Recording, name: str, seconds: float, *texts: str | None) -> MonoCut:
    cut = MonoCut(name, start=0.5, duration=seconds, channel=0, recording=recording)
    cut.supervisions = [SupervisionSegment(f"{name}-{i}", recording.id, float(i), 1.0, text=text) for i, text in enumerate(texts)]
    return cut


def batch_of(cuts: list[MonoCut], **options: Any) -> AsrBatch:
    loaded = AsrDataset(**options)[Request(0, tuple(cuts))]
    assert loaded.batch is not None and not loaded.failures
    return loaded.batch


def test_audio_is_padded_and_stays_with_its_text(recording: Recording) -> None:
    cuts = [utterance(recording, "a", 1.0, "ONE"), utterance(recording, "b", 2.5, "TWO THREE"), utterance(recording, "c", 0.03, "X")]
    batch = batch_of(cuts)
    assert batch.ids == ("a", "b", "c") and batch.texts == ("ONE", "TWO THREE", "X")
    assert batch.audio_lens is not None and batch.audio_lens.tolist() == [16000, 40000, 480] and batch.audio_lens.dtype == torch.int64
    for row, length, cut in zip(batch.audio, batch.audio_lens.tolist(), cuts, strict=True):
        assert np.array_equal(row[:length].numpy(), read_utterance(cut, normalize=False)) and not row[length:].any()
    moved = batch.to("cpu")
    assert torch.equal(moved.audio, batch.audio) and moved.audio_lens is batch.audio_lens and moved.texts == batch.texts


def test_nothing_padded_means_no_lengths(recording: Recording) -> None:
    assert batch_of([utterance(recording, name, 1.0, "A") for name in "ab"]).audio_lens is None


def test_each_utterance_is_normalised_without_its_padding(recording: Recording) -> None:
    cuts = [utterance(recording, "a", 0.5, "A"), utterance(recording, "b", 2.0, "B")]
    plain, ours = batch_of(cuts), batch_of(cuts, normalize=True)
    for row, samples in ((0, 8000), (1, 32000)):
        expected = F.layer_norm(plain.audio[row, :samples].double(), (samples,))
        assert (ours.audio[row, :samples] - expected).abs().max() < 1e-5 and not ours.audio[row, samples:].any()


@given(texts=st.lists(st.one_of(st.none(), st.text(alphabet=" \t\nABÉ'", max_size=5)), max_size=4))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_transcript_is_empty_exactly_when_no_supervision_says_anything(recording: Recording, texts: list[str | None]) -> None:
    cut = utterance(recording, "a", 5.0, *texts)
    words = [word for text in texts if text for word in text.split()]
    assert transcript(cut).split() == words
    intake = Intake(RATE, need_text=True)
    assert [each.id for each in intake([cut])] == (["a"] if words else [])
    assert intake.excluded == ({} if words else {"with an empty transcript": 1})


def test_supervisions_are_joined_in_order_of_time(recording: Recording) -> None:
    cut = utterance(recording, "a", 5.0, "ONE", " TWO ", None, "THREE")
    cut.supervisions.reverse()
    assert transcript(cut) == "ONE TWO THREE"


def corpus(recording: Recording) -> CutSet:
    texts: list[tuple[str | None, ...]] = [("HELLO",), ("",), ("  ",), (None,), (), ("A", "B")]
    return CutSet.from_cuts(utterance(recording, f"u{i}", 1 + i % 7, *texts[i % 6]) for i in range(60))


@pytest.mark.parametrize("workers", [0, 2])
def test_empty_transcripts_are_left_out_and_counted(recording: Recording, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    loader = asr_loader(corpus(recording), max_duration=20.0, num_workers=workers, num_buckets=3, max_seconds=6.5)
    with caplog.at_level(logging.INFO):
        batches = list(loader)
    seen = {name: text for batch in batches for name, text in zip(batch.ids, batch.texts, strict=True)}
    expected = {f"u{i}": "HELLO" if i % 6 == 0 else "A B" for i in range(60) if i % 6 in (0, 5) and i % 7 != 6}
    assert seen == expected and sum(len(batch.ids) for batch in batches) == len(expected)
    assert loader.excluded == {
        "with an empty transcript": 40 - sum(i % 7 == 6 for i in range(60) if i % 6 in (1, 2, 3, 4)),
        "longer than 6.5 s": 8,
    }
    assert "with an empty transcript" in caplog.text and "longer than 6.5 s" in caplog.text
    assert all(batch.audio.numel() <= 20 * RATE for batch in batches), "padding included"


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_gives_ranks_equally_many_batches_and_decoding_every_utterance(recording: Recording, world_size: int) -> None:
    def batches(drop_incomplete: bool) -> list[list[AsrBatch]]:
        options: dict[str, Any] = {"max_duration": 9.0, "num_buckets": 3, "world_size": world_size, "drop_incomplete": drop_incomplete}
        return [list(asr_loader(corpus(recording), rank=rank, shuffle=drop_incomplete, **options)) for rank in range(world_size)]

    assert len({len(of_rank) for of_rank in batches(True)}) == 1
    ids = [name for of_rank in batches(False) for batch in of_rank for name in batch.ids]
    assert sorted(ids) == sorted(f"u{i}" for i in range(60) if i % 6 in (0, 5))


def test_an_interrupted_epoch_goes_on_with_the_same_batches(recording: Recording, tmp_path: Path) -> None:
    def loader(**options: Any) -> Any:
        return asr_loader(corpus(recording), max_duration=9.0, num_buckets=2, seed=4, **options)

    straight = list(loader())
    interrupted, resumed = loader(num_workers=2), loader()
    batches = iter(interrupted)
    before = [next(batches) for _ in range(3)]
    resumed.load_state_dict(interrupted.state_dict())
    again = before + list(resumed)
    assert len(straight) > 4 and [batch.ids for batch in again] == [batch.ids for batch in straight]
    assert all(torch.equal(ours.audio, theirs.audio) for ours, theirs in zip(again, straight, strict=True))


def test_a_state_of_a_loader_that_left_out_other_cuts_is_refused(recording: Recording) -> None:
    ours, other = (asr_loader(corpus(recording), max_duration=9.0, num_buckets=2) for _ in range(2))
    for name, intake in {"need_text was True": Intake(RATE), "max_samples was None": Intake(RATE, max_seconds=6.0, need_text=True)}.items():
        other.intake = intake
        with pytest.raises(ValueError, match=f"loader state: {name} when it was saved and is"):
            other.load_state_dict(ours.state_dict())


LETTERS = LetterTokenizer("ABEHLO", NormalizationConfig())


def test_a_tokenizer_gives_every_utterance_its_tokens(recording: Recording) -> None:
    cuts = [utterance(recording, "a", 1.0, "HELLO"), utterance(recording, "b", 2.5, "A  B")]
    batch = batch_of(cuts, tokenizer=LETTERS)
    assert batch.tokens is not None and batch.token_lens is not None and batch.tokens.dtype == batch.token_lens.dtype == torch.int64
    assert batch.token_lens.tolist() == [5, 3]
    assert [LETTERS.decode(row[:length].tolist()) for row, length in zip(batch.tokens, batch.token_lens, strict=True)] == ["HELLO", "A B"]
    assert batch_of(cuts).tokens is None and batch_of(cuts).token_lens is None


def test_unknown_symbols_are_refused_by_the_utterances_name_or_marked(recording: Recording) -> None:
    cuts = [utterance(recording, "a", 1.0, "HELLO"), utterance(recording, "b", 2.5, "AXB")]
    with pytest.raises(ValueError, match=r"utterance 'b': .*'X'"):
        batch_of(cuts, tokenizer=LETTERS)
    batch = batch_of(cuts, tokenizer=LETTERS, unknown="mark")
    assert batch.tokens is not None and batch.tokens[1, :3].tolist() == [*LETTERS.encode("A"), LETTERS.unk, *LETTERS.encode("B")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_makes_tokens_and_an_interrupted_one_goes_on_with_the_same_tokenizer_only(recording: Recording, workers: int) -> None:
    def loader(**options: Any) -> Any:
        return asr_loader(corpus(recording), max_duration=9.0, num_buckets=2, num_workers=workers, **options)

    ours = loader(tokenizer=LETTERS)
    batch = next(iter(ours))
    assert [LETTERS.decode(row[:n].tolist()) for row, n in zip(batch.tokens, batch.token_lens, strict=True)] == list(batch.texts)
    state = ours.state_dict()
    loader(tokenizer=LETTERS).load_state_dict(state)
    others = [{}, {"tokenizer": LetterTokenizer("ABEHOL", NormalizationConfig())}, {"tokenizer": LETTERS, "unknown": "mark"}]
    for options in others:
        with pytest.raises(ValueError, match="loader state: "):
            loader(**options).load_state_dict(state)


def test_of_several_channels_the_first_ones_transcript_counts(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "two.wav", np.random.default_rng(1).normal(0, 0.1, (RATE, 2)), RATE)
    both = Recording.from_file(tmp_path / "two.wav")

    def cut(name: str, *texts: str | None) -> MultiCut:
        said = [SupervisionSegment(f"{name}-{i}", both.id, 0.0, 1.0, channel=i, text=text) for i, text in enumerate(texts) if text]
        return MultiCut(name, start=0.0, duration=1.0, channel=[0, 1], recording=both, supervisions=said)

    cuts = [cut("second", None, "HELLO"), cut("both", "ONE", "TWO")]
    assert [transcript(one) for one in cuts] == ["", "ONE"]
    loader = asr_loader(CutSet.from_cuts(cuts), max_duration=10, num_buckets=1, drop_incomplete=False)
    assert [batch.texts for batch in loader] == [("ONE",)] and loader.excluded == {"with an empty transcript": 1}
