#!/usr/bin/env bash
# Train or prune on a Slurm cluster.
#
#     slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of train.py]
#
# GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS change what is asked for.
PARTITION=${1:?usage: slurm_train.sh PARTITION JOB_NAME CONFIG [ARGS]}
JOB_NAME=${2:?usage: slurm_train.sh PARTITION JOB_NAME CONFIG [ARGS]}
CONFIG=${3:?usage: slurm_train.sh PARTITION JOB_NAME CONFIG [ARGS]}
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
CPUS_PER_TASK=${CPUS_PER_TASK:-5}
SRUN_ARGS=${SRUN_ARGS:-""}

set -x
# shellcheck disable=SC2086
srun -p "$PARTITION" \
    --job-name="$JOB_NAME" \
    --gres=gpu:"$GPUS_PER_NODE" \
    --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" \
    --cpus-per-task="$CPUS_PER_TASK" \
    --kill-on-bad-exit=1 \
    $SRUN_ARGS \
    python -u "$(dirname "$0")/train.py" "$CONFIG" --launcher="slurm" "${@:4}"
