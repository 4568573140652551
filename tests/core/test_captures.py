"""Tensors that only a hook or a backward captures: the graph does not show them, and a derivative depends on them."""

from __future__ import annotations

from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import autodiff as ad
from autodiff import functional
from autodiff.errors import MissingRuleError

X = torch.tensor([0.3, 0.7], dtype=torch.float64)
V = torch.tensor([1.0, 2.0], dtype=torch.float64)


class _OfSine(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


def in_closure(w: Tensor):
    class Sine(_OfSine):
        @staticmethod
        def backward(ctx, g):
            return g * w * ctx.saved_tensors[0].cos()

    return Sine.apply


def in_container(w: Tensor):
    held = {"scale": [w]}

    class Sine(_OfSine):
        @staticmethod
        def backward(ctx, g):
            return g * held["scale"][0] * ctx.saved_tensors[0].cos()

    return Sine.apply


def in_method_of_an_object(w: Tensor):
    class Scale:
        def __init__(self):
            self.by = w

        def scaled(self, g):
            return g * self.by

    scaled = partial(Scale().scaled)

    class Sine(_OfSine):
        @staticmethod
        def backward(ctx, g):
            return scaled(g) * ctx.saved_tensors[0].cos()

    return Sine.apply


def in_plain_attributes_of_a_module(w: Tensor):
    module = nn.Module()
    array = np.empty(1, dtype=object)
    array[0] = w
    module.scales = deque([array])

    class Sine(_OfSine):
        @staticmethod
        def backward(ctx, g):
            return g * module.scales[0][0] * ctx.saved_tensors[0].cos()

    return Sine.apply


def in_class_above(w: Tensor):
    class Scaled(_OfSine):
        by = w

    class Sine(Scaled):
        @classmethod
        def scaled(cls, g):
            return g * cls.by

        @staticmethod
        def backward(ctx, g):
            return Sine.scaled(g) * ctx.saved_tensors[0].cos()

    return Sine.apply


def in_context(w: Tensor):
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(x, scale):
            return x.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            x, ctx.scale = inputs
            ctx.save_for_backward(x)

        @staticmethod
        def backward(ctx, g):
            return g * ctx.scale[0] * ctx.saved_tensors[0].cos(), None

    return lambda x: Sine.apply(x, [w])


def by_hook(w: Tensor):
    def func(x):
        y = x.sin()
        y.register_hook(lambda g: g * w)
        return y

    return func


def by_hook_of_a_node(w: Tensor):
    def func(x):
        y = x.sin()
        y.grad_fn.register_hook(lambda inputs, outputs: (inputs[0] * w,))
        return y

    return func


def by_custom_vjp(w: Tensor):
    sine = ad.custom_vjp(torch.sin)
    sine.defvjp(lambda x: (x.sin(), x), lambda x, c: (c * w * x.cos(),))
    return sine


def by_custom_jvp(w: Tensor):
    sine = ad.custom_jvp(torch.sin)
    sine.defjvp(lambda primals, tangents: (primals[0].sin(), tangents[0] * w * primals[0].cos()))
    return sine


CAPTURING = [
    in_closure,
    in_container,
    in_context,
    in_method_of_an_object,
    in_plain_attributes_of_a_module,
    in_class_above,
    by_hook,
    by_hook_of_a_node,
    by_custom_vjp,
    by_custom_jvp,
]
DERIVATIVES = {
    "grad": lambda f: ad.grad(lambda x: f(x).sum())(X),
    "vjp": lambda f: ad.vjp(f, X)[1](torch.ones_like(X))[0],
    "jacrev": lambda f: ad.jacrev(f)(X).sum(0),
    "jacobian": lambda f: ad.jacobian(f)(X).sum(0),
    "linearize": lambda f: ad.linearize(f, X)[1](torch.ones_like(X)),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("capturing", CAPTURING)
def test_the_derivative_depends_on_what_is_captured(capturing, derivative):
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    slope = DERIVATIVES[derivative](capturing(w))
    torch.testing.assert_close(slope.detach(), 2 * X.cos())
    (mixed,) = torch.autograd.grad(slope @ V, w)
    torch.testing.assert_close(mixed, X.cos() @ V)


@pytest.mark.parametrize("outer", [ad.grad, ad.jacrev, torch.func.grad])
@pytest.mark.parametrize("capturing", CAPTURING)
def test_also_where_a_transform_differentiates_it(capturing, outer):
    if outer is torch.func.grad and capturing is by_hook_of_a_node:
        pytest.skip(
            "inside torch.func's levels torch calls the hook of a node with the tensors of another level"
        )
    w = torch.tensor(2.0, dtype=torch.float64)
    mixed = outer(lambda w: ad.grad(lambda x: capturing(w)(x).sum())(X) @ V)(w)
    torch.testing.assert_close(mixed, X.cos() @ V)


@pytest.mark.parametrize("capturing", [by_hook, by_custom_vjp, by_custom_jvp])
def test_also_for_every_sample(capturing):
    w = torch.tensor([2.0, 3.0], dtype=torch.float64)
    mixed = ad.vmap(ad.grad(lambda w: ad.grad(lambda x: capturing(w)(x).sum())(X) @ V))(w)
    torch.testing.assert_close(mixed, (X.cos() @ V).expand(2))


@pytest.mark.parametrize("capturing", CAPTURING)
def test_nothing_is_tracked_where_nothing_tracked_is_captured(capturing):
    w = torch.tensor(2.0, dtype=torch.float64)
    for name, derivative in DERIVATIVES.items():
        assert not derivative(capturing(w)).requires_grad, name


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * 2 * ctx.saved_tensors[0]


def square(x):
    return Square.apply(x)


def total(x):
    return Square.apply(x).sum()


def test_first_derivatives_of_what_is_differentiable_once():
    torch.testing.assert_close(ad.grad(total)(X), 2 * X)
    torch.testing.assert_close(ad.jacrev(square)(X), torch.diag(2 * X))
    torch.testing.assert_close(ad.jacobian(lambda x: square(x).repeat(3))(X), torch.diag(2 * X).repeat(3, 1))
    torch.testing.assert_close(functional.jacobian(square, X), torch.diag(2 * X))


@pytest.mark.parametrize(
    "derivative",
    [
        lambda: ad.linearize(square, X)[1](V),
        lambda: ad.jacrev(ad.jacrev(total))(X),
        lambda: ad.grad(lambda x: ad.grad(lambda x: square(x * x).sum())(x).sum())(X),
        lambda: ad.hessian(total, chunk_size=1)(X),
        lambda: ad.hvp(total, (X,), (V,)),
        lambda: ad.vmap(lambda x: ad.linearize(square, x))(X[None]),
        lambda: functional.hessian(total, X),
        lambda: functional.hvp(total, X, V),
        lambda: functional.jvp(square, X, V),
        # Only the cotangent that reaches it depends on w.
        lambda: ad.grad(lambda w: ad.grad(lambda x: (w * square(x)).sum())(X).sum())(V),
    ],
)
def test_second_derivatives_of_what_is_differentiable_once_are_an_error(derivative):
    with pytest.raises((MissingRuleError, RuntimeError), match=r"once_differentiable|vmap over Square"):
        derivative()


def test_what_does_not_pass_through_it_is_differentiated_twice():
    mixed = ad.grad(lambda w: ad.grad(lambda x: (w * x).sum() + total(x))(X) @ V)(X)
    torch.testing.assert_close(mixed, V)


@pytest.mark.parametrize("own_rule", [False, True])
def test_functions_that_torch_batches(own_rule):
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    class Sine(_OfSine):
        generate_vmap_rule = not own_rule

        @staticmethod
        def backward(ctx, g):
            return g * w * ctx.saved_tensors[0].cos()

    class Once(Square):
        generate_vmap_rule = not own_rule

    if own_rule:
        Sine.vmap = staticmethod(lambda info, dims, x: (Sine.apply(x), dims[0]))
        Once.vmap = staticmethod(lambda info, dims, x: (Once.apply(x), dims[0]))
    for slope in (
        ad.vmap(ad.grad(lambda x: Sine.apply(x).sum()))(X[None])[0],
        ad.vmap(ad.grad(lambda x: ad.vmap(Sine.apply)(x).sum()))(X[None, None])[0, 0],
    ):
        (mixed,) = torch.autograd.grad(slope @ V, w)
        torch.testing.assert_close(mixed, X.cos() @ V)
    with pytest.raises(MissingRuleError):
        ad.vmap(ad.grad(lambda x: ad.grad(lambda x: Once.apply(x).sum())(x).sum()))(X[None])
