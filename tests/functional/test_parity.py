"""autodiff.functional against torch.autograd.functional, field by field, over all keywords.

What is deliberately not compared, each tested in test_beyond.py for what it gives instead:

- what legacy refuses with NotImplementedError: forward mode without ``vectorize`` or with
  ``create_graph=True``, and forward mode through an operation without a forward rule or through
  ``torch.autograd.grad``;
- a list where legacy's forward mode returns one in place of the documented tuple;
- the dtype of legacy's forward mode with mixed dtypes, which is the input's in places, where the
  documentation says the output's;
- ``requires_grad`` of legacy's forward mode, which leaves results connected although ``create_graph``
  is off, against its documentation;
- the text for a bare number out of a function in forward mode, which says "given to None";
- errors of legacy's double-backward trick about in-place operations, which forward mode does not meet.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.autograd.functional as legacy
from torch import Tensor

import autodiff.functional as ours
from tests.functional.cases import CASES, build

# Legacy's first forward mode in a process warns of torch.jit.script, which is no error of the case's.
# Ours loads what it needs without a warning, and then it is there for both.
ours.jvp(torch.sin, torch.ones(1), torch.ones(1))

FLAGS = list(itertools.product((False, True), repeat=3))


def outcome(api, name, func, inputs, **keywords):
    torch.manual_seed(0)
    try:
        return getattr(api, name)(func, inputs, **keywords)
    except Exception as error:  # noqa: BLE001  whatever legacy raises is compared
        return error


def assert_same(came, expected, *, forward):
    if isinstance(expected, tuple | list):
        assert isinstance(came, tuple if forward else type(expected))
        assert len(came) == len(expected)
        for one, other in zip(came, expected, strict=True):
            assert_same(one, other, forward=forward)
        return
    assert isinstance(came, Tensor)
    torch.testing.assert_close(came, expected, equal_nan=True, check_dtype=not forward)
    assert (came.shape, came.device) == (expected.shape, expected.device)
    if not forward:
        assert came.requires_grad == expected.requires_grad


def now_allowed(error, name, *, forward):
    if forward:
        return isinstance(error, NotImplementedError) or "does not require grad" in str(error)
    return name == "jvp" and "modified by an inplace operation" in str(error)


def compare(name, func, inputs, *, forward=False, instead=None, **keywords):
    """``instead`` are options with which legacy is right."""
    expected = outcome(legacy, name, func, inputs, **keywords)
    if instead and not isinstance(expected, Exception):
        expected = outcome(legacy, name, func, inputs, **keywords | instead)
    came = outcome(ours, name, func, inputs, **keywords)
    if not isinstance(expected, Exception):
        assert not isinstance(came, Exception), came
        assert_same(came, expected, forward=forward)
    elif not now_allowed(expected, name, forward=forward):
        assert isinstance(came, type(expected)), (came, expected)
        if "given to None" not in str(expected):
            assert str(came) == str(expected)


def like(tree, value):
    if isinstance(tree, tuple):
        return tuple(like(one, value) for one in tree)
    return torch.full_like(tree, value) if isinstance(tree, Tensor) else None


@pytest.mark.parametrize(("name", "kind"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("product", ["vjp", "jvp", "vhp", "hvp"])
def test_products_are_legacys(product, name, kind):
    func, inputs = build(name, kind)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    vectors = [like(inputs, 0.5)]
    if product == "vjp":
        try:
            vectors = [like(func(*args), 0.5), None]
        except RuntimeError:
            vectors = [None]
    for v, (create_graph, strict, recording) in itertools.product(vectors, FLAGS):
        with torch.set_grad_enabled(recording):
            compare(product, func, inputs, v=v, create_graph=create_graph, strict=strict)


@pytest.mark.parametrize(("name", "kind"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize(
    ("matrix", "keyword"), [("jacobian", "strategy"), ("hessian", "outer_jacobian_strategy")]
)
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("vectorize", [False, True])
def test_matrices_are_legacys(matrix, keyword, strategy, vectorize, name, kind):
    func, inputs = build(name, kind)
    forward = strategy == "forward-mode"
    silently_zero = forward and name in {"product by scatter", "custom operator"}
    instead = {keyword: "reverse-mode", "vectorize": False} if silently_zero else None
    for create_graph, strict, recording in FLAGS:
        keywords = {"create_graph": create_graph, "strict": strict, "vectorize": vectorize, keyword: strategy}
        with torch.set_grad_enabled(recording):
            compare(matrix, func, inputs, forward=forward, instead=instead, **keywords)


@pytest.mark.parametrize("product", ["vjp", "jvp", "vhp", "hvp"])
@pytest.mark.parametrize(
    ("inputs", "v"),
    [
        (torch.rand(2), torch.rand(3)),
        (torch.rand(2), (torch.rand(2), torch.rand(2))),
        (torch.rand(2), (torch.rand(2),)),
        ((torch.rand(2),), torch.rand(2)),
        ((torch.rand(2),), (torch.rand(3),)),
        ((torch.rand(2),), (torch.rand(2), torch.rand(3))),
        (torch.rand(2), 3.0),
        (torch.rand(2), (3.0,)),
        (torch.rand(2), None),
        (torch.rand(1), None),
        (torch.rand(2), torch.rand(2, dtype=torch.float64)),
        (3.0, torch.rand(2)),
        ((torch.rand(2), 3.0), torch.rand(2)),
    ],
)
def test_the_vector_is_refused_as_legacy_refuses_it(product, inputs, v):
    def vector(*args):
        return args[0].sin() * 2

    def number(*args):
        return args[0].sin().sum()

    compare(product, number if product in ("vhp", "hvp") else vector, inputs, v=v)


@pytest.mark.parametrize("matrix", ["jacobian", "hessian"])
def test_an_unknown_strategy_is_refused_as_legacy_refuses_it(matrix):
    keyword = "strategy" if matrix == "jacobian" else "outer_jacobian_strategy"
    compare(matrix, torch.sum, torch.rand(2), **{keyword: "sideways"})


def cubes(x):
    return (x**3).sum()


every_function = pytest.mark.parametrize("name", ["vjp", "jvp", "vhp", "hvp", "jacobian", "hessian"])


def vector_for(name, x):
    return {} if name in ("vjp", "jacobian", "hessian") else {"v": torch.rand_like(x)}


def dropped(x):
    return (torch.nn.functional.dropout(x, 0.5) * x).sum()


def dropped_then_seen_by_backward(x):
    total = dropped(x)
    return total if total.requires_grad else total * 2


@every_function
@pytest.mark.parametrize("func", [dropped, dropped_then_seen_by_backward])
def test_random_numbers_are_legacys_and_end_where_legacys_end(name, func):
    x = torch.rand(8)
    keywords = vector_for(name, x)
    expected, after_legacy = outcome(legacy, name, func, x, **keywords), torch.get_rng_state()
    came, after_ours = outcome(ours, name, func, x, **keywords), torch.get_rng_state()
    assert_same(came, expected, forward=False)
    assert torch.equal(after_ours, after_legacy)
