#!/usr/bin/env bash
# Makes all measurements that need a GPU, in calls of at most ten minutes: the tests for a GPU, a short run of one rank
# over NCCL, and the whole benchmark. The benchmark writes FILE.json after each part; --continue skips the parts that
# FILE.json holds.
# Usage: bash scripts/measure_gpu.sh [--continue] [--device cpu] [FILE.json]     default: benchmarks/<GPU>.json
# PYTHON: an interpreter with torch 2.11 and this package's dependencies; nothing is installed, no network is needed.
# --device cpu tests the script itself on a machine without a GPU. Exit code 124: out of time; repeat with --continue.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
deadline=$(($(date +%s) + 570))
device=cuda
backend=nccl
continued=()
while [[ "${1:-}" == --* ]]; do
    case "$1" in
        --continue) continued=(--continue) ;;
        --device)
            device="${2:?cpu or cuda}"
            [ "$device" = cuda ] || backend=gloo
            shift
            ;;
        *)
            echo "error: $1: unknown option; the options are --continue and --device cpu" >&2
            exit 2
            ;;
    esac
    shift
done
if [ "$device" = cuda ]; then
    name="$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')"
else
    name="$device"
fi
file="${1:-benchmarks/$name.json}"
log="${file%.json}.log"

# Run a step and print its exit code. Continue after a failure: the log shows that the result of the step is missing.
step() {
    local what="$1" code=0
    shift
    "$@" >>"$log" 2>&1 || code=$?
    echo "$what: exit code $code" | tee -a "$log"
}

if [ "${#continued[@]}" = 0 ]; then
    : >"$log"
    step "tests on the GPU" timeout 120 "$python" -m pytest -o addopts="" -q -k gpu -rs \
        tests/test_engines.py tests/test_grouped_conv.py tests/test_device_decoding.py
    run="$(mktemp -d)"
    # Start the run as a user does. Without a GPU, use a small network and a small data set.
    model=(--config configs/cifar10_resnext29_8x64d.yaml "schedule.milestones=[]")
    [ "$device" = cuda ] || model=(--config configs/quickstart.yaml data.train_size=256 data.test_size=100)
    step "a run of one rank over $backend" timeout 150 \
        "$python" -m torch.distributed.run --standalone --nproc-per-node=1 -m resnext_ignite.train "${model[@]}" \
        --output-dir "$run/run" --backend "$backend" data.name=shapes train.epochs=2 logging.tensorboard=false \
        "train.device=$device"
    rm -r "$run"
fi
code=0
timeout "$((deadline - $(date +%s)))" "$python" -m resnext_ignite.benchmark --device "$device" --json "$file" \
    "${continued[@]}" 2>&1 | tee -a "$log" || code=$?
if [ "$code" = 124 ]; then
    # The next call repeats the interrupted part.
    echo "out of time; continue with: bash scripts/measure_gpu.sh --continue --device $device $file"
fi
exit "$code"
