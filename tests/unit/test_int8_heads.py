"""Heads in 8 bits compute what their rounded weights say."""

import pytest
import torch

from vllm_propd.heads.medusa import MedusaHeads, root_input
from vllm_propd.kernels.int8_heads_cpu import WIDTH, Int8Heads, Int8Linear


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Weights whose every row has multiples of a 127th of its largest."""
    scale = weight.abs().amax(-1, keepdim=True) / 127
    return (weight / scale).round() * scale


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 16])
@pytest.mark.parametrize("outputs", [5, WIDTH, 3 * WIDTH + 1, 4096 + WIDTH])
@pytest.mark.parametrize("layers", [1, 3])
def test_products_are_those_of_rounded_weights(
    layers: int, outputs: int, rows: int
) -> None:
    torch.manual_seed(rows)
    weight = torch.randn(layers, outputs, 40)
    states = torch.randn(layers, rows, 40)
    found = Int8Linear(weight)(states)
    assert found.shape == (layers, rows, outputs)
    assert found.is_contiguous()  # or vLLM's ranks cannot gather it
    torch.testing.assert_close(found, states @ rounded(weight).mT, rtol=1e-4, atol=1e-4)


def test_weights_of_eight_bits_say_nearly_the_same() -> None:
    torch.manual_seed(0)
    weight, states = torch.randn(1, 1000, 576), torch.randn(1, 50, 576)
    found, exact = Int8Linear(weight)(states), states @ weight.mT
    assert (found - exact).std() < 0.01 * exact.std()


@pytest.mark.parametrize("hidden", [40, WIDTH, 2 * WIDTH + 8])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("root", [True, False], ids=["root", "blind"])
def test_states_are_those_of_rounded_weights(
    root: bool, bias: bool, layers: int, hidden: int
) -> None:
    torch.manual_seed(layers)
    reference = MedusaHeads(3, layers, hidden, bias, root)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        if parameter.shape[-2] > 1:
            parameter.data = rounded(parameter.data)
    weights = [weight.data for weight in reference.weights]
    biases = [one.data[:, 0] for one in reference.biases]
    roots = None if reference.roots is None else reference.roots.data
    heads = Int8Heads(weights, biases, roots)
    for rows in (1, 4, 6):
        states = torch.randn(rows, hidden)
        embedded = 7 * torch.randn(rows, hidden) if root else None
        read = None if embedded is None else root_input(embedded)
        with torch.no_grad():
            expected = reference(states, read)
        found = heads(states, embedded)
        assert found.shape == (3, rows, hidden)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_16_bits_are_taken() -> None:
    torch.manual_seed(0)
    layer = Int8Linear(torch.randn(2, 10, 8).bfloat16())
    states = torch.randn(2, 3, 8).bfloat16()
    torch.testing.assert_close(layer(states), layer(states.float()))


def test_rows_of_zeros_and_states_that_are_no_numbers() -> None:
    weight = torch.zeros(1, WIDTH, 4)
    weight[0, 1] = 1.0
    states = torch.tensor([[[1.0, 2, 3, 4], [torch.nan, 0, 0, 0]]])
    found = Int8Linear(weight)(states)
    assert found[0, 0].tolist() == [0.0, 10.0] + [0.0] * (WIDTH - 2)
    assert found[0, 1].isnan().all()


def test_an_output_is_the_same_beside_any_other_rows() -> None:
    torch.manual_seed(0)
    layer, states = Int8Linear(torch.randn(1, 100, 64)), torch.randn(1, 9, 64)
    alone = torch.cat([layer(states[:, i : i + 1]) for i in range(9)], 1)
    assert torch.equal(layer(states), alone)
