#!/usr/bin/env bash
# A rank for each GPU of one or several machines, under torchrun, which starts ranks that died again: three times.
# Usage, on one machine:
#   [RANKS=N] bash scripts/train_torchrun.sh --config configs/X.yaml --output-dir RUN [KEY=VALUE ...]
# On several, the same line on each; HOST is one of them, 29400 a free port there, and RUN a folder that all see:
#   NODES=4 ENDPOINT=HOST:29400 bash scripts/train_torchrun.sh --config configs/X.yaml --output-dir RUN [KEY=VALUE ...]
# NODES=2:4 begins with what has come after half a minute, two at least, and goes on with as many when one is lost; with
# HOST all is lost.
set -euo pipefail
gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" || gpus=0
ranks="${RANKS:-$((gpus > 0 ? gpus : 1))}"
if [ -n "${ENDPOINT:-}" ]; then
    where=(--nnodes "${NODES:?how many machines, as 4 or 2:4}")
    where+=(--rdzv-backend c10d --rdzv-endpoint "$ENDPOINT" --rdzv-id resnext)
else
    where=(--standalone)
fi
# --resume: from the start where there is nothing yet, else from the last checkpoint.
exec python -m torch.distributed.run "${where[@]}" --nproc-per-node "$ranks" --max-restarts 3 \
    -m resnext_ignite.train "$@" --resume
