"""Heads on vLLM's layers compute what the reference computes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)

from vllm_propd.engine.step.served_heads import (
    FEW_ROWS,
    OutputRows,
    ServedHeads,
    draft_dtype,
    part_of_target,
)
from vllm_propd.heads.checkpoint import HeadsCheckpoint
from vllm_propd.heads.medusa import MedusaHeads, root_input

pytestmark = pytest.mark.usefixtures("one_rank")
HEADS, HIDDEN, TOKENS = 3, 64, 5


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a worker has before it loads: vLLM's parameters ask for their rank."""
    store = tmp_path_factory.mktemp("ranks") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel()
    yield
    destroy_model_parallel()
    destroy_distributed_environment()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("root", [False, True], ids=["blind", "root"])
def test_states_are_the_references(
    root: bool, layers: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    reference = MedusaHeads(HEADS, layers, HIDDEN, bias, root)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    checkpoint = HeadsCheckpoint(Path(), reference.tensors())
    hidden = torch.randn(TOKENS, HIDDEN).to(dtype)
    with torch.inference_mode():
        roots = 5 * torch.randn(TOKENS, HIDDEN).to(dtype) if root else None
        states = ServedHeads(checkpoint, dtype, "cpu")(hidden, roots)
        read = None if roots is None else root_input(roots).to(dtype)
        torch.testing.assert_close(states, reference.to(dtype)(hidden, read))


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 70])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("root", [False, True], ids=["blind", "root"])
def test_weights_of_eight_bits_say_nearly_the_same(
    root: bool, bias: bool, rows: int
) -> None:
    torch.manual_seed(0)
    reference = MedusaHeads(HEADS, 2, HIDDEN, bias, root)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    output = torch.randn(100, HIDDEN)
    checkpoint = HeadsCheckpoint(Path(), reference.tensors())
    hidden, roots = torch.randn(rows, HIDDEN), torch.randn(rows, HIDDEN) if root else None
    with torch.inference_mode():
        states = ServedHeads(checkpoint, torch.int8, "cpu")(hidden, roots)
        logits = OutputRows([output], 100, 1.0, torch.int8, "cpu")(states)
        read = None if roots is None else root_input(roots)
        expected = reference(hidden, read) @ output.T
    assert (logits.float() - expected).std() < 0.02 * expected.std()


def test_heads_have_eight_bits_on_cpus_and_the_targets_dtype_elsewhere() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert draft_dtype(torch.float32, cpu) == torch.int8
    assert draft_dtype(torch.bfloat16, cpu) == torch.int8
    assert draft_dtype(torch.float32, cuda) == torch.bfloat16
    assert draft_dtype(torch.float16, cuda) == torch.float16


def test_no_rows_have_no_logits() -> None:
    output = OutputRows([torch.randn(100, HIDDEN)], 100, 1.0, torch.int8, "cpu")
    assert output(torch.empty(HEADS, 0, HIDDEN)).shape == (HEADS, 0, 100)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bias_hides_nothing_of_16_bits(dtype: torch.dtype, bias: bool) -> None:
    """It may be far larger than the weights that stand beside it."""
    torch.manual_seed(0)
    output, tokens = torch.nn.Linear(HIDDEN, 40, bias), torch.arange(40)
    torch.nn.init.normal_(output.weight, std=0.02)
    if bias:
        torch.nn.init.normal_(output.bias, mean=5.0)
    output = output.to(dtype)
    with torch.inference_mode():
        rows = part_of_target(output, tokens, HIDDEN, dtype, torch.float32, "cpu")
        states = torch.randn(HEADS, TOKENS, HIDDEN)
        expected = states @ output.weight.float().T
        assert (rows(states) - expected).std() < 0.01 * expected.std()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_rows_of_the_targets_output_layer_are_read_without_its_bias(bias: bool) -> None:
    torch.manual_seed(0)
    output, tokens = torch.nn.Linear(HIDDEN, 40, bias), torch.tensor([3, 39, 7])
    with torch.inference_mode():
        rows = part_of_target(output, tokens, HIDDEN, torch.float32, torch.float32, "cpu")
        states = torch.randn(HEADS, TOKENS, HIDDEN)
        expected = states @ output.weight[tokens].T
        torch.testing.assert_close(rows(states), expected, rtol=1e-4, atol=1e-5)
