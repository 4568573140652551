"""How operators are made, what they refuse, how often a function runs for one, and how long it lives."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autodiff as ad
from autodiff import errors, operators
from dense_operators import F64, dense_hessian, dense_jacobian, flat, numbers, params, random, scalar, vector

X = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
V = torch.tensor([1.0, -2.0, 0.25], dtype=F64)


def cubic(x: Tensor, w: Any = 1.0) -> Tensor:
    return (w * x**3).sum()


class Counted:
    """A function that counts its calls."""

    def __init__(self, func: Any) -> None:
        self.func, self.calls = func, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.func(*args, **kwargs)


# The call is the transform's.


@ad.pytree.register_dataclass
@dataclass
class Line:
    slope: Tensor
    name: str
    offset: Tensor


def of_line(line: Line, x: Tensor, power: int = 2) -> Tensor:
    return ((line.slope * x).sum() + line.offset) ** power


LINE = Line(torch.tensor([1.0, -0.5, 2.0], dtype=F64), "first", torch.tensor(0.3, dtype=F64))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"argnums": 1},
        {"argnums": "x"},
        {"argnums": -1},
        {"argnums": (0, 1)},
        {"argnums": ("x", "line")},
        {"wrt": "slope"},
        {"wrt": ("off*", "slope")},
    ],
    ids=str,
)
def test_options_are_those_of_the_transforms(options: dict[str, Any]) -> None:
    A = operators.hessian(of_line, **options)(LINE, X, power=3)
    nested = ad.hessian(of_line, **options)(LINE, X, power=3)
    for ours, theirs in zip(numbers(A.to_tree()), numbers(nested), strict=True):
        torch.testing.assert_close(ours, theirs)
    J = operators.jacobian(of_line, **options)(LINE, X, power=3)
    for ours, theirs in zip(
        numbers(J.to_tree()), numbers(ad.jacrev(of_line, **options)(LINE, X, power=3)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(flat(A.gradient), flat(J.to_tree()))
    assert A.value == J.value == of_line(LINE, X, power=3)


def test_tree_is_that_of_the_transform() -> None:
    p = params(F64)
    assert str(operators.hessian(scalar)(p).to_tree()) == str(ad.hessian(scalar)(p))
    ours, theirs = operators.jacobian(vector)(p).to_tree(), ad.jacrev(vector)(p)
    assert torch.utils._pytree.tree_structure(ours) == torch.utils._pytree.tree_structure(theirs)
    torch.testing.assert_close(flat(ours), flat(theirs))


def test_value_gradient_and_aux() -> None:
    A = operators.hessian(lambda x: (cubic(x), {"doubled": 2 * x, "name": "any"}), has_aux=True)(X)
    assert A.value == cubic(X)
    assert torch.equal(A.gradient, 3 * X**2)
    assert torch.equal(A.aux["doubled"], 2 * X)
    assert A.aux["name"] == "any"
    assert torch.equal(A @ V, 6 * X * V)
    J = operators.jacobian(lambda x: (x.sin(), 7), has_aux=True)(X)
    assert (J.aux, J.shape) == (7, (3, 3))
    assert torch.equal(J.value, X.sin())


def test_real_and_complex_leaves_are_multiplied_as_trees() -> None:
    z = X.to(torch.complex128) * 1j
    D = operators.diagonal([X, z]) + 2
    product = D @ [V, z]
    torch.testing.assert_close(product, [(X + 2) * V, (z + 2) * z])
    for attempt in (lambda: 1j * D, D.to_scipy):
        with pytest.raises(errors.DtypeError):
            attempt()


def test_vectors_match_by_key_whatever_their_order() -> None:
    A = operators.hessian(lambda p: p["a"] ** 3 * p["b"])({"a": X[0], "b": X[1]})
    product = A @ {"b": V[1], "a": V[0]}
    assert list(product) == ["a", "b"]
    expected = torch.stack([6 * X[0] * X[1] * V[0] + 3 * X[0] ** 2 * V[1], 3 * X[0] ** 2 * V[0]])
    torch.testing.assert_close(flat(product), expected)


def test_parameters_are_vectors_and_points() -> None:
    x, v = nn.Parameter(X.clone()), nn.Parameter(V.clone())
    A = operators.hessian(cubic)(x)
    product = A @ v
    torch.testing.assert_close(product, 6 * X * V)
    for_x, for_v = torch.autograd.grad(product.sum(), (x, v))
    torch.testing.assert_close(for_x, 6 * V)
    torch.testing.assert_close(for_v, 6 * X)
    torch.testing.assert_close((A @ torch.stack([v, 2 * v], 1))[:, 1], 12 * X * V)


@pytest.mark.parametrize("shape", [(0,), (0, 2), (3, 0)])
def test_leaves_without_numbers(shape: tuple[int, ...]) -> None:
    p = {"empty": torch.zeros(shape, dtype=F64), "x": X}
    A = operators.hessian(lambda p: cubic(p["x"]) + p["empty"].sum())(p)
    assert A.shape == (3, 3)
    torch.testing.assert_close(A.to_matrix(), (6 * X).diag())
    torch.testing.assert_close((A @ p)["x"], 6 * X * X)
    assert (A @ p)["empty"].shape == shape
    torch.testing.assert_close(A.diagonal()["x"], 6 * X)
    nothing = operators.hessian(lambda x: (x**2).sum())(p["empty"])
    assert nothing.to_matrix().shape == nothing.H.to_matrix().shape == (0, 0)
    assert (nothing @ p["empty"]).shape == shape
    assert nothing.matmat(torch.zeros(0, 2, dtype=F64)).shape == (0, 2)
    onto_nothing = operators.jacobian(lambda x: x[:0])(X)
    assert onto_nothing.to_matrix().shape == (0, 3)
    assert onto_nothing.T.to_matrix().shape == (3, 0)


def test_captured_parameters_that_require_grad() -> None:
    w = V.clone().requires_grad_()
    A = operators.hessian(lambda x: (w * x**3).sum())(X)
    (slope,) = torch.autograd.grad((A @ X).sum(), w)
    torch.testing.assert_close(slope, 6 * X * X)
    with torch.no_grad():
        assert not (A @ X).requires_grad
    (slope,) = torch.autograd.grad((operators.jacobian(lambda x: w * x)(X) @ X).sum(), w)
    torch.testing.assert_close(slope, X)


# How often the function runs, and how long its graph lives.


@pytest.mark.parametrize("make", [operators.hessian, operators.jacobian])
def test_function_runs_once_for_all_products(make: Any) -> None:
    func = Counted(cubic)
    A = make(func)(X)
    assert func.calls == 1
    for B in (A, A.H, 2 * A + A, A.H @ A, A["*", "*"], -A):
        B @ (V if B.domain.size == 3 else V[:1])
        B.to_matrix()
        B.prepared().matmat(torch.zeros(B.shape[1], 4, dtype=F64))
    A.to_scipy() if func.calls else None
    ad.vmap(A.matvec)(torch.stack([V, V]))
    ad.grad(lambda v: A.matvec(v).sum())(V)
    repr(A)
    assert func.calls == 1


def test_prepared_operator_runs_its_function_once_inside_a_transform() -> None:
    func = Counted(cubic)
    A = operators.hessian(func)(X)
    spec = torch.utils._pytree.tree_structure(2 * A + 1)

    def twice(x: Tensor) -> Tensor:
        func.calls = 0
        again = torch.utils._pytree.tree_unflatten([2, x, 1], spec).prepared()
        return again @ (again @ V)

    for x, product in zip((X, 2 * X), ad.vmap(twice)(torch.stack([X, 2 * X])), strict=True):
        torch.testing.assert_close(product, (12 * x + 1) ** 2 * V)
    assert func.calls == 1
    # What it recorded there has stayed there: the operator outside is what it was.
    torch.testing.assert_close(A @ V, 6 * X * V)


@pytest.mark.parametrize("prepared", [False, True])
def test_what_is_recorded_inside_a_transform_does_not_outlive_it(prepared: bool) -> None:
    factor = [torch.ones((), dtype=F64)]
    leaves, spec = torch.utils._pytree.tree_flatten(operators.jacobian(lambda x: factor[0] * x.sin())(X))
    outside = torch.utils._pytree.tree_unflatten(leaves, spec)

    def product(w: Tensor) -> Tensor:
        factor[0] = w
        return (outside.prepared() if prepared else outside) @ V

    torch.testing.assert_close(ad.vmap(product)(V), V[:, None] * X.cos() * V)
    factor[0] = torch.ones((), dtype=F64)
    torch.testing.assert_close(outside @ V, X.cos() * V)
    torch.testing.assert_close(outside.H @ V, X.cos() * V)


def transposed_function() -> Any:
    A = operators.from_matvec(lambda v: X * v, X)
    A.H @ V
    return A


@pytest.mark.parametrize(
    "make",
    [
        lambda: operators.hessian(cubic)(X.clone()),
        lambda: operators.jacobian(torch.sin)(X.clone()),
        lambda: (j := operators.jacobian(torch.sin)(X.clone())).H @ j + 1,
        transposed_function,
    ],
)
def test_operator_is_released_when_it_goes_out_of_scope(make: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        A = make()
        A @ V, A.H @ V, A.to_matrix(), repr(A)
        kept = [weakref.ref(A)]
        # The graph, by a tensor that it alone keeps.
        kept += [weakref.ref(part.linearized.outputs[0]) for part in (A,) if hasattr(part, "linearized")]
        del A
        assert [one() for one in kept] == [None] * len(kept)
    finally:
        gc.enable()


def test_products_in_threads() -> None:
    p = params(F64)
    A, J = operators.hessian(scalar)(p), operators.jacobian(vector)(p)
    dense, jacobian = dense_hessian(scalar, params(F64)), dense_jacobian(vector, params(F64))
    wrong: list[Any] = []

    def multiply(seed: int) -> None:
        for n in range(10):
            v = random(10, 3, seed=100 * seed + n)
            for B, M in ((A, dense), (J, jacobian), (J.H @ J + A, jacobian.T @ jacobian + dense)):
                if not torch.allclose(B @ v, M @ v, rtol=1e-10):
                    wrong.append((seed, n))
            ad.jvp(A.matvec, (v[:, 0],), (v[:, 1],))

    threads = [threading.Thread(target=multiply, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert wrong == []


# What is refused.

A = operators.hessian(scalar)(params(F64))
SMALL = operators.hessian(cubic)(X)
P = params(F64)


def changed(**parts: Any) -> dict[str, Any]:
    return {**P, **parts}


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        (
            lambda: A @ {"w": P["w"]},
            errors.StructureError,
            r"hessian of scalar @ v: Expected pytree structure of v to be the same .* v is a dict with keys \['w'\]",
        ),
        (
            lambda: A @ changed(w=P["w"].T),
            errors.ShapeError,
            r"hessian of scalar @ v: v\['w'\] has shape \(3, 2\), but space\['w'\] has shape \(2, 3\)\. A vector must match",
        ),
        (
            lambda: A @ changed(b=P["b"].float()),
            errors.DtypeError,
            r"v\['b'\] has dtype torch.float32, but space\['b'\] has dtype torch.float64\..* Convert it, as in v\['b'\]\.to\(torch.float64\)",
        ),
        (
            lambda: A @ changed(b=None),
            errors.LeafError,
            r"v\['b'\] is of type NoneType, but space\['b'\] is a tensor of shape \(3,\)",
        ),
        (lambda: A @ changed(b="b"), errors.LeafError, r"v\['b'\]"),
        (
            lambda: A @ torch.zeros(9, dtype=F64),
            errors.ShapeError,
            r"expected a vector of shape \[10\] or a matrix of shape \[10, k\], or a tree like the operator's domain, .* got v of shape \(9,\)",
        ),
        (lambda: A @ torch.zeros(9, 10, dtype=F64), errors.ShapeError, r"got v of shape \(9, 10\)"),
        (lambda: A @ torch.zeros(10, 2, 2, dtype=F64), errors.ShapeError, r"got v of shape \(10, 2, 2\)"),
        (
            lambda: A @ torch.zeros(10),
            errors.DtypeError,
            r"expected v of dtype torch.float64, that of the operator's domain, got torch.float32\. Convert it",
        ),
        (lambda: A @ torch.zeros(10, dtype=torch.int64), errors.DtypeError, r"got torch.int64"),
        (
            lambda: A @ torch.zeros(10, dtype=F64).numpy(),
            errors.StructureError,
            r"hessian of scalar @ v: Expected pytree structure",
        ),
        (lambda: SMALL @ X.numpy(), errors.LeafError, r"hessian of cubic @ v: .*Tensor"),
        (
            lambda: SMALL @ X[:2],
            errors.ShapeError,
            r"expected a vector of shape \[3\] or a matrix of shape \[3, k\], got v of shape \(2,\)",
        ),
        (lambda: SMALL @ X.to(torch.complex128), errors.DtypeError, r"torch.complex128"),
        (
            lambda: A @ SMALL,
            errors.StructureError,
            r"A @ B: expected B.codomain and A.domain to be the same space, got Space\(.*Make both operators at trees of one structure",
        ),
        (
            lambda: A + SMALL,
            errors.StructureError,
            r"A \+ B: expected B.domain and A.domain to be the same space",
        ),
        (
            lambda: SMALL @ operators.hessian(cubic)(X[:2]),
            errors.ShapeError,
            r"A @ B: .* got shape \(2,\), torch.float64 on cpu and shape \(3,\), torch.float64 on cpu at their only leaf",
        ),
        (
            lambda: SMALL - operators.hessian(cubic)(X.float()),
            errors.DtypeError,
            r"torch.float32 on cpu and shape \(3,\), torch.float64 on cpu",
        ),
        (
            lambda: operators.jacobian(vector)(P) + 1,
            errors.ShapeError,
            r"A \+ a number: expected an operator from a space to itself, got jacobian of vector from Space",
        ),
        (
            lambda: 1j * SMALL,
            errors.DtypeError,
            r"c \* A: expected a real number, since hessian of cubic has leaves of dtype torch.float64, got a complex one",
        ),
        (lambda: SMALL + torch.tensor(1j), errors.DtypeError, r"c \* A: expected a real number"),
        (
            lambda: A["w"],
            errors.ArgnumsError,
            r"A\[rows, columns\]: expected two patterns for hessian of scalar, .* got 'w'\. Write A\['layer",
        ),
        (lambda: A["w", "b", "b"], errors.ArgnumsError, r"expected two patterns"),
        (lambda: A["w", "c"], errors.ArgnumsError, r"A\[rows, columns\]: .*'c'.*w.*b.*inner\.0"),
        (lambda: A["w", 0], Exception, r"A\[rows, columns\]"),
        (
            lambda: operators.identity_like(operators.jacobian(vector)(P)),
            errors.ShapeError,
            r"operators.identity_like: expected an operator from a space to itself",
        ),
        (lambda: operators.diagonal({"n": 1}), errors.LeafError, r"operators.diagonal: diagonal"),
        (
            lambda: operators.diagonal([X, X.to(torch.complex128)]) @ torch.zeros(6, dtype=torch.complex128),
            errors.DtypeError,
            r"diagonal @ v: expected a space of flat vectors of real tensors alone, or of complex ones",
        ),
        (
            lambda: operators.hessian(cubic)(X.to(torch.complex128)),
            errors.DtypeError,
            r"operators.hessian: .*holomorphic",
        ),
        (
            lambda: operators.hessian(cubic, holomorphic=True)(X),
            errors.DtypeError,
            r"operators.hessian: .*holomorphic",
        ),
        (
            lambda: operators.jacobian(lambda x: x * 1j)(X),
            errors.DtypeError,
            r"operators.jacobian: .*holomorphic",
        ),
        (lambda: operators.hessian(torch.sin)(X), errors.OutputError, r"operators.hessian: "),
        (lambda: operators.jacobian(lambda x: "text")(X), errors.OutputError, r"operators.jacobian: "),
        (
            lambda: operators.jacobian(lambda x: {"y": x, "n": 3})(X),
            errors.OutputError,
            r"operators.jacobian: expected .* at output\['n'\]",
        ),
        (lambda: operators.hessian(cubic, 3)(X), errors.ArgnumsError, r"operators.hessian: "),
        (lambda: operators.hessian(cubic, wrt="c*")({"a": X}), errors.ArgnumsError, r"operators.hessian: "),
        (
            lambda: operators.from_matrix(X),
            errors.ShapeError,
            r"operators.from_matrix: expected M to be a floating or complex tensor of shape \[m, n\], got shape \(3,\)",
        ),
        (
            lambda: operators.from_matrix(torch.eye(3, dtype=torch.int64)),
            errors.ShapeError,
            r"got dtype torch.int64",
        ),
        (lambda: operators.from_matrix([[1.0]]), errors.ShapeError, r"got type list"),
        (
            lambda: operators.from_matrix(torch.eye(3, dtype=F64), {"x": X, "y": X}),
            errors.ShapeError,
            r"operators.from_matrix: M has shape \(3, 3\), but \(6, 6\) is expected: a row for each",
        ),
        (
            lambda: operators.from_matrix(torch.eye(3) * 1j, X, X),
            errors.DtypeError,
            r"operators.from_matrix: expected M, structure and codomain of real tensors alone",
        ),
        (
            lambda: operators.from_matvec(lambda v: v + 1, X),
            errors.RuleError,
            r"operators.from_matvec: expected a linear function, but <lambda>\(u - 2 v\) is not",
        ),
        (
            lambda: operators.from_matvec(lambda v: v * v.abs(), X),
            errors.RuleError,
            r"expected a linear function",
        ),
        *(
            (
                lambda func=func: operators.from_matvec(func, torch.zeros(3)),
                errors.RuleError,
                r"expected a linear function",
            )
            for func in (torch.square, torch.abs, torch.relu)
        ),
        (
            lambda: operators.from_matvec(torch.conj, X.to(torch.complex128)),
            errors.RuleError,
            r"expected a linear function",
        ),
        (
            lambda: (
                operators.from_matvec(lambda v: v.flip(0).cumsum(0) - v, X, symmetric=True)
                and operators.from_matvec(lambda v: v.cumsum(0), X, symmetric=True)
            ),
            errors.RuleError,
            r"expected a symmetric operator, as promised",
        ),
        (
            lambda: operators.from_matvec(lambda v: -v, X, positive=True),
            errors.RuleError,
            r"expected a positive semidefinite operator, as promised",
        ),
        (
            lambda: operators.from_matvec(lambda v: v.cumsum(0), X, rmatvec=lambda v: v.cumsum(0)),
            errors.RuleError,
            r"expected rmatvec to multiply by the conjugate transpose",
        ),
        (
            lambda: operators.from_matvec(lambda v: v[:2], X, X[:2], symmetric=True),
            errors.ShapeError,
            r"operators.from_matvec: expected an operator from a space to itself",
        ),
        (
            lambda: operators.from_matvec(lambda v: v[:2], X),
            errors.ShapeError,
            r"operators.from_matvec: matvec\(v\) has shape \(2,\)",
        ),
        (
            lambda: operators.from_matvec(lambda v: v.float(), X),
            errors.DtypeError,
            r"operators.from_matvec: matvec\(v\) has dtype torch.float32",
        ),
        (
            lambda: operators.from_matvec(lambda v: {"y": v}, X),
            errors.StructureError,
            r"operators.from_matvec: ",
        ),
        (
            lambda: operators.from_matvec(lambda v: v, X, X.to(torch.complex128)),
            errors.DtypeError,
            r"operators.from_matvec: expected domain and codomain of real",
        ),
        (
            lambda: A.domain.unravel(torch.zeros(3, dtype=F64)),
            errors.ShapeError,
            r"unravel: vector has shape \(3,\), but \(10,\) is expected",
        ),
        (lambda: A.domain.ravel({"x": X}), errors.StructureError, r"ravel: "),
        (
            lambda: operators.diagonal(X.bfloat16()).to_scipy(),
            errors.DtypeError,
            r"A.to_scipy\(\): expected a dtype that NumPy has, got torch.bfloat16",
        ),
    ],
)
def test_bad_input_is_refused(attempt: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"(?s){message}"):
        attempt()
    torch.testing.assert_close(SMALL @ V, 6 * X * V)


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: A + "x",
        lambda: "x" * A,
        lambda: X * A,
        lambda: A * X,
        lambda: A * True,
        lambda: A / A,
        lambda: X / SMALL,
        lambda: torch.exp(SMALL),
        lambda: SMALL + X.numpy(),
    ],
)
def test_python_refuses_what_has_no_meaning(attempt: Any) -> None:
    with pytest.raises(TypeError):
        attempt()


def test_check_can_be_left_out() -> None:
    A = operators.from_matvec(lambda v: v + 1, X, check=False)
    torch.testing.assert_close(A @ V, V + 1)


def test_freed_graph_is_explained() -> None:
    x = X.clone().requires_grad_()
    A = operators.hessian(lambda x: x.sin().exp().sum())(x)
    (A @ V).sum().backward()
    with pytest.raises(
        RuntimeError, match="the graph of the operator was freed by a backward pass"
    ) as caught:
        A @ V
    assert "retain_graph=True" in str(caught.value)


def test_scipy_solves_with_operators() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    M = random(12, 12, seed=30)
    M = M @ M.T + torch.eye(12, dtype=F64)
    A = operators.hessian(lambda x: 0.5 * x @ M @ x)(torch.zeros(12, dtype=F64))
    b = random(12, seed=31)
    solution, failed = linalg.cg(A.to_scipy(), b.numpy(), rtol=1e-12)
    assert not failed
    torch.testing.assert_close(torch.as_tensor(solution), torch.linalg.solve(M, b))
    values = linalg.eigsh(A.to_scipy(), 3, return_eigenvectors=False)
    torch.testing.assert_close(torch.as_tensor(values).sort().values, torch.linalg.eigvalsh(M)[-3:])


def test_names_of_functions() -> None:
    assert repr(operators.hessian(partial(cubic, w=2.0))(X)).startswith(
        "<hessian of cubic: [3, 3], torch.float64, cpu, symmetric, 2 gradients"
    )
    assert (2 * (SMALL + SMALL)).name == "2 * (hessian of cubic + hessian of cubic)"
    assert repr(operators.hessian(nn.Linear(3, 1))) == "<HessianOperator of Linear>"
