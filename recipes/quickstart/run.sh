#!/usr/bin/env bash
# Quickstart: from nothing to a small trained model on a CPU.
#
#   bash recipes/quickstart/run.sh
#
# Stage 0 makes the Python environment (once), stage 1 pre-trains a tiny HuBERT-Zipformer on synthetic audio with known labels. No download,
# no real speech. The stages that make a spoken corpus, cluster it, fine-tune and decode do not exist yet: see README.md here.
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

steps=200  # optimizer steps of stage 1
seed=1  # of everything random in stage 1
parse_options "$@"
need_whole_numbers steps seed

recipe=$(dirname "$recipe_script")

if in_stages 0 "set up the Python environment"; then
    run bash "$repository/scripts/setup.sh"
fi

if in_stages 1 "pre-train a tiny HuBERT-Zipformer on synthetic audio"; then
    $dry_run || [ -x "$python" ] || { log "there is no $python: run stage 0 first" && exit 1; }
    run "$python" "$recipe/pretrain_tiny.py" --steps "$steps" --seed "$seed"
fi
