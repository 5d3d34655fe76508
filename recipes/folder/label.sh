#!/usr/bin/env bash
# Frame labels for any folder of audio: cuts, k-means over MFCC or over a model's layer, labels, and a report on how good they are.
#
#   bash recipes/folder/label.sh --audio-dir recordings --out exp/mfcc100
#   bash recipes/folder/label.sh --audio-dir recordings --out exp/layer6 --features layer6 --checkpoint model.pt \
#       --num-clusters 500 --previous exp/mfcc100/labels
#
# --audio-dir takes several folders, separated by commas; each becomes a split named like the folder, with labels of its own, and the
# centres are learned from all of them. A stage whose result is there is skipped, an interrupted one goes on where it was.
# The results are OUT/cuts/cuts_SPLIT.jsonl.gz, OUT/kmeans.pt and OUT/labels/SPLIT, with quality.json and quality.png in it.
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

audio_dir=  # folders of audio, separated by commas (required)
out=exp/labels  # folder for everything that is made
features=mfcc  # mfcc, or layerN or stackN of the model that --checkpoint names
checkpoint=  # model file, for features other than mfcc
num_clusters=100  # classes
max_batches=10000  # mini-batches of 10,000 frames after which k-means stops at the latest
previous=  # labels to compare with: a folder with a label store for each split
alignments=  # phone alignments to compare with: a CTM file, or a folder of TextGrid files
max_duration=200  # audio in a batch, seconds
num_workers=2  # processes that decode audio
num_processes=1  # processes that compute, for instance one per GPU
device=auto  # auto, cpu, cuda
quiet=False  # True: plain lines instead of progress bars
seed=0  # of everything random
parse_options "$@"
need_whole_numbers num_clusters max_batches num_workers num_processes seed

recipe=$(dirname "$recipe_script")
[ -n "$audio_dir" ] || _refuse "--audio-dir is missing"
IFS=, read -r -a folders <<<"$audio_dir"
splits=() manifests=()
for folder in "${folders[@]}"; do
    split=$(basename "$(realpath -ms -- "$folder")") # the real name of `.`, but of a link its own
    [ "$split" != / ] || _refuse "--audio-dir is $folder, which has no name; name a folder below it"
    [[ " ${splits[*]-} " != *" $split "* ]] || _refuse "--audio-dir names two folders called $split"
    splits+=("$split") manifests+=("$out/cuts/cuts_$split.jsonl.gz")
done

case $features in
mfcc)
    [ -z "$checkpoint" ] || _refuse "--checkpoint is of no use with --features mfcc"
    feature_options=(--features.kind mfcc)
    ;;
layer[1-9]* | stack[1-9]*)
    [ -n "$checkpoint" ] || _refuse "--features $features needs --checkpoint"
    feature_options=(--features.kind hidden --features.checkpoint "$checkpoint" "--features.${features:0:5}" "${features:5}")
    ;;
*) _refuse "--features is $features; mfcc, layerN and stackN are known" ;;
esac

$dry_run || [ -x "$python" ] || { log "there is no $python: run scripts/setup.sh first" && exit 1; }
if [ "$num_processes" = 1 ]; then
    program=("$python" -m)
else
    program=("$python" -m torch.distributed.run --standalone --nproc-per-node "$num_processes" -m)
fi
common_options=(--loader.max-duration "$max_duration" --loader.num-workers "$num_workers" --device "$device" --quiet "$quiet")

if in_stages 1 "cuts"; then
    for i in "${!folders[@]}"; do
        run "$python" "$recipe/prepare_cuts.py" --audio-dir "${folders[i]}" --split "${splits[i]}" --out "$out/cuts"
    done
fi

if in_stages 2 "k-means over $features"; then
    run "${program[@]}" k2ssl.bin.fit_kmeans --cuts "${manifests[@]}" --output "$out/kmeans.pt" --skip-finished True "${feature_options[@]}" \
        --kmeans.num-clusters "$num_clusters" --kmeans.max-batches "$max_batches" --kmeans.seed "$seed" "${common_options[@]}"
fi

if in_stages 3 "labels and report"; then
    for split in "${splits[@]}"; do
        run "${program[@]}" k2ssl.bin.label --kmeans "$out/kmeans.pt" --cuts "$out/cuts/cuts_$split.jsonl.gz" --output "$out/labels/$split" \
            ${checkpoint:+--checkpoint "$checkpoint"} ${previous:+--compare.previous "$previous/$split"} \
            ${alignments:+--compare.alignments "$alignments"} "${common_options[@]}"
    done
fi
