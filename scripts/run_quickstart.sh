#!/usr/bin/env bash
# From scratch to a trained ResNeXt: sets up the environment, trains on drawn shapes, prints the error, draws curves.
# Usage: bash scripts/run_quickstart.sh [KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_env.sh ""
run="${RUN:-runs/quickstart/$(date +%Y-%m-%d_%H-%M-%S)}"
"$python" -m resnext_ignite.train --config configs/quickstart.yaml --output-dir "$run" train.device=cpu "$@"
echo "curve: $run/curves.png"
echo "watch: $python -m tensorboard.main --logdir runs"
