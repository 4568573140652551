"""functional_call on modules that keep a way of their own to themselves or to a submodule."""

from __future__ import annotations

import copy
import functools
import gc
import queue
import random
import signal
import threading
import time
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autodiff as ad
from autodiff.errors import BufferWarning, CloneError, StructureError
from scenarios import assert_close

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROUNDS = 2
X = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]])


class Linear(nn.Module):
    """A layer in an attribute, which ``forward`` reaches in the way that ``arrange`` gives it."""

    def __init__(self, arrange: Callable[[Linear], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.way = arrange(self)

    def through(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x)


class Holding(nn.Module):
    """The layer in a container or object, and ``take``, which finds it there."""

    def __init__(self, hold: Callable[[nn.Module], Any], take: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.held, self.take = hold(self.inner), take

    def forward(self, x: Tensor) -> Tensor:
        return self.take(self.held)(x)


@dataclass(frozen=True)
class Pair:
    layer: nn.Module
    scale: float


class InSlots:
    __slots__ = ("__layer",)

    def __init__(self, layer: nn.Module) -> None:
        self.__layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.__layer(x)


class Callee:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module.inner(x)


class Slotted(nn.Module):
    __slots__ = ("layers", "scale")

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(3, 3), 2.0
        self.layers = [self.inner]

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layers[0](x)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.inner.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept = output

    def forward(self, x: Tensor) -> Tensor:
        self.inner(x)
        return self.kept


class Child(nn.Module):
    """A layer that knows its parent without being its parent's parent."""

    def __init__(self, parent: nn.Module, refer: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.parent = refer(parent)

    def forward(self, x: Tensor) -> Tensor:
        parent = self.parent() if isinstance(self.parent, weakref.ref) else self.parent
        return parent.inner(x)


class Family(nn.Module):
    def __init__(self, refer: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.inner, self.child = nn.Linear(3, 3), Child(self, refer)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def countdown(module: Linear) -> Callable[[Tensor], Tensor]:
    """A closure that leads to itself and to the module."""

    def step(x: Tensor, rest: int = 2) -> Tensor:
        return step(module.inner(x), rest - 1) if rest else x

    return step


def by_a_cache(module: Linear) -> Callable[[Tensor], Tensor]:
    weight = functools.lru_cache(lambda: module.inner.weight)
    weight()  # remembers the module's own
    return lambda x: x @ weight()


def by_its_weight(module: Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = module.inner.weight, module.inner.bias
    return lambda x: nn.functional.linear(x, weight, bias)


def by_its_layer(module: Linear) -> Callable[[Tensor], Tensor]:
    inner = module.inner
    return lambda x: inner(x)  # noqa: PLW0108  a closure is the case


def by_a_weak_method(module: Linear) -> Callable[[Tensor], Tensor]:
    through = weakref.WeakMethod(module.through)
    return lambda x: through()(x)  # noqa: PLW0108  the closure is to hold the reference


def in_an_array(layer: nn.Module) -> Any:
    layers = np.empty((2, 1), dtype=object)
    layers[1, 0] = layer
    return layers


def in_a_weak_dictionary(layer: nn.Module) -> Any:
    layers: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()
    layers["a"] = layer
    return layers


def far_away(layer: nn.Module) -> Any:
    """Behind 300 objects and lists, one in another."""
    held: Any = layer
    for _ in range(150):
        held = SimpleNamespace(inner=[held])
    return held


def at_the_end(held: Any) -> nn.Module:
    while not isinstance(held, nn.Module):
        held = held.inner[0]
    return held


def layer_of(held: Any) -> nn.Module:
    return held.layer


def first_of(held: Any) -> nn.Module:
    return held[0]


MODULES = {
    "in a list": lambda: Holding(lambda m: [m], first_of),
    "in a tuple of lists": lambda: Holding(lambda m: ([m], 3), lambda held: held[0][0]),
    "in a dict": lambda: Holding(lambda m: {"a": m}, lambda held: held["a"]),
    "as a key": lambda: Holding(lambda m: {m: 1}, lambda held: next(iter(held))),
    "in a set": lambda: Holding(lambda m: {m}, lambda held: next(iter(held))),
    "in a dataclass": lambda: Holding(lambda m: Pair(m, 1.0), layer_of),
    "in a namespace": lambda: Holding(lambda m: SimpleNamespace(layer=m), layer_of),
    "in an object array": lambda: Holding(in_an_array, lambda held: held[1, 0]),
    "in a weak dictionary": lambda: Holding(in_a_weak_dictionary, lambda held: held["a"]),
    "in a weak set": lambda: Holding(lambda m: weakref.WeakSet([m]), lambda held: next(iter(held))),
    "as a weak key": lambda: Holding(
        lambda m: weakref.WeakKeyDictionary({m: 1}), lambda held: next(iter(held))
    ),
    "in a context variable": lambda: Holding(
        lambda m: ContextVar("layer", default=m), lambda held: held.get()
    ),
    "among much": lambda: Holding(lambda m: [m, *range(5000)], first_of),
    "far away": lambda: Holding(far_away, at_the_end),
    "in slots": lambda: Holding(InSlots, lambda held: held),
    "bound method": lambda: Linear(lambda m: m.through),
    "closure": lambda: Linear(lambda m: lambda x: m.inner(x)),  # noqa: PLW0108  a closure is the case
    "closure over a layer": lambda: Linear(by_its_layer),
    "closure over tensors": lambda: Linear(by_its_weight),
    "closure over itself": lambda: Linear(countdown),
    "default": lambda: Linear(lambda m: lambda x, inner=m.inner: inner(x)),
    "keyword default": lambda: Linear(lambda m: lambda x, *, inner=m.inner: inner(x)),
    "partial": lambda: Linear(lambda m: functools.partial(m.through)),
    "partial of a function": lambda: Linear(lambda m: functools.partial(nn.Linear.forward, m.inner)),
    "cache": lambda: Linear(by_a_cache),
    "method of a slot": lambda: Linear(lambda m: m.inner.__call__),
    "callable object": lambda: Linear(Callee),
    "weak reference": lambda: Family(weakref.ref),
    "weak proxy": lambda: Family(weakref.proxy),
    "weak method": lambda: Linear(by_a_weak_method),
    "slots": Slotted,
    "hook": Hooked,
    "traced by fx": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3))),
    "plain": lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh()),
    "recurrent": lambda: nn.GRU(3, 2),
    "scripted layer": lambda: Outer(torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))),
    "traced layer": lambda: Outer(torch.jit.trace(nn.Linear(3, 3), X)),
    "compiled": lambda: torch.compile(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), backend="eager"),
    "compiled layer": lambda: Outer(torch.compile(nn.Linear(3, 3), backend="eager")),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
}
each_kind = pytest.mark.parametrize("name", MODULES)


def energy(output: Any) -> Tensor:
    return (output[0] if isinstance(output, tuple) else output).square().sum()


def other_params(module: nn.Module, factor: float = 1.5) -> dict[str, Tensor]:
    return {key: factor * value.detach() for key, value in module.named_parameters()}


def expected(name: str, params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The energy and its gradients, by a module of the kind that holds the parameters itself."""
    module = MODULES[name]()
    if name == "cache":
        module = Linear(lambda m: lambda x: x @ m.inner.weight)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(params[key])
    value = energy(module(X))
    keys, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(value, parameters, materialize_grads=True)
    return value.detach(), dict(zip(keys, grads, strict=True))


def everything(module: nn.Module) -> dict[str, Any]:
    """Every attribute of every submodule: who it is, what it holds, and the numbers of tensors."""

    def look(value: Any, deep: int = 4) -> Any:
        if isinstance(value, Tensor):
            return id(value), value.detach().clone().tolist()
        if isinstance(value, dict) and deep:
            return id(value), [(look(k, deep - 1), look(v, deep - 1)) for k, v in value.items()]
        if isinstance(value, list | tuple | set) and deep:
            return id(value), [look(item, deep - 1) for item in value]
        return id(value)

    seen = {}
    for path, sub in module.named_modules():
        slots = {name: getattr(sub, name) for name in getattr(type(sub), "__slots__", ())}
        held = {} if isinstance(sub, torch.jit.ScriptModule) else {**vars(sub), **slots}
        seen[path] = type(sub), {name: look(value) for name, value in held.items()}
    return seen


@each_kind
def test_gradients_are_those_of_the_parameters_given(name: str) -> None:
    module = MODULES[name]()
    params, before = other_params(module), everything(module)
    value, grads = expected(name, params)

    def of_params(params: dict[str, Tensor]) -> Tensor:
        return energy(ad.functional_call(module, params, (X,)))

    assert_close(of_params(params), value, loose=True)
    assert_close(ad.grad(of_params)(params), grads, loose=True)
    assert_close(torch.func.grad(of_params)(params), grads, loose=True)
    assert any(grad.abs().sum() > 0 for grad in grads.values())
    assert everything(module) == before


@pytest.mark.parametrize("name", ["closure over tensors", "cache"])
def test_torchs_functional_call_does_not_find_tensors_in_closures(name: str) -> None:
    """Silently: the gradient is zero."""
    module = MODULES[name]()
    grads = torch.func.grad(lambda p: energy(torch.func.functional_call(module, p, (X,))))(
        other_params(module)
    )
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads.values())


@each_kind
def test_every_kind_in_threads(name: str) -> None:
    module, before = MODULES[name](), None
    factors = [0.5 + k / 4 for k in range(8)]
    before = everything(module)
    own = other_params(module, 1.0)

    def work(factor: float) -> Tensor:
        params = {key: factor * value for key, value in own.items()}
        return energy(ad.functional_call(module, params, (X,))).detach()

    work(1.0)  # what is compiled is compiled here
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, factors))
    for factor, result in zip(factors, results, strict=True):
        params = {key: factor * value for key, value in own.items()}
        assert_close(result, expected(name, params)[0], loose=True)
    assert everything(module) == before


@pytest.mark.parametrize("name", ["plain", "hooked"])
def test_threads_run_one_module_at_the_same_time(name: str) -> None:
    """Each waits inside ``forward`` for the other."""
    both = threading.Barrier(2)

    class Waiting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            both.wait(10)
            return super().forward(x)

    module = Waiting(3, 1, bias=False)
    if name == "hooked":
        module.register_forward_hook(lambda *_: module.training)
        module.register_forward_pre_hook(lambda m, _: setattr(m, "seen", True))
    weights = [torch.ones(1, 3), 2 * torch.ones(1, 3)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda w: ad.functional_call(module, {"weight": w}, (X,)), weights)
    if name == "plain":
        assert_close(first.detach(), X.sum(1, keepdim=True))
        assert_close(second.detach(), 2 * X.sum(1, keepdim=True))
    assert not hasattr(module, "seen")


def test_torchs_functional_call_in_two_threads_uses_one_weight_for_both() -> None:
    both = threading.Barrier(2)

    class Waiting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            both.wait(10)
            result = super().forward(x)
            both.wait(10)
            return result

    module, weights = Waiting(3, 1, bias=False), [torch.ones(1, 3), 2 * torch.ones(1, 3)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda w: torch.func.functional_call(module, {"weight": w}, (X,)), weights)
    assert torch.equal(first, second)


class Meddler(nn.Module):
    """Changes whatever it has."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.register_buffer("written", torch.zeros(3))
        self.register_buffer("assigned", torch.zeros(3))
        self.register_buffer("missing", None)
        self.inner = nn.BatchNorm1d(3)
        table = {"a": [1, {2}]}
        self.first = lambda: (self, table)  # leads to the table before the attribute does
        self.layers, self.table, self.names = [self.inner], table, {"x"}
        self.calls, self.gone, self.plain, self.fails = 0, 1, torch.zeros(3), fails
        self.push = self.layers.append

    def forward(self, x: Tensor) -> Tensor:
        self.written.add_(x.detach()[0])
        self.assigned, self.missing = self.assigned + 1, x
        self.w, self.plain = nn.Parameter(torch.zeros(3)), self.plain + 1
        self.calls += 1
        del self.gone
        self.push(nn.ReLU())
        itself, table = self.first()
        assert itself is self
        assert table is self.table
        table["a"].append(3)
        self.table["a"][1].add(4)
        self.names.add("y")
        self.new = self.inner
        self.extra = nn.Linear(2, 2)
        self.inner.extra = nn.Linear(2, 2)
        self.register_forward_hook(lambda *_: None)
        self.inner.register_buffer("more", torch.ones(1))
        self.eval()
        self.inner.train()
        result = self.layers[0](x) * self.w
        self.inner = None
        if self.fails:
            raise KeyError("inside")
        return result


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("given", ["nothing", "parameters", "all"])
@pytest.mark.filterwarnings("ignore::autodiff.errors.BufferWarning")
def test_whatever_forward_does_the_module_stays_as_it_was(given: str, tie_weights: bool, fails: bool) -> None:
    module = Meddler(fails=fails)
    params, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    given_tensors = {"nothing": {}, "parameters": params, "all": {**params, **copy.deepcopy(buffers)}}[given]
    before = everything(module)
    for options in ({}, {"return_buffers": True}):
        call = functools.partial(
            ad.functional_call, module, dict(given_tensors), (X,), tie_weights=tie_weights
        )
        if fails:
            with pytest.raises(KeyError, match="inside"):
                call(**options)
        else:
            call(**options)
        assert everything(module) == before
    gc.collect()
    assert everything(module) == before


def test_torchs_functional_call_leaves_traces() -> None:
    module = Meddler(fails=False)
    before = everything(module)
    torch.func.functional_call(module, dict(module.named_parameters()), (X,))
    assert everything(module) != before


def test_buffers_that_are_lost_are_named() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.InstanceNorm1d(2, track_running_stats=True))
    names = "1.num_batches_tracked"
    with pytest.warns(BufferWarning, match=rf"wrote to its buffers .*{names}.*return_buffers=True") as caught:
        ad.functional_call(nn.Sequential(*module[:2]), {}, (X,))
    assert caught[0].filename == __file__
    with pytest.warns(BufferWarning, match="running_mean"):
        ad.functional_call(module[2], {}, (X[None],))
    # Nothing is written, or what is written is given, or returned.
    ad.functional_call(module[1].eval(), {}, (X,))
    ad.functional_call(module[1].train(), {k: v.clone() for k, v in module[1].named_buffers()}, (X,))
    ad.functional_call(module[1], {}, (X,), return_buffers=True)


def test_module_outside_the_tree_is_not_touched_either() -> None:
    """A list hides it from torch; its buffers are written on its clone."""
    norm = nn.BatchNorm1d(3)
    module = Linear(lambda m: [norm])
    module.way = None
    module.hidden = [norm]
    module.forward = lambda x: module.hidden[0](module.inner(x))
    before = everything(norm)
    ad.functional_call(module, other_params(module), (X,))
    assert everything(norm) == before


class Observer:
    """Not a module: it looks at one, and writes down what it sees."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.seen, self.log, self.last = module, 0, [], None
        module.register_forward_hook(self.look)

    def look(self, module: nn.Module, args: Any, output: Tensor) -> None:
        assert self.module is module
        self.seen += 1
        self.last = output
        self.log.append(output)


def test_what_an_object_outside_records_arrives() -> None:
    """Whether the object had to be copied, since it holds the module, makes no difference."""
    module, outputs = nn.Linear(3, 2), []
    observer = Observer(module)
    module.register_forward_hook(lambda *call: outputs.append(call[-1]))
    results = [ad.functional_call(module, other_params(module), (X,)) for _ in range(2)]
    assert observer.module is module
    assert observer.seen == 2
    assert observer.last is results[1]
    assert all(one is other for one, other in zip(observer.log, results, strict=True))
    assert all(one is other for one, other in zip(outputs, results, strict=True))


def test_objects_that_do_not_lead_back_are_shared() -> None:
    class Knows(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert self.config is config
            assert self.lock is lock
            assert self.stream is stream
            assert self.other is other
            return super().forward(x)

    config, lock, stream, other = SimpleNamespace(a=[1]), threading.Lock(), iter([1]), nn.functional.relu
    module = Knows(3, 2)
    module.config, module.lock, module.stream, module.other = config, lock, stream, other
    ad.functional_call(module, other_params(module), (X,))


def test_a_module_near_by_is_found_beside_much_data() -> None:
    module = Holding(
        lambda m: SimpleNamespace(data=[SimpleNamespace(k=k) for k in range(50_000)], layer=m), layer_of
    )
    params = other_params(module)
    assert_close(
        ad.functional_call(module, params, (X,)), X @ params["inner.weight"].T + params["inner.bias"]
    )


def test_an_exception_kept_in_an_attribute_leads_nowhere() -> None:
    """Its traceback holds the frames of all who called, and those hold the module."""

    def fail(module: nn.Module) -> None:
        raise KeyError("kept")

    module = nn.Linear(3, 3)
    try:
        fail(module)
    except KeyError as error:
        module.kept = error
    ad.functional_call(module, other_params(module), (X,))


class Record:
    """A tree of objects, with a layer in its last leaf."""

    def __init__(self, layer: nn.Module, depth: int = 6) -> None:
        self.layer = layer
        self.parts = [Record(nn.Identity(), depth - 1) for _ in range(4)] if depth else []
        if depth:
            self.parts.append(Record(layer, depth - 1))

    def last(self) -> nn.Module:
        return self.parts[-1].last() if self.parts else self.layer


class InAQueue:
    def __init__(self, layer: nn.Module) -> None:
        self.queue: queue.SimpleQueue[nn.Module] = queue.SimpleQueue()
        self.queue.put(layer)

    def pass_on(self) -> nn.Module:
        layer = self.queue.get()
        self.queue.put(layer)
        return layer


def in_a_queue(layer: nn.Module) -> Any:
    return InAQueue(layer)


GLOBAL: list[nn.Module] = []


def by_a_global_name() -> nn.Module:
    class Global(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return GLOBAL[0].inner(x)

    GLOBAL[:] = [Global()]
    return GLOBAL[0]


def by_a_global_name_in(module: Linear) -> Callable[[Tensor], Tensor]:
    GLOBAL[:] = [module]
    return lambda x: GLOBAL[0].inner(x)  # noqa: PLW0108  the global name is the case


def by_an_enclosing_function() -> nn.Module:
    layer = nn.Linear(3, 3)

    class Enclosed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, x: Tensor) -> Tensor:
            return layer(x)

    return Enclosed()


def in_its_class() -> nn.Module:
    class Classy(nn.Module):
        layers: ClassVar[list[nn.Module]] = []

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.layers.append(self.inner)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    return Classy()


NOT_FOLLOWED = {
    "last of many": lambda: Holding(lambda m: [*range(5000), m], lambda held: held[-1]),
    "last of many values": lambda: Holding(
        lambda m: {**dict.fromkeys(range(5000)), "a": m}, lambda held: held["a"]
    ),
    "in many objects": lambda: Holding(
        lambda m: [SimpleNamespace(layer=m) for _ in range(5000)], lambda held: held[-1].layer
    ),
    "last of a large array": lambda: Holding(
        lambda m: np.array([*range(5000), m], dtype=object), lambda held: held[-1]
    ),
    "in an array of records": lambda: Holding(
        lambda m: np.array([(1, m)], dtype=[("k", int), ("layer", object)]), lambda held: held["layer"][0]
    ),
    "beyond the search": lambda: Holding(lambda m: Record(m, 5), lambda held: held.last()),
    "queue in an object": lambda: Holding(in_a_queue, lambda held: held.pass_on()),
    "global name": by_a_global_name,
    "global name in a closure": lambda: Linear(by_a_global_name_in),
    "enclosing function": by_an_enclosing_function,
    "class": in_its_class,
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_a_layer_that_is_not_followed_is_an_error_where_forward_calls_it(name: str) -> None:
    module = NOT_FOLLOWED[name]()
    params, before = other_params(module), everything(module)
    own = module(X)
    with pytest.raises(CloneError) as raised:
        ad.functional_call(module, params, (X,))
    message = str(raised.value)
    assert message.startswith(
        "functional_call: forward called a Linear with the module's own parameters. It is held"
    )
    assert "ModuleList, and reach it from self" in message
    assert everything(module) == before
    assert torch.equal(module(X), own)
    assert not torch.nn.modules.module._has_any_global_hook()


def test_a_layer_that_is_not_followed_may_be_there() -> None:
    """Where forward does not use it, and where another thread runs the module itself."""
    inside, over = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.records = [SimpleNamespace(layer=self.inner) for _ in range(5000)]

        def forward(self, x: Tensor, *, wait: bool) -> Tensor:
            if wait:
                inside.set()
                assert over.wait(10)
            return self.inner(x)

    module = Waiting()
    params = other_params(module)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(ad.functional_call, module, params, (X,), {"wait": True})
        assert inside.wait(10)
        plain = module(X, wait=False)
        over.set()
        assert_close(result.result(), X @ params["inner.weight"].T + params["inner.bias"])
    assert_close(plain, X @ module.inner.weight.T + module.inner.bias)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that interrupts")
def test_interrupts_leave_nothing_behind() -> None:
    """At random instants of calls in which the module's own layers are refused."""
    module = Holding(lambda m: SimpleNamespace(layer=m), layer_of)
    module.data = [[k] for k in range(2000)]
    params, draw, raised = other_params(module), random.Random(1), 0
    output, own, before = ad.functional_call(module, params, (X,)), module(X), everything(module)
    start = time.perf_counter()
    ad.functional_call(module, params, (X,))
    longest = time.perf_counter() - start

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(500):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, longest))
                ad.functional_call(module, params, (X,))
                time.sleep(longest)
            except KeyboardInterrupt:
                raised += 1
            assert torch.equal(module(X), own)
            assert not torch.nn.modules.module._has_any_global_hook()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert raised > 400  # Python swallows one that comes while it runs a callback
    assert everything(module) == before
    assert torch.equal(ad.functional_call(module, params, (X,)), output)


def test_a_plain_call_in_another_thread_sees_the_module_s_own_weights() -> None:
    inside, over = threading.Event(), threading.Event()

    class Waiting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                assert over.wait(10)
            return super().forward(x)

    module = Waiting(3, 1, bias=False)
    before, weight = everything(module), module.weight
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(ad.functional_call, module, {"weight": torch.ones(1, 3)}, (X,))
        assert inside.wait(10)
        assert everything(module) == before
        assert type(module) is Waiting
        assert_close(module(X), X @ weight.T)
        over.set()
        assert_close(result.result(), X.sum(1, keepdim=True))


class Later(nn.Module):
    """Uses its parameters after ``forward`` has returned, or in another thread."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(3, 3), how

    def forward(self, x: Tensor) -> Any:
        if self.how == "checkpoint":
            return checkpoint(lambda x: self.inner(x).sin(), x, use_reentrant=False)
        if self.how == "thread":
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(self.inner, x).result().sin()
        if self.how == "generator":
            return (self.inner(x).sin() for _ in range(1))
        return lambda: self.inner(x).sin()


@pytest.mark.parametrize("how", ["checkpoint", "thread", "generator", "function"])
def test_parameters_that_are_used_after_the_call_are_those_given(how: str) -> None:
    module = Later(how)
    params = {name: p.requires_grad_() for name, p in other_params(module).items()}
    output = ad.functional_call(module, params, (X,))
    output = next(output) if how == "generator" else output() if how == "function" else output
    expected = (X @ params["inner.weight"].T + params["inner.bias"]).sin()
    assert_close(output, expected)
    grads = torch.autograd.grad(output.square().sum(), [*params.values()])
    assert_close(list(grads), list(torch.autograd.grad(expected.square().sum(), [*params.values()])))


def test_hooks_that_forward_registers_are_called_for_their_layer_alone() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())

        def forward(self, x: Tensor) -> list[Tensor]:
            found: list[Tensor] = []
            hooks = [
                self.layers[1].register_forward_hook(lambda *call: found.append(call[-1]), always_call=True),
                self.layers[2].register_forward_pre_hook(
                    lambda module, args, kwargs: found.append(args[0] + 1), with_kwargs=True
                ),
            ]
            self.layers(x)
            for hook in hooks:
                hook.remove()
            return found

    module = Features()
    before = everything(module)
    params = other_params(module)
    tanh = (X @ params["layers.0.weight"].T + params["layers.0.bias"]).tanh()
    assert_close(ad.functional_call(module, params, (X,)), [tanh, tanh + 1])
    assert everything(module) == before


@pytest.mark.parametrize("slots", [False, True])
def test_what_del_closes_stays_open(slots: bool, tmp_path: Path) -> None:
    """For a module, and for an object that leads back to it."""
    closed: list[str] = []

    class Owner:
        if slots:
            __slots__ = ("module",)

        def __init__(self, module: nn.Module) -> None:
            self.module = module

        def __del__(self) -> None:
            closed.append("object")

    class Logged(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.log = (tmp_path / "log").open("w")
            self.owner = Owner(self)

        def forward(self, x: Tensor) -> Tensor:
            assert type(self) is Logged
            self.log.write("called\n")
            return super().forward(x)

        def __del__(self) -> None:
            closed.append("module")
            self.log.close()

    module = Logged()
    if slots:
        with pytest.raises(CloneError, match="a Owner that leads back to the module and cannot be copied"):
            ad.functional_call(module, other_params(module), (X,))
        del module.owner
        assert closed.pop() == "object"
    for _ in range(3):
        ad.functional_call(module, other_params(module), (X,))
    gc.collect()
    assert closed == []
    module.log.write("open")
    del module
    gc.collect()
    assert sorted(closed) == ["module", "object"][: 1 if slots else 2]


def test_slots_and_del_together_cannot_be_copied() -> None:
    class Both(nn.Linear):
        __slots__ = ("scale",)

        def __del__(self) -> None:
            pass

    with pytest.raises(
        CloneError, match=r"Both .*has both __slots__ and __del__.*Make the other object an attribute"
    ):
        ad.functional_call(Both(3, 2), {}, (X,))


def test_nothing_is_kept_after_a_thousand_calls() -> None:
    """No module, class, or parameter: neither of local classes nor of those that parametrize makes."""

    def work() -> list[weakref.ref[Any]]:
        class Local(nn.Module):
            __slots__ = ("layers",)

            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
                self.layers = [self.inner]
                self.hold = SimpleNamespace(module=self)
                self.inner.register_forward_hook(lambda *_: self.hold)

            def forward(self, x: Tensor) -> Tensor:
                return self.layers[0](x)

        module = Local()
        params = other_params(module)
        for _ in range(1000 // ROUNDS):
            ad.functional_call(module, params, (X,))
        kept = [module, module.inner, type(module), type(module.inner), *params.values()]
        return [weakref.ref(one) for one in kept]

    for _ in range(ROUNDS):
        refs = work()
        gc.collect()
        assert [ref() for ref in refs] == [None] * len(refs)


def test_modules_may_be_nested_deeper_than_functions() -> None:
    class Chain(nn.Module):
        def __init__(self, below: nn.Module | None) -> None:
            super().__init__()
            self.below, self.w = below, nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            last, module = self, self.below
            while module is not None:
                x, last, module = x * module.w, module, module.below
            return x * self.w + last.w

    module = None
    for _ in range(2000):
        module = Chain(module)
    given = {"w": torch.tensor(3.0), "below." * 1999 + "w": torch.tensor(5.0)}
    assert ad.functional_call(module, given, (torch.ones(()),)).item() == 20


def test_parts_that_are_shared_on_many_levels_are_taken_once() -> None:
    """They have 2 ** 60 names."""

    class Twice(nn.Module):
        def __init__(self, below: nn.Module) -> None:
            super().__init__()
            self.first, self.second = below, below

        def forward(self, x: Tensor) -> Tensor:
            module = self
            while isinstance(module, Twice):
                module = module.second
            return module(x)

    module: nn.Module = nn.BatchNorm1d(3)
    for _ in range(60):
        module = Twice(module)
    names, own = ["first." * 60 + name for name in ("weight", "bias")], [torch.full((3,), 2.0), torch.ones(3)]
    output, buffers = ad.functional_call(
        module, dict(zip(names, own, strict=True)), (X,), return_buffers=True
    )
    assert_close(output, nn.functional.batch_norm(X, None, None, *own, training=True))
    assert_close(buffers["first." * 60 + "running_mean"], 0.1 * X.mean(0))
    assert len(buffers) == 3
    with pytest.warns(BufferWarning, match="to its buffers " + r"(first\.){60}num_batches_tracked, "):
        ad.functional_call(module, {}, (X,))


@pytest.mark.parametrize(
    "make",
    [
        lambda: {f"word{k}": k for k in range(100_000)},
        lambda: [SimpleNamespace(k=k) for k in range(200_000)],
        lambda: SimpleNamespace(data=[[SimpleNamespace(k=k) for k in range(100)] for _ in range(2000)]),
        lambda: OrderedDict((k, [k]) for k in range(100_000)),
    ],
    ids=["vocabulary", "objects", "objects in an object", "lists"],
)
def test_much_data_costs_little(make: Callable[[], Any]) -> None:
    """Two milliseconds at most, where a copy takes tens."""
    module = nn.Sequential(nn.Linear(3, 3))
    module[0].data = make()
    params = other_params(module)
    times = []
    for _ in range(20):
        start = time.thread_time()
        ad.functional_call(module, params, (X,))
        times.append(time.thread_time() - start)
    assert min(times) < 2e-3


def test_large_containers_are_shared_and_small_ones_are_not() -> None:
    class Writing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.small["new"] = self.large["new"] = self.nested[0]["new"] = 1
            return super().forward(x)

    module = Writing(3, 2)
    module.small, module.large, module.nested = {}, dict.fromkeys(range(2000)), [{}]
    ad.functional_call(module, other_params(module), (X,))
    assert (module.small, module.large["new"], module.nested) == ({}, 1, [{}])


def test_what_cannot_be_copied_is_named() -> None:
    module = nn.Sequential(nn.Linear(3, 3))
    module[0].stream = (layer for layer in [module[0]])
    before = everything(module)
    with pytest.raises(CloneError) as raised:
        ad.functional_call(module, other_params(module), (X,))
    assert str(raised.value).startswith(
        "functional_call: Linear.stream is, or holds, a generator that leads back"
    )
    assert "Make it in forward" in str(raised.value)
    assert everything(module) == before
    # In an object outside, such as a trainer with its loaders, it is nobody's concern.
    del module[0].stream
    module[0].trainer = SimpleNamespace(module=module, loader=(layer for layer in [module]))
    ad.functional_call(module, other_params(module), (X,))


def test_module_that_is_a_dict_cannot_be_copied() -> None:
    class Both(nn.Module, dict):
        pass

    with pytest.raises(
        CloneError, match=r"functional_call: Both derives from nn.Module and from a class written in C"
    ):
        ad.functional_call(Both(), {}, ())


def test_lazy_module_is_not_initialized_on_the_way() -> None:
    module = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    with pytest.raises(
        StructureError, match=r"functional_call: 0\.weight is not initialized.*Call the module once"
    ):
        ad.functional_call(module, {}, (X,))
    assert isinstance(module[0].weight, nn.UninitializedParameter)
    module(X)
    params = other_params(module)
    output = ad.functional_call(module.eval(), params, (X,))
    assert output.shape == (2, 2)


def test_clones_go_when_the_call_is_over() -> None:
    """No cycle of our own keeps the tensors of a call alive."""
    for module in (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval()), nn.GRU(3, 2)):
        params = other_params(module)
        alive = [weakref.ref(tensor) for tensor in params.values()]
        gc.disable()
        try:
            ad.functional_call(module, params, (X,))
            del params
            assert all(ref() is None for ref in alive)
        finally:
            gc.enable()


def test_compiled_module_is_compiled_once() -> None:
    counter = pytest.importorskip("torch._dynamo.testing").CompileCounter()
    torch.compiler.reset()
    module = torch.compile(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), backend=counter)
    for factor in range(10):
        ad.functional_call(module, other_params(module, factor), (X,))
    assert counter.frame_count == 1
