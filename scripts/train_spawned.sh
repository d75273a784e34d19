#!/usr/bin/env bash
# Trains with one rank per GPU of this machine; the train command itself spawns them.
# Usage: [RANKS=N] bash scripts/train_spawned.sh --config configs/X.yaml [KEY=VALUE ...]
set -euo pipefail
gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" || gpus=0
ranks="${RANKS:-$((gpus > 0 ? gpus : 1))}"
exec python -m resnext_ignite.train "$@" --nproc-per-node "$ranks"
