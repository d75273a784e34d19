#!/usr/bin/env bash
# Sets up the environment, trains a small ResNeXt on drawn shapes, prints its error, and draws its curves.
# Usage: bash scripts/run_quickstart.sh [KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_env.sh ""
run="runs/quickstart/$(date +%Y-%m-%d_%H-%M-%S)"
"$python" -m resnext_ignite.train --config configs/quickstart.yaml --output-dir "$run" train.device=cpu "$@"
echo "curve: $run/curves.png"
echo "watch: $python -m tensorboard.main --logdir runs"
