#!/usr/bin/env bash
# Train or prune with several processes, one a GPU, or on the CPU where there is none.
#
#     dist_train.sh CONFIG GPUS [arguments of train.py]
#
# On several machines: NNODES, NODE_RANK and MASTER_ADDR, the same PORT on each.
CONFIG=${1:?usage: dist_train.sh CONFIG GPUS [ARGS]}
GPUS=${2:?usage: dist_train.sh CONFIG GPUS [ARGS]}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
PORT=${PORT:-29500}
MASTER_ADDR=${MASTER_ADDR:-"127.0.0.1"}

python -m torch.distributed.run \
    --nnodes="$NNODES" \
    --node_rank="$NODE_RANK" \
    --master_addr="$MASTER_ADDR" \
    --nproc_per_node="$GPUS" \
    --master_port="$PORT" \
    "$(dirname "$0")/train.py" \
    "$CONFIG" \
    --launcher pytorch "${@:3}"
