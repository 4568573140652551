"""Modules as functions: the module is never touched, buffers go to the dict, states stack."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autodiff as ad
from scenarios import assert_close


def state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def scaled(module: nn.Module, factor: float = 2.0) -> dict[str, Tensor]:
    return {
        name: tensor.detach() * factor if tensor.is_floating_point() else tensor.clone()
        for name, tensor in state(module).items()
    }


def reference(module: nn.Module, given: dict[str, Tensor], *args: Any) -> Any:
    """A deep copy with the tensors loaded."""
    clone = copy.deepcopy(module)
    with torch.no_grad():
        for name, tensor in state(clone).items():
            if name in given:
                tensor.copy_(given[name])
    return clone(*args)


MODULES = {
    "linear": (lambda: nn.Linear(3, 2), (5, 3)),
    "nested": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2))), (5, 3)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), (5, 3)),
    "convolution": (lambda: nn.Conv2d(2, 3, 2), (1, 2, 4, 5)),
    "lstm": (lambda: nn.LSTM(3, 4, num_layers=2), (6, 1, 3)),
    "gru": (lambda: nn.GRU(3, 4, bidirectional=True), (6, 1, 3)),
}


@pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)
def test_call_with_other_tensors_equals_a_module_that_holds_them(make: Any, shape: tuple[int, ...]) -> None:
    module, x = make(), torch.randn(shape)
    before = {name: (id(tensor), tensor.detach().clone()) for name, tensor in state(module).items()}
    attributes = {name: set(vars(sub)) for name, sub in module.named_modules()}
    own = module(x)
    given = scaled(module)
    result = ad.functional_call(module, given, (x,))
    torch.testing.assert_close(result, reference(module, given, x))
    torch.testing.assert_close(module(x), own)
    assert {name: set(vars(sub)) for name, sub in module.named_modules()} == attributes
    for name, tensor in state(module).items():
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1])


@pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)
def test_gradient_by_given_parameters(make: Any, shape: tuple[int, ...]) -> None:
    module, x = make(), torch.randn(shape)

    def loss(params: dict[str, Tensor]) -> Tensor:
        out = ad.functional_call(module, params, (x,))
        return ((out[0] if isinstance(out, tuple) else out) ** 2).sum()

    result = ad.grad(loss)(dict(module.named_parameters()))
    module.zero_grad()
    out = module(x)
    ((out[0] if isinstance(out, tuple) else out) ** 2).sum().backward()
    assert list(result) == [name for name, _ in module.named_parameters()]
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(result[name].detach(), parameter.grad)


def test_arguments_and_keywords() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x: Any = 1.0, *rest: Any, k: Any = 0.0) -> Any:
            return self.w * x + sum(rest) + k

    module, given = Sum(), {"w": torch.tensor(3.0)}
    two = torch.tensor(2.0)
    for args, kwargs, expected in [
        (None, None, 3.0),
        (two, None, 6.0),
        ((two,), None, 6.0),
        ((two, two), {"k": 1.0}, 9.0),
        ((), {"x": two}, 6.0),
    ]:
        assert ad.functional_call(module, given, args, kwargs).item() == expected


def test_several_dicts() -> None:
    module = nn.Linear(3, 2)
    given = scaled(module)
    x = torch.randn(4, 3)
    parts = ({"weight": given["weight"]}, {"bias": given["bias"]})
    assert_close(ad.functional_call(module, parts, x), ad.functional_call(module, given, x))
    assert_close(
        ad.functional_call(module, {"bias": given["bias"]}, x).detach(),
        (x @ module.weight.T + given["bias"]).detach(),
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


@pytest.mark.parametrize("name", ["one.weight", "two.weight"])
def test_tied_weights_change_together(name: str) -> None:
    module, w, x = Tied(), torch.randn(3, 3), torch.randn(2, 3)
    assert_close(ad.functional_call(module, {name: w}, x), x @ w.T @ w.T)
    own = module.one.weight.detach()
    alone = ad.functional_call(module, {name: w}, x, tie_weights=False).detach()
    first, second = (w, own) if name == "one.weight" else (own, w)
    assert_close(alone, x @ first.T @ second.T)


def test_tied_weights_given_twice() -> None:
    module, w, x = Tied(), torch.randn(3, 3), torch.randn(2, 3)
    assert_close(ad.functional_call(module, {"one.weight": w, "two.weight": w}, x), x @ w.T @ w.T)
    with pytest.raises(ValueError, match=r"functional_call got multiple values for keys .*which are tied"):
        ad.functional_call(module, {"one.weight": w, "two.weight": w + 1}, x)


def test_module_in_two_places_stays_one() -> None:
    shared = nn.Linear(3, 3, bias=False)
    module, w, x = nn.Sequential(shared, shared), torch.randn(3, 3), torch.randn(2, 3)
    assert_close(ad.functional_call(module, {"0.weight": w}, x), x @ w.T @ w.T)


@pytest.mark.parametrize("transform", ["none", "grad", "jvp", "hessian"])
def test_batch_norm_updates_the_buffers_of_the_given_dict(transform: str) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().train()
    x = torch.randn(7, 3, dtype=torch.float64)
    params = {name: p.detach() for name, p in module.named_parameters()}
    original = {name: b.clone() for name, b in module.named_buffers()}
    expected = copy.deepcopy(module)
    expected(x)

    def loss(params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        buffers = {name: b.clone() for name, b in original.items()}
        out = ad.functional_call(module, (params, buffers), x)
        return (out**3).sum(), buffers

    if transform == "none":
        _, buffers = loss(params)
    elif transform == "jvp":
        _, _, buffers = ad.jvp(
            loss, (params,), ({k: torch.ones_like(p) for k, p in params.items()},), has_aux=True
        )
    else:
        _, buffers = getattr(ad, transform)(loss, has_aux=True)(params)
    assert_close(dict(buffers), dict(expected.named_buffers()))
    assert_close(dict(module.named_buffers()), original)


class Counter(nn.Module):
    """Assigns its buffer anew and keeps a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.calls += 1
        return x * self.count


def test_reassigned_buffer_arrives_in_the_given_dict_alone() -> None:
    module, given = nn.Sequential(Counter()), {"0.count": torch.tensor(4.0)}
    result = ad.functional_call(module, given, torch.ones(2))
    assert_close(result, torch.full((2,), 5.0))
    assert given["0.count"].item() == 5
    assert module[0].count.item() == 0
    assert module[0].calls == 0


def test_exception_inside_forward_leaves_the_module_alone() -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("inside")

    module = Failing(3, 2)
    weight = module.weight
    with pytest.raises(KeyError, match="inside"):
        ad.functional_call(module, scaled(module), torch.ones(3))
    assert module.weight is weight


def test_one_module_in_eight_threads() -> None:
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    before = {name: tensor.detach().clone() for name, tensor in state(module).items()}
    factors = [0.5 + k / 10 for k in range(40)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda f: ad.functional_call(module, scaled(module, f), x), factors))
    for factor, result in zip(factors, results, strict=True):
        assert_close(result.detach(), reference(module, scaled(module, factor), x).detach())
    assert_close({name: tensor.detach() for name, tensor in state(module).items()}, before)


@pytest.mark.parametrize(
    ("given", "options", "kind", "beats"),
    [
        (
            {"weight": torch.ones(2, 3)},
            {"strict": True},
            RuntimeError,
            ["Error(s) in reparametrizing", "Missing key(s): 'bias'"],
        ),
        (
            {"weight": torch.ones(2, 3), "bias": torch.ones(2), "x": torch.ones(1)},
            {"strict": True},
            RuntimeError,
            ["Unexpected key(s): 'x'"],
        ),
        (
            ({"weight": torch.ones(2, 3)}, {"weight": torch.ones(2, 3)}),
            {},
            ValueError,
            ["'weight'", "appeared in multiple dictionaries"],
        ),
        (
            3,
            {},
            ValueError,
            ["Expected parameter_and_buffer_dicts to be a dict, or a list/tuple of dicts", "int"],
        ),
    ],
    ids=["missing", "unknown", "twice", "no dict"],
)
def test_wrong_dicts(given: Any, options: dict[str, Any], kind: type[Exception], beats: list[str]) -> None:
    for library in (ad, torch.func):
        with pytest.raises(kind) as raised:
            library.functional_call(nn.Linear(3, 2), given, torch.ones(3), **options)
        if library is ad:
            assert all(beat in str(raised.value) for beat in ["functional_call: ", *beats])


def test_unknown_name_is_an_error() -> None:
    with pytest.raises((KeyError, AttributeError, RuntimeError), match="nowhere"):
        ad.functional_call(nn.Sequential(nn.Linear(3, 2)), {"nowhere.weight": torch.ones(1)}, torch.ones(3))


def test_parametrized_module() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double()
    given, x = scaled(module), torch.randn(4, 3, dtype=torch.float64)
    assert_close(ad.functional_call(module, given, x), torch.func.functional_call(module, given, x))


@pytest.mark.parametrize("library", [ad, torch.func], ids=lambda m: m.__name__)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_stacked_models_under_vmap(library: Any, chunk_size: int | None) -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval() for _ in range(3)]
    for k, model in enumerate(models):
        model[1].running_mean.fill_(float(k))
    params, buffers = ad.stack_module_state(models)
    theirs = torch.func.stack_module_state(models)
    for mine, other in zip((params, buffers), theirs, strict=True):
        assert list(mine) == list(other)
        for name in mine:
            assert torch.equal(mine[name], other[name])
            assert mine[name].requires_grad == other[name].requires_grad
            assert mine[name].is_leaf
    x = torch.randn(5, 3)
    base = copy.deepcopy(models[0]).to("meta")
    result = library.vmap(lambda p, b: ad.functional_call(base, (p, b), (x,)), chunk_size=chunk_size)(
        params, buffers
    )
    assert_close(result.detach(), torch.stack([model(x) for model in models]).detach())


@pytest.mark.parametrize(
    ("models", "beat"),
    [
        ([], "at least one model"),
        ([nn.Linear(2, 2), nn.Linear(2, 2).eval()], "same training/eval mode"),
        ([nn.Linear(2, 2), nn.ReLU()], "same class"),
        ([nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(requires_grad=False)], "same .requires_grad"),
    ],
    ids=["none", "mode", "class", "requires_grad"],
)
def test_models_that_cannot_be_stacked(models: list[nn.Module], beat: str) -> None:
    with pytest.raises(RuntimeError, match=beat) as raised:
        ad.stack_module_state(models)
    assert str(raised.value).startswith("stack_module_state: ")
    with pytest.raises(RuntimeError):
        torch.func.stack_module_state(models)


@pytest.mark.parametrize("transform", [ad.grad, lambda f: ad.vmap(ad.grad(f)), ad.jacfwd])
def test_stack_inside_a_transform(transform: Any) -> None:
    """Ensembles are stacked inside a loss, too."""
    models = [nn.Linear(2, 1, bias=False, dtype=torch.float64) for _ in range(3)]
    total = sum(model.weight.detach()[0] for model in models)
    x = torch.ones(2, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        params, _ = ad.stack_module_state(models)
        return ad.vmap(lambda p: p["weight"][0] @ x)(params).sum()

    result = transform(loss)(x if transform in (ad.grad, ad.jacfwd) else x[None])
    assert_close(result.detach().reshape(2), total)


# The loss of one sample.


def test_sample_loss_shows_the_module_a_batch_of_one() -> None:
    shapes = []

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)
            self.register_buffer("shift", torch.ones(2))

        def forward(self, x: Any) -> torch.Tensor:
            shapes.append((x["a"].shape, x["n"]))
            return self.layer(x["a"]) + self.shift

    module = Two()
    loss = ad.sample_loss(module, torch.nn.functional.cross_entropy)
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    params = {"layer.weight": torch.randn(2, 3)}
    each = ad.vmap(loss, in_dims=(None, {"a": 0, "n": None}, 0))(params, {"a": x, "n": 4}, y)
    logits = torch.nn.functional.linear(x, params["layer.weight"], module.layer.bias) + 1
    torch.testing.assert_close(each, torch.nn.functional.cross_entropy(logits, y, reduction="none"))
    assert shapes == [((1, 3), 4)]


@pytest.mark.parametrize(
    ("layer", "fine"),
    [
        (torch.nn.BatchNorm1d(3), False),
        (torch.nn.BatchNorm1d(3).eval(), True),
        (torch.nn.BatchNorm1d(3, track_running_stats=False).eval(), False),
        (torch.nn.LayerNorm(3), True),
    ],
)
def test_a_batch_s_statistics_are_no_sample_s(layer: torch.nn.Module, fine: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), layer)
    loss = ad.sample_loss(module, torch.nn.functional.mse_loss)
    args = dict(module.named_parameters()), torch.ones(2), torch.zeros(3)
    if fine:
        assert loss(*args).shape == ()
        return
    with pytest.raises(ad.errors.OptionError, match=r"sample_loss: 1 is a BatchNorm1d .* module\.eval\(\)"):
        loss(*args)


def test_sample_loss_of_a_list_of_parameters_names_the_dict() -> None:
    module = torch.nn.Linear(2, 3)
    loss = ad.sample_loss(module, torch.nn.functional.mse_loss)
    with pytest.raises(
        ad.errors.StructureError, match=r"params is a list\. .* dict\(module\.named_parameters\(\)\)"
    ):
        ad.per_sample(ad.grad(loss), in_dims=(None, 0, 0))(
            list(module.parameters()), torch.ones(4, 2), torch.ones(4, 3)
        )
