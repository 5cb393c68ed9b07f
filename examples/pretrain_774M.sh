#!/usr/bin/env bash
# The paper's 774M runs on one or two machines with 8 GPUs each.
#
#   DATA=data/slimpajama examples/pretrain_774M.sh
#   DATA=data/slimpajama NODES=2 HOSTFILE=two_hosts examples/launch_hostfile.sh examples/pretrain_774M.sh
#
# 0.77e9 parameters x (2 bytes of bf16 weights + 4 of gradients + 12/8 of ZeRO-1's share of the optimizer) = 6 GB,
# activations 12 GB: data parallelism suffices, and neither tensor nor pipeline parallel sizes are needed.
#
# Two machines take half as many sequences a GPU: selection chooses among the same 64 sequences a micro-step, so both
# train the same model.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case ${NODES:-1} in
    1) micro_batch=8 ;;
    2) micro_batch=4 ;;
    *) echo "error: NODES=$NODES is neither 1 nor 2" >&2 && exit 2 ;;
esac
pretrain 774M --micro-batch-size "$micro_batch" --global-batch-size 320 "$@"
