#!/usr/bin/env bash
# The tests of k2ssl/lattice with k2, in an environment of their own: the only k2 on the ordinary package index is for Python 3.9 and torch 1.13.1.
#
#   bash scripts/test_k2.sh                   set up if need be (.venv-k2, 4 GB on disk, once), record what our own code computes, test
#   bash scripts/test_k2.sh -k transducer     arguments go to pytest
#
#   K2SSL_K2_PYTHON=/usr/bin/python3.9   the Python 3.9 to create the environment with; unset: python3.9 on PATH, then pyenv's;
#                                        none: run no such tests
#   K2SSL_VENV                           the environment of our own code, see scripts/setup.sh
#
# Without a Python 3.9, or where the packages cannot be had, nothing is tested, a line "k2: not run" says why, and the exit status is 0: nobody
# needs k2. Otherwise the exit status is that of the tests.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv-k2
stamp=$venv/.k2ssl-setup
requirements=$root/tests/k2/requirements.txt

not_run() {
    echo "k2: not run: $*"
    exit 0
}

is_python39() { [ "$("$1" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = 3.9 ]; }

find_python39() {
    local candidate
    if [ -n "${K2SSL_K2_PYTHON:-}" ]; then
        is_python39 "$K2SSL_K2_PYTHON" || return 1
        echo "$K2SSL_K2_PYTHON"
        return
    fi
    for candidate in python3.9 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.9*/bin/python3.9; do
        if is_python39 "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

wanted_stamp() { (cd "$root" && echo "$root" && sha256sum tests/k2/requirements.txt); }

is_ready() { [ "$(cat "$stamp" 2>/dev/null)" = "$(wanted_stamp)" ] && is_python39 "$venv/bin/python"; }

install_all() {
    local python
    python=$(find_python39) || not_run "there is no Python 3.9 with venv${K2SSL_K2_PYTHON:+ at K2SSL_K2_PYTHON, $K2SSL_K2_PYTHON}; name one with K2SSL_K2_PYTHON"
    echo "k2: creating $venv with $python (4 GB on disk, a minute or more, once)" >&2
    rm -rf "$venv"
    if ! { "$python" -m venv "$venv" && "$venv/bin/python" -m pip install --disable-pip-version-check --quiet -r "$requirements"; } >&2; then
        rm -rf "$venv"
        not_run "its packages could not be installed, see above"
    fi
    wanted_stamp >"$stamp.part"
    mv "$stamp.part" "$stamp"
}

[ "${K2SSL_K2_PYTHON:-}" != none ] || not_run "K2SSL_K2_PYTHON is none"
if ! is_ready; then
    exec 9<"${BASH_SOURCE[0]}" # this very file is the lock: a second set-up of this folder waits here
    flock 9
    is_ready || install_all
fi

ours=$(bash "$root/scripts/setup.sh")
arrays=$(mktemp -d)
trap 'rm -rf "$arrays"' EXIT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
PYTHONPATH=$root "$ours" "$root/tests/k2/record_ours.py" "$arrays"
cd "$root"
PYTHONPATH='' K2SSL_K2_ARRAYS=$arrays "$venv/bin/python" -m pytest -c tests/k2/pytest.ini tests/k2 "$@"
