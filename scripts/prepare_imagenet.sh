#!/usr/bin/env bash
# ILSVRC2012's three archives as a folder to train from, in an environment of its own; run again, it goes on.
# Usage: bash scripts/prepare_imagenet.sh --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar \
#            --devkit ILSVRC2012_devkit_t12.tar.gz --output DIR [--short-side PIXELS] [--shards]
set -euo pipefail
. "$(dirname "$0")/setup_env.sh" "[imagenet]"
exec "$python" -m resnext_ignite.imagenet "$@"
