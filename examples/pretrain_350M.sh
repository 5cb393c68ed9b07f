#!/usr/bin/env bash
# The paper's 350M runs on one machine with 8 GPUs: plain, ESLM and the random control, then the table.
#
#   DATA=data/slimpajama examples/pretrain_350M.sh
#
# 320 sequences a step = 8 a GPU x 8 GPUs x 5 micro-steps; about 10 GB a GPU.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
pretrain 350M "$@"
