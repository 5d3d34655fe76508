#!/usr/bin/env bash
# Pre-training on Libri-Light (577, 5,193 and 51,934 hours of read books without transcripts): segments of speech become cuts, a Base model labels
# them, a Large model is pre-trained on the labels, and fine-tuned on 10 minutes, 1 hour and 10 hours of LibriSpeech and on LibriSpeech itself.
#
#   bash recipes/librilight/run.sh --parts small --label-model exp/librispeech/iter2 --ngpu 8
#   bash recipes/librilight/run.sh --corpus-dir /corpora/librilight --stage 1 --stop-stage 3 --pretrain-conf recipes/librilight/conf/hubert_large.toml
#
# Stages: 0 download, 1 cuts, 2 labels, 3 pre-training, 4 cuts and tokenizers for fine-tuning, 5 fine-tuning on the limited sets, 6 on LibriSpeech,
# 7 averages and recognition, 8 scores, 9 tables. What is finished is skipped, what was interrupted goes on. Stages 2 and 3 can take several
# machines. Stages from 4 on are those of recipes/librispeech/run.sh, once for each set to fine-tune on, in OUT/finetune/SET.
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../stages.sh"

download_dir=data  # where stage 0 puts the corpora that are not named in the next three lines
corpus_dir=  # Libri-Light as it is unpacked, with small/, medium/, large/ in it; empty: DOWNLOAD_DIR/librilight
limited_dir=  # the limited sets as they are unpacked, with 1h/ and 9h/ in it; empty: DOWNLOAD_DIR/librispeech_finetuning
librispeech_dir=  # LibriSpeech as it is unpacked; empty: DOWNLOAD_DIR/LibriSpeech
parts=small,medium,large  # of Libri-Light
label_model=exp/librispeech/iter2  # a Base model's second iteration: model file, checkpoint, or the folder of its training for the last one
label_layer=layer9  # whose output is clustered: layerN, or stackN of a Zipformer
num_clusters=500  # classes
pretrain_conf=recipes/librilight/conf/zipformer_large.toml  # hubert_large.toml beside it for comparison
pretrain_steps=  # updates; empty: as the configuration says, and so below
pretrain_save_every=5000  # updates between two checkpoints of pre-training, of which the last two stay
finetune_sets=10min,1h,10h,100h,960h  # the limited ones, and those of LibriSpeech; separated by commas
systems=ctc,transducer  # which of the two to fine-tune
ctc_steps=  # updates of the fine-tuning with CTC, on every set
transducer_steps=  # of the fine-tuning with a transducer
finetune_averaged=1000  # of the last updates of fine-tuning, over which weights are averaged
dev_sets=dev-clean,dev-other  # of LibriSpeech, for validation in fine-tuning
test_sets=dev-clean,dev-other,test-clean,test-other  # of LibriSpeech, to recognise
lm=none  # language model: none, transcripts, or a published one, as in recipes/librispeech/run.sh
out=exp/librilight  # folder for everything that is made
seed=42  # of the weights that are drawn and of the order of the data
device=auto  # auto, cpu, cuda
num_workers=4  # processes that read audio, for each process that computes
quiet=False  # True: plain lines instead of progress bars
parse_options "$@"

recipe=$(dirname "$recipe_script")
need_whole_numbers num_clusters pretrain_save_every finetune_averaged seed num_workers
need_steps pretrain_steps ctc_steps transducer_steps
find_conf pretrain_conf || refuse "--pretrain-conf: there is no file ${pretrain_conf#"$repository/"}"
need_lists parts finetune_sets dev_sets test_sets
need_systems
IFS=, read -r -a part_list <<<"$parts"
IFS=, read -r -a set_list <<<"$finetune_sets"
IFS=, read -r -a system_list <<<"$systems"
limited_list=() librispeech_list=()
for set in "${set_list[@]}"; do
    case $set in
    10min | 1h | 10h) limited_list+=("$set") ;;
    100h | 960h) librispeech_list+=("$set") ;;
    *) refuse "--finetune-sets names $set; 10min, 1h, 10h, 100h, 960h are known" ;;
    esac
done
need_environment

manifests=() labels=()
for part in "${part_list[@]}"; do
    manifests+=("$out/cuts/cuts_$part.jsonl.gz") labels+=("$out/labels/labels/$part")
done

# Parts of LibriSpeech that set $1 is.
parts_of() {
    case $1 in
    100h) echo train-clean-100 ;;
    960h) echo train-clean-100,train-clean-360,train-other-500 ;;
    *) echo "$1" ;; # a limited set, whose cuts stage 4 makes under its name
    esac
}

# Parts of LibriSpeech, one a line, that fine-tuning on these sets takes.
parts_for() {
    local _set
    {
        echo "$dev_sets,$test_sets"
        for _set in "$@"; do parts_of "$_set"; done
    } | tr , '\n' | sort -u
}

# The configuration of system $2 on set $1 for Zipformer Base.
conf_of() {
    local _head=ctc_letters
    [ "$2" = ctc ] || _head=transducer_bpe
    case $1 in
    100h | 960h) echo "$recipe/../librispeech/conf/finetune/${_head}_$1.toml" ;;
    *) echo "$recipe/conf/finetune/$1_$_head.toml" ;;
    esac
}

for set in "${set_list[@]}"; do
    for system in "${system_list[@]}"; do need_average "${system}_steps" finetune_averaged "$(conf_of "$set" "$system")"; done
done

# Stages of LibriSpeech's recipe, from $2 to $3, for set $1.
librispeech() {
    local _set=$1 _from=$2 _to=$3 _folder=$out/finetune/$1 _sets
    _sets=$(parts_of "$1")
    run_extra bash "$recipe/../librispeech/run.sh" --stage "$_from" --stop-stage "$_to" --out "$_folder" \
        --corpus-dir "${librispeech_dir:-$download_dir/LibriSpeech}" --download-dir "$download_dir" --pretrain-sets "$_sets" \
        --finetune-sets "$_sets" --dev-sets "$dev_sets" --test-sets "$test_sets" --systems "$systems" \
        --ctc-conf "$(settings_of "$_set" ctc)" --transducer-conf "$(settings_of "$_set" transducer)" \
        --vocab-size "$(sed -n 's/^vocab_size = //p' "$(conf_of "$_set" transducer)")" --pretrained "$(last_checkpoint pretrain "$pretrain_steps")" --lm "$lm" \
        --finetune-averaged "$finetune_averaged" --seed "$seed" --device "$device" --num-workers "$num_workers" --quiet "$quiet" --ngpu "$ngpu" \
        ${ctc_steps:+--ctc-steps "$ctc_steps"} ${transducer_steps:+--transducer-steps "$transducer_steps"} ${extra[0]+--}
}

# That configuration with the encoder that was pre-trained; stage 4 writes it.
settings_of() {
    case ,$systems, in
    *,$2,*) echo "$out/finetune/$1/$2.json" ;;
    *) conf_of "$1" "$2" ;;
    esac
}

if in_stages 0 "download"; then
    [ -n "$corpus_dir" ] || run_extra "$python" "$recipe/download.py" --out "$download_dir" --parts "${part_list[@]}"
    [ -n "$limited_dir" ] || [ ${#limited_list[@]} = 0 ] || run_extra "$python" "$recipe/download.py" --out "$download_dir" --parts limited
    if [ -z "$librispeech_dir" ]; then
        mapfile -t wanted < <(parts_for ${librispeech_list[@]+"${librispeech_list[@]}"})
        run_extra "$python" "$recipe/../librispeech/download.py" --out "$download_dir" --parts "${wanted[@]}"
    fi
    [[ $lm =~ ^(none|transcripts)$ ]] || run_extra "$python" "$recipe/../librispeech/download.py" --out "$download_dir" --lm "$lm" vocab
fi

if in_stages 1 "cuts of Libri-Light"; then
    corpus=${corpus_dir:-$download_dir/librilight}
    if [ -n "$corpus_dir" ]; then
        need_corpus corpus-dir "$corpus_dir" "without it, stage 0 fetches Libri-Light"
    else
        for part in "${part_list[@]}"; do need_file "$corpus/$part" "part of Libri-Light; --corpus-dir names one that is there" 0; done
    fi
    run_extra "$python" "$recipe/prepare_cuts.py" --corpus-dir "$corpus" --parts "${part_list[@]}" --out "$out/cuts"
fi

if in_stages 2 "labels of $label_layer"; then
    for manifest in "${manifests[@]}"; do need_file "$manifest" "manifest of cuts" 1; done
    model=$(model_at "$label_model")
    $dry_run || [ -f "$model" ] ||
        _fail "--label-model is $label_model, and there is no such file or folder; recipes/librispeech/run.sh trains a Base model"
    make_labels "$out/labels" --cuts "$(IFS=, && echo "${manifests[*]}")" --features "$label_layer" --checkpoint "$model" \
        --num-clusters "$num_clusters"
fi

if in_stages 3 "pre-training"; then
    for folder in "${labels[@]}"; do need_file "$folder/contract.json" "labels" 2; done
    classes=()
    ! given num_clusters || classes=(--model.head.num-classes "$num_clusters")
    pretrain pretrain "$pretrain_conf" "$pretrain_steps" "$pretrain_save_every" --data.cuts "${manifests[@]}" --data.labels "${labels[@]}" \
        ${classes[@]+"${classes[@]}"} --trainer.keep.keep-every 0 # fine-tuning begins with the last weights, as published: no average is taken
fi

if in_stages 4 "cuts, tokenizers and configurations for fine-tuning"; then
    limited=${limited_dir:-$download_dir/librispeech_finetuning} librispeech=${librispeech_dir:-$download_dir/LibriSpeech}
    [ -z "$limited_dir" ] || need_corpus limited-dir "$limited_dir" "without it, stage 0 fetches the limited sets"
    [ -z "$librispeech_dir" ] || need_corpus librispeech-dir "$librispeech_dir" "without it, stage 0 fetches what is needed of LibriSpeech"
    for set in "${set_list[@]}"; do
        trained=()
        if [[ " ${limited_list[*]-} " == *" $set "* ]]; then
            need_file "$limited" "the limited sets; --limited-dir names them where they are there" 0
            run "$python" "$recipe/prepare_limited.py" --corpus-dir "$limited" --sets "$set" --out "$out/finetune/$set/cuts"
        else
            trained=("$set")
        fi
        mapfile -t wanted < <(parts_for ${trained[@]+"${trained[@]}"})
        [ -n "$librispeech_dir" ] ||
            for part in "${wanted[@]}"; do need_file "$librispeech/$part" "part of LibriSpeech; --librispeech-dir names one that is there" 0; done
        run "$python" "$recipe/../librispeech/prepare_cuts.py" --corpus-dir "$librispeech" \
            --parts "${wanted[@]}" --out "$out/finetune/$set/cuts"
        librispeech "$set" 2 2
        for system in "${system_list[@]}"; do # last, since the next stages look for these files
            run "$python" "$recipe/finetune_conf.py" --conf "$(conf_of "$set" "$system")" --pretrain-conf "$pretrain_conf" \
                --output "$(settings_of "$set" "$system")"
        done
    done
fi

# Each system in a stage of its own: there, flags after -- are known.
finetune_on() {
    local _set _system _number
    need_file "$out/pretrain/finished" "mark of pre-training that came to its end" 3
    need_file "$(last_checkpoint pretrain "$pretrain_steps")" "last checkpoint of pre-training" 3
    for _set in "$@"; do
        for _system in "${system_list[@]}"; do
            need_file "$(settings_of "$_set" "$_system")" "configuration" 4
            _number=7
            [ "$_system" = ctc ] || _number=8
            librispeech "$_set" $_number $_number
        done
    done
}

if in_stages 5 "fine-tuning on limited sets"; then
    finetune_on ${limited_list[@]+"${limited_list[@]}"}
fi

if in_stages 6 "fine-tuning on LibriSpeech"; then
    finetune_on ${librispeech_list[@]+"${librispeech_list[@]}"}
fi

if in_stages 7 "averages and recognition"; then
    for set in "${set_list[@]}"; do
        extra_of_all=(${extra[@]+"${extra[@]}"}) extra=() # they are for recognition
        librispeech "$set" 9 9
        extra=(${extra_of_all[@]+"${extra_of_all[@]}"})
        librispeech "$set" 10 10
    done
fi

if in_stages 8 "scores"; then
    for set in "${set_list[@]}"; do librispeech "$set" 11 11; done
fi

if in_stages 9 "tables"; then
    for set in "${set_list[@]}"; do need_file "$out/finetune/$set/score/wer.json" "scores" 8; done
    make_tables "$out/report" "$out"
fi
