# shellcheck shell=bash
# What every recipe's run.sh sources first: strict mode, a log, options, stages.
#
#   . "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
#   out=exp/mine  # folder for everything that is made
#   steps=200  # optimizer steps
#   parse_options "$@"
#   if in_stages 1 "train"; then
#       need_file "$out/cuts.jsonl.gz" "manifest" 0
#       launch k2ssl.bin.pretrain --trainer.max-steps "$steps"
#   fi
#
# Every variable that run.sh sets at the start of a line before `parse_options` is an option: `learning_rate=0.1` makes
# `--learning-rate 0.2` known. All recipes also have --stage, --stop-stage, --ngpu, --nnodes, --dry-run and --help, and hand flags after
# `--` to the programs of a stage (`run_extra`, `launch`). Where there is a variable `out`, OUT/logs gets what the programs print, a file for
# each stage, and stages.tsv with the time and exit status of each.
#
# Exit status: 0 done, 2 refused; 130 interrupted, after the program has ended; otherwise that of the program that failed, or 1.
#
# On several machines (--nnodes) each runs the same command on shared folders. `launch` starts processes on all of them, `run` works on the first
# alone. Nothing else holds the machines together, so that only one stage may be asked for at a time.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
recipe_script=$(realpath "${BASH_SOURCE[1]}")
python=$(realpath -ms "${K2SSL_VENV:-$repository/.venv}")/bin/python
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} # an environment named by K2SSL_VENV need not have k2ssl installed
dry_run=false
stage=0
stop_stage=1000
ngpu=1
nnodes=1
extra=()     # flags after `--`
node_rank=0  # number of this machine
log_file=    # of the stage that runs

log() {
    local _line
    _line="$(date '+%F %T') $*"
    echo "$_line" >&2
    [ -z "$log_file" ] || echo "$_line" >>"$log_file"
}

# --- commands

# Carry a command out, its output also into the stage's log; with --dry-run, print it instead. On the first machine only.
run() {
    if [ "$node_rank" -gt 0 ]; then
        log "left to the first machine: $(_quoted "$@")"
    else
        _run "$@" || return $? # so that it is the line of run.sh that fails
    fi
}

# `run` with the flags after `--` appended.
run_extra() {
    _used_extra=true
    run "$@" ${extra[@]+"${extra[@]}"} || return $?
}

# Run a module of Python with its arguments and the flags after `--`, in as many processes as --ngpu and --nnodes say.
launch() {
    _used_extra=true
    local _words=("$python" -m)
    if [ $((ngpu * nnodes)) -gt 1 ]; then
        _words+=(torch.distributed.run)
        # whoever lets shells ignore TERM wants the programs alone to answer it; torchrun would kill them 30 s later
        [[ $(trap -p TERM) != "trap -- '' "* ]] || _words+=(--signals-to-handle "SIGINT,SIGHUP,SIGQUIT")
        if [ "$nnodes" -gt 1 ]; then
            _words+=(--nnodes "$nnodes" --node-rank "$node_rank" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
        else
            _words+=(--standalone)
        fi
        _words+=(--nproc-per-node "$ngpu" -m)
    fi
    _run "${_words[@]}" "$@" ${extra[@]+"${extra[@]}"} || return $?
}

_child=     # process that `_run` waits for
_stopper=   # process that passes a signal on to it
_woken=false
_interrupted=false

_run() {
    if $dry_run; then
        _quoted "$@"
        echo
        return
    fi
    if _told_to_stop; then # nobody will tell a program that is begun now
        _interrupted=true
        return 130
    fi
    log "$(_quoted "$@")"
    local _out _err _tees=() _status
    if [ -n "$log_file" ]; then
        exec {_out}> >(_tee) && _tees+=("$!")
        exec {_err}> >(_tee >&2) && _tees+=("$!")
    else
        exec {_out}>&1 {_err}>&2
    fi
    # in the background, since a shell that waits in the foreground does not hear signals; `trap` undoes that Ctrl-C is ignored there
    (trap - INT QUIT && exec "$@" {_out}>&- {_err}>&-) <&0 >&"$_out" 2>&"$_err" &
    _child=$!
    exec {_out}>&- {_err}>&-
    while true; do
        _woken=false _status=0
        wait "$_child" || _status=$?
        $_woken || break
    done
    _child=
    [ -z "$_stopper" ] || { kill "$_stopper" 2>/dev/null && wait "$_stopper"; } || true
    wait ${_tees[@]+"${_tees[@]}"} || true # before Bash 5.1 only the last can be waited for
    [ "$_status" = 0 ] || ! _told_to_stop || _interrupted=true
    ! $_interrupted || _status=130
    return $_status # the caller's `set -e` then acts
}

# A command as it can be copied into a shell.
_quoted() { printf '%q ' "$@"; }

# Whether launch/task.sh, where it started this recipe, was told to stop.
_told_to_stop() { [ -n "${K2SSL_STOPPED:-}" ] && [ -e "$K2SSL_STOPPED" ]; }

_tee() {
    trap '' INT TERM HUP # a program that is told to stop still has something to say
    exec tee -a "$log_file"
}

_stop() {
    _interrupted=true _woken=true
    [ -n "$_child" ] || exit 130
    [ -z "$_stopper" ] || return 0
    # a signal to the whole process group has reached the program too and a second one might hurt, a signal to this shell alone has not
    (sleep 2 && kill -TERM "$_child") <&- &>/dev/null &
    _stopper=$!
}
trap _stop INT TERM HUP
trap 'log "${BASH_SOURCE[0]##*/}: stopped at line $LINENO, exit status $?"' ERR

# --- stages

_stage='' _title='' _began=0 _start_time=''
_used_extra=false
_ran_a_stage=true # until options are parsed

# Whether a stage is asked for; ends the one before, and says so if it is.
in_stages() {
    _end_stage 0
    [ "$stage" -le "$1" ] && [ "$stop_stage" -ge "$1" ] || return 1
    _ran_a_stage=true _used_extra=false
    _stage=$1 _title=$2 _began=$SECONDS _start_time=$(date '+%FT%T%z')
    if ! $dry_run && [ -n "${out:-}" ]; then
        mkdir -p "$out/logs" || exit 1
        log_file=$out/logs/stage-$(printf %02d "$1")
        [ "$node_rank" = 0 ] || log_file+=.machine$node_rank
        log_file+=.log
    fi
    log "stage $1: $2"
}

# End the running stage, if there is one, with an exit status.
_end_stage() {
    [ -n "$_stage" ] || return 0
    local _name="stage $_stage ($_title)" _table="${log_file%/*}/stages.tsv" _status=$1 _number=$_stage
    local _seconds=$((SECONDS - _began)) _see="${log_file:+; see $log_file}"
    _stage=
    if [ "$_status" = 0 ] && [ ${#extra[@]} -gt 0 ] && ! $_used_extra; then
        _status=2
    fi
    if [ -n "$log_file" ] && [ "$node_rank" = 0 ]; then
        [ -s "$_table" ] || printf 'stage\ttitle\tstart\tseconds\texit_status\n' >"$_table"
        printf '%s\t%s\t%s\t%s\t%s\n' "$_number" "$_title" "$_start_time" "$_seconds" "$_status" >>"$_table"
    fi
    if [ "$1" != "$_status" ]; then
        refuse "$_name has no program that took the flags after --: ${extra[*]}"
    elif [ "$_status" = 0 ]; then
        $dry_run || log "$_name done in $(_clock $_seconds), exit status 0"
    elif [ "$_status" = 130 ]; then
        log "$_name interrupted after $(_clock $_seconds), exit status 130; the same command goes on"
    else
        log "$_name failed after $(_clock $_seconds), exit status $_status$_see"
    fi
    log_file=
}

# Let another recipe do the stages that follow, with the same range of stages: hand_over SCRIPT OPTION...
hand_over() {
    local _words=(bash "$@" --stage "$((stage > 1 ? stage : 1))" --stop-stage "$stop_stage" --ngpu "$ngpu" --nnodes "$nnodes")
    ! $dry_run || _words+=(--dry-run)
    _end_stage 0
    exec "${_words[@]}" ${extra[@]+-- "${extra[@]}"} # its exit status is ours; `exec` leaves the trap of EXIT out
}

_clock() { printf '%d:%02d:%02d' $(($1 / 3600)) $(($1 / 60 % 60)) $(($1 % 60)); }

_end() {
    local _status=$?
    ! $_interrupted || _status=130
    _end_stage $_status
    [ $_status = 0 ] || exit $_status
    $_ran_a_stage || refuse "no stage lies from --stage $stage to --stop-stage $stop_stage"
    $dry_run || log "all done in $(_clock $SECONDS)"
}
trap _end EXIT

# --- what a stage needs

# need_file PATH "what it is" STAGE: end, naming the stage that makes it, where a file or folder is missing.
need_file() {
    $dry_run || [ -e "$1" ] || _fail "$1 ($2) is missing; stage $3 makes it: bash $(_command_of_stage "$3")"
}

# need_corpus OPTION PATH "where it comes from": end where a corpus that an option names is not there.
need_corpus() {
    $dry_run || [ -d "$2" ] || _fail "--$1 is $2, and there is no such folder; $3"
}

# End where there is no Python environment.
need_environment() { $dry_run || [ -x "$python" ] || _fail "there is no $python: run scripts/setup.sh first"; }

_fail() {
    log "${recipe_script##*/}: $*"
    exit 1
}

# This command line, but for one stage.
_command_of_stage() {
    local _i _words=()
    for ((_i = 0; _i < ${#_arguments[@]}; _i++)); do
        case ${_arguments[_i]} in
        --) break ;;
        --stage | --stop-stage) _i=$((_i + 1)) ;;
        *) _words+=("${_arguments[_i]}") ;;
        esac
    done
    _quoted "$recipe_script" --stage "$1" --stop-stage "$1" ${_words[@]+"${_words[@]}"}
}

# --- options

_arguments=() # as they were given
_given=" "    # names of the options among them

parse_options() {
    local _name # underscored, or it would hide an option of that name
    _arguments=("$@")
    while [ $# -gt 0 ]; do
        case $1 in
        --help | -h) _help && trap - EXIT && exit 0 ;;
        --dry-run) dry_run=true && shift && continue ;;
        --) shift && extra=("$@") && break ;;
        --*) _name=${1#--} ;;
        *) refuse "$1 is not an option" ;;
        esac
        _name=${_name//-/_}
        grep -Fqx -- "$_name" <<<"$(_option_names)" || refuse "unknown option $1"
        [ $# -ge 2 ] && [[ $2 != --* ]] || refuse "$1 needs a value"
        printf -v "$_name" %s "$2"
        _given+="$_name "
        shift 2
    done
    need_whole_numbers stage stop_stage ngpu nnodes
    [ -n "${out-unset}" ] || refuse "--out is empty, a folder is needed"
    [ "$stage" -le "$stop_stage" ] || refuse "--stage $stage is after --stop-stage $stop_stage"
    [ "$ngpu" -ge 1 ] || refuse "--ngpu is 0, at least 1 is needed"
    [ "$nnodes" -ge 1 ] || refuse "--nnodes is 0, at least 1 is needed"
    [ ${#extra[@]} = 0 ] || _need_one_stage "flags after --"
    [ "$nnodes" = 1 ] || _find_machines
    _ran_a_stage=false
}

_need_one_stage() { [ "$stage" = "$stop_stage" ] || refuse "$1: only with one stage, --stage N --stop-stage N"; }

# Which of several machines this is, from the environment.
_find_machines() {
    local _name
    _need_one_stage "--nnodes $nnodes"
    node_rank=${NODE_RANK:-${SLURM_NODEID:-}}
    for _name in MASTER_ADDR MASTER_PORT; do
        [ -n "${!_name:-}" ] || refuse "--nnodes $nnodes: the environment variable $_name is missing, of the first machine"
    done
    [ -n "$node_rank" ] || refuse "--nnodes $nnodes: the environment variable NODE_RANK or SLURM_NODEID is missing, the number of this machine"
    [[ $node_rank =~ ^[0-9]+$ ]] && [ "$node_rank" -lt "$nnodes" ] ||
        refuse "--nnodes $nnodes: NODE_RANK or SLURM_NODEID is $node_rank, a whole number from 0 to $((nnodes - 1)) is needed"
}

# given NAME: whether that option is on the command line.
given() { [[ $_given == *" $1 "* ]]; }

# unless_given NAME VALUE: set an option that is not, as presets do.
unless_given() { given "$1" || printf -v "$1" %s "$2"; }

# Refuse options that are not whole numbers: `need_whole_numbers steps seed` after `parse_options`.
need_whole_numbers() {
    local _name
    for _name in "$@"; do
        # Bash would take a number that begins with 0 for an octal one
        [[ ${!_name} =~ ^(0|[1-9][0-9]*)$ ]] || refuse "--${_name//_/-} is ${!_name}, a whole number >= 0 is needed (without zeros before it)"
    done
}

# is_one_of WORD OTHER...: whether the word is among the others.
is_one_of() {
    local _other
    for _other in "${@:2}"; do
        [ "$_other" != "$1" ] || return 0
    done
    return 1
}

# need_lists NAME...: refuse options that are empty where a list with commas is needed.
need_lists() {
    local _name
    for _name in "$@"; do
        [ -n "${!_name}" ] || refuse "--${_name//_/-} is empty, one is needed at least"
    done
}

# read_folders NAME: the array `folders` of an option that names several with commas between them; refuses one with a comma in its own path.
read_folders() {
    local _first _last _joined
    IFS=, read -r -a folders <<<"${!1}"
    _are_folders ${folders[@]+"${folders[@]}"} || for ((_first = 0; _first < ${#folders[@]}; _first++)); do
        _joined=${folders[_first]}
        for ((_last = _first + 1; _last < ${#folders[@]}; _last++)); do
            _joined+=,${folders[_last]}
            [ ! -d "$_joined" ] ||
                refuse "--${1//_/-} is ${!1}: there is a folder $_joined, but a comma separates folders here; rename it, or name a link without a comma"
        done
    done
}

_are_folders() {
    local _folder
    for _folder in "$@"; do
        [ -d "$_folder" ] || return 1
    done
}

# need_one_of NAME VALUE...: refuse an option with another value.
need_one_of() {
    local _name=$1 _value
    shift
    for _value in "$@"; do
        [ "${!_name}" != "$_value" ] || return 0
    done
    refuse "--${_name//_/-} is ${!_name}; allowed: $*"
}

# End because of how the recipe was called.
refuse() {
    echo "${recipe_script##*/}: $1; known options: $(_option_names | sed 's/^/--/; s/_/-/g' | tr '\n' ' ')--dry-run --help" >&2
    exit 2
}

_option_lines() {
    sed -n '/^parse_options/q; /^[a-z][a-z0-9_]*=/p' "$recipe_script"
    echo "stage=0  # first stage to run"
    echo "stop_stage=1000  # last stage to run"
    echo "ngpu=1  # processes on each machine, one per GPU"
    echo "nnodes=1  # machines; on each the same command, one stage at a time, with MASTER_ADDR, MASTER_PORT and NODE_RANK (or SLURM_NODEID) set"
}

_option_names() { _option_lines | sed 's/=.*//'; }

# The comment at the head of run.sh, then its options with defaults and their comments.
_help() {
    sed -n '2,$ { /^#/!q; s/^# \{0,1\}//p; }' "$recipe_script"
    echo
    echo "Options:"
    _option_lines | while IFS= read -r line; do
        name=${line%%=*}
        printf '  --%s VALUE  (%s)%s\n' "${name//_/-}" "$(sed 's/^[^=]*=//; s/ *#.*//' <<<"$line")" "$(sed -n 's/.*#//p' <<<"$line")"
    done
    echo "  --dry-run  print the commands instead of running them"
    echo "  --help"
    echo "  -- FLAG ...  further flags for the programs of the one stage that is run"
}
