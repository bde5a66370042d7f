#!/usr/bin/env bash
# One machine's part of a run: scripts/launch/node.sh experiment=titans_paper, the arguments of train.py.
#
# One machine: all of its GPUs, without further settings. Several: the same command on each, with NODES, and with HEAD,
# the name of the machine where the processes meet. Slurm: see slurm.sh.
#   NODES=1          machines
#   HEAD, PORT       where the processes meet, 29500 if PORT is not set
#   JOB              a name that all machines of the run share, and no other run on them
#   PROCESSES=auto   processes of this machine: one for each GPU; on CPUs a number
#
# SIGUSR1 to this script: every rank saves, then it ends with 138. Otherwise its exit code is torchrun's: 0 at the end
# of the run, 1 after an error or another signal. In all cases the same command goes on from the last checkpoint.
set -u
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Seconds that torchrun gives the ranks to save after SIGTERM; its own 30 are too few for a large model.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# Without it the threads of every rank would share all cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ -e /dev/kfd ]; then
    # ROCm. Kernel arguments in device memory start kernels sooner; scratch memory that is kept spares RCCL a wait.
    export HIP_FORCE_DEV_KERNARG=${HIP_FORCE_DEV_KERNARG:-1} HSA_NO_SCRATCH_RECLAIM=${HSA_NO_SCRATCH_RECLAIM:-1}
    export TORCH_NCCL_HIGH_PRIORITY=${TORCH_NCCL_HIGH_PRIORITY:-1}
    # Slurm may hide GPUs by several variables; the others would then count among those that the first one leaves.
    if [ -n "${ROCR_VISIBLE_DEVICES:-}" ]; then unset HIP_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES; fi
fi

meet=(--standalone)
if [ "${NODES:-1}" -gt 1 ]; then
    : "${HEAD:?set HEAD to the name of the first machine}"
    meet=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${JOB:-memlm}")
fi

# torchrun ends at once at SIGUSR1 and leaves its ranks alone, so it ignores the signal, and the ranks get it directly.
(trap '' USR1 && exec torchrun "${meet[@]}" --nproc-per-node "${PROCESSES:-auto}" "$repository/train.py" "$@") &
launcher=$! preempted=
trap 'preempted=1; pkill -USR1 -P "$launcher"' USR1
trap 'kill -TERM "$launcher"' TERM INT

# A signal ends a wait early.
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done
wait "$launcher"
code=$?
[ -n "$preempted" ] && [ "$code" -ne 0 ] && code=138
exit "$code"
