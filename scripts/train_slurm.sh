#!/usr/bin/env bash
# Trains in a job that survives time limits and preemption: the run saves its state and exits, the job is queued again,
# and the run resumes.
# Usage: sbatch [SBATCH OPTIONS] scripts/train_slurm.sh --config configs/X.yaml [KEY=VALUE ...]
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
set -uo pipefail
# --wait: if tasks still run two minutes after the first task has ended, they only wait for that task; srun ends them.
# Slurm sends SIGUSR1 to the tasks two minutes before the time limit (SIGTERM when it preempts).
srun --wait=120 python -m resnext_ignite.train "$@" --output-dir "${RUN_DIR:-runs/slurm-$SLURM_JOB_ID}" --resume
code=$?
# 75: a signal stopped the run; it is saved and can resume. After any other error, a new attempt would only fail again.
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
