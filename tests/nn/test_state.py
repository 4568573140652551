"""functional_call(return_buffers=True): the updated buffers come back, under every transform, and none is touched."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import autodiff as ad
from scenarios import assert_close, map_tree

if TYPE_CHECKING:
    from collections.abc import Callable

    State = dict[str, Tensor]

# Six samples, each a batch of seven vectors of three numbers.
X = torch.randn(6, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Statistics(nn.Module):
    """Writes its buffers in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
        self.register_buffer("ema", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("top", torch.full((3,), -1e3, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("positive", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("total", torch.ones(3, dtype=torch.float64))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        self.ema.mul_(0.9).add_(0.1 * x.mean(0))
        self.top.copy_(torch.maximum(self.top, x.amax(0)))
        self.count += 1
        self.positive += (x > 0).sum()
        self.total = 2 * self.total + x.sum(0)
        self.last = x[-1]
        return x * self.w


def statistics(old: State, x: Tensor) -> State:
    return {
        "ema": 0.9 * old["ema"] + 0.1 * x.mean(0),
        "top": torch.maximum(old["top"], x.amax(0)),
        "count": old["count"] + 1,
        "positive": old["positive"] + (x > 0).sum(),
        "total": 2 * old["total"] + x.sum(0),
        "last": x[-1],
    }


def running(old: State, x: Tensor, prefix: str = "") -> State:
    """BatchNorm's: momentum 0.1, and the variance with n - 1 below."""
    mean, var, count = (old[prefix + name] for name in ("running_mean", "running_var", "num_batches_tracked"))
    return {
        prefix + "running_mean": 0.9 * mean + 0.1 * x.mean(0),
        prefix + "running_var": 0.9 * var + 0.1 * x.var(0, correction=1),
        prefix + "num_batches_tracked": count + 1,
    }


def cumulative(old: State, x: Tensor) -> State:
    count = old["num_batches_tracked"] + 1
    weight = 1 / count
    return {
        "running_mean": (1 - weight) * old["running_mean"] + weight * x.mean(0),
        "running_var": (1 - weight) * old["running_var"] + weight * x.var(0, correction=1),
        "num_batches_tracked": count,
    }


def of_instances(old: State, x: Tensor) -> State:
    """InstanceNorm1d of one unbatched sample with seven channels; it does not count."""
    return {
        "running_mean": 0.9 * old["running_mean"] + 0.1 * x.mean(1),
        "running_var": 0.9 * old["running_var"] + 0.1 * x.var(1, correction=1),
        "num_batches_tracked": old["num_batches_tracked"],
    }


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    after: Callable[[State, Tensor], State]


CASES = {
    "batch norm": Case(lambda: nn.BatchNorm1d(3), running),
    "after a layer": Case(
        lambda: nn.Sequential(nn.Identity(), nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Tanh()),
        lambda old, x: running(old, x, "1."),
    ),
    "without momentum": Case(lambda: nn.BatchNorm1d(3, momentum=None), cumulative),
    "instance norm": Case(lambda: nn.InstanceNorm1d(7, affine=True, track_running_stats=True), of_instances),
    "custom": Case(Statistics, statistics),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

WithBuffers = "Callable[[State], tuple[Tensor, State]]"


def ones_like(params: State) -> State:
    return {name: torch.ones_like(tensor) for name, tensor in params.items()}


def squares(grads: State, buffers: State) -> tuple[Tensor, State]:
    return sum(grad.square().sum() for grad in grads.values()), buffers


def of_library(lib: Any) -> dict[str, Callable[..., State]]:
    """Each gives the buffers that come out of a derivative of a function with aux."""
    aux = {"has_aux": True}
    return {
        "grad": lambda f, p: lib.grad(f, **aux)(p)[1],
        "grad_and_value": lambda f, p: lib.grad_and_value(f, **aux)(p)[1][1],
        "vjp": lambda f, p: lib.vjp(f, p, **aux)[2],
        "jvp": lambda f, p: lib.jvp(f, (p,), (ones_like(p),), **aux)[2],
        "jacrev": lambda f, p: lib.jacrev(f, **aux)(p)[1],
        "jacfwd": lambda f, p: lib.jacfwd(f, **aux)(p)[1],
        "grad of grad": lambda f, p: lib.grad(lambda q: squares(*lib.grad(f, **aux)(q)), **aux)(p)[1],
        "jvp of grad": lambda f, p: lib.jvp(lib.grad(f, **aux), (p,), (ones_like(p),), **aux)[2],
        "jacfwd of jacrev": lambda f, p: lib.jacfwd(lib.jacrev(f, **aux), **aux)(p)[1],
        "jacrev of jacfwd": lambda f, p: lib.jacrev(lib.jacfwd(f, **aux), **aux)(p)[1],
        "jacfwd of jacfwd": lambda f, p: lib.jacfwd(lib.jacfwd(f, **aux), **aux)(p)[1],
    }


MODES = [f"{outer}-over-{inner}" for outer in ("reverse", "forward") for inner in ("reverse", "forward")]
TRANSFORMS: dict[str, Callable[..., State]] = {
    "none": lambda f, p: f(p)[1],
    **of_library(ad),
    **{f"torch.func.{name}": apply for name, apply in of_library(torch.func).items()},
    "value_and_grad": lambda f, p: ad.value_and_grad(f, has_aux=True)(p)[0][1],
    "hvp": lambda f, p: ad.hvp(f, (p,), (ones_like(p),), has_aux=True)[2],
    "jacfwd-1": lambda f, p: ad.jacfwd(f, has_aux=True, chunk_size=1)(p)[1],
    "jacfwd-2": lambda f, p: ad.jacfwd(f, has_aux=True, chunk_size=2)(p)[1],
    **{f"hessian-{m}": lambda f, p, m=m: ad.hessian(f, has_aux=True, mode=m)(p)[1] for m in MODES},
}
each_transform = pytest.mark.parametrize("apply", TRANSFORMS.values(), ids=TRANSFORMS)


def loss_with_buffers(module: nn.Module, *, given: bool) -> Callable[..., tuple[Tensor, State]]:
    def loss(params: State, buffers: State, x: Tensor) -> tuple[Tensor, State]:
        dicts = (params, buffers) if given else params
        output, new = ad.functional_call(module, dicts, (x,), return_buffers=True)
        return output.square().sum(), new

    return loss


def state(module: nn.Module) -> tuple[State, State]:
    params = {name: tensor.detach() for name, tensor in module.named_parameters()}
    return params, {name: tensor.clone() for name, tensor in module.named_buffers()}


@each_case
@each_transform
@pytest.mark.parametrize("given", [True, False], ids=["given", "own"])
def test_buffers_that_come_back_are_right(case: Case, apply: Any, given: bool) -> None:
    module = case.make().double().train()
    params, buffers = state(module)
    old = map_tree(lambda tensor: tensor + 1, buffers, buffers) if given else buffers
    passed = dict(old)
    loss = loss_with_buffers(module, given=given)
    result = apply(lambda p: loss(p, passed, X[0]), params)
    assert_close(result, case.after(old, X[0]))
    assert_close(dict(module.named_buffers()), buffers)
    assert all(passed[name] is old[name] for name in old)
    assert_close(passed, map_tree(lambda tensor: tensor + given, buffers, buffers))


@each_case
@each_transform
@pytest.mark.parametrize("vmap", [ad.vmap, torch.func.vmap], ids=["ours", "torch's"])
def test_each_sample_has_buffers_of_its_own(case: Case, apply: Any, vmap: Any) -> None:
    """Where all start from the same ones, and where each brings its own."""
    module = case.make().double().train()
    params, buffers = state(module)
    loss = loss_with_buffers(module, given=True)
    shared = vmap(lambda x: apply(lambda p: loss(p, buffers, x), params))(X)
    assert_close(
        shared,
        map_tree(
            lambda *each: torch.stack(each),
            *[case.after(buffers, x) for x in X[:1]],
            *[case.after(buffers, x) for x in X],
        ),
    )
    each = [map_tree(lambda tensor, k=k: tensor + k, buffers, buffers) for k in range(6)]
    stacked = map_tree(lambda *tensors: torch.stack(tensors), buffers, *each)
    if case is CASES["without momentum"]:
        return  # the layer asks for the number of batches, which the samples then have not in common
    brought = vmap(lambda b, x: apply(lambda p: loss(p, b, x), params))(stacked, X)
    expected = [case.after(b, x) for b, x in zip(each, X, strict=True)]
    assert_close(brought, map_tree(lambda *tensors: torch.stack(tensors), expected[0], *expected))
    assert_close(dict(module.named_buffers()), buffers)


@pytest.mark.parametrize("name", ["grad", "jvp", "jacfwd"])
def test_torchs_functional_call_refuses(name: str) -> None:
    """Unless the function clones the buffers itself."""
    module = CASES["after a layer"].make().double()
    params, buffers = state(module)

    def loss(p: State) -> tuple[Tensor, State]:
        return torch.func.functional_call(module, (p, buffers), (X[0],)).square().sum(), buffers

    with pytest.raises(RuntimeError, match="in-place"):
        of_library(torch.func)[name](loss, params)


@pytest.mark.parametrize("name", ["batch norm", "custom"])
def test_gradients_of_each_sample_are_those_of_plain_autograd(name: str) -> None:
    module = CASES[name].make().double().train()
    params, buffers = state(module)
    loss = loss_with_buffers(module, given=True)
    grads, _ = ad.vmap(ad.grad(loss, has_aux=True), in_dims=(None, None, 0))(params, buffers, X)
    hessians, _ = ad.vmap(ad.hessian(lambda p, x: loss(p, buffers, x), has_aux=True), in_dims=(None, 0))(
        params, X
    )
    for k, x in enumerate(X):
        alone = copy.deepcopy(module)
        names, leaves = zip(*alone.named_parameters(), strict=True)
        plain = torch.autograd.grad(alone(x).square().sum(), leaves)
        assert_close({n: grad[k] for n, grad in grads.items()}, dict(zip(names, plain, strict=True)))
        weight = leaves[0]

        def of_weight(
            w: Tensor, x: Tensor = x, alone: nn.Module = alone, rest: tuple[Tensor, ...] = leaves[1:]
        ) -> Tensor:
            if name == "custom":
                return (x * w).square().sum()
            return nn.functional.batch_norm(x, None, None, w, rest[0].detach(), training=True).square().sum()

        exact = torch.autograd.functional.hessian(of_weight, weight.detach())
        assert_close(hessians[names[0]][names[0]][k], exact)


def test_vmap_over_an_ensemble_and_over_samples() -> None:
    models = [CASES["after a layer"].make().double().train() for _ in range(4)]
    params, buffers = ad.stack_module_state(models)
    params = {name: tensor.detach() for name, tensor in params.items()}
    loss = loss_with_buffers(models[0], given=True)
    of_samples = ad.vmap(ad.grad(loss, has_aux=True), in_dims=(None, None, 0))
    _, new = ad.vmap(of_samples, in_dims=(0, 0, None))(params, buffers, X)
    old = state(models[0])[1]
    after = [CASES["after a layer"].after(old, x) for x in X]
    stacked = map_tree(
        lambda *tensors: torch.stack(tensors).expand(4, *[-1] * (tensors[0].dim() + 1)), old, *after
    )
    assert_close(new, stacked)


def test_steps_of_training_carry_the_buffers() -> None:
    """As a loop of jax's would; a module that trains in place ends with the same numbers."""
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().train()
    plain = copy.deepcopy(module)
    params, buffers = state(module)
    step = ad.grad(loss_with_buffers(module, given=True), has_aux=True)
    for x in X:
        grads, buffers = step(params, buffers, x)
        params = {name: params[name] - 0.1 * grads[name] for name in params}
        plain.zero_grad()
        plain(x).square().sum().backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.sub_(0.1 * parameter.grad)
    assert_close(buffers, dict(plain.named_buffers()))
    assert_close(params, {name: tensor.detach() for name, tensor in plain.named_parameters()})


def test_samples_that_differ_by_their_random_numbers_alone() -> None:
    """Nothing that comes in is batched, and what is written is."""
    module = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).double().train()
    params, buffers = state(module)
    seen: list[Tensor] = []
    module[0].register_forward_hook(lambda module, args, output: seen.append(ad.debug_unwrap(output)))

    def new_buffers(_: Tensor) -> State:
        return ad.functional_call(module, (params, buffers), (X[0],), return_buffers=True)[1]

    result = ad.vmap(new_buffers, randomness="different")(torch.zeros(5))
    expected = [running(buffers, x, "1.") for x in seen[0]]
    assert_close(result, map_tree(lambda *tensors: torch.stack(tensors), buffers, *expected))


def test_buffers_may_carry_derivatives() -> None:
    """They are what forward made them, as in jax: an average of activations depends on the parameters."""

    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.register_buffer("assigned", torch.zeros(3, dtype=torch.float64))
            self.register_buffer("written", torch.zeros(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            activation = (x * self.w).mean(0)
            self.assigned = self.assigned + activation
            self.written.add_(activation**2)
            return activation

    module = Average()
    params, _ = state(module)

    def new(params: State) -> State:
        return ad.functional_call(module, params, (X[0],), return_buffers=True)[1]

    mean = X[0].mean(0)
    expected = {"assigned": {"w": torch.diag(mean)}, "written": {"w": torch.diag(2 * mean**2)}}
    for transform in (ad.jacrev, ad.jacfwd, torch.func.jacrev, torch.func.jacfwd):
        assert_close(transform(new)(params), expected)
    # Of a derivative's aux, nothing is left.
    _, aux = ad.grad(lambda p: (p["w"].sum(), new(p)), has_aux=True)(params)
    assert not any(buffer.requires_grad for buffer in aux.values())


def test_derivative_by_the_buffers() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            result = (x - self.mean).square().sum()
            self.mean.mul_(2)
            return result

    mean = torch.arange(3.0, dtype=torch.float64)

    def loss(mean: Tensor) -> tuple[Tensor, State]:
        return ad.functional_call(Shift(), {"mean": mean}, (X[0],), return_buffers=True)

    for transform in (ad.grad, ad.jacfwd, torch.func.grad):
        slope, new = transform(loss, has_aux=True)(mean)
        assert_close(slope, -2 * (X[0] - mean).sum(0))
        assert_close(new, {"mean": 2 * mean})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.zeros(2))
        self.register_buffer("two", self.one)
        self.inner = nn.Sequential(nn.BatchNorm1d(3, affine=False))
        self.again = self.inner

    def forward(self, x: Tensor) -> Tensor:
        self.one.add_(1)
        self.two.add_(10)
        return self.inner(x)


def test_tied_buffers() -> None:
    module, x = Tied(), X[0].float()
    given = {"two": torch.full((2,), 5.0)}
    _, tied = ad.functional_call(module, given, (x,), return_buffers=True)
    assert tied["one"].tolist() == [16, 16]
    assert list(tied) == [name for name, _ in module.named_buffers()]
    _, untied = ad.functional_call(module, given, (x,), tie_weights=False, return_buffers=True)
    assert (untied["one"].tolist(), untied["two"].tolist()) == ([1, 1], [15, 15])
    assert list(untied) == [name for name, _ in module.named_buffers(remove_duplicate=False)]
    for prefix in ("inner.0.", "again.0."):
        assert_close(untied[prefix + "running_mean"], 0.1 * x.mean(0))
    assert given["two"].tolist() == [5, 5]
    assert (module.one is module.two, module.one.tolist()) == (True, [0, 0])


def test_module_without_buffers_and_names_that_are_none_of_its_own() -> None:
    module, x = nn.Linear(3, 2), torch.ones(3)
    output, buffers = ad.functional_call(module, {"other": x}, (x,), return_buffers=True)
    assert_close(output, module(x))
    assert buffers == {}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ad.functional_call(module, {"other": x}, (x,), strict=True, return_buffers=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_buffers_under_modes(mode: Any) -> None:
    module = nn.BatchNorm1d(3).double()
    _, buffers = state(module)
    with mode():
        _, new = ad.functional_call(module, {}, (X[0],), return_buffers=True)
        _, each = ad.vmap(lambda x: ad.functional_call(module, {}, (x,), return_buffers=True))(X)
    assert_close(new, running(buffers, X[0]))
    assert_close(each["running_mean"], 0.1 * X.mean(1))
