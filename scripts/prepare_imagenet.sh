#!/usr/bin/env bash
# Unpacks ILSVRC2012's three archives into a folder to train from, in a separate environment. After an interruption, run
# the same command again: it resumes.
# Usage: bash scripts/prepare_imagenet.sh --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar \
#            --devkit ILSVRC2012_devkit_t12.tar.gz --output DIR [--short-side PIXELS] [--shards]
set -euo pipefail
. "$(dirname "$0")/setup_env.sh" "[imagenet]"
exec "$python" -m resnext_ignite.imagenet "$@"
