"""Every documented example of torch.autograd.functional, with the answer worked out by hand."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from autodiff.functional import hessian, hvp, jacobian, jvp, vhp, vjp


def exp_reducer(x):
    return x.exp().sum(dim=1)


def adder(x, y):
    return 2 * x + 3 * y


def pow_reducer(x):
    return x.pow(3).sum()


def pow_adder_reducer(x, y):
    return (2 * x.pow(2) + 3 * y.pow(2)).sum()


def test_vjp():
    inputs, v = torch.rand(4, 4), torch.ones(4)
    output, product = vjp(exp_reducer, inputs, v)
    assert_close((output, product), (inputs.exp().sum(1), inputs.exp()))
    output, product = vjp(exp_reducer, inputs, v, create_graph=True)
    assert output.grad_fn is not None
    assert product.grad_fn is not None
    _, products = vjp(adder, (torch.rand(2), torch.rand(2)), torch.ones(2))
    assert_close(products, (torch.full((2,), 2.0), torch.full((2,), 3.0)))


def test_jvp():
    inputs, v = torch.rand(4, 4), torch.ones(4, 4)
    assert_close(jvp(exp_reducer, inputs, v), (inputs.exp().sum(1), inputs.exp().sum(1)))
    output, product = jvp(exp_reducer, inputs, v, create_graph=True)
    assert output.grad_fn is not None
    assert product.grad_fn is not None
    _, product = jvp(adder, (torch.rand(2), torch.rand(2)), (torch.ones(2), torch.ones(2)))
    assert_close(product, torch.full((2,), 5.0))


def test_jacobian():
    inputs = torch.rand(2, 2)
    expected = torch.zeros(2, 2, 2)
    expected[0, 0], expected[1, 1] = inputs[0].exp(), inputs[1].exp()
    assert_close(jacobian(exp_reducer, inputs), expected)
    assert jacobian(exp_reducer, inputs, create_graph=True).grad_fn is not None
    x, y = torch.rand(2), torch.rand(2)
    by_x, by_y = jacobian(lambda x, y: 2 * x.exp() + 3 * y, (x, y))
    assert_close((by_x, by_y), (torch.diag(2 * x.exp()), 3 * torch.eye(2)))
    weight = torch.tensor([[2.0, -1.0], [0.0, 1.0]])
    x = torch.randn(4, 2, requires_grad=True)
    linear = jacobian(lambda x: x @ weight.T + torch.tensor([1.0, 0.5]), x, vectorize=True)
    assert_close(linear, torch.einsum("ab,ij->aibj", torch.eye(4), weight))


def test_hessian():
    inputs = torch.rand(2, 2)
    expected = torch.diag((6 * inputs).flatten()).view(2, 2, 2, 2)
    assert_close(hessian(pow_reducer, inputs), expected)
    assert hessian(pow_reducer, inputs, create_graph=True).grad_fn is not None
    (xx, xy), (yx, yy) = hessian(pow_adder_reducer, (torch.rand(2), torch.rand(2)))
    assert_close((xx, xy, yx, yy), (4 * torch.eye(2), torch.zeros(2, 2), torch.zeros(2, 2), 6 * torch.eye(2)))


def test_vhp_and_hvp():
    inputs, v = torch.rand(2, 2), torch.ones(2, 2)
    for product_of in (vhp, hvp):
        assert_close(product_of(pow_reducer, inputs, v), ((inputs**3).sum(), 6 * inputs))
        output, product = product_of(pow_reducer, inputs, v, create_graph=True)
        assert output.grad_fn is not None
        assert product.grad_fn is not None
        inputs_of_two, vectors = (torch.rand(2), torch.rand(2)), (torch.zeros(2), torch.ones(2))
        _, products = product_of(pow_adder_reducer, inputs_of_two, vectors)
        assert_close(products, (torch.zeros(2), torch.full((2,), 6.0)))
