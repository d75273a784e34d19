#!/usr/bin/env bash
# Everything that is to be measured on a GPU, at most ten minutes a call: the tests that need one, a short run over NCCL
# with one rank, and the whole benchmark. FILE.json holds what is measured after each part: --continue goes on there.
# Usage: bash scripts/measure_gpu.sh [--continue] [--device cpu] [FILE.json]     default: benchmarks/<GPU>.json
# PYTHON is one with torch 2.11 and this package's dependencies: nothing is installed, and no network is needed.
# --device cpu tries the script itself, on a machine without a GPU. Exit code 124: the time is over, --continue.
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
            echo "error: $1: --continue and --device cpu are all there is" >&2
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

# Says how a step ended, and goes on: what it would have shown stands in the log as missing.
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
    # As a user would start it; small where there is no GPU.
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
    # The part that the time ended is measured by the next call.
    echo "the time is over: bash scripts/measure_gpu.sh --continue --device $device $file"
fi
exit "$code"
