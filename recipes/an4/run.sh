#!/usr/bin/env bash
# Real speech in an hour or two of one CPU core: a small Zipformer is pre-trained on AN4's training audio and on any other audio at hand, then
# fine-tuned on AN4's transcripts, with CTC alone and with a transducer beside CTC, each from the pre-trained encoder and from scratch with as
# many updates; the test set is recognised by greedy search, with --searches all by every search and with language models, and scored.
#
#   bash recipes/an4/run.sh --corpus-dir an4 --audio-dir recordings,more --out exp/an4
#   bash recipes/an4/run.sh --corpus-dir an4 --audio-dir recordings,more --out exp/an4 --transcribed-minutes 10
#
# The second command uses what the first one has pre-trained, and fine-tunes on the transcripts of ten minutes.
# A stage whose result is there is skipped, an interrupted one goes on where it was. The last stages write OUT/score/report.txt and wer.json,
# and tables of error rates and cost, OUT/tables/report.md.
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../stages.sh"

corpus_dir=data/an4  # the corpus as it is published: a folder with etc/ and flac/
audio_dir=  # further folders of audio to pre-train on, separated by commas; transcripts are not used
out=exp/an4  # folder for everything that is made
pretrain_steps=1800  # updates of 60 s
finetune_steps=2000  # updates of 30 s
transcribed_minutes=0  # of the training audio, drawn evenly from its speakers, whose transcripts are used; 0: all (43 minutes)
pretrain_averaged=200  # of the last updates of pre-training, over which weights are averaged before they are used
finetune_averaged=250  # the same of fine-tuning
init_batch_count=20000  # where the schedules inside a pre-trained encoder begin; see the program's --help
searches=greedy  # greedy; all: every search too, alone and with n-grams of the training transcripts and the corpus' an4.lm (needs k2ssl[lm])
seed=42  # of the weights that are drawn and of the order of the data
device=auto  # auto, cpu, cuda
num_workers=1  # processes that read audio
quiet=False  # True: plain lines instead of progress bars
parse_options "$@"
need_whole_numbers pretrain_steps finetune_steps transcribed_minutes pretrain_averaged finetune_averaged init_batch_count seed num_workers
need_one_of searches greedy all

recipe=$(dirname "$recipe_script")
need_average pretrain_steps pretrain_averaged "$repository/recipes/folder/conf/zipformer_logmel.toml"
for system in ctc transducer; do need_average finetune_steps finetune_averaged "$recipe/conf/finetune/${system}_letters.toml"; done
need_environment

[[ $corpus_dir != *,* ]] || refuse "--corpus-dir is $corpus_dir, and a comma separates folders of audio; rename it, or name a link without a comma"
read_folders audio_dir
folders=("$corpus_dir/flac/an4_clstk" ${folders[@]+"${folders[@]}"})
unlabelled=$corpus_dir/flac/an4_clstk${audio_dir:+,$audio_dir}
pretrain_cuts=() pretrain_labels=()
for folder in "${folders[@]}"; do
    split=$(basename "$(realpath -ms -- "$folder")")
    pretrain_cuts+=("$out/mfcc/cuts/cuts_$split.jsonl.gz") pretrain_labels+=("$out/mfcc/labels/$split")
done
limit=
[ "$transcribed_minutes" = 0 ] || limit=_${transcribed_minutes}min
transcribed=$out/cuts/cuts_train$limit.jsonl.gz
systems=("ctc${limit}_scratch" "ctc${limit}_pretrained" "transducer${limit}_scratch" "transducer${limit}_pretrained")

if in_stages 1 "cuts"; then
    need_corpus corpus-dir "$corpus_dir" "Carnegie Mellon University publishes AN4, free of charge; README.md says how it has to lie"
    run_extra "$python" "$recipe/prepare_cuts.py" --corpus-dir "$corpus_dir" --out "$out/cuts"
    if [ -n "$limit" ] && ! is_made "$transcribed" "$transcribed_minutes"; then
        run "$python" "$recipe/prepare_limited.py" --cuts "$out/cuts/cuts_train.jsonl.gz" --minutes "$transcribed_minutes" --output "$transcribed"
        now_made "$transcribed" "$transcribed_minutes"
    fi
fi

if in_stages 2 "tokenizer"; then # of all letters, so that systems with fewer transcripts have outputs for the same ones
    need_file "$out/cuts/cuts_train.jsonl.gz" "manifest of the training audio" 1
    make_tokenizer "$out/letters.pt" --cuts "$out/cuts/cuts_train.jsonl.gz" --kind letters
fi

if in_stages 3 "frame labels"; then
    make_labels "$out/mfcc" --audio-dir "$unlabelled"
fi

if in_stages 4 "pre-training"; then
    for folder in "${pretrain_labels[@]}"; do need_file "$folder/contract.json" "frame labels" 3; done
    pretrain pretrain "$recipe/../folder/conf/zipformer_logmel.toml" "$pretrain_steps" "$pretrain_averaged" \
        --data.cuts "${pretrain_cuts[@]}" --data.labels "${pretrain_labels[@]}"
    average "$out/pretrained.pt" pretrain "$pretrain_steps" "$pretrain_averaged"
fi

if in_stages 5 "fine-tuning"; then
    need_file "$out/letters.pt" "tokenizer" 2
    need_file "$out/pretrained.pt" "pre-trained model" 4
    need_file "$transcribed" "manifest of the transcribed audio" 1
    for system in "${systems[@]}"; do
        init=()
        [[ $system == *_scratch ]] || init=(--init "$out/pretrained.pt" --init-batch-count "$init_batch_count")
        finetune "$system" "$recipe/conf/finetune/${system%%_*}_letters.toml" "$finetune_steps" "$finetune_averaged" \
            --data.cuts "$transcribed" --tokenizer "$out/letters.pt" "${init[@]}" \
            --schedule.lr-batches "$((finetune_steps / 2))" --schedule.warmup-batches "$((finetune_steps / 40))"
    done
fi

# How the test set is recognised by $1, METHOD or METHOD+MODEL each; scales are the defaults, since there is no development set.
searches_of() {
    case $searches,$1 in
    greedy,ctc_*) echo ctc-greedy ;;
    greedy,*) echo ctc-greedy greedy ;;
    all,ctc_*) echo ctc-greedy ctc-prefix-beam{,+letters} ctc-lexicon-free+letters ctc-lexicon{,+words,+an4} ;;
    all,*) echo ctc-greedy greedy modified-beam{,+letters} ctc-lexicon+words ;;
    esac
}

# The options of one of these, in the array `options`.
read_options() {
    options=()
    [[ $1 != ctc-lexicon && $1 != ctc-lexicon+* ]] || options+=(--search.lexicon "$out/lm$limit/words.txt")
    case $1 in
    *+an4) options+=(--search.lm "$corpus_dir/etc/an4.lm") ;;
    *+*) options+=(--search.lm "$out/lm$limit/${1#*+}.arpa") ;;
    esac
    [ "$1" != ctc-lexicon-free+letters ] || options+=(--search.lm-scale 0.3) # that of ctc-prefix-beam
}

# A language model of the training transcripts: make_lm NAME FLAG...
make_lm() {
    local _file=$out/lm$limit/$1.arpa
    shift
    is_made "$_file" "$@" && return
    run "$python" -m k2ssl.bin.train_ngram --cuts "$transcribed" "$@" --output "$_file"
    now_made "$_file" "$@"
}

# The words of an ARPA file, one a line.
words_of() { awk '$0 == "\\1-grams:" { on = 1; next } /^\\/ { on = 0 } on && NF > 1 && $2 !~ /^</ { print $2 }' "$1"; }

hypotheses=()
for system in "${systems[@]}"; do
    for name in $(searches_of "$system"); do hypotheses+=("$out/decode/$system-$name/hypotheses.jsonl"); done
done

if in_stages 6 "recognition"; then
    if [ "$searches" = all ]; then
        need_file "$out/letters.pt" "tokenizer" 2
        make_lm letters --tokenizer "$out/letters.pt" --order 6
        make_lm words --order 3
        $dry_run || words_of "$out/lm$limit/words.arpa" >"$out/lm$limit/words.txt"
    fi
    for file in "${hypotheses[@]}"; do
        folder=$(dirname "$file")
        name=$(basename "$folder")
        system=${name%%-*}
        model=$(last_checkpoint "$system" "$finetune_steps")
        need_file "$model" "last checkpoint of $system" 5
        name=${name#*-}
        read_options "$name"
        decode "$folder" "$model" "${name%+*}" ${options[@]+"${options[@]}"} --cuts "$out/cuts/cuts_test.jsonl.gz" --weights average \
            --after "$(earlier_checkpoint "$system" "$finetune_steps" "$finetune_averaged")"
    done
fi

if in_stages 7 "scores"; then
    for file in "${hypotheses[@]}"; do need_file "$file" "recognised text" 6; done
    score "$out/score$limit" "${hypotheses[@]}"
fi

if in_stages 8 "tables"; then
    need_file "$out/score$limit/wer.json" "scores" 7
    make_tables "$out/tables" "$out"
fi
