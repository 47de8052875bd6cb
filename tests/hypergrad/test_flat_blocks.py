"""The long vector and its blocks: every element once, in order, readable and writable."""

import pytest
import torch
from problem_zoo import ZOO, relative_error
from torch.testing import assert_close

from meta_trainer.hypergrad import BilevelProblem, evograd, finite_difference, flat_blocks
from meta_trainer.hypergrad.flat_blocks import FlatBlocks, inner_product


def tensors():
    """Small and large, scalar and empty, in two dtypes, one without a flat view."""
    transposed = torch.randn(6, 4).t()
    double = torch.randn(3, 2).double()
    return [torch.randn(2), torch.randn(5, 5), torch.randn(()), torch.empty(0, 3), transposed, double, torch.randn(9)]


def numbers(group):
    return torch.cat([t.double().flatten() for t in group])


@pytest.mark.parametrize("block_size", [1, 4, 10, 1000, None])
def test_the_blocks_hold_every_element_once_in_order(block_size):
    group = tensors()
    blocks = FlatBlocks(group, block_size)

    assert_close(torch.cat([flat.double() for flat in blocks.flatten(group)]), numbers(group), rtol=0, atol=0)
    assert [len(flat) for flat in blocks.flatten(group)] == [block.numel for block in blocks]
    for block, flat in zip(blocks, blocks.flatten(group), strict=True):
        assert_close(block.split(flat), block.views(group), rtol=0, atol=0)


@pytest.mark.parametrize("block_size", [4, 10, 1000])
def test_a_block_is_no_larger_than_it_may_be_unless_a_tensor_cannot_be_cut(block_size):
    group = tensors()
    whole = group[4].numel()
    assert all(block.numel <= block_size or block.numel == whole for block in FlatBlocks(group, block_size))


def test_small_tensors_share_a_block_of_one_dtype():
    assert [(block.numel, block.dtype) for block in FlatBlocks(tensors())] == [
        (52, torch.float32),
        (6, torch.float64),
        (9, torch.float32),
    ]


@pytest.mark.parametrize("block_size", [1, 4, 1000])
def test_writing_into_the_views_writes_into_the_tensors(block_size):
    group, values = tensors(), tensors()
    blocks = FlatBlocks(group, block_size)

    for block, flat in zip(blocks, blocks.flatten(values), strict=True):
        torch._foreach_copy_(block.views(group), block.split(flat))

    assert_close(group, values, rtol=0, atol=0)


def test_gradients_of_any_strides_are_read_in_the_order_of_the_parameters():
    blocks = FlatBlocks([torch.zeros(4, 6)], block_size=5)
    gradient = torch.randn(6, 4).t()
    assert_close(torch.cat(list(blocks.flatten([gradient]))), gradient.reshape(-1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_read_in_single_precision(dtype):
    group = [torch.randn(7, dtype=dtype)]
    (flat,) = FlatBlocks(group).flatten(group)
    assert flat.dtype == torch.float32


def test_the_inner_product_is_that_of_the_vectors():
    left, right = ([t.double() for t in tensors()] for _ in range(2))
    blocks = FlatBlocks(left, block_size=4)
    expected = numbers(left) @ numbers(right)

    assert_close(inner_product(blocks.flatten(left), blocks.flatten(right)), expected)
    assert_close(inner_product(left, right), expected)


@pytest.mark.parametrize("name", ["convolution", "tied"])
@pytest.mark.parametrize("estimator", [evograd, finite_difference])
def test_estimates_along_given_directions_do_not_depend_on_the_blocks(name, estimator, monkeypatch):
    case = ZOO[name](torch.float64)
    noise = lambda k, theta: [torch.sin((k + 1.0) * torch.arange(t.numel())).view(t.shape) / 10 for t in theta]  # noqa: E731
    settings = {"noise": noise} if estimator is evograd else {}
    expected = estimator(case.problem(), **settings).grads

    monkeypatch.setattr(flat_blocks, "CPU_BLOCK_SIZE", 3)

    assert relative_error(estimator(case.problem(), **settings).grads, expected) < 1e-9


def test_parameters_in_channels_last_are_moved_and_given_back():
    def estimate(memory_format):
        theta = torch.arange(24.0).double().view(2, 3, 2, 2).to(memory_format=memory_format).requires_grad_()
        before, meta = theta.detach().clone(), torch.ones(3).double().requires_grad_()
        train, val = lambda: (theta.mean((0, 2, 3)) * meta).square().sum(), lambda: theta.sin().mean()
        grads = evograd(BilevelProblem([theta], [meta], train, val), noise=direction).grads
        assert torch.equal(theta, before)
        assert theta.stride() == before.stride()
        return grads

    direction = lambda k, theta: [torch.sin((k + 1.0) * torch.arange(24)).view(2, 3, 2, 2) / 10]  # noqa: E731

    assert relative_error(estimate(torch.channels_last), estimate(torch.contiguous_format)) < 1e-9
