"""Kernels compiled for GPUs, where there is none: what they take, and are made for.

Triton's compiler needs no GPU. It does need to be out of its interpreter, which it decides
on when it is imported: a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import cores  # noqa: F401 - before numba counts them
import pytest

from vllm_propd.kernels.tree_attention_triton import SHARED_BYTES, stages_that_fit

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_propd.kernels.tree_attention_triton import KEY_ROWS, QUERY_ROWS, _in_step

types = dict(prefix_lse="*fp32", masks="*i64", scale="fp32", soft_cap="fp32")
whole = sys.argv[2] == "float32"
types |= dict.fromkeys(
    ("query", "key", "value", "out", "prefix"), "*fp32" if whole else "*bf16"
)
types |= dict.fromkeys(("tile_first", "tile_size", "tile_start"), "*i32")
found = []
for head, capability, stages in json.loads(sys.argv[1]):
    constants = dict(
        GROUP=4, HEAD=head, HEAD_PADDED=triton.next_power_of_2(head), CAPPED=False,
        BLOCK_M=QUERY_ROWS, BLOCK_N=KEY_ROWS, WIDEN=False,
        PRECISION="ieee" if whole else "tf32",
    )
    signature = {
        name: types.get(name, "constexpr" if name in constants else "i32")
        for name in _in_step.arg_names
    }
    compiled = triton.compile(
        ASTSource(_in_step, signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options=dict(num_stages=stages),
    )
    found.append(compiled.metadata.shared)
print(json.dumps(found))
"""

PARAMETERS = """
import json
from vllm_propd.kernels import pruning_triton, tree_attention_triton

kernels = [getattr(module, name) for module, name in (
    (tree_attention_triton, "_in_step"), (pruning_triton, "_over_vocabulary"),
    (pruning_triton, "_over_path"), (pruning_triton, "_narrow"))]
print(json.dumps({kernel.__name__: {
    parameter.name: [parameter.do_not_specialize, parameter.do_not_specialize_on_alignment]
    for parameter in kernel.params} for kernel in kernels}))
"""

GPUS = {80: 166912, 86: 101376, 90: 232448}
"""Compute capabilities, and bytes of shared memory that a block can have there."""


def outside_the_interpreter(code: str, *args: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def test_what_is_chosen_fits_every_gpu() -> None:
    heads = {64: 64, 128: 128, 256: 256}
    asked = [
        (head, gpu, stages_that_fit(head, shared))
        for head in heads
        for gpu, shared in GPUS.items()
        if (head, gpu) not in ((64, 80), (64, 90))  # they have room for all
    ]
    assert {stages for _, _, stages in asked} == {1, 2, 3}
    found = json.loads(outside_the_interpreter(COMPILE, json.dumps(asked), "bfloat16"))
    for (head, gpu, stages), taken in zip(asked, found, strict=True):
        assert taken <= GPUS[gpu], (head, gpu)
        assert taken <= SHARED_BYTES[2][heads[head]][stages - 1], (head, gpu)


def test_what_is_chosen_for_float32_fits() -> None:
    """The kernels' own tests run in it; engines on GPUs do not."""
    asked = [
        (head, gpu, stages_that_fit(head, GPUS[gpu], 4))
        for head, gpu in ((64, 86), (96, 80), (96, 90), (256, 90))
    ]
    assert [stages for _, _, stages in asked] == [2, 2, 2, 1]
    found = json.loads(outside_the_interpreter(COMPILE, json.dumps(asked), "float32"))
    for (head, gpu, stages), taken in zip(asked, found, strict=True):
        padded = 1 << (head - 1).bit_length()
        assert taken <= SHARED_BYTES[4][padded][stages - 1] <= GPUS[gpu], (head, gpu)


def test_a_gpu_without_room_is_told_of() -> None:
    with pytest.raises(ValueError, match=r"needs 98304 bytes of shared memory.*has 65536"):
        stages_that_fit(256, 65536)


CHANGES = {
    "_in_step": {
        "lse_stride", "lse_head", "masks", "tile_first", "tile_size", "tile_start",
    },
    "_over_vocabulary": {"logits", "own", "place", "out"},
    "_over_path": {"values", "out", "masks", "first", "sizes", "tree"},
    "_narrow": {"masks", "out", "kept", "starts", "first", "tree"},
}  # fmt: skip
"""What differs from step to step in value or in where it begins."""


def test_no_step_compiles_a_kernel_for_its_numbers() -> None:
    kernels = json.loads(outside_the_interpreter(PARAMETERS))
    for kernel, names in CHANGES.items():
        free = {name for name, flags in kernels[kernel].items() if any(flags)}
        assert names <= free, kernel
