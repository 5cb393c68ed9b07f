#!/usr/bin/env bash
# Start an example on the machines of a hostfile, by DeepSpeed's own launcher.
#
#   DATA=data/slimpajama HOSTFILE=examples/hostfile examples/launch_hostfile.sh examples/pretrain_1.5B.sh [FLAG...]
#
# Needs ssh without a password and pdsh here, and the repository, its Python and DATA under the same paths on all
# machines. Variables NCCL_*, PYTHON*, PATH and LD_LIBRARY_PATH go along; others through a file .deepspeed_env, one
# NAME=VALUE a line, in this folder or at home.
set -euo pipefail
: "${1:?name the script to start, for example examples/pretrain_1.5B.sh}"
hosts=$(realpath -e "${HOSTFILE:-$(dirname "${BASH_SOURCE[0]}")/hostfile}")
launch=(deepspeed --hostfile "$hosts" --master_port "${MASTER_PORT:-29500}")
export LAUNCH="${launch[*]@Q}"
exec "$@"
