#!/usr/bin/env bash
# Frame labels for any folder of audio: cuts, k-means over MFCC or over a model's layer, labels, and a report on how good they are.
#
#   bash recipes/folder/label.sh --audio-dir recordings --out exp/mfcc100
#   bash recipes/folder/label.sh --audio-dir recordings --out exp/layer6 --features layer6 --checkpoint model.pt \
#       --num-clusters 500 --previous exp/mfcc100/labels
#
# --audio-dir takes several folders, separated by commas (a path cannot have one in it); each becomes a split named like the folder, with labels of its own, and the
# centres are learned from all of them. --cuts takes manifests that are there already instead, cuts_SPLIT.jsonl.gz, and stage 1 does nothing.
# A stage whose result is there is skipped, an interrupted one goes on where it was. The results are OUT/cuts/cuts_SPLIT.jsonl.gz (of
# folders), OUT/kmeans.pt and OUT/labels/SPLIT, with quality.json and quality.png in it.
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

audio_dir=  # folders of audio, separated by commas
cuts=  # instead of --audio-dir: manifests, named cuts_SPLIT.jsonl.gz, separated by commas
out=exp/labels  # folder for everything that is made
features=mfcc  # mfcc, or layerN or stackN of the model that --checkpoint names
checkpoint=  # model file, for features other than mfcc
num_clusters=100  # classes
max_batches=10000  # mini-batches of 10,000 frames after which k-means stops at the latest
previous=  # labels to compare with: a folder with a label store for each split
alignments=  # phone alignments to compare with: a CTM file, or a folder of TextGrid files
max_skipped=0.01  # share of the audio that may be left out because it cannot be read; it is listed
max_duration=200  # audio in a batch, seconds
num_workers=2  # processes that decode audio
num_processes=1  # another name of --ngpu
device=auto  # auto, cpu, cuda
quiet=False  # True: plain lines instead of progress bars
seed=0  # of everything random
parse_options "$@"
need_whole_numbers num_clusters max_batches num_workers num_processes seed
[[ $max_skipped =~ ^(0|1|0?\.[0-9]+|[01]\.0*)$ ]] || refuse "--max-skipped is $max_skipped, a share from 0 to 1 is needed, such as 0.1"

recipe=$(dirname "$recipe_script")
[ -n "$audio_dir$cuts" ] || refuse "--audio-dir is missing (or --cuts)"
[ -z "$audio_dir" ] || [ -z "$cuts" ] || refuse "--audio-dir and --cuts are both given, one of them is needed"
read_folders audio_dir
IFS=, read -r -a manifests <<<"$cuts"
splits=()
for folder in "${folders[@]}"; do
    split=$(basename "$(realpath -ms -- "$folder")") # the real name of `.`, but of a link its own
    [ "$split" != / ] || refuse "--audio-dir is $folder, which has no name; name a folder below it"
    ! is_one_of "$split" ${splits[@]+"${splits[@]}"} || refuse "--audio-dir names two folders called $split"
    splits+=("$split") manifests+=("$out/cuts/cuts_$split.jsonl.gz")
done
if [ -n "$cuts" ]; then
    for manifest in "${manifests[@]}"; do
        [[ $(basename "$manifest") =~ ^cuts_(.+)\.jsonl\.gz$ ]] || refuse "--cuts is $manifest, a file named cuts_SPLIT.jsonl.gz is needed"
        split=${BASH_REMATCH[1]}
        ! is_one_of "$split" ${splits[@]+"${splits[@]}"} || refuse "--cuts names two manifests called cuts_$split.jsonl.gz"
        splits+=("$split")
    done
fi

case $features in
mfcc)
    [ -z "$checkpoint" ] || refuse "--checkpoint is of no use with --features mfcc"
    feature_options=(--features.kind mfcc)
    ;;
layer[1-9]* | stack[1-9]*)
    [ -n "$checkpoint" ] || refuse "--features $features needs --checkpoint"
    $dry_run || [ -f "$checkpoint" ] || refuse "--checkpoint is $checkpoint, which is no file"
    feature_options=(--features.kind hidden --features.checkpoint "$checkpoint" "--features.${features:0:5}" "${features:5}")
    ;;
*) refuse "--features is $features; mfcc, layerN and stackN are known" ;;
esac

need_environment
[ "$num_processes" = 1 ] || ngpu=$num_processes
common_options=(--max-skipped "$max_skipped" --loader.max-duration "$max_duration" --loader.num-workers "$num_workers" --device "$device"
    --quiet "$quiet")

if in_stages 1 "cuts"; then
    [ -z "$cuts" ] || log "the manifests are there: $cuts"
    for i in "${!folders[@]}"; do # a name may begin with a dash
        run_extra "$python" "$recipe/prepare_cuts.py" "--audio-dir=${folders[i]}" "--split=${splits[i]}" --out "$out/cuts"
    done
fi

if in_stages 2 "k-means over $features"; then
    [ -n "$cuts" ] || for manifest in "${manifests[@]}"; do need_file "$manifest" "manifest of the audio" 1; done
    launch k2ssl.bin.fit_kmeans --cuts "${manifests[@]}" --output "$out/kmeans.pt" --skip-finished True "${feature_options[@]}" \
        --kmeans.num-clusters "$num_clusters" --kmeans.max-batches "$max_batches" --kmeans.seed "$seed" "${common_options[@]}"
fi

if in_stages 3 "labels and report"; then
    need_file "$out/kmeans.pt" "k-means centres" 2
    for i in "${!splits[@]}"; do
        launch k2ssl.bin.label --kmeans "$out/kmeans.pt" --cuts "${manifests[i]}" --output "$out/labels/${splits[i]}" \
            ${checkpoint:+--checkpoint "$checkpoint"} ${previous:+--compare.previous "$previous/${splits[i]}"} \
            ${alignments:+--compare.alignments "$alignments"} "${common_options[@]}"
    done
fi
