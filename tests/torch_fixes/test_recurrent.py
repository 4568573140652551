"""Recurrent layers under vmap are torch's own, sample by sample: values, gradients and Hessians, with every option."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

import autodiff as ad
from autodiff.core import hooks
from scenarios import assert_close, difference

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLES, TIME, BATCH, FEATURES, HIDDEN = 3, 4, 2, 3, 5

LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN-tanh": nn.RNN,
    "RNN-relu": partial(nn.RNN, nonlinearity="relu"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without bias": {"bias": False},
    "batch first": {"batch_first": True},
    "deep": {"num_layers": 3},
    "both ways": {"bidirectional": True},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
    "nothing passes dropout": {"num_layers": 2, "dropout": 1.0},
    "projected": {"proj_size": 2, "num_layers": 2, "bidirectional": True},
}
CELLS = {
    "LSTMCell": nn.LSTMCell,
    "GRUCell": nn.GRUCell,
    "RNNCell-tanh": nn.RNNCell,
    "RNNCell-relu": partial(nn.RNNCell, nonlinearity="relu"),
}

each_layer = pytest.mark.parametrize("layer", LAYERS)
each_cell = pytest.mark.parametrize("cell", CELLS)
each_option = pytest.mark.parametrize("option", OPTIONS)


def made(layer: str, option: str = "plain") -> nn.RNNBase:
    if option == "projected" and layer != "LSTM":
        pytest.skip("torch projects the state of an LSTM alone")
    return LAYERS[layer](FEATURES, HIDDEN, dtype=torch.float64, **OPTIONS[option])


def flat(tree: Any) -> Tensor:
    """All that a layer returns, in one vector; its entries count differently."""
    leaves = ad.pytree.ravel(tree)[0]
    return leaves * torch.arange(1, len(leaves) + 1).cos()


def sequences() -> Tensor:
    return torch.randn(SAMPLES, BATCH, TIME, FEATURES, dtype=torch.float64)


def arguments(module: nn.RNNBase, x: Tensor, *, state: bool) -> tuple[Any, ...]:
    """Sequences of all samples, and initial states of all samples."""
    x = x if module.batch_first else x.transpose(1, 2)
    if not state:
        return (x,)
    directions = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or HIDDEN, *([HIDDEN] if isinstance(module, nn.LSTM) else [])]
    hx = tuple(torch.randn(SAMPLES, directions, BATCH, size, dtype=torch.float64) for size in sizes)
    return x, hx if len(hx) > 1 else hx[0]


def assert_as_by_sample(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Values, gradients by parameters and arguments, and Hessians, as torch's of each sample."""
    params = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def outputs(params: dict[str, Tensor], *args: Any) -> Tensor:
        return flat(ad.functional_call(module, params, args))

    def loss(params: dict[str, Tensor], *args: Any) -> Tensor:
        return outputs(params, *args).square().sum()

    by_sample = [torch.utils._pytree.tree_map(lambda a, k=k: a[k], args) for k in range(SAMPLES)]
    dims = (None, *(0 for _ in args))
    assert_close(
        ad.vmap(outputs, dims)(params, *args), torch.stack([outputs(params, *one) for one in by_sample])
    )
    gradients = ad.vmap(ad.grad(loss, tuple(range(len(dims)))), dims)(params, *args)
    for k, one in enumerate(by_sample):
        leaves = [*params.values(), *torch.utils._pytree.tree_leaves(one)]
        tracked = [leaf.clone().requires_grad_() for leaf in leaves]
        names, rest = list(params), tracked[len(params) :]
        spec = torch.utils._pytree.tree_structure(one)
        args_k = torch.utils._pytree.tree_unflatten(rest, spec)
        value = loss(dict(zip(names, tracked, strict=False)), *args_k)
        expected = torch.autograd.grad(value, tracked)
        found = [leaf[k] for leaf in torch.utils._pytree.tree_leaves(gradients)]
        assert_close(found, list(expected))
    hessians = ad.vmap(ad.hessian(loss, 1), dims)(params, *args)
    for k, (x, *rest_k) in enumerate(by_sample):
        expected = torch.autograd.functional.hessian(lambda x, rest=rest_k: loss(params, x, *rest), x)
        assert_close(hessians[k], expected)


@each_layer
@each_option
def test_layers(layer: str, option: str) -> None:
    module = made(layer, option)
    assert_as_by_sample(module, arguments(module, sequences(), state=False))


@each_layer
@pytest.mark.parametrize("option", ["all", "projected"])
def test_layers_with_an_initial_state(layer: str, option: str) -> None:
    module = made(layer, option)
    assert_as_by_sample(module, arguments(module, sequences(), state=True))


@each_layer
def test_layers_of_one_sequence(layer: str) -> None:
    assert_as_by_sample(made(layer, "both ways"), (sequences()[:, 0],))


@each_cell
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("state", [True, False])
def test_cells(cell: str, bias: bool, state: bool) -> None:
    module = CELLS[cell](FEATURES, HIDDEN, bias=bias, dtype=torch.float64)
    x = sequences()[:, :, 0]
    hx = [torch.randn(SAMPLES, BATCH, HIDDEN, dtype=torch.float64) for _ in range(2)]
    given = tuple(hx) if cell == "LSTMCell" else hx[0]
    assert_as_by_sample(module, (x, given) if state else (x,))
    assert_as_by_sample(module, (x[:, 0],))


@each_layer
@pytest.mark.parametrize("option", ["plain", "all", "projected"])
def test_packed_sequences(layer: str, option: str) -> None:
    module = made(layer, option)
    sizes = torch.tensor([4, 4, 2, 1])

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self, data: Tensor) -> Any:
            output, state = self.layer(rnn.PackedSequence(data, sizes))
            return output.data, state

    data = torch.randn(SAMPLES, int(sizes.sum()), FEATURES, dtype=torch.float64)
    assert_as_by_sample(Packed(), (data,))


@each_layer
def test_ensembles_have_weights_of_their_own(layer: str) -> None:
    modules = [made(layer, "all") for _ in range(SAMPLES)]
    params, _ = ad.stack_module_state(modules)
    x = sequences()[0]
    result = ad.vmap(lambda params: flat(ad.functional_call(modules[0], params, (x,))))(params)
    assert_close(result, torch.stack([flat(module(x)) for module in modules]))


@each_layer
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x, t: ad.vmap(lambda x, t: ad.jvp(f, (x,), (t,))[1])(x, t),
        lambda f, x, t: ad.vmap(lambda x, t: ad.hvp(f, (x,), (t,))[1])(x, t),
        lambda f, x, t: ad.vmap(ad.vmap(f, 1), 0)(x.transpose(1, 2)),
    ],
    ids=["jvp", "hvp", "vmap"],
)
def test_other_transforms_by_finite_differences(layer: str, transform: Any) -> None:
    module = made(layer, "deep")

    def func(x: Tensor) -> Tensor:
        return flat(module(x)).square().sum()

    x, t = sequences(), sequences()
    result = transform(func, x, t)
    for k in range(SAMPLES):
        if result.dim() == 1:
            expected = difference(func, x[k], t[k], 1e-5)
        elif result.shape == x.shape:
            expected = difference(ad.grad(func), x[k], t[k], 1e-5)
        else:
            expected = torch.stack([func(one) for one in x[k].transpose(0, 1).unbind(1)])
        torch.testing.assert_close(result[k], expected, rtol=1e-6, atol=1e-6)


@each_layer
def test_per_sample(layer: str) -> None:
    module = made(layer)
    params = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return flat(ad.functional_call(module, params, (x,))).square().sum()

    x = sequences()
    gradients = ad.per_sample(ad.grad(loss), (None, 0))(params, x)
    for k in range(SAMPLES):
        assert_close({name: one[k] for name, one in gradients.items()}, ad.grad(loss)(params, x[k]))


@each_layer
def test_dropout_draws_as_randomness_says(layer: str) -> None:
    module = LAYERS[layer](FEATURES, HIDDEN, num_layers=2, dropout=0.5)
    x = torch.randn(1, TIME, FEATURES).expand(SAMPLES, TIME, FEATURES)

    def func(x: Tensor) -> Tensor:
        output: Tensor = module(x)[0]
        return output

    with pytest.raises(RuntimeError, match="randomness"):
        ad.vmap(func)(x)
    same, different = (ad.vmap(func, randomness=which)(x).detach() for which in ("same", "different"))
    assert_close(same[0], same[1])
    assert not torch.allclose(different[0], different[1])
    module.eval()
    assert_close(ad.vmap(func)(x).detach(), torch.stack([func(one) for one in x]).detach())


@each_layer
def test_torchs_own_operation_runs_where_nothing_is_batched(
    layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError

    for operation in hooks.batch_overrides:
        monkeypatch.setitem(hooks.batch_overrides, operation, fail)
    module, x = made(layer), sequences()[0]

    def func(x: Tensor) -> Tensor:
        return flat(module(x)).square().sum()

    expected = torch.autograd.functional.jacobian(func, x)
    assert_close(torch.func.grad(func)(x).detach(), expected)
    assert_close(ad.vmap(lambda scale: ad.grad(func)(x) * scale)(torch.ones(2))[1].detach(), expected)
    with pytest.raises(AssertionError):
        ad.vmap(func)(x[None])
