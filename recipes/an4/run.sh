#!/usr/bin/env bash
# Real speech in an hour or two of one CPU core: a small Zipformer is pre-trained on AN4's training audio and on any other audio at hand, then
# fine-tuned on AN4's transcripts, with CTC alone and with a transducer beside CTC, each from the pre-trained encoder and from scratch with as
# many updates; the test set is recognised by greedy search and scored.
#
#   bash recipes/an4/run.sh --corpus-dir an4 --audio-dir recordings,more --out exp/an4
#
# A stage whose result is there is skipped, an interrupted one goes on where it was. The last stage writes OUT/score/report.txt and wer.json.
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

corpus_dir=data/an4  # the corpus as it is published: a folder with etc/ and flac/
audio_dir=  # further folders of audio to pre-train on, separated by commas; transcripts are not used
out=exp/an4  # folder for everything that is made
pretrain_steps=1800  # updates of 60 s
finetune_steps=2000  # updates of 30 s
pretrain_averaged=200  # of the last updates of pre-training, over which weights are averaged before they are used
finetune_averaged=250  # the same of fine-tuning
init_batch_count=20000  # where the schedules inside a pre-trained encoder begin; see the program's --help
seed=42  # of the weights that are drawn and of the order of the data
device=auto  # auto, cpu, cuda
num_workers=1  # processes that read audio
quiet=False  # True: plain lines instead of progress bars
parse_options "$@"
need_whole_numbers pretrain_steps finetune_steps pretrain_averaged finetune_averaged init_batch_count seed num_workers

recipe=$(dirname "$recipe_script")
for part in pretrain finetune; do
    steps=${part}_steps averaged=${part}_averaged
    [ "${!averaged}" -ge 1 ] && [ "${!averaged}" -lt "${!steps}" ] ||
        _refuse "--$part-averaged is ${!averaged}, at least 1 and less than --$part-steps, ${!steps}, is needed"
done
$dry_run || [ -x "$python" ] || { log "there is no $python: run scripts/setup.sh first" && exit 1; }

unlabelled=$corpus_dir/flac/an4_clstk${audio_dir:+,$audio_dir}
pretrain_cuts=() pretrain_labels=()
IFS=, read -r -a folders <<<"$unlabelled"
for folder in "${folders[@]}"; do
    split=$(basename "$(realpath -ms -- "$folder")")
    pretrain_cuts+=("$out/mfcc/cuts/cuts_$split.jsonl.gz") pretrain_labels+=("$out/mfcc/labels/$split")
done
# checkpoints lie as many steps apart as are averaged, and the last two stay
common_options=(--trainer.max-epochs 100000 --trainer.keep.keep-last 2 --data.num-workers "$num_workers" --seed "$seed" --device "$device"
    --quiet "$quiet")
systems=(ctc_scratch ctc_pretrained transducer_scratch transducer_pretrained)

# Path of the checkpoint of run $1 after $2 steps, and of the one before it, where every $3 steps one was written.
last_checkpoint() { printf '%s/checkpoints/step-%09d.pt' "$out/$1" "$2"; }
earlier_checkpoint() { last_checkpoint "$1" "$((($2 - 1) / $3 * $3))"; }

if in_stages 1 "cuts"; then
    run "$python" "$recipe/prepare_cuts.py" --corpus-dir "$corpus_dir" --out "$out/cuts"
fi

if in_stages 2 "tokenizer"; then
    if [ -f "$out/letters.pt" ]; then
        log "$out/letters.pt is there already"
    else
        run "$python" -m k2ssl.bin.train_tokenizer --cuts "$out/cuts/cuts_train.jsonl.gz" --kind letters --output "$out/letters.pt"
    fi
fi

if in_stages 3 "frame labels"; then
    run bash "$recipe/../folder/label.sh" --audio-dir "$unlabelled" --out "$out/mfcc" --num-workers "$num_workers" --device "$device" \
        --quiet "$quiet"
fi

if in_stages 4 "pre-training"; then
    run "$python" -m k2ssl.bin.pretrain "$recipe/../folder/conf/zipformer_logmel.toml" --data.cuts "${pretrain_cuts[@]}" \
        --data.labels "${pretrain_labels[@]}" --output "$out/pretrain" --trainer.max-steps "$pretrain_steps" \
        --trainer.keep.save-every "$pretrain_averaged" "${common_options[@]}"
    if [ -f "$out/pretrained.pt" ]; then
        log "$out/pretrained.pt is there already"
    else
        run "$python" -m k2ssl.bin.average --start "$(earlier_checkpoint pretrain "$pretrain_steps" "$pretrain_averaged")" \
            --end "$(last_checkpoint pretrain "$pretrain_steps")" --output "$out/pretrained.pt"
    fi
fi

if in_stages 5 "fine-tuning"; then
    for system in "${systems[@]}"; do
        init=()
        [[ $system == *_scratch ]] || init=(--init "$out/pretrained.pt" --init-batch-count "$init_batch_count")
        run "$python" -m k2ssl.bin.finetune "$recipe/conf/finetune/${system%%_*}_letters.toml" --data.cuts "$out/cuts/cuts_train.jsonl.gz" \
            --tokenizer "$out/letters.pt" "${init[@]}" --output "$out/$system" --trainer.max-steps "$finetune_steps" \
            --schedule.lr-batches "$((finetune_steps / 2))" --schedule.warmup-batches "$((finetune_steps / 40))" \
            --trainer.keep.save-every "$finetune_averaged" "${common_options[@]}"
    done
fi

hypotheses=()
for system in "${systems[@]}"; do
    hypotheses+=("$out/decode/$system-ctc-greedy/hypotheses.jsonl")
    [[ $system == ctc_* ]] || hypotheses+=("$out/decode/$system-greedy/hypotheses.jsonl")
done

if in_stages 6 "recognition"; then
    for file in "${hypotheses[@]}"; do
        folder=$(dirname "$file")
        name=$(basename "$folder")
        system=${name%%-*}
        run "$python" -m k2ssl.bin.decode "$(last_checkpoint "$system" "$finetune_steps")" --weights average \
            --after "$(earlier_checkpoint "$system" "$finetune_steps" "$finetune_averaged")" --cuts "$out/cuts/cuts_test.jsonl.gz" --method "${name#*-}" \
            --output "$folder" --device "$device" --quiet "$quiet"
    done
fi

if in_stages 7 "scores"; then
    run "$python" -m k2ssl.bin.score "${hypotheses[@]}" --output "$out/score" --overwrite True
fi
