#!/usr/bin/env bash
# Make the Python environment that the recipes and tests run in, once; does nothing when it is there already.
#
#   bash scripts/setup.sh
#
# Creates .venv in the repository, installs what pyproject.toml requires (with the extras `dev` and `quickstart`, and `lm` where there is a
# wheel of it) at the versions of constraints.txt, and stamps it; after a change of either file, or an interrupted install, it installs again. Prints the environment's python on stdout,
# everything else on stderr.
#
#   K2SSL_PYTHON=/usr/bin/python3.12   the interpreter to create .venv with; unset: the first of python3, python3.13 ... python3.10
#                                      on PATH that is new enough and can create environments
#   K2SSL_VENV=/path/to/environment    use this existing environment instead, as it is: nothing is ever installed into it
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stamp_name=.k2ssl-setup

say() { echo "setup: $*" >&2; }

if [ $# -gt 0 ]; then
    sed -n '2,$ { /^#/!q; s/^# \{0,1\}//p; }' "${BASH_SOURCE[0]}" >&2
    [ $# -eq 1 ] && [[ $1 == --help || $1 == -h ]] && exit 0
    say "takes no arguments, not: $*"
    exit 2
fi

fail() {
    say "$@"
    exit 1
}

# The version of an interpreter as "3.11", nothing if it does not run.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

# Why an interpreter cannot be used; nothing if it can.
objection_to() {
    local version
    version=$(version_of "$1")
    if [ -z "$version" ]; then
        echo "does not run"
    elif ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "is Python $version, 3.10 or newer is needed"
    elif [ "${2:-}" = creator ] && ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "has no venv module (Debian and Ubuntu: apt-get install python$version-venv)"
    fi
}

find_python() {
    local candidate objection seen=""
    if [ -n "${K2SSL_PYTHON:-}" ]; then
        objection=$(objection_to "$K2SSL_PYTHON" creator)
        [ -z "$objection" ] || fail "K2SSL_PYTHON: $K2SSL_PYTHON $objection"
        echo "$K2SSL_PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        command -v "$candidate" >/dev/null || continue
        objection=$(objection_to "$candidate" creator)
        if [ -z "$objection" ]; then
            echo "$candidate"
            return
        fi
        seen+=$'\n'"  $candidate $objection"
    done
    fail "no usable Python on PATH; name one with K2SSL_PYTHON=/path/to/python3.11.${seen:+ Seen:}$seen"
}

use_given_environment() {
    local python=$1/bin/python objection missing line=$'\n'
    [ -e "$python" ] || fail "K2SSL_VENV: there is no environment at $1 (no bin/python); create one or unset K2SSL_VENV"
    objection=$(objection_to "$python")
    [ -z "$objection" ] || fail "K2SSL_VENV: $python $objection"
    if ! missing=$("$python" "$root/scripts/missing_packages.py" dev); then
        fail "K2SSL_VENV: $1 is used as it is, and it lacks:
  ${missing//"$line"/$line  }
Install what is missing yourself:
  $python -m pip install -c $root/constraints.txt -e '${root}[dev]'"
    fi
    echo "$python"
}

# What the stamp of a finished set-up must say. The folder is part of it because environments do not survive being copied.
wanted_stamp() { (cd "$root" && echo "$root" && sha256sum pyproject.toml constraints.txt); }

is_ready() { [ -x "$1/bin/python" ] && [ "$(cat "$1/$stamp_name" 2>/dev/null)" = "$(wanted_stamp)" ] && [ -n "$(version_of "$1/bin/python")" ]; }

# The extra `lm`, so that its searches are tested; its package is of another kind than the rest (few wheels, a source package that downloads
# while it builds), so that nobody who cannot have it shall lack the rest.
install_lm() {
    "$1" "$root/scripts/missing_packages.py" lm >/dev/null ||
        "$1" -m pip install --disable-pip-version-check --quiet --only-binary flashlight-text -c "$root/constraints.txt" \
            --no-build-isolation -e "${root}[lm]" >&2 ||
        say "the extra lm cannot be installed here: the searches ctc-lexicon and ctc-lexicon-free are left out, and their tests skipped"
}

install_all() {
    local venv=$1 python
    rm -f "$venv/$stamp_name"
    if [ -e "$venv" ] && { [ ! -x "$venv/bin/python" ] || [ -n "$(objection_to "$venv/bin/python")" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
        say "$venv is broken or unfinished: creating it anew"
        rm -rf "$venv"
    fi
    if [ ! -e "$venv" ]; then
        python=$(find_python)
        say "creating $venv with $python (Python $(version_of "$python"))"
        "$python" -m venv "$venv" >&2
    fi
    say "installing the versions of constraints.txt into $venv (about 5 GB on disk, a few minutes the first time)"
    # setuptools first: k2ssl itself is then built by the pinned one instead of the newest of the day
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet -c "$root/constraints.txt" setuptools >&2
    "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off -c "$root/constraints.txt" \
        --no-build-isolation -e "${root}[dev,quickstart]" |
        sed -u -n 's/^\(Collecting\|Processing\) \([^ ]*\).*/  \2/p; s/^Installing collected.*/  unpacking everything (takes longest)/p' >&2
    "$venv/bin/python" "$root/scripts/missing_packages.py" dev quickstart >&2
    install_lm "$venv/bin/python"
    wanted_stamp >"$venv/$stamp_name.part"
    mv "$venv/$stamp_name.part" "$venv/$stamp_name"
    say "done: $venv is ready"
}

if [ -n "${K2SSL_VENV:-}" ]; then
    use_given_environment "$(realpath -ms "$K2SSL_VENV")"
    exit
fi

venv=$root/.venv
if ! is_ready "$venv"; then
    exec 9<"${BASH_SOURCE[0]}" # this very file is the lock: a second set-up of this folder waits here
    if ! flock --nonblock 9; then
        say "another set-up of this folder is running: waiting for it"
        flock 9
    fi
    is_ready "$venv" || install_all "$venv"
fi
echo "$venv/bin/python"
