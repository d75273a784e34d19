#!/usr/bin/env bash
# A run that survives time limits and preemption: it saves its state, exits, is queued again and resumes.
# Usage: sbatch [SBATCH OPTIONS] scripts/train_slurm.sh --config configs/X.yaml [KEY=VALUE ...]
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
set -uo pipefail
# --wait: tasks that still run two minutes after the first one ended only wait for it; srun ends them.
# Slurm sends SIGUSR1 to the tasks two minutes before the time limit (SIGTERM when it preempts).
srun --wait=120 python -m resnext_ignite.train "$@" --output-dir "${RUN_DIR:-runs/slurm-$SLURM_JOB_ID}" --resume
code=$?
# 75: stopped by a signal, saved and resumable. After any other error, the run would only fail again.
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
