#!/usr/bin/env bash
# vLLM 0.32 (CUDA) for a machine without a network, in pieces that fit a small transfer.
# See README.md.
#   pack.sh [OUT]    -> OUT/0, OUT/1 ...: a piece each; OUT is build/gpu_kit, which git ignores
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${1:-$root/build/gpu_kit}
out=$(mkdir -p "$out" && cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Wheels for that machine's Python, whatever runs here.
platforms=(--platform any --platform linux_x86_64 --platform manylinux2014_x86_64
  --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
for n in $(seq 5 39); do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
fetch() {
  "${PYTHON:-python3}" -m pip install -q --no-deps --no-compile --only-binary=:all: \
    --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
    "${platforms[@]}" "$@"
}
fetch --target "$work/deps" -r "$here/requirements.txt"
fetch --target "$work/vllm" vllm==0.32.0

# What ProPD's models need no kernels of: mixtures of experts, MLA, FlashAttention 2.
cd "$work/vllm"
rm -rf bin ../deps/bin vllm/vllm-rs* vllm/bin vllm/third_party/{deep_gemm,fmha_sm100,tml_fa4} \
  vllm/{_flashmla_C,_flashmla_extension_C,_flashkda_C,_deepselect_C,_qutlass_C}.abi3.so \
  vllm/_moe_C_stable_libtorch.abi3.so vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so
cd "$work"
find . -name '__pycache__' -prune -exec rm -rf {} +
find . -name '*.pyi' -delete

# The plugin is the checkout itself; only what tells vLLM of it, its metadata, is packed.
"${PYTHON:-python3}" -m pip install -q --no-deps --no-compile --target "$work/own" "$root"
cp -r own/vllm_propd-*.dist-info vllm/
cp -r deps/. vllm/
"$here/pieces.sh" "$work/vllm" "$out"
