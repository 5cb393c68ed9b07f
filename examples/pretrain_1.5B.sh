#!/usr/bin/env bash
# The paper's 1.5B runs on 4 machines with 8 A100-80G each. Started by one of
#
#   DATA=data/slimpajama HOSTFILE=examples/hostfile examples/launch_hostfile.sh examples/pretrain_1.5B.sh
#   DATA=data/slimpajama HOSTFILE=examples/hostfile examples/launch_openmpi.sh examples/pretrain_1.5B.sh
#   DATA=data/slimpajama sbatch examples/slurm_1.5B.sbatch
#
# LAYOUT is TP x PP x DP. What one GPU holds: 1.56e9 parameters / (TP x PP) x (2 bytes of bf16 weights + 4 of gradients
# + 12/DP of ZeRO-1's share of master weights and moments), and activations.
#
#   1x1x32  10 GB + 13 GB of activations (5 sequences). All fits, so nothing is cut and no stage ever waits. What
#           crosses the network is 3.1 GB of gradients (bf16) and 3.1 GB of weights out of each machine a step: 30 ms
#           over eight 200 Gb/s cards, against 0.4 s of computing (1.6e15 FLOPs at 40 % of the peak).
#           The choice on InfiniBand, and the default.
#   1x4x8   Over one 100 Gb/s card the same 6.2 GB take 0.5 s, longer than the computing. With a pipeline stage a
#           machine, each data-parallel group lies inside one, where NVLink is, and only activations cross: 6.6 MB a
#           micro-step and GPU forward, as much backward, 1 GB a step out of each machine. The price: 3 of 13 slots
#           are idle (4 stages, 10 micro-steps of 2 sequences). The choice on Ethernet. 9 GB a GPU.
#   2x4x4   Tensor parallelism sums activations twice a block and direction, in the middle of the computing: only
#           NVLink bears that, so TP stays inside a machine (ranks are numbered tensor, data, pipeline: GPUs 0 and 1
#           are a pair). 1.5B does not need it (7 GB a GPU); larger models and longer sequences do, and this is the
#           layout to start from. GPT-2's 25 heads do not divide by 2, so it has 20 of 80: as many parameters, not the
#           same model.
#
# Sequences are selected once a step among all 160 where there are 10 micro-steps (1x4x8, 2x4x4), and among the 160 of
# the only micro-step in 1x1x32, where ranks wait for the one that keeps most. Tokens are chosen among micro-batch x DP
# sequences: 160, 16 and 16. Compare runs of one layout, or set MICRO_BATCH so that the product is the same.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
: "${LAUNCH:?start this with examples/launch_hostfile.sh, launch_openmpi.sh or slurm_1.5B.sbatch}"
pipeline=(--pipeline-model-parallel-size 4 --deepspeed_config ds_configs/pipeline_zero1_bf16.json)
case ${LAYOUT:=1x1x32} in
    1x1x32) layout=(--micro-batch-size "${MICRO_BATCH:-5}") ;;
    1x4x8) layout=(--micro-batch-size "${MICRO_BATCH:-2}" "${pipeline[@]}") ;;
    2x4x4) layout=(--micro-batch-size "${MICRO_BATCH:-4}" "${pipeline[@]}"
        --tensor-model-parallel-size 2 --sequence-parallel --num-attention-heads 20) ;;
    *) echo "error: LAYOUT=$LAYOUT is not 1x1x32, 1x4x8 or 2x4x4" >&2 && exit 2 ;;
esac
pretrain 1.5B --global-batch-size 160 "${layout[@]}" "$@"
