#!/usr/bin/env bash
# Trains Medusa heads and early heads for a model, on what it writes itself.
#
#   examples/train_heads.sh [MODEL] [DATA] [OUT] [MORE OPTIONS OF vllm-propd train]
#
# DATA gives the prompts: text, JSON rows or Parquet that look like what the model will be
# asked. Three minutes show how it goes; heads to serve with want more of everything, such as
#
#   examples/train_heads.sh MODEL DATA MODEL/propd --distill-tokens 10000000 --minutes 120
set -euo pipefail
model=${1:-demo/model}
data=${2:-$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')}
out=${3:-build/heads}

# The last of two equal options wins. A kill loses nothing: --resume goes on.
vllm-propd train "$model" --data "$data" --out "$out" --self-distill \
  --most-tokens 500000 --distill-tokens 100000 --minutes 3 "${@:4}"

echo "Serve with them: vllm serve $model --speculative-config" \
  "'{\"method\": \"propd\", \"model\": \"$out\"}'"
