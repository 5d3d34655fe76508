#!/usr/bin/env bash
# What slurm.sbatch starts on each machine: a recipe whose programs, and nothing else, answer SIGTERM.
#
#   bash recipes/launch/task.sh recipes/NAME/run.sh [OPTIONS]
#
# Slurm signals the first process of a task only (unless cgroup.conf says SignalChildrenProcesses=yes), so that it is passed on here to all that came of
# it. Shells and torchrun ignore it: torchrun would kill its processes after 30 s, and writing a large checkpoint may take longer.
set -euo pipefail

# shellcheck disable=SC2329 # called by the trap
descendants() {
    local pid
    for pid in $(ps -o pid= --ppid "$1"); do
        echo "$pid"
        descendants "$pid"
    done
}

# a file that is there once the task has been told to stop: recipes/common.sh then takes what a program ends with for an interruption, since torchrun
# makes 1 of every status but 0
folder=$(mktemp -d 2>/dev/null || TMPDIR=/tmp mktemp -d) # TMPDIR may be a folder of the machine that the job was submitted on
trap 'rm -rf "$folder"' EXIT
export K2SSL_STOPPED=$folder/stopped
(trap '' TERM && exec bash "$@") &
recipe=$!
told=false
# shellcheck disable=SC2046 # one word for each process
trap 'told=true; touch "$K2SSL_STOPPED" || true; kill -TERM $(descendants "$recipe") 2>/dev/null || true' TERM
status=0
wait "$recipe" || status=$?
if $told; then # a signal ends `wait`, not the recipe
    while kill -0 "$recipe" 2>/dev/null; do wait "$recipe" || true; done
    status=0
    wait "$recipe" || status=$?
    [ "$status" -eq 0 ] || status=130
fi
exit "$status"
