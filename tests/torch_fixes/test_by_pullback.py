"""Forward mode by the pullback: the tangent of a random operation is that of the draw that it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from autodiff.errors import ForwardRuleError
from scenarios import assert_close

if TYPE_CHECKING:
    from collections.abc import Callable

A = torch.tensor([0.7, 2.3, 5.0], dtype=torch.float64)
ONE = torch.ones((), dtype=torch.float64)
T = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)


def slope_of_gamma_draws(a: Tensor, z: Tensor) -> Tensor:
    """dz/da of a draw z of Gamma(a, 1): the cumulative distribution at z stays what it is."""
    step = 1e-5
    moved = (torch.special.gammainc(a + step, z) - torch.special.gammainc(a - step, z)) / (2 * step)
    density = ((a - 1) * z.log() - z - torch.lgamma(a)).exp()
    return -moved / density


def summed(pushed: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return pushed[1].sum(), pushed


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]]] = {
    "jvp": lambda draw: ad.jvp(draw, (A,), (T,)),
    "jacfwd": lambda draw: tuple(reversed(ad.jacfwd(lambda a: (draw(a),) * 2, has_aux=True)(A))),
    "jvp inside grad": lambda draw: ad.grad(lambda s: summed(ad.jvp(draw, (A,), (s * T,))), has_aux=True)(
        ONE
    )[1],
    "vmap(jvp)": lambda draw: tuple(
        one[1]
        for one in ad.vmap(lambda a, t: ad.jvp(draw, (a,), (t,)), randomness="different")(
            torch.stack([A + 1, A]), torch.stack([T + 1, T])
        )
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("own_generator", [False, True])
def test_tangent_of_a_gamma_draw_is_that_of_the_value(name: str, own_generator: bool) -> None:
    generator = torch.Generator().manual_seed(4) if own_generator else None
    torch.manual_seed(3)
    value, tangent = TRANSFORMS[name](lambda a: torch._standard_gamma(a, generator=generator))
    slopes = slope_of_gamma_draws(A, value)
    torch.testing.assert_close(
        tangent.diagonal() if name == "jacfwd" else tangent / T, slopes, rtol=1e-4, atol=0
    )


@pytest.mark.filterwarnings(
    "ignore:Singular sample detected"
)  # it takes rounded symmetry for that, and draws again
def test_tangent_of_a_wishart_draw() -> None:
    def draw(a: Tensor) -> Tensor:
        torch.manual_seed(5)
        return torch.distributions.Wishart(a.sum(), torch.eye(2, dtype=a.dtype)).rsample()

    expected = draw(A), torch.autograd.functional.jacobian(draw, A) @ T
    assert_close(ad.jvp(draw, (A,), (T,)), expected)


def test_generators_go_on_as_after_one_run() -> None:
    func = lambda a: torch._standard_gamma(a) + torch.rand(())
    torch.manual_seed(3)
    expected = func(A), torch.rand(2)
    torch.manual_seed(3)
    assert_close((ad.jvp(func, (A,), (T,))[0], torch.rand(2)), expected)


def random_scale(name: str, draw: Callable[[], float]) -> Any:
    """An operator of torch.library that multiplies by a random number, which its backward uses again."""

    @torch.library.custom_op(f"autodiff_random::{name}", mutates_args=())
    def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
        factor = torch.tensor(draw(), dtype=x.dtype)
        return x * factor, factor

    scaled.register_autograd(
        lambda ctx, cotangent, _: ctx.saved_tensors[0] * cotangent,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
    )
    return scaled


def test_random_operator_of_torch_library() -> None:
    scaled = random_scale("by_torch", lambda: torch.rand(()).item())
    (value, factor), (tangent, _) = ad.jvp(scaled, (A,), (T,))
    assert_close((value, tangent), (factor * A, factor * T))


def test_random_operator_whose_draw_cannot_be_repeated_is_an_error() -> None:
    scaled = random_scale("by_others", iter([0.25, 0.5, 0.75]).__next__)
    with pytest.raises(ForwardRuleError, match=r"forward mode: .*gave other values when it ran again"):
        ad.jvp(lambda x: scaled(x)[0], (A,), (T,))
