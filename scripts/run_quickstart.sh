#!/usr/bin/env bash
# From nothing to a trained ResNeXt: environment, training on drawn shapes, the error, the curve.
# Usage: bash scripts/run_quickstart.sh [KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_env.sh
run="runs/quickstart/$(date +%Y-%m-%d_%H-%M-%S)"
"$python" -m resnext_ignite.train --config configs/quickstart.yaml --output-dir "$run" train.device=cpu "$@"
echo "curve: $run/curves.png"
echo "watch: $python -m tensorboard.main --logdir runs"
