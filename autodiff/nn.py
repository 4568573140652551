"""Floor 2: modules as functions of their parameters. Builds on `core` alone."""

from __future__ import annotations

import functools
import threading
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from autodiff.core import trees
from autodiff.core._torch import on_ground
from autodiff.errors import OptionError, StructureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    State: TypeAlias = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]

# What every module has: the tables that a copy replaces, flags, and hooks, which may be bound to it.
_STANDARD = frozenset(vars(nn.Module()))
_HOOKS = tuple(name for name in _STANDARD if name.endswith("_hooks"))
_PLAIN = (bool, int, float, complex, str, bytes, type(None), Tensor, torch.dtype, torch.device)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_swapping = threading.RLock()

__all__ = ["functional_call", "sample_loss", "stack_module_state"]


def functional_call(
    module: nn.Module,
    parameter_and_buffer_dicts: State,
    args: Any = None,
    kwargs: dict[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
) -> Any:
    """Call a module with other parameters and buffers than its own.

    The call runs on a shallow copy of the module tree, so that the module is not touched: not by
    another thread's call, not by an exception, not by an assignment inside ``forward``. A module that
    keeps its own way to itself or to a submodule, which a copy would not change (a list of modules in an
    attribute, a bound method, a hook, torch.compile), is called by torch's function instead, which swaps
    the tensors in place and back; a lock keeps other threads' calls of such modules out meanwhile.

    Args:
        module: the module.
        parameter_and_buffer_dicts: tensors by their names in ``module.named_parameters()`` and
            ``named_buffers()``, or several such dicts with no name in common. Names that are left out
            keep the module's own tensors. A buffer that ``forward`` assigns anew is updated in the dict
            that held it, and one written in place is updated where it is.
        args: the positional arguments, as a tuple, or one argument that is no tuple.
        kwargs: the keyword arguments.
        tie_weights: a tensor given for one name serves for all names that share a tensor in the module.
        strict: names must be exactly the module's.

    Returns:
        What the module returns.

    Raises:
        ValueError: a name is in two dicts, or tied names are given different tensors.
        RuntimeError: ``strict`` and names are missing or unknown; a scripted module.

    >>> import torch
    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> functional_call(module, {"weight": torch.tensor([[3.0, 4.0]])}, torch.ones(2))
    tensor([7.])
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise RuntimeError(
            "functional_call: The stateless API can't be used with Jitted modules, got "
            f"{type(module).__name__}. Pass the module that was scripted."
        )
    if isinstance(module, nn.DataParallel):
        raise RuntimeError(
            "functional_call: The stateless API can't be used with nn.DataParallel module. Pass its .module."
        )
    dicts = (
        [parameter_and_buffer_dicts]
        if isinstance(parameter_and_buffer_dicts, dict)
        else parameter_and_buffer_dicts
    )
    if not isinstance(dicts, list | tuple) or not all(isinstance(one, dict) for one in dicts):
        raise OptionError(
            "functional_call: Expected parameter_and_buffer_dicts to be a dict, or a list/tuple of dicts, "
            f"but got {type(parameter_and_buffer_dicts)}. Write dict(module.named_parameters())."
        )
    given = _merged(dicts)
    if not all(map(_is_self_contained, module.modules())):
        with _swapping:
            return torch.func.functional_call(
                module,
                cast("Any", parameter_and_buffer_dicts),
                args,
                kwargs,
                tie_weights=tie_weights,
                strict=strict,
            )
    if strict:
        _check_names(module, given)
    tied = _names_of_shared_tensors(module) if tie_weights else {}
    replaced = _with_tied_names(given, tied) if tied else given
    twin = _twin(module, replaced)
    arguments = () if args is None else args if isinstance(args, tuple) else (args,)
    result = twin(*arguments, **(kwargs or {}))
    for one in dicts:
        for name, tensor in _state(twin, one):
            one[name] = tensor
    return result


def sample_loss(
    module: nn.Module, loss: Callable[[Any, Any], Tensor]
) -> Callable[[Mapping[str, Tensor], Any, Any], Tensor]:
    """The loss of one sample as a function ``(params, x, y)``, for :func:`autodiff.per_sample` and ``vmap``.

    The module is shown the sample as a batch of one. Buffers, and parameters that ``params`` leaves out, are
    the module's own.

    Args:
        module: the module; its layers in the mode, training or evaluation, in which it is to run.
        loss: a function of a batch of outputs and a batch of targets, such as
            ``torch.nn.functional.cross_entropy``.

    Returns:
        A function of the parameters by name, such as ``dict(module.named_parameters())``, one input and one
        target, each a tree of tensors without a batch dimension; it returns a tensor of shape ``()``.

    Raises:
        OptionError: when the function is called, if a layer normalises by the statistics of the batch, as
            BatchNorm does in training mode: then a sample has no loss of its own.

    >>> import torch
    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> loss = sample_loss(module, torch.nn.functional.mse_loss)
    >>> loss({"weight": torch.tensor([[3.0, 4.0]])}, torch.ones(2), torch.tensor([5.0]))
    tensor(4.)
    """

    def loss_of_sample(params: Mapping[str, Tensor], x: Any, y: Any) -> Tensor:
        _refuse_batch_statistics(module)
        output = functional_call(module, dict(params), (_batch_of_one(x),))
        return loss(output, _batch_of_one(y))

    return loss_of_sample


def _batch_of_one(tree: Any) -> Any:
    leaves, spec = trees.flatten(tree)
    return trees.unflatten(spec, [t.unsqueeze(0) if isinstance(t, Tensor) else t for t in leaves])


def _refuse_batch_statistics(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, _BATCH_NORMS) and (layer.training or layer.running_mean is None):
            raise OptionError(
                f"sample_loss: {name or 'the module'} is a {type(layer).__name__} that normalises by the statistics of "
                f"the batch, so that no sample has a loss of its own. Expected running statistics: call module.eval(), "
                f"or use GroupNorm or LayerNorm."
            )


def stack_module_state(models: Sequence[nn.Module] | nn.ModuleList) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and buffers of several modules of one class, stacked for :func:`autodiff.vmap`.

    Args:
        models: at least one module; all of one class and all in training or all in evaluation mode.

    Returns:
        ``(params, buffers)``: dicts by name of tensors of shape ``[len(models), *shape]``. The stacked
        parameters are new leaves that require grad where the modules' do.

    Raises:
        RuntimeError: there is no model, or the models differ in class, mode, or requires_grad.

    >>> import torch
    >>> params, buffers = stack_module_state([torch.nn.Linear(2, 3) for _ in range(5)])
    >>> {name: tuple(param.shape) for name, param in params.items()}
    {'weight': (5, 3, 2), 'bias': (5, 3)}
    """
    if len(models) == 0:
        raise StructureError(
            "stack_module_state: Expected at least one model, got 0. Pass a list of modules."
        )
    if len({model.training for model in models}) > 1:
        raise StructureError(
            "stack_module_state: Expected all models to have the same training/eval mode, got both. Call "
            ".train() or .eval() on all of them."
        )
    if len({type(model) for model in models}) > 1:
        names = sorted({type(model).__name__ for model in models})
        raise StructureError(
            f"stack_module_state: Expected all models to be of the same class, got {', '.join(names)}. "
            f"Stack each class on its own."
        )
    params = _stacked([dict(model.named_parameters()) for model in models])
    buffers = _stacked([dict(model.named_buffers()) for model in models])
    return params, buffers


def _stacked(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    stacked = {}
    for name in states[0]:
        tensors = [state[name] for state in states]
        if len({tensor.requires_grad for tensor in tensors}) > 1:
            raise StructureError(
                f"stack_module_state: Expected {name} from each model to have the same .requires_grad, got "
                f"both. Call .requires_grad_() on all of them."
            )
        stack = torch.stack([tensor.detach() for tensor in tensors])
        # Inside a transform a stack cannot be asked to require grad, and need not.
        watched = tensors[0].requires_grad and on_ground()
        stacked[name] = stack.requires_grad_() if watched else stack
    return stacked


def _merged(dicts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for one in dicts:
        repeated = [name for name in one if name in merged]
        if repeated:
            raise OptionError(
                f"functional_call: {repeated} appeared in multiple dictionaries; behavior of functional call "
                f"is ambiguous. Give each name once."
            )
        merged.update(one)
    return merged


def _check_names(module: nn.Module, given: dict[str, Tensor]) -> None:
    own = {name for name, _ in _named_tensors(module)}
    unknown, missing = [n for n in given if n not in own], [n for n in own if n not in given]
    if unknown or missing:
        parts = [f"Unexpected key(s): {', '.join(map(repr, unknown))}."] if unknown else []
        parts += [f"Missing key(s): {', '.join(map(repr, sorted(missing)))}."] if missing else []
        raise StructureError(
            f"functional_call: Error(s) in reparametrizing for {type(module).__name__}:\n\t"
            + "\n\t".join(parts)
        )


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _names_of_shared_tensors(module: nn.Module) -> dict[str, list[str]]:
    """Each name that shares its tensor with others, with all the names of that tensor."""
    names: dict[int, list[str]] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    names.setdefault(id(tensor), []).append(prefix + name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _with_tied_names(given: dict[str, Tensor], tied: dict[str, list[str]]) -> dict[str, Tensor]:
    replaced = dict(given)
    for name, tensor in given.items():
        for twin in tied.get(name, ()):
            if given.get(twin, tensor) is not tensor:
                raise OptionError(
                    f"functional_call got multiple values for keys {sorted(tied[name])}, which are tied. "
                    f"Give one of them. Consider using tie_weights=False"
                )
            replaced[twin] = tensor
    return replaced


def _twin(module: nn.Module, replaced: dict[str, Tensor]) -> nn.Module:
    """A shallow copy of the module tree with other tensors."""
    twins: dict[int, nn.Module] = {}
    root = _copied(module, twins)
    for name, tensor in replaced.items():
        _set(root, name, tensor)
    return root


def _copied(original: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    """A shallow copy of a module and of what it holds; a module in two places stays one."""
    # A function of its own: one nested in _twin would refer to itself, and such a cycle keeps the
    # tensors alive until the collector comes by.
    if id(original) not in twins:
        twin = original.__new__(type(original))
        twins[id(original)] = twin
        vars(twin).update(vars(original))
        vars(twin)["_parameters"] = dict(original._parameters)
        vars(twin)["_buffers"] = dict(original._buffers)
        vars(twin)["_modules"] = {
            name: child if child is None else _copied(child, twins)
            for name, child in original._modules.items()
        }
    return twins[id(original)]


def _set(root: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    try:
        owner = root.get_submodule(path)
    except AttributeError:
        raise StructureError(
            f"functional_call: parameter_and_buffer_dicts[{name!r}] names no submodule {path!r} of "
            f"{type(root).__name__}. Use the names of named_parameters() and named_buffers()."
        ) from None
    homes: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
    for home in homes:
        if attribute in home:
            home[attribute] = tensor
            return
    # A plain tensor attribute, or a parametrized one whose parametrization is so switched off.
    vars(owner)[attribute] = tensor
    owner._parameters.pop(attribute, None)


def _is_self_contained(module: nn.Module) -> bool:
    """Whether a module reaches itself and its submodules through nothing that a shallow copy leaves."""
    attributes = vars(module)
    if not _can_be_copied(cast("Any", type(module))) or any(attributes.get(table) for table in _HOOKS):
        return False
    return not any(name not in _STANDARD and _holds_a_module(value) for name, value in attributes.items())


@functools.cache
def _can_be_copied(cls: type[nn.Module]) -> bool:
    """Whether ``__new__`` and ``__dict__`` make all of an object of the class."""
    slots = any(vars(base).get("__slots__") for base in cls.__mro__)
    return not slots and cls.__new__ is object.__new__ and not issubclass(cls, torch.fx.GraphModule)


def _holds_a_module(value: object) -> bool:
    """Whether a module may be reached through the value: it is one, or is bound to or holds one."""
    if isinstance(value, _PLAIN):
        return False
    if isinstance(value, FunctionType):
        return value.__closure__ is not None
    if isinstance(value, dict):
        return any(map(_holds_a_module, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(_holds_a_module, value))
    # An object of any other class that cannot be called is taken for data.
    return callable(value) and not isinstance(value, type | BuiltinFunctionType)


def _state(twin: nn.Module, given: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that ``forward`` assigned anew, by name."""
    for name, tensor in given.items():
        path, _, attribute = name.rpartition(".")
        current = getattr(twin.get_submodule(path), attribute, tensor)
        if current is not tensor and isinstance(current, Tensor):
            yield name, current
