"""Modules as functions of their parameters. Builds on `core`, `state` and `clone`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from autodiff._torch import compiling, is_eager
from autodiff.core import trees
from autodiff.core.batch import copy_for_every_sample
from autodiff.errors import BufferWarning, OptionError, StructureError
from autodiff.nn import state
from autodiff.nn.clone import ModuleClone
from autodiff.types import ModuleState

# The result, the buffers after the call if they are asked for, otherwise those of the given tensors that were assigned
# anew, and the names of own buffers whose new values are lost.
Called: TypeAlias = "tuple[Any, dict[str, Tensor], list[str]]"

__all__ = ["functional_call", "sample_loss", "stack_module_state"]


def functional_call(
    module: nn.Module,
    parameter_and_buffer_dicts: ModuleState,
    args: Any = None,
    kwargs: dict[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
    return_buffers: bool = False,
) -> Any:
    """Call a module with other parameters and buffers than its own.

    The call runs on a clone of the module, so that the module is not touched: not by another thread's call, not by
    an exception, not by what ``forward`` assigns, or writes to buffers. Lists of modules, bound methods, closures
    and hooks lead to the clone as well. No lock is held.

    Args:
        module: the module.
        parameter_and_buffer_dicts: tensors by their names in ``module.named_parameters()`` and
            ``named_buffers()``, or several such dicts with no name in common. Names that are left out
            keep the module's own tensors. Without ``return_buffers``, a buffer that ``forward`` assigns anew is
            updated in the dict that held it, and one written in place is updated where it is.
        args: the positional arguments, as a tuple, or one argument that is not a tuple.
        kwargs: the keyword arguments.
        tie_weights: a tensor given for one name is used for all names that share a tensor in the module.
        strict: names must be exactly the module's.
        return_buffers: return the buffers as they are after the call, too, and leave those that were given as
            they are. Inside ``vmap`` each sample has buffers of its own.

    Returns:
        What the module returns; with ``return_buffers`` a pair of that and a dict of all buffers of the module
        by name, the given ones and its own. They are what ``forward`` made them: constants, or part of a graph.

    Raises:
        ValueError: a name is in two dicts, or tied names are given different tensors.
        RuntimeError: ``strict`` and names are missing or unknown; a scripted module; a module that holds something
            which leads back to it and cannot be copied, or that calls a layer which it finds where none is searched.

    Warns:
        BufferWarning: ``forward`` wrote to a buffer that was not given, without ``return_buffers``.

    >>> import torch
    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> functional_call(module, {"weight": torch.tensor([[3.0, 4.0]])}, torch.ones(2))
    tensor([7.])

    Running statistics, with momentum 0.1:

    >>> norm = torch.nn.BatchNorm1d(1)
    >>> _, buffers = functional_call(norm, {}, torch.tensor([[1.0], [5.0]]), return_buffers=True)
    >>> buffers["running_mean"], norm.running_mean
    (tensor([0.3000]), tensor([0.]))

    As a training step, with the gradient:

    >>> def loss(params, buffers, x):
    ...     output, buffers = functional_call(norm, (params, buffers), (x,), return_buffers=True)
    ...     return output.square().sum(), buffers
    >>> x, params = torch.tensor([[1.0], [5.0]]), dict(norm.named_parameters())
    >>> _, buffers = torch.func.grad(loss, has_aux=True)(params, buffers, x)
    >>> buffers["running_mean"], buffers["num_batches_tracked"]
    (tensor([0.5700]), tensor(2))
    """
    dicts = _checked_dicts(module, parameter_and_buffer_dicts)
    given = state.merged(dicts)
    if strict:
        state.check_names(module, given)
    arguments = () if args is None else args if isinstance(args, tuple) else (args,)
    call = _traced_call if compiling() else _cloned_call
    result, updated, lost = call(module, given, arguments, kwargs or {}, tie_weights, return_buffers)
    if return_buffers:
        return result, updated
    for one in dicts:
        for name in one.keys() & updated.keys():
            one[name] = updated[name]
    if lost:
        warnings.warn(
            f"functional_call: the module wrote to its buffers {', '.join(lost)}, which were not given. It is left as "
            f"it was, and what was written is lost. Use return_buffers=True, or give the buffers.",
            BufferWarning,
            stacklevel=2,
        )
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
        StructureError: when the function is called, if ``params`` is not a dict.
        OptionError: when the function is called, if a layer normalises by the statistics of the batch, as
            BatchNorm does in training mode: then a sample has no loss of its own.

    >>> import torch
    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> loss = sample_loss(module, torch.nn.functional.mse_loss)
    >>> loss({"weight": torch.tensor([[3.0, 4.0]])}, torch.ones(2), torch.tensor([5.0]))
    tensor(4.)
    """

    def loss_of_sample(params: Mapping[str, Tensor], x: Any, y: Any) -> Tensor:
        if not isinstance(params, Mapping):
            raise StructureError(
                f"sample_loss: params is a {type(params).__name__}. Expected a dict of tensors by their names in the "
                f"module. Pass dict(module.named_parameters())."
            )
        _check_no_batch_statistics(module)
        output = functional_call(module, dict(params), (_batch_of_one(x),))
        return loss(output, _batch_of_one(y))

    return loss_of_sample


def _batch_of_one(tree: Any) -> Any:
    leaves, spec = trees.flatten(tree)
    return trees.unflatten(spec, [t.unsqueeze(0) if isinstance(t, Tensor) else t for t in leaves])


def _check_no_batch_statistics(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, state.BATCH_NORMS) and (layer.training or layer.running_mean is None):
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
        # Inside a transform a stack cannot be made to require grad, and need not.
        requires_grad = tensors[0].requires_grad and is_eager()
        stacked[name] = stack.requires_grad_() if requires_grad else stack
    return stacked


def _checked_dicts(module: nn.Module, given: Any) -> Sequence[dict[str, Tensor]]:
    """The dicts as a sequence; an error for a module that cannot be called with them."""
    if isinstance(module, torch.jit.ScriptModule):
        raise RuntimeError(
            "functional_call: The stateless API can't be used with Jitted modules, got "
            f"{type(module).__name__}. Pass the module that was scripted."
        )
    if isinstance(module, nn.DataParallel):
        raise RuntimeError(
            "functional_call: The stateless API can't be used with nn.DataParallel module. Pass its .module."
        )
    dicts = [given] if isinstance(given, dict) else given
    if not isinstance(dicts, list | tuple) or not all(isinstance(one, dict) for one in dicts):
        raise OptionError(
            "functional_call: Expected parameter_and_buffer_dicts to be a dict, or a list/tuple of dicts, "
            f"but got {type(given)}. Write dict(module.named_parameters())."
        )
    return dicts


def _cloned_call(
    module: nn.Module,
    given: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tie_weights: bool,
    return_buffers: bool,
) -> Called:
    """A call of the module's clone."""
    places, tensors = state.replacements(module, given, tie_weights=tie_weights)
    buffers = state.Buffers(returned=return_buffers)
    buffers.copy_given(places, tensors)
    clone = ModuleClone(module, tensors, buffers.copy)
    state.check_initialized(module, clone.originals, tensors)
    if len(places) < len(given):
        for name in given.keys() - places.keys():
            _set(clone.root, name, given[name])
    if not tie_weights:
        _untie(module, clone.root, given, return_buffers)
    result = clone.call(*args, **kwargs)
    if return_buffers:
        return result, _buffers(clone.root, once=tie_weights), []
    written = buffers.written(clone.counterpart)
    lost = [name for name, place in state.entries(module, once=True) if place in written] if written else []
    return result, dict(_reassigned(clone, places, given)), lost


def _buffers(root: nn.Module, *, once: bool) -> dict[str, Tensor]:
    """As ``named_buffers`` of torch, which takes time that grows with the square of the depth of nesting."""
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, place in state.entries(root, once=once):
        tensor = state.tensor_at(place)
        if place[2] and not (once and id(tensor) in seen):
            seen.add(id(tensor))
            buffers[name] = tensor
    return buffers


def _untie(module: nn.Module, root: nn.Module, given: Mapping[str, Tensor], return_buffers: bool) -> None:
    """Set tensors that have several names by each name, since they need not stay the same."""
    own = list(state.entries(module))
    count = Counter(id(state.tensor_at(place)) for _, place in own)
    copied = copy_for_every_sample() if return_buffers else Tensor.clone
    # Given tensors come last: two names may belong to one place.
    for name, place in sorted(own, key=lambda entry: entry[0] in given):
        own_tensor = state.tensor_at(place)
        if count[id(own_tensor)] > 1:
            tensor = given.get(name, own_tensor)
            kept = name in given and not return_buffers
            _set(root, name, copied(tensor) if place[2] and not kept else tensor)


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
    # A plain tensor attribute, or a parametrized one, whose parametrization this switches off.
    vars(owner)[attribute] = tensor
    owner._parameters.pop(attribute, None)


def _reassigned(
    clone: ModuleClone, places: Mapping[str, state.Place], given: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The given tensors for which ``forward`` assigned others, by name."""
    for name, (original, key, is_buffer) in places.items():
        owner = clone.counterpart(original)
        table: Mapping[str, Tensor | None] = owner._buffers if is_buffer else owner._parameters
        if key not in table or table[key] is not given[name]:
            current = getattr(owner, key, None)
            if current is not given[name] and isinstance(current, Tensor):
                yield name, current


def _traced_call(
    module: nn.Module,
    given: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tie_weights: bool,
    return_buffers: bool,
) -> Called:
    """A call by torch's own function, which torch.compile knows: it swaps tensors and undoes that in the trace."""
    coming = [leaf for leaf in trees.leaves([args, kwargs, list(given.values())]) if isinstance(leaf, Tensor)]
    for name, buffer in module.named_buffers():
        own = given.get(name, buffer)
        if return_buffers and coming and not name.endswith("num_batches_tracked"):
            # The tracer does not tell its levels: the copy is batched as the inputs are.
            batched = [leaf.new_zeros((), dtype=torch.bool, device=own.device) for leaf in coming]
            given[name] = torch.where(torch.stack(batched).any(), own, own)
        elif return_buffers or name not in given:
            given[name] = own.clone()
    result = torch.func.functional_call(module, given, args, kwargs, tie_weights=tie_weights)
    return result, {name: given[name] for name, _ in module.named_buffers()} if return_buffers else given, []
