# shellcheck shell=bash
# What every recipe's run.sh sources first: strict mode, a log, options, stages.
#
#   . "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
#   steps=200  # optimizer steps
#   parse_options "$@"
#   if in_stages 1 "train"; then
#       run "$python" train.py --steps "$steps"
#   fi
#
# Every variable that run.sh sets at the start of a line before `parse_options` is an option: `learning_rate=0.1` makes
# `--learning-rate 0.2` known. All recipes also have --stage, --stop-stage, --dry-run and --help.
set -euo pipefail
trap 'log "${BASH_SOURCE[0]##*/}: stopped at line $LINENO, exit status $?"' ERR

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
recipe_script=$(realpath "${BASH_SOURCE[1]}")
# shellcheck disable=SC2034
python=$(realpath -ms "${K2SSL_VENV:-$repository/.venv}")/bin/python
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} # an environment named by K2SSL_VENV need not have k2ssl installed
dry_run=false
stage=0
stop_stage=1000

log() { echo "$(date '+%F %T') $*" >&2; }

# Carry a command out; with --dry-run, print it instead.
run() {
    if $dry_run; then
        printf '%q ' "$@"
        echo
    else
        log "$@"
        "$@" || return $? # the caller's `set -e` and trap then act at the line of run.sh
    fi
}

# Whether a stage is asked for; says so if it is.
in_stages() {
    [ "$stage" -le "$1" ] && [ "$stop_stage" -ge "$1" ] || return 1
    _ran_a_stage=true
    log "stage $1: $2"
}

# Refuse options that are not whole numbers: `need_whole_numbers steps seed` after `parse_options`.
need_whole_numbers() {
    local _name
    for _name in "$@"; do
        [[ ${!_name} =~ ^[0-9]+$ ]] || _refuse "--${_name//_/-} is ${!_name}, a whole number >= 0 is needed"
    done
}

_ran_a_stage=true # until options are parsed: --help runs none
_end() {
    local status=$?
    [ $status -ne 0 ] || $_ran_a_stage || _refuse "no stage lies from --stage $stage to --stop-stage $stop_stage"
}
trap _end EXIT

parse_options() {
    local _name # underscored, or it would hide an option of that name
    while [ $# -gt 0 ]; do
        case $1 in
        --help | -h) _help && exit 0 ;;
        --dry-run) dry_run=true && shift && continue ;;
        --*) _name=${1#--} ;;
        *) _refuse "$1 is not an option" ;;
        esac
        _name=${_name//-/_}
        grep -qx -- "$_name" <<<"$(_option_names)" || _refuse "unknown option $1"
        [ $# -ge 2 ] && [[ $2 != --* ]] || _refuse "$1 needs a value"
        printf -v "$_name" %s "$2"
        shift 2
    done
    need_whole_numbers stage stop_stage
    [ "$stage" -le "$stop_stage" ] || _refuse "--stage $stage is after --stop-stage $stop_stage"
    _ran_a_stage=false
}

_refuse() {
    echo "${recipe_script##*/}: $1; known options: $(_option_names | sed 's/^/--/; s/_/-/g' | tr '\n' ' ')--dry-run --help" >&2
    exit 2
}

_option_lines() {
    sed -n '/^parse_options/q; /^[a-z][a-z0-9_]*=/p' "$recipe_script"
    echo "stage=0  # first stage to run"
    echo "stop_stage=1000  # last stage to run"
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
}
