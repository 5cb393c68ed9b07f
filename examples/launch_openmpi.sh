#!/usr/bin/env bash
# Start an example with Open MPI on the machines of a hostfile.
#
#   DATA=data/slimpajama HOSTFILE=examples/hostfile examples/launch_openmpi.sh examples/pretrain_1.5B.sh [FLAG...]
#
#   WITH       mpirun (default), or deepspeed: its launcher with --launcher openmpi, which calls mpirun
#   INTERFACE  the network interface that machines find each other by; default eth0
#
# Needs mpi4py for this MPI (pip install mpi4py): ranks agree over it where rank 0 listens. Without it, export
# MASTER_ADDR (the first machine) and MASTER_PORT for mpirun. MPI does no more than that: NCCL moves the data.
set -euo pipefail
: "${1:?name the script to start, for example examples/pretrain_1.5B.sh}"
hosts=$(realpath -e "${HOSTFILE:-$(dirname "${BASH_SOURCE[0]}")/hostfile}")
# Slots in order, so that ranks 0 to 7 share a machine. Not bound: a rank's threads and loaders need more than a core.
mpi=(--map-by slot --bind-to none --mca btl_tcp_if_include "${INTERFACE:-eth0}")
case ${WITH:=mpirun} in
    mpirun)
        launch=(mpirun --hostfile "$hosts" "${mpi[@]}")
        for name in $(compgen -e); do
            case $name in
                NCCL_* | PYTHON* | PATH | LD_LIBRARY_PATH | MASTER_ADDR | MASTER_PORT) launch+=(-x "$name") ;;
            esac
        done
        launch+=(python)
        ;;
    deepspeed) launch=(deepspeed --hostfile "$hosts" --launcher openmpi --launcher_args "${mpi[*]}") ;;
    *) echo "error: WITH=$WITH is neither mpirun nor deepspeed" >&2 && exit 2 ;;
esac
export LAUNCH="${launch[*]@Q}"
exec "$@"
