#!/bin/bash
# Rendered by: llmfoundry launch --on local --nodes 2 --gpus 8 yamls/pretrain/mpt-1b.yaml run_name=mpt-1b save_folder=./checkpoints/mpt-1b
# Run on each of the 2 nodes: NODE_RANK=0 MASTER_ADDR=ADDRESS-OF-NODE-0 bash FILE   (NODE_RANK=1 on the second, ...)
set -euo pipefail

# What every node runs; between systems only the node's rank and the address of node 0 differ.
export WORLD_SIZE=16 LOCAL_WORLD_SIZE=8
export NODE_RANK=${NODE_RANK:?set it to the rank of this node, 0 to 1}
export MASTER_ADDR=${MASTER_ADDR:?set it to an address of node 0}
export MASTER_PORT=7501
exec composer scripts/train/train.py yamls/pretrain/mpt-1b.yaml run_name=mpt-1b save_folder=./checkpoints/mpt-1b
