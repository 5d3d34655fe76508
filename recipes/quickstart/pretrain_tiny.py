"""Pre-train a tiny HuBERT-Zipformer by masked prediction on synthetic audio whose frame labels are known.

The audio is made up on the fly: eight "sounds", four of them voiced (harmonics of a gliding pitch under fixed resonances) and four of
them noise in fixed bands, 60 to 200 ms each, following each other by a simple grammar with a few exceptions. What is hidden can
therefore be guessed from what is heard around it, which is what masked prediction learns. It is no speech, and the labels come from the
generator, not from clustering: the stages of this recipe that do both are still to come.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from k2ssl.batch import PretrainBatch
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.zipformer import ZipformerConfig
from k2ssl.optim.scaled_adam import ScaledAdam
from k2ssl.optim.schedules import Eden

SAMPLE_RATE = 16000
FRAME = 320  # samples per label: 50 labels a second
RESONANCES = ((300, 2300, 3000), (700, 1200, 2600), (450, 900, 2400), (550, 1800, 2500))  # Hz, of the voiced sounds
BANDS = ((300, 900), (1200, 2200), (2800, 4200), (5000, 7500))  # Hz, of the noises
NUM_SOUNDS = len(RESONANCES) + len(BANDS)
EXCEPTIONS = 0.1  # how often a sound is followed by any other instead of its successor


def synthesise(generator: torch.Generator, num_utterances: int, num_frames: int) -> PretrainBatch:
    """(N, S) audio of N utterances, S = 320 * num_frames, with (N, num_frames) labels, all drawn from `generator`."""
    utterances = [_utterance(generator, num_frames) for _ in range(num_utterances)]
    audio, labels = zip(*utterances, strict=True)
    return PretrainBatch(torch.stack(audio), (torch.stack(labels),))


def _utterance(generator: torch.Generator, num_frames: int) -> tuple[Tensor, Tensor]:
    """(S,) audio and (num_frames,) labels of one made-up speaker."""
    pitch = 90.0 + 130.0 * _draw(generator)
    sound = int(_draw(generator) * NUM_SOUNDS)
    pieces: list[Tensor] = []
    labels: list[int] = []
    while len(labels) < num_frames:
        frames = min(3 + int(_draw(generator) * 8), num_frames - len(labels))
        pieces.append(_voiced(generator, sound, pitch, frames) if sound < len(RESONANCES) else _noise(generator, sound, frames))
        labels += [sound] * frames
        exception = _draw(generator) < EXCEPTIONS
        sound = (sound + (1 + int(_draw(generator) * (NUM_SOUNDS - 1)) if exception else 3)) % NUM_SOUNDS
    audio = torch.cat(pieces)
    return audio + 0.01 * torch.randn(audio.shape, generator=generator), torch.tensor(labels)


def _voiced(generator: torch.Generator, sound: int, pitch: float, frames: int) -> Tensor:
    time_axis = torch.arange(frames * FRAME) / SAMPLE_RATE
    glide = 1.0 + 0.3 * (_draw(generator) - 0.5) * torch.linspace(0, 1, len(time_axis))
    harmonics = torch.arange(1, int(4000 / pitch)).unsqueeze(1)
    peaks = torch.tensor(RESONANCES[sound], dtype=torch.float32)
    loudness = torch.exp(-(((harmonics * pitch - peaks) / 150.0) ** 2)).sum(dim=1, keepdim=True) + 0.02
    phases = 2 * math.pi * (harmonics * pitch * time_axis * glide + torch.rand(harmonics.shape, generator=generator))
    return _level((loudness * torch.sin(phases)).sum(dim=0))


def _noise(generator: torch.Generator, sound: int, frames: int) -> Tensor:
    spectrum = torch.fft.rfft(torch.randn(frames * FRAME, generator=generator))
    frequencies = torch.linspace(0, SAMPLE_RATE / 2, len(spectrum))
    low, high = BANDS[sound - len(RESONANCES)]
    return _level(torch.fft.irfft(spectrum * ((frequencies > low) & (frequencies < high)), n=frames * FRAME))


def _level(audio: Tensor) -> Tensor:
    return 0.1 * audio / audio.square().mean().sqrt()


def _draw(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator).item()


def build_model() -> HubertModel:
    """The tiny model with one head for the sounds, and a warm-up that fits some hundred steps instead of some hundred thousand."""
    tiny = HubertConfig.tiny()
    encoder = replace(ZipformerConfig.tiny(), warmup=50.0)
    return HubertModel(replace(tiny, encoder=encoder, head=replace(tiny.head, num_classes=(NUM_SOUNDS,))))


def masked_accuracy(metrics: list[Mapping[str, Tensor]]) -> float:
    return sum(float(m["correct_masked"]) for m in metrics) / sum(float(m["num_masked"]) for m in metrics)


def train(model: HubertModel, options: argparse.Namespace) -> float:
    """Masked accuracy over the last tenth of the steps."""
    optimizer = ScaledAdam(model.named_parameters(), lr=0.045, clipping_scale=2.0)
    schedule = Eden(optimizer, lr_batches=200, lr_epochs=10.5, warmup_batches=20)
    recent: list[Mapping[str, Tensor]] = []
    progress = tqdm(range(options.steps), unit="step", mininterval=0.5)
    for step in progress:
        batch = synthesise(_generator(options.seed, 0, step), options.batch_size, options.num_frames)
        model.clock.seed(options.seed, 0, 0, step)
        model.clock.advance(step)
        schedule.advance(batch=step, epoch=0)
        output = model(batch)
        (output.loss / output.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent, output.metrics][-max(options.steps // 10, 1) :]
        if step % 5 == 4:
            loss = float(output.metrics["loss_masked"]) / float(output.metrics["num_masked"])
            progress.set_postfix(loss=f"{loss:.3f}", masked_accuracy=f"{masked_accuracy(recent):.1%}")
    return masked_accuracy(recent)


@torch.inference_mode()
def evaluate(model: HubertModel, options: argparse.Namespace) -> tuple[float, float]:
    """Masked accuracy on sentences that were not trained on, and the share of the most frequent label there."""
    model.eval()
    metrics = []
    counts = torch.zeros(NUM_SOUNDS)
    for number in range(8):
        batch = synthesise(_generator(options.seed, 1, number), options.batch_size, options.num_frames)
        counts += torch.bincount(batch.labels[0].flatten(), minlength=NUM_SOUNDS)
        model.clock.seed(options.seed, 1, 0, number)
        metrics.append(model(batch).metrics)
    return masked_accuracy(metrics), float(counts.max() / counts.sum())


def _generator(*parts: int) -> torch.Generator:
    """A generator for one batch, so that batch 7 is the same however training got there."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part) % 2**63
    return torch.Generator().manual_seed(seed)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of everything random (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="utterances per step (default: %(default)s)")
    parser.add_argument("--num-frames", type=int, default=150, help="frames of 20 ms per utterance (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name, least in (("steps", 1), ("seed", 0), ("batch_size", 1), ("num_frames", 10)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, allowed are whole numbers >= {least}")
    return options


def main() -> int:
    options = parse_options()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(2, os.cpu_count() or 1))  # tensors this small gain nothing from more
    torch.manual_seed(options.seed)  # initial weights
    model = build_model()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = options.batch_size * options.num_frames * FRAME / SAMPLE_RATE
    print(f"HuBERT-Zipformer of {num_parameters:,} parameters, {NUM_SOUNDS} synthetic sounds, {seconds:.0f} s of audio per step")
    begin = time.monotonic()
    while_training = train(model, options)
    took = time.monotonic() - begin
    held_out, most_frequent = evaluate(model, options)
    print(f"{options.steps} steps in {took:.0f} s; share of hidden frames whose sound is predicted right:")
    print("| training, last steps | held out | always the most frequent sound |")
    print("|---:|---:|---:|")
    print(f"| {while_training:.1%} | {held_out:.1%} | {most_frequent:.1%} |")
    if held_out < 2 * most_frequent:
        print(f"did not learn: {held_out:.1%} is less than twice {most_frequent:.1%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
