#!/usr/bin/env bash
# Trains with one rank per GPU of one or several machines, under torchrun. If a rank dies, torchrun restarts the ranks,
# at most three times.
# Usage, on one machine:
#   [RANKS=N] bash scripts/train_torchrun.sh --config configs/X.yaml --output-dir RUN [KEY=VALUE ...]
# Usage, on several machines: start the same command on each. HOST is one of the machines, 29400 a free port on it, and
# RUN a folder on shared storage:
#   NODES=4 ENDPOINT=HOST:29400 bash scripts/train_torchrun.sh --config configs/X.yaml --output-dir RUN [KEY=VALUE ...]
# With NODES=2:4, training starts with the machines that have joined after half a minute, if these are at least two. If
# a machine is lost, the others continue, if at least two remain. If HOST is lost, the run ends.
set -euo pipefail
gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" || gpus=0
ranks="${RANKS:-$((gpus > 0 ? gpus : 1))}"
if [ -n "${ENDPOINT:-}" ]; then
    where=(--nnodes "${NODES:?how many machines, as 4 or 2:4}")
    where+=(--rdzv-backend c10d --rdzv-endpoint "$ENDPOINT" --rdzv-id resnext)
else
    where=(--standalone)
fi
# --resume: continue from the newest checkpoint, or start from scratch if there is none.
exec python -m torch.distributed.run "${where[@]}" --nproc-per-node "$ranks" --max-restarts 3 \
    -m resnext_ignite.train "$@" --resume
