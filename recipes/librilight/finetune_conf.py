"""Write the configuration that fine-tunes a pre-trained encoder as another configuration fine-tunes Zipformer Base.

    python recipes/librilight/finetune_conf.py --conf recipes/librilight/conf/finetune/10h_ctc_letters.toml \
        --pretrain-conf recipes/librilight/conf/zipformer_large.toml --output exp/librilight/finetune/10h/ctc.json

Frontend and encoder are taken from the configuration for pre-training, since they must be those of the pre-trained model, and so is whether audio is
scaled to unit variance. The gradient scale of the frontend and everything else are of --conf. An OUTPUT that exists is written anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from k2ssl.atomic_file import atomic_file
from k2ssl.bin.finetune import Finetune
from k2ssl.bin.prepare_options import exit_code
from k2ssl.bin.pretrain import Pretrain
from k2ssl.config import dump, load
from k2ssl.structure import from_dict, to_dict


def adapted(conf: Path, pretrain_conf: Path) -> str:
    """The configuration, as JSON.

    Raises:
        ValueError: one of the files is no configuration of its kind, or they do not go together.
    """
    settings = to_dict(load(Finetune, [str(conf), "--output", "none", "--tokenizer", "none", "--data.cuts", "none"]))
    pretrained = to_dict(load(Pretrain, [str(pretrain_conf), "--output", "none", "--data.cuts", "none", "--data.labels", "none"]))
    settings["data"]["normalize"] = pretrained["data"]["normalize"]
    scale = settings["model"]["frontend"].get("gradient_scale")
    settings["model"] |= {part: pretrained["model"][part] for part in ("frontend", "encoder")}
    if scale is not None and "gradient_scale" in settings["model"]["frontend"]:
        settings["model"]["frontend"]["gradient_scale"] = scale
    checked = json.loads(dump(from_dict(Finetune, settings)))
    del checked["output"], checked["tokenizer"], checked["data"]["cuts"]  # that had to be given, but belong to no configuration
    return json.dumps(checked, indent=2) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conf", type=Path, required=True, help="configuration for fine-tuning (.toml)")
    parser.add_argument("--pretrain-conf", type=Path, required=True, help="configuration for pre-training (.toml)")
    parser.add_argument("--output", type=Path, required=True, help="file to write (.json)")
    options = parser.parse_args(argv)

    def work() -> None:
        text = adapted(options.conf, options.pretrain_conf)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.output) as file:
            file.write(text.encode())

    return exit_code("finetune_conf", work)


if __name__ == "__main__":
    sys.exit(main())
