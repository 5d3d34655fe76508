# shellcheck shell=bash
# Stages that recipes have in common, as functions; sourced after common.sh. Each skips what is finished and goes on with what was interrupted.
#
#   pretrain base conf/zipformer_base.toml "$steps" 20000 --data.cuts "$cuts" --data.labels "$labels"
#   average "$out/base.pt" base "$steps" 20000
#
# They read the recipe's options out, seed, device, num_workers and quiet. Further arguments are flags of the program.
# A run is a name: its folder is OUT/RUN. CONF is a configuration file, or several separated by commas, of which later ones count more.
# STEPS are its updates, or nothing where the configuration says how long it is. AVERAGED are the last updates over which weights are
# averaged: checkpoints lie as many apart, and the last two stay. Where STEPS is no multiple of it they are fewer, and that is said.
# shellcheck disable=SC2154

# need_steps NAME...: refuse options that are neither empty nor whole numbers.
need_steps() {
    local _name
    for _name in "$@"; do
        [ -z "${!_name}" ] || need_whole_numbers "$_name"
    done
}

# need_systems: refuse option --systems where it is not of ctc and transducer.
need_systems() {
    need_lists systems
    [[ ,$systems, =~ ^(,(ctc|transducer))+,$ ]] || refuse "--systems is $systems; ctc, transducer or both with a comma between them are known"
}

# need_average STEPS AVERAGED CONF: refuse options, given by their names, of a run over whose end no average could be taken; see `average`. Where
# neither option nor configuration says how long the run is, the checkpoint to begin with is found at its end. A CONF that is not there yet is
# looked at before its stage.
need_average() {
    local _steps=${!1} _averaged=${!2} _known=true _period _start _fitting _of=--${1//_/-}
    if [ -z "$_steps" ]; then
        _steps=$(_setting_of "$3" max_steps 0) _of="the number of updates of ${3#"$repository/"}"
        [ "$_steps" -gt 0 ] || _known=false
    fi
    if [ "$_averaged" = 0 ] || { $_known && [ "$_averaged" -ge "$_steps" ]; }; then
        refuse "--${2//_/-} is $_averaged, at least 1 and less than $_of, $_steps, is needed"
    fi
    [ -f "${3##*,}" ] || return 0
    _period=$(_setting_of "$3" average_period 200)
    [ "$_period" -ge 1 ] || refuse "trainer.average_period is 0 in ${3#"$repository/"}, at least 1 is needed, so that there is an average"
    $_known || return 0
    _start=$(_average_begins "$_steps" "$_averaged")
    ! _spans_average "$_start" "$_steps" "$_period" || return 0
    _fitting=$_steps
    until _spans_average "$(_average_begins "$_fitting" "$_averaged")" "$_fitting" "$_period"; do _fitting=$((_fitting + 1)); done
    refuse "--${2//_/-} is $_averaged and $_of $_steps: the average is taken between the checkpoints of updates $_start and $_steps, which must lie \
at or behind different multiples of $_period (trainer.average_period of ${3#"$repository/"}), from $_period on; the next number of updates with \
which they do is $_fitting"
}

# Whether weights have been added to the average by update $1, and again by update $2, which happens every $3.
_spans_average() { [ $(($1 / $3)) -ge 1 ] && [ $(($2 / $3)) -gt $(($1 / $3)) ]; }

# A number that flags after `--` or the configurations say, several separated by commas: _setting_of CONF KEY DEFAULT. JSON is read, too.
_setting_of() {
    local _confs=() _conf _line _value=$3 _before='' _word
    IFS=, read -r -a _confs <<<"$1"
    for _conf in "${_confs[@]}"; do
        [ -f "$_conf" ] || continue
        while IFS= read -r _line || [ -n "$_line" ]; do
            [[ ! $_line =~ ^([^#]*[^#a-z_])?$2\"?\ *[=:]\ *([0-9_]+) ]] || _value=${BASH_REMATCH[2]//_/}
        done <"$_conf"
    done
    for _word in ${extra[@]+"${extra[@]}"}; do
        [[ ! "$_before=$_word" =~ (^|=)--trainer\.${2//_/[-_]}=([0-9]+)$ ]] || _value=${BASH_REMATCH[2]}
        _before=$_word
    done
    echo $((10#$_value))
}

# find_conf NAME: let an option that names a configuration of the repository name it from anywhere; fails where there is no such file.
find_conf() {
    [ -f "${!1}" ] || printf -v "$1" %s "$repository/${!1}"
    [ -f "${!1}" ]
}

# make_tokenizer FILE FLAG...: a tokenizer from transcripts.
make_tokenizer() {
    local _file=$1
    shift
    if is_made "$_file" "$@" ${extra[@]+"${extra[@]}"}; then
        [ ! -f "$_file.made" ] || _used_extra=true # it was made with these flags
        return
    fi
    run_extra "$python" -m k2ssl.bin.train_tokenizer --output "$_file" "$@"
    now_made "$_file" "$@" ${extra[@]+"${extra[@]}"}
}

# make_labels FOLDER OPTION...: FOLDER/kmeans.pt and FOLDER/labels/SPLIT by folder/label.sh, whose options these are.
make_labels() {
    local _folder=$1 _part
    shift
    local _label=(bash "$repository/recipes/folder/label.sh" --out "$_folder" --num-workers "$num_workers" --device "$device" --quiet "$quiet"
        --ngpu "$ngpu")
    if [ "$nnodes" = 1 ]; then
        run_extra "${_label[@]}" "$@"
        return
    fi
    for _part in 1 2 3; do # one after the other, since machines wait for each other in `launch` alone
        _used_extra=true
        _run "${_label[@]}" "$@" ${extra[@]+"${extra[@]}"} --nnodes "$nnodes" --stage $_part --stop-stage $_part
    done
}

# pretrain RUN CONF STEPS AVERAGED FLAG...
pretrain() { _train pretrain "$@"; }

# finetune RUN CONF STEPS AVERAGED FLAG...
finetune() { _train finetune "$@"; }

_train() {
    local _program=$1 _run=$2 _confs=() _steps=$4 _averaged=$5 _length=()
    IFS=, read -r -a _confs <<<"$3"
    # kept for good: the checkpoint behind which the average begins, as one that an interruption makes may follow it
    local _keep=$_averaged
    if [ -n "$_steps" ]; then
        _check_averaged "$_run" "$_steps" "$_averaged"
        _length=(--trainer.max-steps "$_steps" --trainer.max-epochs 100000)
        _keep=$(_average_begins "$_steps" "$_averaged")
        _say_range "$_run" "$_steps" "$_averaged"
    fi
    shift 5
    local _trains=true # or only measures something
    [[ ! " ${extra[*]-} " =~ " --"(estimate|tune|diagnose)[\ =] ]] || _trains=false
    $dry_run || ! $_trains || rm -f "$out/$_run/finished"
    launch "k2ssl.bin.$_program" "${_confs[@]}" --output "$out/$_run" ${_length[@]+"${_length[@]}"} --trainer.keep.save-every "$_averaged" \
        --trainer.keep.keep-every "$_keep" --trainer.keep.keep-last 2 --data.num-workers "$num_workers" --seed "$seed" --device "$device" \
        --quiet "$quiet" "$@"
    $dry_run || ! $_trains || touch "$out/$_run/finished"
}

_check_averaged() {
    [ "$3" -ge 1 ] && [ "$3" -lt "$2" ] || refuse "$1: weights are to be averaged over the last $3 of $2 updates, at least 1 and less than all are needed"
}

# Say so where the last checkpoint comes sooner after the one before it than others do.
_say_range() {
    local _number=$(($2 - $(_average_begins "$2" "$3")))
    [ $_number = "$3" ] || log "$1: the average will be over the last $_number updates, not $3, since checkpoints lie $3 apart; it is over $3 \
where the number of updates is a multiple of that"
}

# average FILE RUN STEPS AVERAGED: the mean of the weights over the last updates as a model file; anew where the run has gone on since, or
# the mean is to be taken over other updates.
average() {
    local _file=$1 _end _start _flags=()
    _start=$(earlier_checkpoint "$2" "$3" "$4")
    _end=$(last_checkpoint "$2" "$3")
    if ! $dry_run; then
        [ -f "$_end" ] && [ -f "$out/$2/finished" ] || _fail "$out/$2: this run has not come to its end: give the command of its stage again"
        [ -f "$_start" ] || _fail "$_start is missing, the checkpoint with which the range to average begins"
        if [ -f "$_file" ] && { [ "$_end" -nt "$_file" ] || ! _made_with "$_file" "$_start" "$_end"; }; then
            _flags=(--overwrite True)
        fi
    fi
    [ ${#_flags[@]} -gt 0 ] || ! is_made "$_file" "$_start" "$_end" || return 0
    run "$python" -m k2ssl.bin.average --start "$_start" --end "$_end" --output "$_file" ${_flags[@]+"${_flags[@]}"}
    now_made "$_file" "$_start" "$_end"
}

# last_checkpoint RUN STEPS: the path of the one that a run ends with; without STEPS the newest.
last_checkpoint() { _checkpoint "$1" "${2:-$(_newest_step "$1")}"; }

# earlier_checkpoint RUN STEPS AVERAGED: the path of the one with which the range to average begins.
earlier_checkpoint() {
    local _steps=${2:-$(_newest_step "$1")} _start _earlier _period
    [ "$_steps" != LAST ] || { _checkpoint "$1" EARLIER && return; }
    _start=$(_average_begins "$_steps" "$3")
    if [ -z "$2" ] && [ -f "$out/$1/settings.json" ]; then # the end may lie so near behind it that nothing was added to the average
        _period=$(_setting_of "$out/$1/settings.json" average_period 200)
        for ((_earlier = _start; _earlier > 0; _earlier -= $3)); do
            ! _spans_average "$_earlier" "$_steps" "$_period" || { _start=$_earlier && break; }
        done
    fi
    _checkpoint "$1" "$_start"
}

_average_begins() { echo $((($1 - 1) / $2 * $2)); }

_checkpoint() {
    local _number=$2
    [[ $2 == *[A-Z]* ]] || _number=$(printf %09d "$2")
    printf %s "$out/$1/checkpoints/step-$_number.pt"
}

# LAST where there is none yet
_newest_step() {
    local _paths=("$out/$1/checkpoints"/step-*[0-9].pt) _step
    [ -f "${_paths[-1]}" ] || { echo LAST && return; }
    _step=${_paths[-1]##*/step-}
    echo $((10#${_step%.pt}))
}

# decode FOLDER MODEL METHOD FLAG...: MODEL is a file of `average`, or a checkpoint; flags are --cuts, options of the search, and so on.
decode() {
    local _folder=$1 _model=$2 _method=$3
    shift 3
    launch k2ssl.bin.decode "$_model" --method "$_method" --output "$_folder" --device "$device" --quiet "$quiet" "$@"
}

# score FOLDER HYPOTHESES FLAG...
score() {
    local _folder=$1
    shift
    run_extra "$python" -m k2ssl.bin.score "$@" --output "$_folder" --overwrite True
}

# make_tables FOLDER EXPERIMENT FLAG...: tables of error rates and cost, from all runs, decodings and scores below the experiments' folders.
make_tables() {
    local _folder=$1
    shift
    run_extra "$python" -m k2ssl.bin.report "$@" --output "$_folder" --overwrite True
}

# is_made FILE WORD...: whether a file is there that was made with these words, flags of a program for instance; ends the recipe where it was
# made with others. `now_made FILE WORD...` says so afterwards, in FILE.made.
is_made() {
    ! $dry_run && [ -f "$1" ] || return 1
    _made_with "$@" || _fail "$1 was made with other settings ($(cat "$1.made")), not with $(_made_words "${@:2}"); remove it, or give another --out"
    log "$1 is there already"
}

now_made() {
    $dry_run || [ "$node_rank" -gt 0 ] || printf '%s\n' "$(_made_words "${@:2}")" >"$1.made"
}

# True also where nothing is known of how it was made.
_made_with() { [ ! -f "$1.made" ] || [ "$(cat "$1.made")" = "$(_made_words "${@:2}")" ]; }

_made_words() {
    local _word _words=()
    for _word in "$@"; do _words+=("${_word/#"$out/"/OUT/}"); done # the folder may be moved
    printf '%s' "${_words[*]@Q}"
}

# model_at PATH: a model file or checkpoint; of a folder of training, the last checkpoint, if it came to its end.
model_at() {
    [ -d "$1" ] || { printf %s "$1" && return; }
    local _run=${1%/} _found
    _found=("$_run"/checkpoints/step-*[0-9].pt)
    $dry_run || [ -f "$_run/finished" ] || _fail "$_run: a folder of training that has not come to its end; give the command of its stage again"
    printf %s "${_found[-1]}"
}
