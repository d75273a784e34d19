#!/usr/bin/env bash
# Measures how long a recipe takes from scratch to its error. Each seed is one process, timed from its start to its end.
# Usage: [SEEDS="1 2 3"] [OUT=DIR] bash scripts/time_to_error.sh [CONFIG] [KEY=VALUE ...]
#   default: configs/cifar10_resnext29_8x64d_fast.yaml; OUT: runs/time_to_error/<date-time>
# PYTHON: an interpreter with this package's dependencies; nothing is installed. The measured time includes a download
# of the data: download the data before.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-python3}"
config="$root/configs/cifar10_resnext29_8x64d_fast.yaml"
if [ $# -gt 0 ] && [[ "$1" != *=* ]]; then
    config="$(realpath "$1")"
    shift
fi
out="${OUT:-runs/time_to_error/$(date +%Y-%m-%d_%H-%M-%S)}"
read -ra seeds <<<"${SEEDS:-1 2 3}"
mkdir -p "$out"
: >"$out/seconds.txt"
# The run folders have the names that `ablate` would give them. It therefore finds finished runs and only compares them.
plan="$out/$(basename "$config")"
{
    echo "config: '${config//\'/\'\'}'"
    echo "seeds: [$(IFS=,; echo "${seeds[*]}")]"
    echo "variants: {recipe: {}}"
} >"$plan"
for seed in "${seeds[@]}"; do
    began="$(date +%s.%N)"
    "$python" -m resnext_ignite.train --config "$config" --output-dir "$out/recipe/seed_$seed" "$@" "seed=$seed" >&2
    echo "$seed $began $(date +%s.%N)" >>"$out/seconds.txt"
done
"$python" -m resnext_ignite.ablate "$plan" --output-dir "$out" "$@"
"$python" - "$out" <<'END'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
runs = {run["seed"]: run for run in json.loads((out / "ablation.json").read_text())["runs"]}
print("\nseed  seconds in all = start and end + training + evaluation   epochs  error %")
for line in (out / "seconds.txt").read_text().splitlines():
    seed, began, ended = line.split()
    run, whole = runs[int(seed)], float(ended) - float(began)
    training = run["seconds"] - run["evaluation_seconds"]
    print(
        f"{seed:>4}  {whole:14.1f} = {whole - run['seconds']:13.1f} + {training:8.1f} + {run['evaluation_seconds']:10.1f}"
        f"   {run['epochs']:6}  {run['error']:7.2f}"
    )
END
