#!/usr/bin/env bash
# What it gains to begin from what was learned on other classes: CIFAR-10's cat and truck, 200 training pictures each,
# from a small ResNeXt trained on the other eight, against from nothing; five seeds.
# Usage: bash scripts/measure_finetuning.sh PICTURES [FOLDER]     PICTURES/{train,test}/<class>/*: CIFAR-10 as files
# The runs lie in FOLDER (default: runs/finetuning); a run that is there already is not made again.
set -euo pipefail
pictures="$(realpath "${1:?the folder of CIFAR-10 as pictures}")"
cd "$(dirname "$0")/.."
folder="${2:-runs/finetuning}"
python="${PYTHON:-python3}"
two="$folder/two" eight="$folder/eight"
for class in "$pictures"/train/*/; do
    class="$(basename "$class")"
    [[ "$class" =~ ^(cat|truck)$ ]] && data="$two" || data="$eight"
    mkdir -p "$data/train" "$data/test"
    ln -sfn "$pictures/test/$class" "$data/test/$class"
    if [ "$data" = "$eight" ]; then
        ln -sfn "$pictures/train/$class" "$data/train/$class"
    else
        mkdir -p "$data/train/$class"
        find "$pictures/train/$class" -type f | sort | head -n 200 | while read -r file; do
            ln -sfn "$file" "$data/train/$class/$(basename "$file")"
        done
    fi
done

# $1: its name; the rest as for the train command.
run() {
    local output="$folder/$1"
    shift
    [ -f "$output/checkpoints/final.pt" ] || "$python" -m resnext_ignite.train --config configs/cifar10_resnext11_small.yaml \
        --output-dir "$output" data.name=imagefolder data.image_size=32 logging.tensorboard=false "$@"
}

run base "data.root=$eight" train.epochs="${BASE_EPOCHS:-4}"
for seed in 1 2 3 4 5; do
    small=("data.root=$two" "seed=$seed" train.epochs=30 train.batch_size=32)
    run "scratch-$seed" "${small[@]}"
    run "finetuned-$seed" "${small[@]}" "model.pretrained=$folder/base" optimizer.lr=0.02 evaluation.early='[0]'
    run "frozen-$seed" "${small[@]}" "model.pretrained=$folder/base" optimizer.lr=0.02 train.freeze=backbone
done
"$python" -m resnext_ignite.report "$folder"/{scratch,finetuned,frozen}-? --output "$folder/curves.png"
