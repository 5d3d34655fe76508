"""How it sounds: another sample rate, a small room, background noise and a level, on arrays of one channel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Audio = NDArray[np.float64]

PEAK = 0.95  # of full scale, the largest sample that is written
PINK_FROM = 50.0  # Hz: below it the pink noise is flat


def resample(audio: Audio, old_rate: int, new_rate: int) -> Audio:
    """(S,) audio at another rate, in Hz, by cutting its spectrum off: ceil(S * new_rate / old_rate) samples.

    The spectrum is that of the audio and silence after it, so that the end does not run into the beginning.
    """
    step = old_rate // np.gcd(old_rate, new_rate)
    blocks = 32 * (len(audio) // (32 * step) + 1)  # few prime factors, for the transform's speed
    spectrum = np.fft.rfft(audio, blocks * step)
    length = blocks * step * new_rate // old_rate
    result = np.fft.irfft(spectrum[: length // 2 + 1], length) * (new_rate / old_rate)
    return result[: -(-len(audio) * new_rate // old_rate)]


def room(rng: np.random.Generator, sample_rate: int, decay: float, direct_to_reverberant: float) -> Audio:
    """An impulse response: the direct sound, then noise that falls by 60 dB in `decay` seconds.

    Args:
        rng: draws the noise.
        sample_rate: Hz.
        decay: seconds, known as RT60.
        direct_to_reverberant: energy of the direct sound over that of the rest, dB.
    """
    time = np.arange(1, round(decay * sample_rate)) / sample_rate
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / decay)
    tail *= np.sqrt(10 ** (-direct_to_reverberant / 10) / np.sum(tail**2))
    return np.concatenate([[1.0], tail])


def convolve(audio: Audio, response: Audio) -> Audio:
    """(S,) audio as it arrives through `response`; what comes after its end is left out."""
    length = len(audio) + len(response) - 1
    size = 1 << (length - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(response, size), size)[: len(audio)]


def noise(rng: np.random.Generator, length: int, sample_rate: int, pink: float) -> Audio:
    """(length,) noise of unit power: `pink` of the power (0 to 1) falls by 3 dB an octave, the rest is white."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    frequency = np.maximum(np.fft.rfftfreq(length, 1 / sample_rate), PINK_FROM)
    slope = 1 / frequency
    weight = np.sqrt(pink * slope / slope.mean() + (1 - pink))
    result = np.fft.irfft(spectrum * weight, length)
    return result / np.sqrt(np.mean(result**2))


def add_noise(audio: Audio, background: Audio, ratio: float) -> Audio:
    """Audio over a background of unit power that is `ratio` dB weaker than the audio is on average."""
    return audio + background * np.sqrt(np.mean(audio**2)) * 10 ** (-ratio / 20)


def to_16_bit(audio: Audio, level: float) -> NDArray[np.int16]:
    """Samples at a root mean square of `level` dB of full scale; weaker where a peak would be clipped otherwise."""
    scaled = audio * (10 ** (level / 20) / np.sqrt(np.mean(audio**2)))
    scaled *= min(1.0, PEAK / np.abs(scaled).max())
    return np.round(scaled * 32767).astype(np.int16)
