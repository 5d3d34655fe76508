"""Masks on log-mel features: as large as lhotse's, within the utterance, in training only, and the same for the same step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lhotse.dataset.signal_transforms import SpecAugment as TheirSpecAugment
from torch import Tensor

from k2ssl.data.spec_augment import SpecAugment, SpecAugmentConfig
from k2ssl.models.logmel import LogMelConfig, LogMelFrontend
from k2ssl.nn.schedule import Clock

BANDS = SpecAugmentConfig(band_masks=2, band_width=20)
TIMES = SpecAugmentConfig(time_masks=10, time_width=0.4, time_share=0.15)


def drawn(config: SpecAugmentConfig, lens: list[int], num_frames: int, seed: int = 0, num_bands: int = 80) -> Tensor:
    return SpecAugment(config, 100.0).hidden(torch.tensor(lens), num_frames, num_bands, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", [BANDS, TIMES, SpecAugmentConfig(band_masks=1, time_masks=1)], ids=["bands", "times", "both"])
def test_as_much_is_hidden_as_by_lhotse_and_as_often_at_each_place(config: SpecAugmentConfig) -> None:
    num, frames = 1000, 600
    theirs = TheirSpecAugment(
        time_warp_factor=None, num_feature_masks=config.band_masks or 1, features_mask_size=config.band_width if config.band_masks else 1,
        num_frame_masks=config.time_masks or 1, frames_mask_size=round(100 * config.time_width) if config.time_masks else 1,
        max_frames_mask_fraction=config.time_share, p=1.0,
    )  # fmt: skip
    ours = drawn(config, [frames] * num, frames).float()
    features = torch.tensor([1.0, -1.0]).repeat(1, frames, 40)  # of mean 0, which is what lhotse hides with
    expected = torch.stack([(theirs(features)[0] == 0).float() for _ in range(num)])
    assert ours.mean().item() == pytest.approx(expected.mean().item(), rel=0.06)
    for axis, masks in ((1, config.band_masks), (2, config.time_masks)):
        if masks:  # by tenths of the axis; the ends are hidden less often
            profile, their_profile = (x.mean(axis).mean(0).view(10, -1).mean(1) for x in (ours, expected))
            assert (profile - their_profile).abs().max() < 0.25 * their_profile.max()


def test_times_stay_within_the_utterance_and_hide_no_more_of_it_than_its_share() -> None:
    lens = [3, 40, 130, 400, 1000] * 40
    hidden = drawn(TIMES, lens, 1000)
    assert torch.equal(hidden.any(2), hidden.all(2)), "whole frames"
    for row, length in zip(hidden[:, :, 0], lens, strict=True):
        assert not row[length:].any() and row.sum() <= 0.15 * length
    assert (
        hidden[4::5].any()
        and hidden[1::5].any()
        and drawn(TIMES, [1000], 1000)[0, :, 0].sum()
        < drawn(SpecAugmentConfig(time_masks=10, time_width=0.4, time_share=1.0), [1000], 1000)[0, :, 0].sum()
    )


def test_bands_are_hidden_at_all_times_and_each_utterance_has_its_own() -> None:
    hidden = drawn(BANDS, [50] * 300, 50)
    assert torch.equal(hidden.any(1), hidden.all(1))
    counts = hidden[:, 0].sum(1)
    assert counts.max() <= 2 * 19 and counts.max() > 30 and len({tuple(row.tolist()) for row in hidden[:, 0]}) > 250


def test_masks_are_a_function_of_the_generator_alone() -> None:
    before = torch.get_rng_state()
    both = SpecAugmentConfig(band_masks=2, time_masks=2)
    one, again, other = (drawn(both, [300, 200], 300, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def frontend() -> LogMelFrontend:
    torch.manual_seed(0)
    return LogMelFrontend(LogMelConfig(num_bins=40, channels=(4, 4, 4), output_dim=16))


def attached(config: SpecAugmentConfig) -> tuple[LogMelFrontend, list[Tensor]]:
    """A frontend and the list that receives what its filterbank gives, after masks."""
    made, seen = frontend(), []
    SpecAugment(config, 100.0).attach(made, lambda device: torch.Generator(device).manual_seed(5))
    made.mel.register_forward_hook(lambda module, arguments, features: seen.append(features))
    return made, seen


def test_the_frontend_sees_its_mean_where_something_is_hidden_and_everything_in_evaluation() -> None:
    config = SpecAugmentConfig(band_masks=2, band_width=20, time_masks=4, time_width=0.2, time_share=0.5)
    made, seen = attached(config)
    audio, lens = 0.1 * torch.randn(2, 16000), torch.tensor([16000, 9000])
    plain = frontend()(audio, lens)
    frames = made(audio, lens)
    hidden = drawn(config, [98, 54], 98, seed=5, num_bands=40)
    assert hidden.any(2).any() and torch.equal(seen[0] == made.mel_mean, hidden) and not torch.equal(frames, plain)
    made.eval()
    assert torch.equal(made(audio, lens), frontend().eval()(audio, lens))


def test_lengths_given_by_name_or_not_at_all_are_understood() -> None:
    made, seen = attached(TIMES)
    audio = 0.1 * torch.randn(2, 48000)
    made(audio, audio_lens=torch.tensor([48000, 16000]))
    made(audio)
    assert not (seen[0][1, 98:] == made.mel_mean).any() and (seen[0][0] == made.mel_mean).any()
    assert torch.equal(seen[1] == made.mel_mean, drawn(TIMES, [298, 298], 298, seed=5, num_bands=40))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_by_its_own_mode_and_its_own_generator(copied: Callable[[Any], Any]) -> None:
    student, clock, audio = frontend(), Clock(), 0.1 * torch.randn(2, 16000)
    SpecAugment(TIMES, 100.0).attach(student, clock.generator)
    teacher = copied(student).eval()
    before = clock.generator(torch.device("cpu")).get_state()
    assert torch.equal(teacher(audio), frontend().eval()(audio))
    student.eval()
    teacher.train()
    assert not torch.equal(teacher(audio), teacher(audio)) and torch.equal(student(audio), student(audio))
    assert torch.equal(clock.generator(torch.device("cpu")).get_state(), before)


def test_a_filterbank_that_is_called_alone_hides_nothing() -> None:
    made, _ = attached(TIMES)
    audio = 0.1 * torch.randn(3, 8000)
    made(audio[:2])
    assert torch.equal(made.mel(audio), frontend().mel(audio))


def test_drawing_never_waits_for_the_device(no_questions: Any) -> None:
    lens, generator = torch.tensor([300, 200]), torch.Generator().manual_seed(0)
    with no_questions():
        SpecAugment(SpecAugmentConfig(band_masks=2, time_masks=2), 100.0).hidden(lens, 300, 80, generator)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"band_masks": -1}, "band_masks is -1, a whole number >= 0"),
        ({"band_width": 0}, "band_width is 0, a whole number >= 1"),
        ({"time_masks": -2}, "time_masks is -2, a whole number >= 0"),
        ({"time_width": 0.0}, "time_width is 0.0, a finite number of seconds > 0"),
        ({"time_width": float("inf")}, "time_width is inf"),
        ({"time_share": 0.0}, "time_share is 0.0, allowed is 0 < time_share <= 1"),
        ({"time_share": 1.1}, "time_share is 1.1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"SpecAugmentConfig: {said}"):
        SpecAugmentConfig(**settings)
