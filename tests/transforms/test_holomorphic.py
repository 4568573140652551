"""Complex derivatives of holomorphic functions, by every transform that takes ``holomorphic=True``.

Every function here has a derivative that is not real, so that its conjugate fails.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from scenarios import assert_close

Z = torch.tensor([1 + 2j, 0.5 - 1j, -0.25 + 0.75j], dtype=torch.complex128)
C = torch.tensor([2 - 1j, 3j, 1 + 0.5j], dtype=torch.complex128)
W = torch.tensor([[1j, 2, 0.5], [3 - 1j, 1, -1j]], dtype=torch.complex128)
M = torch.tensor([[1 + 1j, 0.5], [-0.25j, 2 - 1j]], dtype=torch.complex128)
EYE = torch.eye(3, dtype=torch.complex128)

GRADIENTS = {
    "grad": ad.grad,
    "value_and_grad": lambda f, **k: lambda *a, **kw: ad.value_and_grad(f, **k)(*a, **kw)[1],
    "grad_and_value": lambda f, **k: lambda *a, **kw: ad.grad_and_value(f, **k)(*a, **kw)[0],
}
JACOBIANS = {
    "jacrev": ad.jacrev,
    "jacfwd": ad.jacfwd,
    "auto": ad.jacobian,
    "reverse": partial(ad.jacobian, mode="reverse"),
    "forward": partial(ad.jacobian, mode="forward"),
}
HESSIANS = {
    mode: partial(ad.hessian, mode=mode)
    for mode in (
        "auto",
        "reverse-over-reverse",
        "forward-over-reverse",
        "reverse-over-forward",
        "forward-over-forward",
    )
}


def of(transforms: dict[str, Any]) -> Any:
    holomorphic = {name: partial(transform, holomorphic=True) for name, transform in transforms.items()}
    return pytest.mark.parametrize("derive", holomorphic.values(), ids=holomorphic)


FIRST = of(GRADIENTS | JACOBIANS)
JACOBIAN = of(JACOBIANS)
HESSIAN = of(HESSIANS)
IN_CHUNKS = pytest.mark.parametrize("chunk_size", [None, 1, 2])

# A scalar function of a vector, its gradient and its Hessian.
SCALARS = {
    "cube": (lambda z: C @ z**3, lambda z: 3 * C * z**2, lambda z: torch.diag(6 * C * z)),
    "exp": (lambda z: (z.exp() * C).sum(), lambda z: C * z.exp(), lambda z: torch.diag(C * z.exp())),
    "sin": (lambda z: (z.sin() * C).sum(), lambda z: C * z.cos(), lambda z: torch.diag(-C * z.sin())),
    "polynomial": (
        lambda z: 1j + z[0] * z[1] ** 2 - 2j * z[2],
        lambda z: torch.stack([z[1] ** 2, 2 * z[0] * z[1], -2j + 0 * z[2]]),
        lambda z: torch.stack([z[1] * 0, 2 * z[1], z[0] * 0, 2 * z[1], 2 * z[0], *[z[0] * 0] * 4]).reshape(
            3, 3
        ),
    ),
    "quotient": (
        lambda z: z[0] / z[1],
        lambda z: torch.stack([1 / z[1], -z[0] / z[1] ** 2, 0 * z[2]]),
        lambda z: torch.stack(
            [z[0] * 0, -1 / z[1] ** 2, z[0] * 0, -1 / z[1] ** 2, 2 * z[0] / z[1] ** 3, *[z[0] * 0] * 4]
        ).reshape(3, 3),
    ),
}
each_scalar = pytest.mark.parametrize(("func", "first", "second"), SCALARS.values(), ids=SCALARS)


@FIRST
@each_scalar
def test_derivative_of_a_scalar_function(derive: Any, func: Any, first: Any, second: Any) -> None:
    result = derive(func)(Z)
    assert_close(result, first(Z))
    assert not result.is_conj(), "a lazy conjugate has no numpy()"
    batch = torch.stack([Z, 2j * Z])
    assert_close(ad.vmap(derive(func))(batch), torch.stack([first(z) for z in batch]))


@HESSIAN
@IN_CHUNKS
@each_scalar
def test_hessian_of_a_scalar_function(
    derive: Any, chunk_size: Any, func: Any, first: Any, second: Any
) -> None:
    derived = derive(func, chunk_size=chunk_size)
    assert_close(derived(Z), second(Z))
    batch = torch.stack([Z, 2j * Z])
    assert_close(ad.vmap(derived)(batch), torch.stack([second(z) for z in batch]))


@JACOBIAN
@IN_CHUNKS
def test_jacobian_of_a_function_from_few_to_many_and_from_many_to_few(derive: Any, chunk_size: Any) -> None:
    powers = torch.arange(1, 6)
    tall = derive(lambda t: t**powers, chunk_size=chunk_size)(Z[0])
    assert_close(tall, powers * Z[0] ** (powers - 1))
    assert_close(derive(lambda z: W @ z.sin(), chunk_size=chunk_size)(Z), W * Z.cos())


@JACOBIAN
@IN_CHUNKS
def test_jacobian_of_the_inverse(derive: Any, chunk_size: Any) -> None:
    inverse = torch.linalg.inv(M)
    expected = -torch.einsum("ia,bj->ijab", inverse, inverse)
    assert_close(derive(torch.linalg.inv, chunk_size=chunk_size)(M), expected)


@HESSIAN
def test_hessian_of_the_inverse(derive: Any) -> None:
    inverse = torch.linalg.inv(M)
    half = torch.einsum("ia,bc,dj->ijabcd", inverse, inverse, inverse)
    assert_close(derive(torch.linalg.inv)(M), half + half.permute(0, 1, 4, 5, 2, 3))


def mixed(p: dict[str, Any], s: Tensor) -> dict[str, Tensor]:
    """{"x": a B_01 s, "y": sum B^2}."""
    b = p["b"][0]
    return {"x": p["a"] * b[0, 1] * s, "y": (b @ b).sum()}


@JACOBIAN
@IN_CHUNKS
def test_jacobian_of_trees_with_passive_leaves_and_several_argnums(derive: Any, chunk_size: Any) -> None:
    tree = {"a": Z, "b": (M,), "n": 3, "i": torch.arange(2), "none": None}
    s = C[0]
    unit = torch.zeros(2, 2, dtype=torch.complex128)
    unit[0, 1] = 1
    passive = {"n": None, "i": None, "none": None}
    x = (
        {"a": EYE * M[0, 1] * s, "b": (torch.einsum("i,jk->ijk", Z * s, unit),), **passive},
        Z * M[0, 1],
    )
    y = (
        {"a": torch.zeros_like(Z), "b": (M.sum(1) + M.sum(0)[:, None],), **passive},
        torch.zeros_like(s),
    )
    result = derive(mixed, argnums=(0, "s"), chunk_size=chunk_size)(tree, s)
    assert_close(result, {"x": x, "y": y})


@HESSIAN
@IN_CHUNKS
def test_hessian_of_trees_and_several_argnums(derive: Any, chunk_size: Any) -> None:
    p, s = {"a": Z, "b": C[1]}, C[0]
    zero, square = torch.zeros_like(s), (Z**2).sum()
    result = derive(lambda p, s: (p["a"] ** 2).sum() * s * p["b"], argnums=(0, 1), chunk_size=chunk_size)(
        p, s
    )
    of_p = {
        "a": ({"a": 2 * EYE * s * p["b"], "b": 2 * Z * s}, 2 * Z * p["b"]),
        "b": ({"a": 2 * Z * s, "b": zero}, square),
    }
    assert_close(result, (of_p, ({"a": 2 * Z * p["b"], "b": square}, zero)))


@of(GRADIENTS)
def test_gradient_of_trees_and_several_argnums(derive: Any) -> None:
    p, s = {"a": Z, "n": 3, "b": [C[1], None]}, C[0]
    func = lambda p, s: (p["a"] ** 2).sum() * s * p["b"][0]
    square = (Z**2).sum()
    of_p = {"a": 2 * Z * s * C[1], "n": None, "b": [square * s, None]}
    assert_close(derive(func, argnums=(0, "s"))(p, s), (of_p, square * C[1]))
    assert_close(derive(func, wrt="b.*")(p, s=s), of_p | {"a": None})


@FIRST
def test_wrt_leaves_real_leaves_out(derive: Any) -> None:
    p = {"z": Z[0], "x": torch.tensor(2.0, dtype=torch.float64)}
    assert_close(derive(lambda p: p["x"] * p["z"] ** 2, wrt="z")(p), {"z": 4 * Z[0], "x": None})
    with pytest.raises(ad.errors.DtypeError, match="holomorphic=True expects all inputs to be complex"):
        derive(lambda p: p["x"] * p["z"] ** 2)(p)


def test_value_and_aux_come_with_the_complex_derivative() -> None:
    func = lambda z: (C @ z**3, {"modulus": z.abs(), "note": "text"})
    value, aux, gradient = C @ Z**3, {"modulus": Z.abs(), "note": "text"}, 3 * C * Z**2
    assert_close(ad.grad(func, has_aux=True, holomorphic=True)(Z), (gradient, aux))
    assert_close(ad.value_and_grad(func, has_aux=True, holomorphic=True)(Z), ((value, aux), gradient))
    assert_close(ad.grad_and_value(func, has_aux=True, holomorphic=True)(Z), (gradient, (value, aux)))
    for jacobian in JACOBIANS.values():
        assert_close(jacobian(func, has_aux=True, holomorphic=True)(Z), (gradient, aux))
    for hessian in HESSIANS.values():
        assert_close(hessian(func, has_aux=True, holomorphic=True)(Z), (torch.diag(6 * C * Z), aux))


@FIRST
def test_derivatives_nest(derive: Any) -> None:
    second = derive(derive(lambda t: t**5))
    assert_close(second(Z[0]), 20 * Z[0] ** 3)
    assert_close(derive(second)(Z[0]), 60 * Z[0] ** 2)


@FIRST
def test_jvp_and_vjp_of_a_derivative(derive: Any) -> None:
    gradient = derive(lambda z: C @ z**3)
    assert_close(ad.jvp(gradient, (Z,), (C,))[1], 6 * C * Z * C)
    # A pullback is torch's: the conjugate transpose.
    assert_close(ad.vjp(gradient, Z)[1](C)[0], (6 * C * Z).conj() * C)


@HESSIAN
def test_jvp_and_jacrev_of_a_hessian(derive: Any) -> None:
    hessian = derive(lambda z: C @ z**4)
    assert_close(ad.jvp(hessian, (Z,), (C,))[1], torch.diag(24 * C * Z * C))
    third = 24 * torch.einsum("i,ij,ik->ijk", C * Z, EYE, EYE)
    assert_close(ad.jacrev(hessian, holomorphic=True)(Z), third)


@FIRST
def test_inside_a_real_gradient(derive: Any) -> None:
    """d/dx Re sum(i f'((1 + i) x)) for f = sum z^4."""
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    slope = lambda x: (1j * derive(lambda z: (z**4).sum())((1 + 1j) * x)).sum().real
    z = (1 + 1j) * x
    assert_close(ad.grad(slope)(x), (1j * 12 * z**2 * (1 + 1j)).real)


@FIRST
def test_watched_parameter_stays_connected(derive: Any) -> None:
    w = C.clone().requires_grad_()
    result = derive(lambda z: w @ z**2)(Z)
    (gradient,) = torch.autograd.grad((1j * result).sum().real, w)
    assert_close(gradient, (1j * 2 * Z).conj())


@FIRST
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_dtype_and_a_lazy_conjugate(derive: Any, dtype: torch.dtype) -> None:
    z = Z.to(dtype).conj()
    result = derive(lambda z: z.exp().sum())(z)
    assert result.dtype == dtype
    torch.testing.assert_close(result, z.exp())


@FIRST
def test_strict(derive: Any) -> None:
    strict = partial(derive, strict=True)
    assert_close(strict(lambda z: (0j * z).sum())(Z), torch.zeros_like(Z))
    with pytest.raises(ad.errors.IndependenceError, match="strict=True"):
        strict(lambda z: C.sum())(Z)
    assert_close(derive(lambda z: C.sum())(Z), torch.zeros_like(Z))


@HESSIAN
def test_strict_hessian(derive: Any) -> None:
    strict = partial(derive, strict=True)
    assert_close(strict(lambda z: 0j * (z**2).sum())(Z), 0 * EYE)
    with pytest.raises(ad.errors.IndependenceError, match="strict=True"):
        strict(lambda z: 1j - z.sum())(Z)


@of(GRADIENTS | JACOBIANS | HESSIANS)
def test_inputs_and_outputs_have_to_be_complex(derive: Any) -> None:
    calls: list[int] = []

    def real(z: Tensor) -> Tensor:
        calls.append(1)
        return z.abs().sum()

    words = "holomorphic=True expects all {} to be complex, got torch.float64"
    with pytest.raises(ad.errors.DtypeError, match=words.format("outputs")):
        derive(real)(Z)
    calls.clear()
    with pytest.raises(ad.errors.DtypeError, match=words.format("inputs")):
        derive(real)(Z.real)
    assert not calls, "inputs are refused before the function runs"


@pytest.mark.parametrize("name", GRADIENTS)
def test_without_holomorphic_a_complex_output_names_the_way_out(name: str) -> None:
    words = f"{name}: .*only for real scalar outputs .* pass holomorphic=True"
    with pytest.raises(ad.errors.OutputError, match=words):
        getattr(ad, name)(lambda z: C @ z)(Z)


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "jacobian", "hessian"])
def test_without_holomorphic_complex_inputs_and_outputs_name_the_way_out(name: str) -> None:
    transform = getattr(ad, name)
    with pytest.raises(ad.errors.DtypeError, match=f"{name}: .*all inputs to be real.*holomorphic=True"):
        transform(lambda z: z.abs().sum())(Z)
    with pytest.raises(ad.errors.DtypeError, match=f"{name}: .*all outputs to be real.*holomorphic=True"):
        transform(lambda x: 1j * x.sum())(Z.real)


@pytest.mark.parametrize("derive", [ad.grad, *HESSIANS.values()])
def test_per_sample(derive: Any) -> None:
    batch = torch.stack([Z, 2j * Z])
    func = lambda c, z: c @ z**3
    derived = derive(func, argnums=1, holomorphic=True)
    expected = torch.stack([derived(C, z) for z in batch])
    assert_close(ad.per_sample(derived, in_dims=(None, 0))(C, batch), expected)
    assert_close(expected[0], 3 * C * Z**2 if derive is ad.grad else torch.diag(6 * C * Z))
