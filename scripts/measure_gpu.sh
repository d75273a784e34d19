#!/usr/bin/env bash
# Everything that is to be measured on a GPU, at most ten minutes a call: the tests that need one, a short run over NCCL
# with one rank, and the whole benchmark. What is measured stands in FILE after each suite; --continue goes on from there.
# Usage: bash scripts/measure_gpu.sh [--continue] [FILE.json]     default: benchmarks/<GPU>.json
# PYTHON is one with torch 2.11 and this package's dependencies; nothing is installed, and no network is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
options=()
if [ "${1:-}" = "--continue" ]; then
    options=(--continue)
    shift
fi
gpu="$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')"
file="${1:-benchmarks/$gpu.json}"
log="${file%.json}.log"
deadline=$(($(date +%s) + ${MEASURE_SECONDS:-570}))
left() { echo $((deadline - $(date +%s))); }

if [ "${#options[@]}" = 0 ]; then
    : >"$log"
    if "$python" -c 'import pytest' 2>/dev/null; then
        timeout 120 "$python" -m pytest -o addopts="" -q -k gpu -rs tests/test_engines.py tests/test_grouped_conv.py 2>&1 | tee -a "$log"
    fi
    run="$(mktemp -d)"
    timeout 120 "$python" -m torch.distributed.run --standalone --nproc-per-node=1 -m resnext_ignite.train \
        --config configs/cifar10_resnext29_8x64d.yaml --output-dir "$run/run" --backend nccl data.name=shapes \
        schedule.milestones='[]' train.epochs=2 logging.tensorboard=false 2>&1 | tee -a "$log"
    rm -r "$run"
fi
# Ended before the time is over, the suite at hand is measured again by the next call.
timeout --preserve-status "$(left)" "$python" -m resnext_ignite.benchmark \
    --json "$file" --picture "${file%.json}.png" "${options[@]}" 2>&1 | tee -a "$log"
