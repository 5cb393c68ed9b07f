#!/usr/bin/env bash
# The paper's 124M runs on one machine with 8 GPUs: plain, ESLM and the random control, then the table.
#
#   DATA=data/slimpajama examples/pretrain_124M.sh --train-iters 40000
#
# 480 sequences a step = 12 a GPU x 8 GPUs x 5 micro-steps; about 6 GB a GPU.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
pretrain 124M "$@"
