"""Turn a checkpoint of icefall's SSL recipe, fairseq, torchaudio or Hugging Face into a model file of ours.

Prints what was matched, what of our model is missing in the checkpoint, and what of the checkpoint was left over. Unless told otherwise,
anything missing or left over is an error and nothing is written. Exit status: 0 written, 1 the checkpoint cannot be imported, 2 wrong usage.

    python scripts/import_checkpoint.py pretrained.pt model.pt --size zipformer_base
    python scripts/import_checkpoint.py epoch-300.pt model.pt --size zipformer_base --weights model_avg
    python scripts/import_checkpoint.py hubert_base_ls960.pt model.pt --size hubert_base
    python scripts/import_checkpoint.py model.safetensors model.pt --size hubert_large --allow-missing heads.

Nothing in the checkpoint is run: of what it holds besides tensors and plain values, such as options, nothing is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.import_file import read_foreign_state
from k2ssl.models.import_names import SOURCES, guess_source
from k2ssl.models.import_state import fit_config, import_state_dict
from k2ssl.models.load import save_model
from k2ssl.structure import from_dict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SIZES = {
    "zipformer_base": HubertConfig.zipformer_base,
    "zipformer_large": HubertConfig.zipformer_large,
    "hubert_base": HubertConfig.hubert_base,
    "hubert_large": HubertConfig.hubert_large,
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="file to import: written by torch.save, or a .safetensors file")
    parser.add_argument("out", type=Path, help="model file to write")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--size",
        choices=SIZES,
        help="published size of the model; the number of classes, the kind of head, and normalisation and biases of the frontend "
        "are taken from the checkpoint",
    )
    model.add_argument(
        "--config", type=Path, help="TOML or JSON file with the model's configuration, every field of which is taken as it is"
    )
    parser.add_argument("--source", choices=("auto", *SOURCES), default="auto", help="whose checkpoint it is (default: told by its names)")
    parser.add_argument(
        "--weights",
        default="model",
        metavar="ENTRY",
        help="entry of the checkpoint to take: model (default), model_avg (icefall's running average), or another",
    )
    parser.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="PREFIX",
        help="names of ours that begin so may be missing and start from random values; may be given several times. Checkpoints without "
        "a pre-training head need 'heads.', those without a mask embedding 'mask_embedding'",
    )
    parser.add_argument(
        "--allow-left-over",
        action="append",
        default=[],
        metavar="PREFIX",
        help="names of the checkpoint that begin so may be left over, such as 'lm_head.'; may be given several times",
    )
    parser.add_argument("--all", action="store_true", help="also print every pair of names that was matched")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return parser.parse_args(argv)


def read_config(path: Path) -> HubertConfig:
    """The configuration in a TOML or JSON file; ValueError with its path if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        return from_dict(HubertConfig, data)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def convert(options: argparse.Namespace) -> None:
    """Read, fit, check, write; ValueError or OSError if anything is wrong."""
    if options.out.exists() and not options.force:
        raise ValueError(f"{options.out} exists; --force replaces it")
    if options.out.is_dir() or options.out.resolve() == options.checkpoint.resolve():
        raise ValueError(f"{options.out} is {'a folder' if options.out.is_dir() else 'the checkpoint itself'}; name another file to write")
    if not options.out.parent.is_dir():
        raise ValueError(f"{options.out.parent} is not a folder")
    config = SIZES[options.size]() if options.size else read_config(options.config)
    state = read_foreign_state(options.checkpoint, options.weights)
    source = guess_source(state) if options.source == "auto" else options.source
    if options.size:
        config = fit_config(config, state, source)
    torch.manual_seed(0)  # values for what may be missing, the same each time
    model = HubertModel(config)
    report = import_state_dict(model, state, source, allow_missing=options.allow_missing, allow_left_over=options.allow_left_over)
    print(f"source: {source}")
    print(report if options.all else report.summary())
    save_model(options.out, model)
    print(f"written: {options.out}")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        convert(options)
    except (ValueError, OSError) as error:
        print(f"import_checkpoint: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
