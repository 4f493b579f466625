"""Copies and waits of a step: few, all of them through `kernels/transfer.py`.

Whatever the host has to know of a GPU, it waits for. Engines run on a CPU whose nodes are
chosen as a GPU's are (see `test_device_pruning.py`); what would wait there is looked for.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cores  # noqa: F401 - before numba counts them
import pytest
import torch
from conftest import engine, greedy, prompts_of, run
from prices import watch_plans
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import SamplingParams

import vllm_propd
from vllm_propd.engine.step import propose
from vllm_propd.fast_dtype import fast_dtype
from vllm_propd.kernels import transfer

OURS = str(Path(vllm_propd.__file__).parent)
TRANSFER = "kernels/transfer.py"
HOSTS_ONLY = (
    "kernels/early_head_ranks.py",
    "kernels/tree_attention_cpu.py",
    "engine/attention/cpu.py",
    "engine/step/record.py",
)
"""What runs on CPUs only, or while measuring."""

WAITING_OPS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.repeat_interleave.Tensor,
}
WAITING_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__")

FIXED = {"sizing": "fixed", "lookup": False}
KINDS: dict[str, tuple[dict[str, Any], int, int]] = {
    # settings, copies to the device, copies to the host
    "bare": (FIXED, 1, 2),
    "chain": ({**FIXED, "tree": "chain"}, 1, 3),
    "tree": (FIXED, 3, 3),
    "pruned by top_k": ({**FIXED, "pruning": "top_k", "top_k": 3}, 5, 5),
    "pruned by paths": (
        {**FIXED, "pruning": "path_probability", "keep_nodes": 4},
        4,
        4,
    ),
}


@pytest.fixture(autouse=True)
def heads_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads on vLLM's layers, as a GPU's are, not in 8 bits."""

    def dtype(target: torch.dtype, device: torch.device) -> torch.dtype:
        return getattr(torch, fast_dtype(device.type))

    monkeypatch.setattr(propose, "draft_dtype", dtype)


def callers() -> Iterator[str]:
    """The files of the stack, from the innermost one that is not torch's or this one."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and name != __file__ and name != "<string>":
            yield name
        frame = frame.f_back  # type: ignore[assignment]


def ours() -> str | None:
    """Our file that waits, if it is one."""
    name = next(callers())
    if not name.startswith(OURS):
        return None
    place = str(Path(name).relative_to(OURS))
    return None if place in (TRANSFER, *HOSTS_ONLY) else place


class Watch(TorchDispatchMode):
    """Notes operations whose results a host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def note(self, what: str) -> None:
        if place := ours():
            self.found[f"{place}: {what}"] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func in WAITING_OPS or by_mask:
            self.note(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    watch = Watch()

    def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            watch.note(name)
            return method(self, *args, **kwargs)

        return call

    with monkeypatch.context() as patches, watch:
        for name in WAITING_METHODS:
            patches.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
        yield watch


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """How often a function of `kernels/transfer.py` has been called, in a list of one."""
    function, calls = getattr(transfer, name), [0]

    def call(*args: Any) -> Any:
        calls[0] += 1
        return function(*args)

    for module in [m for key, m in sys.modules.items() if key.startswith("vllm_propd")]:
        if getattr(module, name, None) is function and module is not transfer:
            monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM for CUDA runs on no CPU")
@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    propd, to_device, to_host = KINDS[kind]
    with engine(12, propd=propd) as llm:
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        if kind == "bare":
            watch_plans(runner.sizing, lambda drafts, choice: choice.sizes.fill(0))
        if runner._pruned_forward is not None:
            runner._pruned_forward.on_device = True
        sent, fetched = counted(monkeypatch, "to_device"), counted(monkeypatch, "to_host")
        most = [0, 0]
        execute = runner._prepare_inputs

        def step(*args: Any) -> Any:
            most[:] = max(most[0], sent[0]), max(most[1], fetched[0])
            sent[0] = fetched[0] = 0
            return execute(*args)

        monkeypatch.setattr(runner, "_prepare_inputs", step)
        run(llm, prompts_of([50] * 3), greedy(24))
    print(f"{kind}: {most[0]} copies to the device, {most[1]} to the host")
    assert most == [to_device, to_host]


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM for CUDA runs on no CPU")
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bare"])
def test_nothing_else_waits_for_the_device(
    kind: str, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    propd = {**KINDS[kind][0], **({"acceptance": "typical"} if sampled else {})}
    with engine(12, propd=propd) as llm:
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        if runner._pruned_forward is not None:
            runner._pruned_forward.on_device = True
        params = SamplingParams(temperature=float(sampled), max_tokens=12, seed=1)
        with watched(monkeypatch) as watch:
            run(llm, prompts_of([30] * 2), params)
    assert not watch.found, dict(watch.found)


def test_the_watch_sees() -> None:
    """It must be able to find something: in the very code that it looks at."""
    watch = Watch()
    source = "def wait(x):\n    return int(x.nonzero().sum()), x[x > 0]\n"
    space: dict[str, Any] = {}
    exec(compile(source, f"{OURS}/engine/runner.py", "exec"), space)
    with watch:
        space["wait"](torch.arange(3))
    assert sum(watch.found.values()) >= 3
