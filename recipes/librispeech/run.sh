#!/usr/bin/env bash
# From LibriSpeech's audio to a table of word error rates: labels of MFCC, a first model, labels of one of its layers, Zipformer Base, fine-tuning
# with CTC and with a transducer, recognition with and without a language model.
#
#   bash recipes/librispeech/run.sh --ngpu 8                                     # downloads 61 GB; pre-trains on 960 h, fine-tunes on 100 h
#   bash recipes/librispeech/run.sh --corpus-dir /data/LibriSpeech --ngpu 8      # the corpus is there already
#   bash recipes/librispeech/run.sh --subset mini --out exp/mini                 # a small model on mini LibriSpeech, on a workstation
#   bash recipes/librispeech/run.sh --dry-run                                    # every command
#
# Stages: 0 download, 1 cuts, 2 tokenizers, 3 labels of MFCC, 4 pre-training 1, 5 labels of a layer, 6 pre-training 2, 7 CTC, 8 transducer,
# 9 averages, 10 language models and recognition, 11 scores, 12 tables. What is finished is skipped, what was interrupted goes on.
#
# --subset mini sets these where they are not given: sets train-clean-5, dev-clean-2, test-clean; configurations zipformer_logmel (folder/conf),
# zipformer_mini_iter2, ctc_letters_mini and transducer_bpe_mini; labels of stack 2 in 100 clusters; 300 mini-batches of k-means at most; 100 pieces; averages over 200 and 500
# updates, and averaged weights to go on from, at batch 20000.
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../stages.sh"

subset=full  # full or mini: what is set where no option says otherwise, see above
corpus_dir=  # the corpus as it is unpacked; empty: DOWNLOAD_DIR/LibriSpeech, made by stage 0
download_dir=data  # where stage 0 puts the corpus and published language models
base_url=  # where OpenSLR's resources lie, several separated by commas; empty: OpenSLR and its mirrors
pretrain_sets=train-clean-100,train-clean-360,train-other-500  # to pre-train on, separated by commas
finetune_sets=train-clean-100  # to fine-tune on; tokenizers and language models are made of their transcripts
dev_sets=dev-clean,dev-other  # for validation and the scales of language models; of pre-training only the first
test_sets=dev-clean,dev-other,test-clean,test-other  # to recognise
held_out_speakers=  # for corpora without such sets: speakers whose chapters become the sets to develop and to test on
pretrain1_conf=recipes/librispeech/conf/zipformer_base_iter1.toml  # of the first iteration
pretrain2_conf=recipes/librispeech/conf/zipformer_base.toml  # of the second; hubert_base.toml beside it for comparison
ctc_conf=recipes/librispeech/conf/finetune/ctc_letters_100h.toml  # of the fine-tuning with CTC
transducer_conf=recipes/librispeech/conf/finetune/transducer_bpe_100h.toml  # of the fine-tuning with a transducer
pretrain1_steps=  # updates of the first iteration; empty: as the configuration says, and so below
pretrain2_steps=  # of the second
ctc_steps=  # of the fine-tuning with CTC
transducer_steps=  # of the fine-tuning with a transducer
mfcc_clusters=100  # classes of the first labels
layer_clusters=500  # classes of the second labels
kmeans_batches=10000  # mini-batches of 10,000 frames after which a clustering stops at the latest
label_layer=layer6  # of the first model that the second labels are made of: layerN, or stackN of a Zipformer
pretrained_labels=  # published labels, stages 3 and 4 fall away then: a manifest of cuts, a .km file beside its .tsv, or a folder of them
pretrained=  # what to fine-tune: a model file, a checkpoint, or a folder of pre-training for its last one; stages 3 to 6 fall away then
init_weights=raw  # weights to go on from after pre-training: raw, of the last update, or average, over the last updates
init_batch_count=0  # where the schedules inside a pre-trained encoder begin in fine-tuning; see the program's --help
pretrain_averaged=20000  # updates between two checkpoints of pre-training, and over which weights are averaged
finetune_averaged=1000  # the same of fine-tuning, where averages are always taken
vocab_size=500  # BPE pieces of the transducer
systems=ctc,transducer  # which of the two to fine-tune
scratch=False  # True: fine-tune each also from drawn weights, with as many updates
ctc_methods=ctc-greedy,ctc-prefix-beam  # searches without a language model for the systems with CTC
transducer_methods=greedy,modified-beam  # the same for those with a transducer
lm=transcripts  # none; transcripts: n-grams of tokens; or a published model of words for CTC, such as 3-gram.pruned.1e-7 (needs k2ssl[lm])
lm_text=  # further text for n-grams, files separated by commas
lm_order=5  # tokens in an n-gram
lm_scales=0.1,0.3,0.5  # weights of the language model that are tried on the sets to develop on
token_scores=0,0.5  # what is added for a token or word with CTC, likewise
out=exp/librispeech  # folder for everything that is made
seed=42  # of the weights that are drawn and of the order of the data
device=auto  # auto, cpu, cuda
num_workers=2  # processes that read audio, for each process that computes
quiet=False  # True: plain lines instead of progress bars
parse_options "$@"

recipe=$(dirname "$recipe_script")
need_one_of subset full mini
need_one_of scratch True False
need_one_of init_weights raw average
need_one_of lm none transcripts 3-gram.pruned.1e-7 3-gram.pruned.3e-7 3-gram 4-gram
if [ "$subset" = mini ]; then
    unless_given pretrain_sets train-clean-5
    unless_given finetune_sets train-clean-5
    unless_given dev_sets dev-clean-2
    unless_given test_sets test-clean
    unless_given pretrain1_conf recipes/folder/conf/zipformer_logmel.toml
    unless_given pretrain2_conf recipes/librispeech/conf/zipformer_mini_iter2.toml
    unless_given ctc_conf recipes/librispeech/conf/finetune/ctc_letters_mini.toml
    unless_given transducer_conf recipes/librispeech/conf/finetune/transducer_bpe_mini.toml
    unless_given kmeans_batches 300
    unless_given layer_clusters 100
    unless_given label_layer stack2
    unless_given vocab_size 100
    unless_given pretrain_averaged 200
    unless_given finetune_averaged 500
    unless_given init_weights average
    unless_given init_batch_count 20000
fi
if [ -n "$held_out_speakers" ]; then
    unless_given dev_sets held-out-dev
    unless_given test_sets held-out-test
fi
need_whole_numbers mfcc_clusters layer_clusters kmeans_batches init_batch_count pretrain_averaged finetune_averaged vocab_size lm_order seed num_workers
need_steps pretrain1_steps pretrain2_steps ctc_steps transducer_steps
for pair in pretrain1_conf=4 pretrain2_conf=6 ctc_conf=7 transducer_conf=8; do
    conf=${pair%=*} said=${!conf}
    find_conf "$conf" || [ "${pair#*=}" -lt "$stage" ] || [ "${pair#*=}" -gt "$stop_stage" ] ||
        refuse "--${conf//_/-} is $said, and there is no such file"
done
need_lists pretrain_sets finetune_sets dev_sets test_sets
need_systems
[ -z "$pretrained" ] || [ -z "$pretrained_labels" ] || refuse "--pretrained and --pretrained-labels are both given; nothing is pre-trained with the first"
if [ "$init_weights" = average ] && [ -z "$pretrained" ]; then
    [ -n "$pretrained_labels" ] || need_average pretrain1_steps pretrain_averaged "$pretrain1_conf"
    need_average pretrain2_steps pretrain_averaged "$pretrain2_conf"
fi
[[ ,$systems, != *,ctc,* ]] || need_average ctc_steps finetune_averaged "$ctc_conf"
[[ ,$systems, != *,transducer,* ]] || need_average transducer_steps finetune_averaged "$transducer_conf"
need_environment

# The words of a list with commas between them, one a line; `words` puts them into array `found`.
each() { tr ',' '\n' <<<"$1" | sed '/^$/d'; }
words() { mapfile -t found < <(each "$1"); }

# What lies at $1, for each set of list $2: `files cuts "$dev_sets"` puts the manifests into array `found`.
files() {
    local _set
    found=()
    for _set in $(each "$2"); do
        case $1 in
        cuts) found+=("$out/cuts/cuts_$_set.jsonl.gz") ;;
        *) found+=("$out/$1/labels/$_set") ;;
        esac
    done
}

need_cuts() {
    files cuts "$1"
    for manifest in "${found[@]}"; do need_file "$manifest" "manifest of cuts" 1; done
}

files cuts "$pretrain_sets" && pretrain_cuts=("${found[@]}")
files cuts "$finetune_sets" && finetune_cuts=("${found[@]}")
files cuts "$dev_sets" && dev_cuts=("${found[@]}")
first_dev=$(each "$dev_sets" | head -n 1)
mapfile -t all_sets < <(each "$pretrain_sets,$finetune_sets,$dev_sets,$test_sets" | sort -u | grep -v '^held-out-')
runs=() # of fine-tuning
for system in $(each "$systems"); do
    runs+=("$system")
    [ "$scratch" = False ] || runs+=("${system}_scratch")
done
methods_of() { if [[ $1 == ctc* ]]; then each "$ctc_methods"; else each "$transducer_methods"; fi; }
tokenizer_of() { [[ $1 == ctc* ]] && echo "$out/letters.pt" || echo "$out/bpe.pt"; }
need_run() { need_file "$out/$1/finished" "mark of a run that came to its end" "$2"; }
# Where a pre-trained model lies: run $1, its updates $2.
model_of() { [ "$init_weights" = raw ] && last_checkpoint "$1" "$2" || echo "$out/$1.pt"; }
average_if_wanted() { [ "$init_weights" = raw ] || average "$out/$1.pt" "$1" "$2" "$pretrain_averaged"; }

# Cluster the sets to pre-train on and label them, then the first set to develop on: label FOLDER OPTION...
label() {
    local _folder=$1
    shift
    make_labels "$_folder" --cuts "$(IFS=, && echo "${pretrain_cuts[*]}")" --max-batches "$kmeans_batches" "$@"
    # several machines go through all stages of label.sh, and the centres are not to be learned from these
    [ "$nnodes" -gt 1 ] || make_labels "$_folder" --cuts "${dev_cuts[0]}" --stage 3 --stop-stage 3 "$@"
}

# Pre-train on labels in folder $5, in as many classes as option $6 says if it is given: pretrain_on RUN CONF STEPS STAGE FOLDER OPTION
pretrain_on() {
    files "$5" "$pretrain_sets"
    local _labels=("${found[@]}") _folder _valid=() _classes=()
    ! given "$6" || _classes=(--model.head.num-classes "${!6}")
    for _folder in "${_labels[@]}"; do need_file "$_folder/contract.json" "finished labels" "$4"; done
    if [ -f "$out/$5/labels/$first_dev/contract.json" ] || { $dry_run && [ "$5" != imported ]; }; then
        _valid=(--data.valid-cuts "${dev_cuts[0]}" --data.valid-labels "$out/$5/labels/$first_dev")
    else
        log "there are no labels of $first_dev: nothing is validated"
    fi
    pretrain "$1" "$2" "$3" "$pretrain_averaged" --data.cuts "${pretrain_cuts[@]}" --data.labels "${_labels[@]}" ${_valid[@]+"${_valid[@]}"} \
        ${_classes[@]+"${_classes[@]}"}
}

# Fine-tune the systems of one kind: finetune_system ctc|transducer CONF STEPS FLAG...
finetune_system() {
    local _kind=$1 _conf=$2 _steps=$3 _run _init _model
    shift 3
    need_cuts "$finetune_sets,$dev_sets"
    need_file "$(tokenizer_of "$_kind")" "tokenizer" 2
    for _run in "${runs[@]}"; do
        [[ $_run == "$_kind"* ]] || continue
        _init=()
        if [ "$_run" = "$_kind" ]; then
            if [ -n "$pretrained" ]; then
                _model=$(model_at "$pretrained")
                $dry_run || [ -e "$_model" ] || _fail "--pretrained is $pretrained, and there is no such file"
            else
                need_run iter2 6
                _model=$(model_of iter2 "$pretrain2_steps")
                need_file "$_model" "pre-trained model" 6
            fi
            _init=(--init "$_model" --init-batch-count "$init_batch_count")
        fi
        finetune "$_run" "$_conf" "$_steps" "$finetune_averaged" --data.cuts "${finetune_cuts[@]}" --data.valid-cuts "${dev_cuts[@]}" \
            --tokenizer "$(tokenizer_of "$_kind")" ${_init[@]+"${_init[@]}"} "$@"
    done
}

if in_stages 0 "download"; then
    wanted=()
    [[ $lm =~ ^(none|transcripts)$ ]] || wanted+=(--lm "$lm" vocab)
    [ -n "$corpus_dir" ] || wanted+=(--parts "${all_sets[@]}")
    [ -z "$base_url" ] || { words "$base_url" && wanted+=(--base-url "${found[@]}"); }
    [ -z "$corpus_dir" ] || log "the corpus is $corpus_dir"
    [ -n "$corpus_dir" ] && [[ $lm =~ ^(none|transcripts)$ ]] || run_extra "$python" "$recipe/download.py" --out "$download_dir" "${wanted[@]}"
fi

if in_stages 1 "cuts"; then
    corpus=${corpus_dir:-$download_dir/LibriSpeech}
    if [ -n "$corpus_dir" ]; then
        need_corpus corpus-dir "$corpus_dir" "without it, stage 0 fetches the corpus"
    else
        for set in "${all_sets[@]}"; do need_file "$corpus/$set" "part of the corpus; --corpus-dir names one that is there" 0; done
    fi
    held_out=()
    [ -z "$held_out_speakers" ] || { words "$held_out_speakers" && held_out=(--held-out-speakers "${found[@]}"); }
    run_extra "$python" "$recipe/prepare_cuts.py" --corpus-dir "$corpus" --parts "${all_sets[@]}" --out "$out/cuts" ${held_out[@]+"${held_out[@]}"}
fi

if in_stages 2 "tokenizers"; then
    need_cuts "$finetune_sets"
    make_tokenizer "$out/letters.pt" --cuts "${finetune_cuts[@]}" --kind letters --text.case upper --text.allowed "ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
    make_tokenizer "$out/bpe.pt" --cuts "${finetune_cuts[@]}" --kind bpe --vocab-size "$vocab_size" --text.case upper
fi

if [ -n "$pretrained" ]; then
    second_labels=none
elif [ -n "$pretrained_labels" ]; then
    second_labels=imported
    if in_stages 5 "import labels"; then
        need_cuts "$pretrain_sets"
        for set in $(each "$pretrain_sets"); do
            run_extra "$python" "$recipe/import_labels.py" --labels "$pretrained_labels" --cuts "$out/cuts/cuts_$set.jsonl.gz" \
                --num-classes "$layer_clusters" --output "$out/imported/labels/$set"
        done
    fi
else
    second_labels=layer
    if in_stages 3 "labels of MFCC"; then
        need_cuts "$pretrain_sets,$first_dev"
        label "$out/mfcc" --num-clusters "$mfcc_clusters"
    fi

    if in_stages 4 "pre-training 1"; then
        pretrain_on iter1 "$pretrain1_conf" "$pretrain1_steps" 3 mfcc mfcc_clusters
        average_if_wanted iter1 "$pretrain1_steps"
    fi

    if in_stages 5 "labels of $label_layer"; then
        need_cuts "$pretrain_sets,$first_dev"
        need_run iter1 4
        model=$(model_of iter1 "$pretrain1_steps")
        need_file "$model" "model of the first iteration" 4
        label "$out/layer" --features "$label_layer" --checkpoint "$model" --num-clusters "$layer_clusters" --previous "$out/mfcc/labels"
    fi
fi

if [ -z "$pretrained" ] && in_stages 6 "pre-training 2"; then
    pretrain_on iter2 "$pretrain2_conf" "$pretrain2_steps" 5 "$second_labels" layer_clusters
    average_if_wanted iter2 "$pretrain2_steps"
fi

if [[ ,$systems, == *,ctc,* ]] && in_stages 7 "fine-tuning with CTC"; then
    finetune_system ctc "$ctc_conf" "$ctc_steps"
fi

if [[ ,$systems, == *,transducer,* ]] && in_stages 8 "fine-tuning with a transducer"; then
    finetune_system transducer "$transducer_conf" "$transducer_steps" --model.vocab-size "$vocab_size"
fi

if in_stages 9 "averages"; then
    for name in "${runs[@]}"; do
        steps=${name%_scratch}_steps
        need_run "$name" "$([[ $name == ctc* ]] && echo 7 || echo 8)"
        average "$out/$name.pt" "$name" "${!steps}" "$finetune_averaged"
    done
fi

# The language model for runs like $1: search and file; nothing if there is none.
lm_of() {
    case $lm,$1 in
    none,*) ;;
    transcripts,ctc*) echo "ctc-prefix-beam $out/lm/letters.arpa.gz" ;;
    *,transducer*) echo "modified-beam $out/lm/bpe.arpa.gz" ;;
    *) echo "ctc-lexicon $download_dir/lm/$lm.arpa.gz" ;;
    esac
}

# The language model for runs of system $1: made of text, or fetched before.
make_lm() {
    local _method _model _text=() _flags=()
    read -r _method _model <<<"$(lm_of "$1")"
    if [ "$_method" = ctc-lexicon ]; then
        need_file "$_model" "published language model" 0
        need_file "$download_dir/lm/librispeech-vocab.txt" "words of the published language model" 0
    elif [ -n "$_model" ]; then
        [ -z "$lm_text" ] || { words "$lm_text" && _text=(--text "${found[@]}"); }
        _flags=(--cuts "${finetune_cuts[@]}" ${_text[@]+"${_text[@]}"} --tokenizer "$(tokenizer_of "$1")" --order "$lm_order")
        is_made "$_model" "${_flags[@]}" && return
        run "$python" -m k2ssl.bin.train_ngram "${_flags[@]}" --check-cuts "${dev_cuts[@]}" --output "$_model"
        now_made "$_model" "${_flags[@]}"
    fi
}

# Find the best scales for run $1 with language model $2 and search $3 on the sets to develop on, and recognise the test sets with them.
decode_with_lm() {
    local _tuned=$out/lm/$1.$3.json _set _options=(--method "$3" --search.lm "$2") _again=()
    words "$lm_scales" && _options+=(--lm-scales "${found[@]}")
    words "$token_scores"
    case $3 in
    ctc-prefix-beam) _options+=(--token-scores "${found[@]}") ;;
    ctc-lexicon) _options+=(--word-scores "${found[@]}" --search.lexicon "$download_dir/lm/librispeech-vocab.txt") ;;
    esac
    _options+=(--cuts "${dev_cuts[@]}")
    if [ -f "$_tuned" ] && { [ "$out/$1.pt" -nt "$_tuned" ] || [ "$2" -nt "$_tuned" ]; }; then
        _again=(--overwrite True) # these scales are of another model
    fi
    if [ ${#_again[@]} -gt 0 ] || ! is_made "$_tuned" "${_options[@]}"; then
        run "$python" -m k2ssl.bin.tune_lm "$out/$1.pt" "${_options[@]}" --output "$_tuned" --device "$device" --quiet "$quiet" \
            ${_again[@]+"${_again[@]}"}
        now_made "$_tuned" "${_options[@]}"
    fi
    for _set in $(each "$test_sets"); do
        launch k2ssl.bin.decode "$_tuned" "$out/$1.pt" --cuts "$out/cuts/cuts_$_set.jsonl.gz" --output "$out/decode/$1/$3-lm/$_set" \
            --device "$device" --quiet "$quiet"
    done
}

if in_stages 10 "recognition"; then
    need_cuts "$dev_sets,$test_sets"
    for name in "${runs[@]}"; do need_file "$out/$name.pt" "averaged model" 9; done
    for system in $(each "$systems"); do make_lm "$system"; done
    for name in "${runs[@]}"; do
        for method in $(methods_of "$name"); do
            for set in $(each "$test_sets"); do
                decode "$out/decode/$name/$method/$set" "$out/$name.pt" "$method" --cuts "$out/cuts/cuts_$set.jsonl.gz"
            done
        done
        read -r method model <<<"$(lm_of "$name")"
        [ -z "$model" ] || decode_with_lm "$name" "$model" "$method"
    done
fi

if in_stages 11 "scores"; then
    hypotheses=()
    for name in "${runs[@]}"; do
        read -r with_lm model <<<"$(lm_of "$name")"
        for method in $(methods_of "$name") ${model:+"$with_lm-lm"}; do
            for set in $(each "$test_sets"); do
                need_file "$out/decode/$name/$method/$set/hypotheses.jsonl" "recognised text" 10
                hypotheses+=("$out/decode/$name/$method/$set/hypotheses.jsonl")
            done
        done
    done
    score "$out/score" "${hypotheses[@]}"
fi

if in_stages 12 "tables"; then
    need_file "$out/score/wer.json" "scores" 11
    references=()
    [ ! -f "$recipe/reference_results.toml" ] || references=(--references "$recipe/reference_results.toml")
    baseline=()
    if [ "$scratch" = True ]; then
        baseline=(--baseline)
        for name in "${runs[@]}"; do [[ $name != *_scratch ]] || baseline+=("$name"); done
    fi
    make_tables "$out/report" "$out" ${references[@]+"${references[@]}"} ${baseline[@]+"${baseline[@]}"}
fi
