#!/usr/bin/env bash
# Serves a model with ProPD, asks it something, shows what was accepted, and stops it.
#
#   examples/serve.sh [MODEL] [PORT]
set -euo pipefail
model=${1:-demo/model}
port=${2:-8000}

# Heads lie in MODEL/propd; elsewhere: '{"method": "propd", "model": "HEADS"}'.
vllm serve "$model" --port "$port" --served-model-name target --dtype float32 \
  --speculative-config propd &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait' EXIT

until curl -sf "localhost:$port/health"; do
  kill -0 "$server" # or it has ended, and has said why
  sleep 1
done

curl -sf "localhost:$port/v1/completions" -H 'Content-Type: application/json' -d '{
  "model": "target", "prompt": "class Stack:\n", "max_tokens": 64, "temperature": 0
}'
echo
# While it serves, `vllm-propd watch` draws these in the terminal.
curl -sf "localhost:$port/metrics" | grep '^vllm:propd_'
