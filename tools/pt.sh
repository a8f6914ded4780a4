#!/usr/bin/env bash
# Start a pre-training on one or several machines, with the command line of the published SparK launcher.
#
#     bash tools/pt.sh <experiment_name> [--num_nodes=1] [--ngpu_per_node=1] [--node_rank=0]
#         [--master_address=127.0.0.1] [--master_port=30001] [any flag of spark-fast-train]
#
# The same command runs on every node, each with its own --node_rank. --num_nodes=0 is one plain process without
# DDP. On a machine without a GPU --ngpu_per_node counts processes. The exit code is that of the training;
# torchrun makes 1 of any failure of its processes, whose own code is in its report. A run that was told to stop and has
# saved is none: torchrun ends with 0, and stopped.txt in the run folder says that there is more to do.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python="$(command -v python || echo python3)"

if [[ $# -eq 0 || "$1" == -* ]]; then
    echo "pt.sh: the experiment name comes first" >&2
    sed -n '2,/^set /{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
experiment="$1"
shift

num_nodes=1 ngpu_per_node=1 node_rank=0 master_address=127.0.0.1 master_port=30001
training=()
while [[ $# -gt 0 ]]; do
    if [[ "$1" =~ ^--(num_nodes|ngpu_per_node|node_rank|master_address|master_port)(=(.*))?$ ]]; then
        name="${BASH_REMATCH[1]}" value="${BASH_REMATCH[3]}"
        if [[ "$1" != *=* ]]; then
            value="${2-}"
            shift
        fi
        if [[ -z "$value" || ("$name" != master_address && ! "$value" =~ ^[0-9]+$) ]]; then
            echo "pt.sh: --$name needs a $([[ $name == master_address ]] && echo value || echo number), got '$value'" >&2
            exit 2
        fi
        printf -v "$name" '%s' "$value"
    else
        training+=("$1")
    fi
    [[ $# -eq 0 ]] || shift
done

if [[ $num_nodes -eq 0 ]]; then
    exec "$python" -m spark_fast.train "$experiment" "${training[@]}"
fi
exec "$python" -m torch.distributed.run \
    --nnodes="$num_nodes" --nproc_per_node="$ngpu_per_node" --node_rank="$node_rank" \
    --master_addr="$master_address" --master_port="$master_port" \
    -m spark_fast.train "$experiment" "${training[@]}"
