#!/usr/bin/env bash
# Set up if need be, then run every check of the project. Nothing after the set-ups uses the network.
#
#   bash scripts/test.sh                              everything, pytest in two processes
#   bash scripts/test.sh tests/nn -k swoosh -x        arguments go to pytest; the other checks run all the same
#
# Checks: ruff check, ruff format, mypy on k2ssl/, bash -n on every shell script, the tests with k2 where there is a Python 3.9 for them
# (scripts/test_k2.sh, which sets its own environment up), pytest. All of them run even if one fails; the exit status is that of the worst.
# The environment is .venv, or the one that K2SSL_VENV names (see scripts/setup.sh).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/scripts/setup.sh")
cd "$root"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # an environment named by K2SSL_VENV need not have k2ssl installed
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # more threads than the smallest machine's two cores would only wait for each other

failed=()

check() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

shell_syntax() {
    local script status=0
    while IFS= read -r script; do
        bash -n "$script" || status=1
    done < <(echo .ci/run && find scripts recipes -name '*.sh' -o -name '*.sbatch')
    return $status
}

check "ruff check" "$python" -m ruff check .
check "ruff format" "$python" -m ruff format --check .
check "mypy" "$python" -m mypy
check "bash -n" shell_syntax
check "k2" bash scripts/test_k2.sh

# of everything, one half beside the other, with one thread each: tiny models gain nothing from more
split=()
if [ $# -eq 0 ] && [ "$(nproc)" -ge 2 ] && "$python" -c 'import xdist' 2>/dev/null; then
    split=(--numprocesses 2 --dist loadfile --no-loadscope-reorder) # in order, which ends with short files
    OMP_NUM_THREADS=1
fi

echo "== pytest"
# pytest runs last and repeats what failed before it just above its closing line (tests/conftest.py), so that the end tells everything
K2SSL_FAILED_CHECKS=$(IFS=,; echo "${failed[*]-}") "$python" -m pytest ${split[@]+"${split[@]}"} "$@" || exit $?
[ ${#failed[@]} -eq 0 ]
