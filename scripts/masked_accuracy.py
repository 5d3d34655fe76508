#!/usr/bin/env python
"""How well a pre-trained model predicts the codes of hidden frames, by their distance from the nearest visible frame.

    PYTHONPATH=. python scripts/masked_accuracy.py --model exp/pretrained.pt --cuts CUTS --labels FOLDER

Codes are guessed best next to what is visible. An accuracy that stays high over a few frames and then falls off a step says that something
lets the encoder see so far into the hidden span, and that it learns to copy. Every utterance is read alone, with spans drawn as in training.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from lhotse.cut import Cut
from torch import Tensor
from tqdm import tqdm

from k2ssl.bin.pretrain_data import check_store
from k2ssl.data.audio import read_utterance
from k2ssl.data.cuts import read_cuts
from k2ssl.data.labels import LabelStore
from k2ssl.models.hubert import HubertModel, labels_of_frames
from k2ssl.models.load import load_model


def distances(mask: Tensor) -> Tensor:
    """(T,) bool, True where hidden -> (T,) int64 frames to the nearest visible one, 0 where visible."""
    visible = (~mask).nonzero().flatten()
    return (torch.arange(len(mask)).unsqueeze(1) - visible).abs().amin(dim=1)


def right_by_distance(
    model: HubertModel, cuts: Iterable[Cut], labels: LabelStore, draws: int, farthest: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Codes of the first label set that are predicted, and all that are hidden: (farthest,) each, at distances from 1; the last has all beyond."""
    right, hidden = torch.zeros(2, farthest + 1, dtype=torch.int64)
    for number, cut in enumerate(cuts):
        at_rate = cut if cut.sampling_rate == model.frontend.sample_rate else cut.resample(model.frontend.sample_rate)
        audio = torch.from_numpy(read_utterance(at_rate, normalize)).unsqueeze(0)
        num_frames = model.frontend.num_frames(audio.shape[1])
        ratio = model.label_rate[0] / model.frontend.frame_rate
        codes = labels_of_frames(torch.from_numpy(labels.labels(cut.id).astype("int64")).unsqueeze(0), num_frames, ratio)[0]
        for draw in range(draws):
            model.clock.seed(number, draw)
            mask = model.draw_mask(audio)
            with torch.no_grad():
                predicted = model.heads[0](model.encode(audio, mask=mask).output.frames[0]).argmax(dim=-1)
            counted = mask[0] & (codes >= 0)
            distance = distances(mask[0]).clamp(max=farthest)[counted]
            hidden += torch.bincount(distance, minlength=farthest + 1)
            right += torch.bincount(distance[(predicted == codes)[counted]], minlength=farthest + 1)
    return right[1:], hidden[1:]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="pre-trained model, as bin.average writes it")
    parser.add_argument("--cuts", type=Path, required=True, help="manifest")
    parser.add_argument("--labels", type=Path, required=True, help="folder of its labels")
    parser.add_argument("--draws", type=int, default=4, help="masks for every utterance")
    parser.add_argument("--farthest", type=int, default=8, help="frames; what is farther counts with these")
    parser.add_argument(
        "--normalize",
        action="store_true",
        help="bring every utterance to zero mean and unit variance, as in a pre-training with --data.normalize True",
    )
    args = parser.parse_args(argv)
    for name in ("draws", "farthest"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, allowed are whole numbers >= 1")
    try:
        model = load_model(args.model)
        cuts, labels = list(read_cuts(args.cuts)), LabelStore.open(args.labels)
        check_store(model, 0, cuts, labels, max_unused_share=1.0, require_lineage=False)
        # the others were listed as skipped when the labels were made, or are so short that nothing is left to see
        used = [cut for cut in cuts if cut.id in labels and cut.duration >= 0.1]
        right, hidden = right_by_distance(model.eval(), tqdm(used, unit="cut"), labels, args.draws, args.farthest, args.normalize)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if len(used) < len(cuts):
        print(f"{len(cuts) - len(used)} of {len(cuts)} utterances left out: no labels, or shorter than 0.1 s", file=sys.stderr)
    by_distance = [round(r / n, 4) if n else None for r, n in zip(right.tolist(), hidden.tolist(), strict=True)]
    record = {"model": str(args.model), "accuracy": round(int(right.sum()) / max(1, int(hidden.sum())), 4), "hidden": int(hidden.sum())}
    print(json.dumps({**record, "by_distance": by_distance, "frames": hidden.tolist()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
