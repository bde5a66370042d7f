#!/usr/bin/env bash
# A run on Slurm: sbatch scripts/launch/slurm.sh experiment=titans_paper, the arguments of train.py.
# Options of sbatch before the script replace those below: sbatch --nodes=4 --partition=gpu --time=24:00:00 ...
#
# Before the end of its time, and if it is preempted, the job saves, and Slurm puts it into the queue again; there the
# same command goes on. Slurm shows the exit code: 0 at the end of the run, otherwise that of node.sh.
#SBATCH --job-name=memlm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=runs/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# 300 seconds for the save; B: the signal is for this script alone.
#SBATCH --signal=B:USR1@300
set -u
# Slurm runs a copy of this script, but in the folder where sbatch was called: the repository's.
node=scripts/launch/node.sh
[ -x "$node" ] || { echo "$PWD has no $node; call sbatch in the repository" >&2; exit 2; }

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD NODES=$SLURM_JOB_NUM_NODES JOB=$SLURM_JOB_ID PORT=$((20000 + SLURM_JOB_ID % 20000))

# A step that dies on one machine would wait for ever on the others.
srun --kill-on-bad-exit=1 "$node" "$@" &
step=$! preempted=
trap 'preempted=1; kill -USR1 "$step"' USR1

# A signal ends a wait early.
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?
if [ -n "$preempted" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
