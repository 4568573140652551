"""The engine, what tensors and nodes tell, and what torch registers.

Imports `thread_state`.
"""

from __future__ import annotations

from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch import autograd_function
from torch.autograd import Variable
from torch.autograd import graph as autograd_graph
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.torch_version import TorchVersion
from torch.utils import _python_dispatch
from torch.utils import _pytree as torch_pytree

from autodiff._torch.thread_state import without_inference_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

# Without the local part, as in 2.13.0+cpu.
version = TorchVersion(torch.__version__.split("+")[0])
# Sees every operation, beneath all transforms.
DispatchMode = _python_dispatch.TorchDispatchMode
# What applies an autograd Function inside torch's levels, as a torch function mode sees it.
custom_function_call = autograd_function.custom_function_call
# torch.func has it since 2.13.
rearrange: Any = getattr(torch.func, "rearrange", None) or import_module("functorch.einops").rearrange


def backward(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    retain_graph: bool,
    create_graph: bool,
) -> list[Tensor | None]:
    """The engine alone: what torch.autograd.grad does after its own argument handling (12 against 17 us).

    On the CPU the engine works in this thread, and needs no copy of its context either.
    """
    run = (
        Variable._execution_engine.run_backward if outputs[0].is_cpu else autograd_graph._engine_run_backward
    )
    arguments = tuple(outputs), tuple(cotangents), retain_graph, create_graph, tuple(inputs)
    if torch.is_inference_mode_enabled():
        return list(without_inference_mode(run, *arguments, allow_unreachable=True, accumulate_grad=False))
    return list(run(*arguments, allow_unreachable=True, accumulate_grad=False))


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor's storage was written in place."""
    return [tensor._version for tensor in tensors]


def sequence_number(node: Any) -> int:
    """What its thread numbered a node by; of a leaf's node the largest number there is."""
    number: int = node._sequence_nr()
    return number


def is_function_node(node: Any) -> bool:
    """Whether a node of a graph belongs to an autograd Function."""
    return isinstance(node, BackwardCFunction)


def user_function(node: Any) -> type:
    """The autograd Function that a node belongs to. Inside levels torch makes others around the user's."""
    cls: Any = node._forward_cls
    while (backward := cls.backward).__module__ == autograd_function.__name__:
        cls = backward.__closure__[backward.__code__.co_freevars.index("autograd_function")].cell_contents
    return cls  # type: ignore[no-any-return]


def is_eager_function(node: Any) -> bool:
    """Whether a node belongs to an autograd Function without setup_context, which no level can run."""
    if not is_function_node(node):
        return False
    return user_function(node).setup_context is torch.autograd.Function.setup_context  # type: ignore[attr-defined]


def saved_tensor_hooks_active() -> bool:
    """Whether what operations save goes through a hook, such as that of a checkpoint."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_differentiable_once(node: Any) -> bool:
    """Whether the backward of an autograd Function is marked so: torch forgets what its result depends on."""
    backward = getattr(user_function(node), "backward", None)
    return getattr(backward, "__code__", None) is _ONCE_DIFFERENTIABLE


def scales_by_frequency(nodes: Iterable[Any]) -> bool:
    """Whether an embedding among the nodes divides gradients by how often a word occurs."""
    embeddings = (node for node in nodes if type(node).__name__.startswith("Embedding"))
    return any(getattr(node, "_saved_scale_grad_by_freq", False) for node in embeddings)


def is_zero_tensor(tensor: Tensor) -> bool:
    """Whether the tensor is a zero without memory, such as the tangent of a constant."""
    return tensor._is_zerotensor()


def cotangent_sizes(node: Any) -> list[int]:
    """The bytes of the cotangents that come into a node of a graph."""
    return [prod(metadata.shape) * metadata.dtype.itemsize for metadata in node._input_metadata]


def saved_by(node: Any, name: str) -> Any:
    """What a node of a graph has saved; a tensor without the wrapper of a level that has been left."""
    value = getattr(node, f"_saved_{name}")
    if isinstance(value, int) and value >= 2**63:
        return value - 2**64  # torch shows a negative number, such as a dim, without its sign
    return _functorch.unwrap_if_dead(value) if isinstance(value, Tensor) else value


# What the next node that this thread makes is numbered by.
next_sequence_number: Callable[[], int] = torch._C._autograd._get_sequence_nr
# Its ``next_id`` counts the hooks on tensors, nodes and modules that have been registered in this process.
HookHandle = torch.utils.hooks.RemovableHandle
# What every backward that is marked by once_differentiable runs.
_ONCE_DIFFERENTIABLE: Any = once_differentiable(repr).__code__


# Trees that torch flattens itself.

# The classes that torch's own pytree knows, with how it takes them apart.
torch_registry: dict[Any, Any] = torch_pytree.SUPPORTED_NODES


def register_with_torch(
    cls: type, flatten: Callable[[Any], tuple[list[Any], Any]], unflatten: Callable[[Any, Any], Any]
) -> None:
    """Register a class with torch's own pytree, so that it crosses torch.func's transforms too."""
    torch_pytree._private_register_pytree_node(cls, flatten, unflatten)


def copy_of_scripted(module: Any) -> Any:
    """A scripted or traced module with slots of its own, which hold the same tensors and submodules."""
    # Both kinds have what this takes; a traced module's own copy would share the slots.
    return torch.jit.RecursiveScriptModule.__copy__(module)  # type: ignore[attr-defined]
