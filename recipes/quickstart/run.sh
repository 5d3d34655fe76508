#!/usr/bin/env bash
# Quickstart: from nothing to a table of word error rates in 15 minutes on two CPU cores, without a download of audio.
#
#   bash recipes/quickstart/run.sh
#
# Stage 0 makes the Python environment (once) and a small corpus of synthetic speech in LibriSpeech's layout. All other stages are those of
# recipes/librispeech/run.sh, with settings for a small model: 1 cuts, 2 tokenizers, 3 labels of MFCC, 4 pre-training 1, 5 labels of a layer,
# 6 pre-training 2, 7 CTC, 8 transducer (both also from drawn weights), 9 averages, 10 language models and recognition, 11 scores, 12 tables.
# What is finished is skipped, what was interrupted goes on. The last stage prints the tables and writes OUT/report/report.html.
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../stages.sh"

train_minutes=40  # of speech to train on
dev_minutes=2  # of speech to choose by
test_minutes=4  # of speech to measure with
pretrain1_steps=800  # updates of 20 s, on labels of MFCC
pretrain2_steps=1000  # the same on labels of the first model
finetune_steps=800  # updates of 10 s
averaged=200  # last updates over which weights are averaged
scratch=True  # False: only the systems that are pre-trained
seed=42  # of the corpus, the weights that are drawn and the order of the data
out=exp/quickstart  # folder for everything that is made
num_workers=1  # processes that read audio
device=auto  # auto, cpu, cuda
quiet=False  # True: plain lines instead of progress bars
parse_options "$@"
need_whole_numbers pretrain1_steps pretrain2_steps finetune_steps averaged seed num_workers
need_one_of scratch True False

recipe=$(dirname "$recipe_script")
for number in 1 2; do need_average pretrain${number}_steps averaged "$recipe/conf/iteration$number.toml"; done
for system in ctc transducer; do need_average finetune_steps averaged "$recipe/conf/finetune/$system.toml"; done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # more would only wait for each other: the model is small

if in_stages 0 "environment and corpus"; then
    run bash "$repository/scripts/setup.sh"
    run_extra "$python" "$recipe/make_corpus.py" --out "$out/corpus" --train-minutes "$train_minutes" --dev-minutes "$dev_minutes" \
        --test-minutes "$test_minutes" --seed "$seed"
fi

if [ "$stop_stage" -ge 1 ]; then
    [ "$stage" -gt 1 ] || need_file "$out/corpus/corpus.json" "mark of a finished corpus" 0
    hand_over "$repository/recipes/librispeech/run.sh" --corpus-dir "$out/corpus" --out "$out" \
        --pretrain-sets train-clean-quick --finetune-sets train-clean-quick --dev-sets dev-clean-quick --test-sets test-clean-quick \
        --pretrain1-conf "$recipe/conf/iteration1.toml" --pretrain1-steps "$pretrain1_steps" \
        --pretrain2-conf "$recipe/conf/iteration2.toml" --pretrain2-steps "$pretrain2_steps" --pretrain-averaged "$averaged" \
        --ctc-conf "$recipe/conf/finetune/ctc.toml" --ctc-steps "$finetune_steps" \
        --transducer-conf "$recipe/conf/finetune/transducer.toml" --transducer-steps "$finetune_steps" --finetune-averaged "$averaged" \
        --kmeans-batches 12 --layer-clusters 100 --label-layer layer3 --init-weights average --init-batch-count 20000 --vocab-size 30 \
        --scratch "$scratch" --seed "$seed" --num-workers "$num_workers" --device "$device" --quiet "$quiet"
fi
