"""Span masks against an independent implementation of fairseq's statistics, and on inputs where that one fails."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2ssl.models.asr import AsrConfig, AsrModel
from k2ssl.models.frontend import LogMelConfig
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.masking import MaskingConfig, draw_span_mask, most_hidden, select_true
from k2ssl.models.speech_encoder import SpeechEncoder


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _reference_mask(rows: int, frames: int, probability: float, length: int, min_spans: int, rng: np.random.Generator) -> np.ndarray:
    """One row after the other, as the statistics are described."""
    hidden = []
    for _ in range(rows):
        spans = max(int(probability * frames / length + rng.random()), min_spans)
        starts = rng.choice(frames - length, spans, replace=False)
        hidden.append(np.unique((starts[:, None] + np.arange(length)).ravel()))
    fewest = min(map(len, hidden))
    mask = np.zeros((rows, frames), dtype=bool)
    for row, positions in zip(mask, hidden, strict=True):
        row[rng.choice(positions, fewest, replace=False)] = True
    return mask


@pytest.mark.parametrize(("probability", "frames"), [(0.8, 390), (0.65, 200), (0.8, 60)])
def test_coverage_and_runs_are_those_of_the_reference(probability: float, frames: int) -> None:
    rng, generator = np.random.default_rng(0), _generator(0)
    ours = [draw_span_mask(torch.full((16,), frames), frames, probability, 10, 2, generator, True).numpy() for _ in range(300)]
    theirs = [_reference_mask(16, frames, probability, 10, 2, rng) for _ in range(300)]

    def statistics(masks: list[np.ndarray]) -> np.ndarray:
        stacked = np.concatenate(masks)
        starts = (stacked[:, 1:] & ~stacked[:, :-1]).sum(axis=1).mean() / frames
        return np.array([stacked.mean(), starts, stacked[:, :10].mean(), stacked[:, -10:].mean()])

    difference = np.abs(statistics(ours) - statistics(theirs))
    assert (difference <= [0.013, 0.004, 0.03, 0.03]).all(), difference  # four standard errors of the difference of two such samples


def test_the_published_mask_hides_about_57_percent() -> None:
    mask = draw_span_mask(torch.full((1,), 5000), 5000, 0.8, 10, 2, _generator(1), True)
    assert mask.float().mean().item() == pytest.approx(0.55, abs=0.03)  # 1 - (1 - 10 / T)^(.8 T / 10) -> 1 - exp(-.8) = .551


@settings(max_examples=200, deadline=None)
@given(
    lens=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    probability=st.floats(0, 1),
    length=st.integers(1, 20),
    min_spans=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_masks_of_any_lengths_have_equal_counts_inside_the_utterances(
    lens: list[int], probability: float, length: int, min_spans: int, seed: int
) -> None:
    max_len = max(lens) + seed % 3
    mask = draw_span_mask(torch.tensor(lens), max_len, probability, length, min_spans, _generator(seed), True)
    counts = mask.sum(dim=1)
    assert mask.shape == (len(lens), max_len)
    assert (counts == counts[0]).all()
    assert counts[0] <= most_hidden(max_len, probability, length, min_spans)
    for row, n in zip(mask, lens, strict=True):
        assert not row[n:].any()
        assert n == 1 or not row[:n].all()
    assert min_spans == 0 or counts[0] >= 1


@settings(max_examples=100, deadline=None)
@given(lens=st.lists(st.integers(30, 300), min_size=2, max_size=5), length=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_spans_of_rows_of_different_lengths_stay_whole(lens: list[int], length: int, seed: int) -> None:
    mask = draw_span_mask(torch.tensor(lens), max(lens), 0.5, length, 2, _generator(seed), False)
    for row, n in zip(mask, lens, strict=True):
        assert not row[n:].any() and row.any() and not row[:n].all()
        runs = [len(list(run)) for hidden, run in itertools.groupby(row[:n].tolist()) if hidden]
        assert all(run >= length for run in runs)


def test_a_short_row_takes_nothing_from_the_mask_of_a_long_one() -> None:
    lens = torch.tensor([40, 1000])
    masks = torch.stack([draw_span_mask(lens, 1000, 0.65, 10, 2, _generator(seed), False) for seed in range(200)])
    alone = torch.stack([draw_span_mask(lens[1:], 1000, 0.65, 10, 2, _generator(seed), False) for seed in range(200)])
    shares = masks.float().mean(dim=(0, 2)) * 1000 / lens
    assert shares[1] == pytest.approx(alone.float().mean().item(), abs=0.01) and 0.45 < shares[1] < 0.52 and shares[0] > 0.4
    together = draw_span_mask(lens, 1000, 0.65, 10, 2, _generator(0), True)
    assert together[1].sum() == together[0].sum() < 40, "as fairseq has it, nearly nothing of the long row is hidden"


@pytest.mark.parametrize("kind", ["hubert", "asr"])
@pytest.mark.parametrize("equal", [True, False])
def test_as_many_frames_are_hidden_in_all_utterances_if_asked(kind: str, equal: bool) -> None:
    model = _on_log_mel(kind, frozen=False, equal_counts=equal)
    lens = torch.tensor([400 + 320 * 39, 400 + 320 * 399])
    counts = model.draw_mask(torch.zeros(2, int(lens[1])), lens).sum(dim=1)
    assert (counts[0] == counts[1]) == equal and counts[1] > (1 if equal else 4) * counts[0] - 1


@pytest.mark.parametrize("equal", [True, False])
def test_channels_of_many_utterances_are_hidden_as_those_of_few_unless_counts_are_equal(equal: bool) -> None:
    model = _on_log_mel("asr", frozen=False, channel_probability=0.25, channel_length=8, equal_counts=equal)
    seen: list[torch.Tensor] = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    audio = torch.randn(64, 4000)
    model.encode(audio, mask=model.draw_mask(audio))
    hidden = (seen[0] == 0).all(dim=1).sum(dim=1)
    assert hidden.tolist() == [8] * 64 if equal else hidden.max() > 12  # one span is the least that somebody has
    assert hidden.min() >= 8 and hidden.max() <= 16


def test_equal_seeds_draw_equal_masks() -> None:
    draws = [draw_span_mask(torch.tensor([90, 50]), 90, 0.8, 10, 2, _generator(seed), True) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@settings(max_examples=50, deadline=None)
@given(flags=st.lists(st.booleans(), min_size=1, max_size=60), extra=st.integers(0, 9))
def test_select_true_lists_the_true_positions_in_order(flags: list[bool], extra: int) -> None:
    mask = torch.tensor(flags)
    expected = mask.nonzero().flatten()
    positions, valid = select_true(mask, len(expected) + extra)
    assert torch.equal(positions[: len(expected)], expected)
    assert valid.tolist() == [True] * len(expected) + [False] * extra
    assert (positions[len(expected) :] == 0).all()


@pytest.mark.parametrize(("field", "value"), [("probability", 1.5), ("length", 0), ("min_spans", -1), ("channel_probability", -0.1)])
def test_impossible_masking_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"MaskingConfig: {field} is {value}"):
        MaskingConfig(**{field: value})


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["hubert", "asr"])
def test_an_encoder_on_log_mel_features_learns_nothing_of_what_is_hidden(kind: str, frozen: bool) -> None:
    """Convolutions of that frontend reach five frames to both sides, so that spans of ten lie open unless they are hidden before it."""
    model = _on_log_mel(kind, frozen)
    audio = 0.1 * torch.randn(1, 400 + 320 * 59, generator=_generator(0))
    mask = torch.zeros(1, 60, dtype=torch.bool)
    mask[0, 20:30] = True
    other = audio.clone()
    other[0, 320 * 19 + 400 : 320 * 30] = 0.1 * torch.randn(320 * 11 - 400, generator=_generator(1))
    frames = []
    for heard in (audio, other):
        model.clock.seed(0)
        frames.append(model.encode(heard, mask=mask).output.frames)
    torch.testing.assert_close(frames[0], frames[1], rtol=0, atol=1e-5)
    model.eval()
    assert (model.encode(audio).output.frames - model.encode(other).output.frames).abs().amax() > 0.01


def _on_log_mel(kind: str, frozen: bool, **masking: float) -> SpeechEncoder:
    torch.manual_seed(0)
    tiny = dataclasses.replace(HubertConfig.tiny(), masking=MaskingConfig(**masking))
    frontend = LogMelConfig(channels=(2, 4, 8), output_dim=16)
    if kind == "hubert":
        return HubertModel(dataclasses.replace(tiny, frontend=dataclasses.replace(frontend, gradient_scale=0.0 if frozen else 1.0)))
    config = AsrConfig(vocab_size=5, heads="ctc", frontend=frontend, encoder=tiny.encoder, freeze_frontend_steps=int(frozen))
    model = AsrModel(dataclasses.replace(config, masking=tiny.masking))
    model.step = 0
    return model
