#!/usr/bin/env bash
# The first ten minutes on a GPU: each step under its own limit of time, the most valuable ones first.
#
#     OUT=results bash benchmarks/first_minutes.sh
#
# A row is appended to $OUT/first_minutes.jsonl as soon as it is measured, and one after each step says how it ended:
# whatever is done when this is cut off is kept. Beside it are first_minutes.log, gpu_tests.log and a trace. The limits
# add up to 565 s, imports included. Arguments go to device_report.py: --tiny rehearses. On a CPU all is tiny anyway.
#
#     PYTHON=python3   the Python that has torch
#     PACE=1           multiplies every limit: to rehearse on a slow machine
set -u
: "${OUT:?give the folder that results are written to: OUT=results bash benchmarks/first_minutes.sh}"
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-python3} pace=${PACE:-1} begun=$(date +%s.%N) running='' options=("$@")
scratch=$(mktemp -d) # what a step that is ended leaves behind goes with it
trap 'rm -rf "$scratch"' EXIT
trap '[ -z "$running" ] || { kill "$running"; wait "$running"; }; exit 143' HUP INT TERM
export OUT TMPDIR=$scratch PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

limited() { # NAME SECONDS COMMAND...: its output into the log, then a row on how it ended; 124 or 137: its time was up
    local name=$1 limit=$(($2 * pace)) from=$SECONDS code=0
    shift 2
    timeout --kill-after=2 "$limit" "$@" >>"$OUT/first_minutes.log" 2>&1 </dev/null &
    running=$!
    wait "$running" || code=$?
    running=''
    printf '{"step": "%s", "code": %d, "took": %d, "limit": %d}\n' "$name" "$code" $((SECONDS - from)) "$limit" |
        tee -a "$OUT/first_minutes.jsonl"
}

step() { # SECONDS PART: a part of device_report, or those of a pattern
    limited "$2" "$1" "$python" benchmarks/device_report.py --rows "$OUT/first_minutes.jsonl" --only "$2" \
        --seconds $(($1 * pace)) --begun "$begun" ${options[@]+"${options[@]}"}
}

limited imports 20 "$python" -c 'import torch, torchvision, timm' # from a cold disk this may take most of a step
step 20 ceilings                                                # and machine and versions
step 60 'step resnet*'                                          # packed, published, packed as a graph, masked
step 25 profile
step 50 layers # convolutions, batch norms, the decoder: each choice both ways
step 75 'GPU tests'
step 100 'compiled step resnet*'
step 60 'step convnext*' # ConvNeXt-S by SparK, V2-T by FCMAE
step 35 encoder
step 60 loader
step 60 'packed = masked'
