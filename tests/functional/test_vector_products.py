"""vjp, jvp, vhp and hvp: trees, nesting, strict, graphs, and what only a backward pass sees."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.testing._internal.logging_tensor import LoggingTensor

import autodiff
from autodiff import functional
from autodiff.errors import AutodiffError, StrictModeError


def cubes(x):
    return (x**3).sum()


def cubes_of_tree(params):
    return params["b"][0] * (params["w"] ** params["power"]).sum()


def tree():
    return {
        "w": torch.tensor([1.0, 2.0], dtype=torch.float64),
        "power": 3,
        "b": (torch.tensor(0.5, dtype=torch.float64), None),
    }


@pytest.mark.parametrize("name", ["vhp", "hvp"])
def test_a_tree_is_one_argument_and_products_are_like_it(name):
    params = tree()
    direction = {
        "w": torch.ones(2, dtype=torch.float64),
        "power": None,
        "b": (torch.tensor(2.0).double(), None),
    }
    value, product = getattr(functional, name)(cubes_of_tree, params, direction)
    w, b = params["w"], params["b"][0]
    assert_close(value, b * (w**3).sum())
    # d(3 b w^2) = 6 b w dw + 3 w^2 db, and d(sum w^3) = 3 w^2 dw.
    assert_close(product["w"], 6 * b * w + 3 * w**2 * 2.0)
    assert_close(product["b"][0], (3 * w**2).sum())
    assert product["power"] is None
    assert product["b"][1] is None


@pytest.mark.parametrize("create_graph", [False, True])
def test_vjp_and_jvp_take_trees_out_as_well(create_graph):
    def func(params):
        return {"out": [params["w"] * params["b"][0]]}

    params, w = tree(), tree()["w"]
    output, pulled = functional.vjp(
        func, params, {"out": [torch.tensor([1.0, 3.0])]}, create_graph=create_graph
    )
    assert_close(output["out"][0].detach(), 0.5 * w)
    assert_close(pulled["w"].detach(), torch.tensor([0.5, 1.5]).double())
    assert_close(pulled["b"][0].detach(), torch.tensor(7.0).double())
    _, pushed = functional.jvp(func, params, params, create_graph=create_graph)
    assert_close(pushed["out"][0].detach(), 2 * 0.5 * w)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", ["vjp", "jvp", "vhp", "hvp"])
def test_products_are_right_under_vmap(name, create_graph):
    samples = torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.5, 4.0]])
    vector = torch.tensor([1.0, 10.0])
    v = None if name == "vjp" else vector

    def one(x):
        return getattr(functional, name)(cubes, x, v, create_graph=create_graph)[1]

    expected = {
        "vjp": 3 * samples**2,
        "jvp": (3 * samples**2) @ vector,
        "vhp": 6 * samples * vector,
        "hvp": 6 * samples * vector,
    }[name]
    assert_close(autodiff.vmap(one)(samples), expected)


def test_results_with_a_graph_are_differentiated_by_the_transforms():
    x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0])

    def product(x):
        return functional.vhp(cubes, x, v, create_graph=True)[1]

    assert_close(autodiff.jacrev(product)(x), torch.diag(6 * v))
    assert_close(autodiff.jacfwd(product)(x), torch.diag(6 * v))


@pytest.mark.parametrize("name", ["vjp", "jvp", "vhp", "hvp"])
def test_products_with_a_graph_are_twice_differentiable(name):
    weight = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0.4, 0.9, -0.3], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)

    def func(w):
        return lambda x: (w * x.sin() * x.flip(0)).sum()

    def product(x, v, w):
        vector = v[0] if name == "vjp" else v
        return getattr(functional, name)(func(w), x, vector, create_graph=True)

    assert torch.autograd.gradcheck(product, (x, v, weight))
    assert torch.autograd.gradgradcheck(product, (x, v, weight))


@pytest.mark.parametrize("name", ["vjp", "jvp", "vhp", "hvp"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_inference_mode_changes_nothing(name, create_graph):
    with torch.inference_mode():
        x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0])
        vector = torch.tensor(1.0) if name == "vjp" else v
        _, product = getattr(functional, name)(cubes, x, vector, create_graph=create_graph)
    expected = {"vjp": [3.0, 12.0], "jvp": 123.0, "vhp": [6.0, 120.0], "hvp": [6.0, 120.0]}[name]
    assert_close(product.detach().clone(), torch.tensor(expected))
    assert product.requires_grad == create_graph


@pytest.mark.parametrize("name", ["vjp", "jvp", "vhp", "hvp"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_logging_subclass_passes(name, create_graph, strict):
    x = LoggingTensor(torch.tensor([1.0, 2.0]))
    v = LoggingTensor(torch.tensor(1.0) if name == "vjp" else torch.tensor([1.0, 10.0]))
    _, product = getattr(functional, name)(cubes, x, v, create_graph=create_graph, strict=strict)
    assert isinstance(product, LoggingTensor)


def test_strict_names_the_leaf_of_a_tree():
    params = {"w": torch.ones(2), "unused": torch.ones(3)}
    with pytest.raises(StrictModeError, match=r"independent of input inputs\['unused'\]"):
        functional.vjp(lambda p: p["w"].sum(), params, strict=True)
    with pytest.raises(StrictModeError, match=r"with respect to input inputs\[1\]\['w'\] is independent"):
        functional.vhp(
            lambda x, p: (x**2).sum() + p["w"].sum(),
            (torch.ones(2), {"w": torch.ones(1)}),
            (torch.ones(2), {"w": torch.ones(1)}),
            strict=True,
        )


def test_a_vector_of_another_structure_is_refused_by_name():
    with pytest.raises(AutodiffError, match="vhp: v has structure"):
        functional.vhp(cubes_of_tree, tree(), {"w": torch.ones(2)})


def count_calls(func):
    def counted(*args):
        counted.calls += 1
        return func(*args)

    counted.calls = 0
    return counted


@pytest.mark.parametrize("name", ["vjp", "jvp", "vhp", "hvp"])
def test_the_function_runs_once(name):
    func = count_calls(cubes)
    getattr(functional, name)(func, torch.ones(2), *([] if name == "vjp" else [torch.ones(2)]))
    assert func.calls == 1


def test_jvp_runs_again_where_only_a_backward_pass_sees():
    @count_calls
    def stops(x):
        with torch.no_grad():
            constant = x**2
        return constant * x

    x = torch.tensor([2.0, 3.0])
    _, product = functional.jvp(stops, x, torch.ones(2))
    assert_close(product, x**2)
    assert stops.calls == 2


def test_a_write_in_place_that_forward_mode_allows_leaves_the_input_alone():
    x = torch.tensor([1.0, 2.0])
    result = functional.jvp(lambda x: x.mul_(3).square(), x, torch.tensor([1.0, 10.0]))
    assert_close(result, (torch.tensor([9.0, 36.0]), torch.tensor([18.0, 360.0])))
    assert_close(x, torch.tensor([1.0, 2.0]))


def test_an_error_of_the_functions_own_is_its_own():
    def raises(x):
        raise RuntimeError("of my own")

    for name in ("vjp", "jvp", "vhp", "hvp"):
        with pytest.raises(RuntimeError, match="of my own"):
            getattr(functional, name)(raises, torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("name", ["vjp", "jvp", "vhp", "hvp"])
def test_inputs_are_not_changed_and_not_marked(name):
    x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0])
    vector = torch.tensor(1.0) if name == "vjp" else v
    getattr(functional, name)(cubes, x, vector, create_graph=True)
    assert_close(x, torch.tensor([1.0, 2.0]))
    assert not x.requires_grad
    assert not vector.requires_grad
    assert x.grad is None


def _hook_on_a_node(x):
    y = x.sin() * x
    weights = torch.arange(1.0, x.numel() + 1, dtype=x.dtype).reshape(x.shape)
    y.grad_fn.register_hook(lambda inputs, outputs: tuple(one * weights for one in inputs))
    return (y**2).sum()


def _words_by_frequency(weights):
    words = torch.tensor([0, 1, 1, 2])
    rows = torch.nn.functional.embedding(words, weights, scale_grad_by_freq=True)
    return ((rows * torch.arange(1.0, 13.0, dtype=rows.dtype).reshape(4, 3)) ** 3).sum()


@pytest.mark.parametrize("func", [_hook_on_a_node, _words_by_frequency])
@pytest.mark.parametrize("product", ["hvp", "vhp", "jvp"])
def test_gradients_that_are_not_those_of_a_function_are_as_in_torch(func, product):
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(3, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    theirs = getattr(torch.autograd.functional, product)(func, x, v)
    assert_close(getattr(functional, product)(func, x, v), theirs)


def test_jvp_of_eigenvectors_is_as_in_torch_for_a_tangent_that_is_not_symmetric():
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(3, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    x = x + x.T

    def func(a):
        return torch.linalg.eigh(a).eigenvectors.abs() ** 3

    assert_close(functional.jvp(func, x, v), torch.autograd.functional.jvp(func, x, v))
