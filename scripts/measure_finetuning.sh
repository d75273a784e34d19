#!/usr/bin/env bash
# Measures the gain from fine-tuning on few images. A small ResNeXt first learns eight classes of CIFAR-10. It then
# learns cats and trucks from 200 images each. The script compares its error before fine-tuning (epoch 0), its error
# after fine-tuning, and the error of training from scratch, on all 2,000 test images and over five seeds.
# Usage: bash scripts/measure_finetuning.sh IMAGES [OUT]      default OUT: runs/finetuning; the same command resumes
#   IMAGES: CIFAR-10 as train|test/<class>/*.jpg. It takes 8 to 15 minutes on two CPU cores.
# PYTHON: an interpreter with this package's dependencies; nothing is installed. BASE and TUNE: KEY=VALUE overrides for
# the first and the second part, to test the script in less time: BASE="train.epochs=1 data.train_size=2000".
set -euo pipefail
pictures="$(realpath "${1:?IMAGES: a folder that holds train and test}")"
mkdir -p "${2:-runs/finetuning}"
out="$(realpath "${2:-runs/finetuning}")"
if [ -f "$out/pictures.txt" ] && [ "$(cat "$out/pictures.txt")" != "$pictures" ]; then
    echo "error: $out: holds an experiment on $(cat "$out/pictures.txt"); choose another OUT" >&2
    exit 7
fi
echo "$pictures" >"$out/pictures.txt"
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
read -ra base <<<"${BASE:-}"
read -ra tune <<<"${TUNE:-}"

# Use symbolic links: no file is copied, and no run can read an image that is not linked.
for split in train test; do
    mkdir -p "$out/eight/$split" "$out/two/$split"
    for class in "$pictures/$split"/*/; do
        name="$(basename "$class")"
        case "$name" in
            cat | truck) ;;
            *) ln -sfn "$class" "$out/eight/$split/$name" ;;
        esac
    done
done
for name in cat truck; do
    ln -sfn "$pictures/test/$name" "$out/two/test/$name"
    mkdir -p "$out/two/train/$name"
    # Take the first 200 images by name: all seeds use the same images.
    find "$pictures/train/$name" -name '*.jpg' | LC_ALL=C sort | awk 'NR <= 200' | while IFS= read -r picture; do
        ln -sf "$picture" "$out/two/train/$name/"
    done
done

"$python" -m resnext_ignite.train --config configs/cifar10_resnext11_small.yaml --output-dir "$out/base" --resume \
    data.name=imagefolder "data.root=$out/eight" train.epochs=5 schedule.warmup_epochs=1 evaluation.every=5 \
    logging.tensorboard=false "${base[@]}"
exec "$python" -m resnext_ignite.ablate configs/ablations/finetuning.yaml --output-dir "$out/tuned" \
    "data.root=$out/two" "model.pretrained=$out/base" "${tune[@]}"
