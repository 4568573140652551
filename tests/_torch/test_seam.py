"""Contracts of torch's private parts: each test says which symbol, and what it does for us.

When a new torch breaks one of these, the place to mend is autodiff/_torch alone (or trees.py
for the last). The final test fails when that file names a symbol that has no contract here.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import threading
import traceback
import types
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import optree
import pytest
import torch
from torch import Tensor, overrides
from torch._C import _autograd, _functorch
from torch._C._dynamo import eval_frame
from torch._functorch import autograd_function, eager_transforms, predispatch
from torch._functorch import vmap as torch_vmap
from torch._subclasses import FakeTensorMode
from torch.autograd import Variable, forward_ad
from torch.autograd import graph as autograd_graph
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.torch_version import TorchVersion
from torch.utils import _pytree as torch_pytree
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import autodiff as ad
from autodiff import _torch
from autodiff._torch.recomputation import put_back_checkpoint_hooks, take_checkpoint_hooks

if TYPE_CHECKING:
    from collections.abc import Iterator

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
SOURCES = sorted(Path(_torch.__file__).parent.glob("[!_]*.py"))

OF_PYTHON = ("__code__", "__context__", "__dict__", "__enter__", "__exit__", "__traceback__")

# Every private symbol of the seam, and the test here that pins it.
CONTRACTS = {
    "torch.__version__": "test_version_can_be_compared",
    "_functorch.peek_interpreter_stack": "test_empty_stack_of_transforms_is_none",
    "_functorch.get_interpreter_stack": "test_stack_tells_the_kinds_of_its_levels",
    "_functorch.TransformType": "test_stack_tells_the_kinds_of_its_levels",
    "_functorch.unwrap_if_dead": "test_wrapper_of_a_level_that_was_left_can_be_taken_off",
    "_functorch.pop_dynamic_layer_stack": "test_upper_levels_can_be_stepped_out_of",
    "_functorch.push_dynamic_layer_stack": "test_upper_levels_can_be_stepped_out_of",
    "_functorch.get_dynamic_layer_stack_depth": "test_upper_levels_can_be_stepped_out_of",
    "_functorch.set_single_level_autograd_function_allowed": "test_torch_forbids_its_own_functions_outside_levels",
    "contextlib._GeneratorContextManager": "test_end_of_a_generators_context_waits_in_the_traceback",
    "torch._C._InferenceMode": "test_inference_mode_is_left_in_c",
    "torch._C._pop_torch_function_stack": "test_function_modes_stand_on_a_stack",
    "autograd_function.custom_function_call": "test_function_mode_sees_autograd_functions_inside_levels",
    "overrides._get_current_function_mode": "test_function_modes_can_be_left_out",
    "overrides._get_current_function_mode_stack": "test_function_modes_stand_on_a_stack",
    "torch._C.DisableTorchFunction": "test_function_modes_can_be_left_out",
    "_functorch.CVmapInterpreterPtr": "test_stack_tells_the_sizes_of_its_batches",
    "_functorch.is_functorch_wrapped_tensor": "test_wrappers_are_told_and_opened",
    "_functorch.get_unwrapped": "test_wrappers_are_told_and_opened",
    "_functorch._grad_increment_nesting": "test_grad_level_differentiates_by_wrapping",
    "_functorch._grad_decrement_nesting": "test_grad_level_differentiates_by_wrapping",
    "_functorch._wrap_for_grad": "test_grad_level_differentiates_by_wrapping",
    "_functorch._unwrap_for_grad": "test_grad_level_differentiates_by_wrapping",
    "_functorch.get_inplace_requires_grad_allowed": "test_requires_grad_inside_a_level_must_be_allowed",
    "_functorch.set_inplace_requires_grad_allowed": "test_requires_grad_inside_a_level_must_be_allowed",
    "_functorch._jvp_increment_nesting": "test_jvp_level_nests",
    "_functorch._jvp_decrement_nesting": "test_jvp_level_nests",
    "_functorch._vmap_increment_nesting": "test_vmap_level_hides_a_dimension",
    "_functorch._vmap_decrement_nesting": "test_vmap_level_hides_a_dimension",
    "_functorch._add_batch_dim": "test_vmap_level_hides_a_dimension",
    "_functorch._remove_batch_dim": "test_vmap_level_hides_a_dimension",
    "_functorch.is_batchedtensor": "test_vmap_level_hides_a_dimension",
    "_functorch.maybe_get_level": "test_vmap_level_hides_a_dimension",
    "forward_ad._current_level": "test_one_dual_level_per_process_by_a_global",
    "torch._C._enter_dual_level": "test_one_dual_level_per_process_by_a_global",
    "torch._C._exit_dual_level": "test_one_dual_level_per_process_by_a_global",
    "forward_ad._maybe_load_decompositions": "test_loading_forward_rules_is_what_warns",
    "forward_ad.make_dual": "test_torch_func_wraps_tensors_by_names_that_others_replace",
    "eager_transforms._wrap_tensor_for_grad": "test_torch_func_wraps_tensors_by_names_that_others_replace",
    "torch_vmap._add_batch_dim": "test_torch_func_wraps_tensors_by_names_that_others_replace",
    "operator._op_dk": "test_operation_can_be_run_otherwise_inside_levels",
    "torch._ops": "test_operation_can_be_run_otherwise_inside_levels",
    "eager_transforms.JVP_NESTING": "test_torch_func_jvp_enters_a_level_only_when_it_is_the_first",
    "torch._C._set_grad_enabled": "test_modes_are_switched_without_context_managers",
    "torch._C._is_fwd_grad_enabled": "test_modes_are_switched_without_context_managers",
    "torch._C._set_fwd_grad_enabled": "test_modes_are_switched_without_context_managers",
    "checkpoint._recomputation_hook": "test_second_run_of_a_checkpoint_can_be_surrounded",
    "checkpoint._StopRecomputationError": "test_second_run_of_a_checkpoint_ends_by_an_exception",
    "checkpoint.__file__": "test_checkpoint_has_its_generator_in_a_frame_of_its_file",
    "_C._autograd": "test_hooks_of_checkpoints_can_be_put_aside",
    "torch._C._get_dispatch_mode": "test_tracers_and_fake_tensors_are_modes_of_their_own",
    "torch._C._TorchDispatchModeKey": "test_tracers_and_fake_tensors_are_modes_of_their_own",
    "torch._dynamo": "test_graph_can_be_broken_with_words",
    "operator._dispatch_cache": "test_kernels_of_higher_order_operators_are_in_tables",
    "torch._C._len_torch_dispatch_stack": "test_stack_of_dispatch_modes_has_a_length",
    "Tensor.__rmatmul__": "test_tracer_tells_the_order_of_the_operands_of_matmul",
    "tracer._stance": "test_stance_is_asked_at_every_call_of_a_compiled_function",
    "eval_frame._FrameAction": "test_code_can_be_kept_from_being_compiled_alone",
    "eval_frame._FrameExecStrategy": "test_code_can_be_kept_from_being_compiled_alone",
    "eval_frame.set_code_exec_strategy": "test_code_can_be_kept_from_being_compiled_alone",
    "torch._C._get_flash_sdp_enabled": "test_switches_of_attention_are_those_of_the_public_functions",
    "torch._C._set_sdp_use_flash": "test_switches_of_attention_are_those_of_the_public_functions",
    "torch._C._get_math_sdp_enabled": "test_switches_of_attention_are_those_of_the_public_functions",
    "torch._C._set_sdp_use_math": "test_switches_of_attention_are_those_of_the_public_functions",
    "torch._VF._make_dual": "test_dual_tensors_are_made_and_opened",
    "torch._VF._unpack_dual": "test_dual_tensors_are_made_and_opened",
    "autograd_graph._engine_run_backward": "test_engine_is_called_like_autograd_grad",
    "Variable._execution_engine": "test_engine_is_called_like_autograd_grad",
    "_autograd._saved_tensors_hooks_disable": "test_saved_tensor_hooks_can_be_forbidden",
    "_autograd._saved_tensors_hooks_enable": "test_saved_tensor_hooks_can_be_forbidden",
    "_autograd._saved_tensors_hooks_get_disabled_error_message": "test_saved_tensor_hooks_can_be_forbidden",
    "_autograd._top_saved_tensors_default_hooks": "test_saved_tensor_hooks_stand_on_a_stack",
    "_autograd._pop_saved_tensors_default_hooks": "test_saved_tensor_hooks_stand_on_a_stack",
    "predispatch.lazy_load_decompositions": "test_decompositions_load_lazily",
    "tensor._version": "test_writes_are_counted",
    "tensor._is_zerotensor": "test_zeros_without_memory_are_told",
    "node._input_metadata": "test_nodes_know_the_shapes_of_their_cotangents",
    "node._sequence_nr": "test_nodes_are_numbered_in_the_order_of_their_making",
    "torch._C._autograd": "test_nodes_are_numbered_in_the_order_of_their_making",
    "node._forward_cls": "test_nodes_of_functions_know_their_class",
    "autograd_function.__name__": "test_nodes_of_functions_know_their_class",
    "backward.__closure__": "test_nodes_of_functions_know_their_class",
    "torch._debug_has_internal_overlap": "test_overlap_is_seen",
    "torch_pytree._private_register_pytree_node": "test_torchs_own_trees_learn_a_class",
    "torch_pytree.SUPPORTED_NODES": "test_torchs_registry_holds_its_dataclasses",
    "_python_dispatch.TorchDispatchMode": "test_dispatch_mode_sees_operations_beneath_transforms",
}


def test_empty_stack_of_transforms_is_none() -> None:
    """peek_interpreter_stack() is None eagerly: the tape rule's first question."""
    assert _functorch.peek_interpreter_stack() is None
    seen: list[Any] = []
    torch.func.vmap(lambda x: (seen.append(_functorch.peek_interpreter_stack()), x)[1])(X)
    assert seen[0] is not None


def test_stack_tells_the_kinds_of_its_levels() -> None:
    """get_interpreter_stack() and TransformType say whether an outer grad level watches a pull."""
    assert _functorch.get_interpreter_stack() is None
    seen: list[Any] = []

    def look(x: Tensor) -> Tensor:
        seen.append([layer.key() for layer in _functorch.get_interpreter_stack()])
        seen.append(len(_functorch.get_interpreter_stack() or ()))
        return x.sum()

    torch.func.vmap(torch.func.grad(look))(X[:, None])
    kinds = _functorch.TransformType
    assert seen == [[kinds.Vmap, kinds.Grad], 2]
    assert _functorch.get_interpreter_stack() is None


def test_stack_tells_the_sizes_of_its_batches() -> None:
    """CVmapInterpreterPtr(layer).batchSize() and layer.level() say what a copy for every sample is batched by."""
    seen: list[Any] = []

    def look(x: Tensor) -> Tensor:
        vmaps = [
            layer
            for layer in _functorch.get_interpreter_stack()
            if layer.key() == _functorch.TransformType.Vmap
        ]
        seen.extend((layer.level(), _functorch.CVmapInterpreterPtr(layer).batchSize()) for layer in vmaps)
        seen.append(_torch.vmap_levels())
        return x.sum()

    torch.func.vmap(torch.func.grad(lambda x: torch.func.vmap(look)(x).sum()))(torch.ones(4, 5, 1))
    assert seen == [(1, 4), (3, 5), [(1, 4), (3, 5)]]
    assert _torch.vmap_levels() == []


def test_wrappers_are_told_and_opened() -> None:
    """is_functorch_wrapped_tensor() and get_unwrapped() lead to a tracked tensor inside a wrapper."""
    x = X.clone().requires_grad_()
    seen: list[Any] = []

    def look(row: Tensor) -> Tensor:
        inner = _functorch.get_unwrapped(row)
        seen.append((_functorch.is_functorch_wrapped_tensor(row), row.requires_grad, inner.requires_grad))
        return row

    torch.func.vmap(look)(x)
    assert seen == [(True, False, True)]
    assert not _functorch.is_functorch_wrapped_tensor(x)
    assert _torch.requires_grad_at_any_depth(x)
    assert not _torch.requires_grad_at_any_depth(X)


def test_grad_level_differentiates_by_wrapping() -> None:
    """_grad_increment_nesting and _wrap_for_grad make the level on which an inner tape records."""
    with _torch.grad_level() as level:
        x = _torch.wrap_tracked(X, level)
        y = (x**2).sum()
        assert _functorch.maybe_get_level(x) == level
        assert not _torch.unwrap(y, level).requires_grad
        (slope,) = torch.autograd.grad(y, x)
        result = _torch.unwrap(slope, level)
    torch.testing.assert_close(result, 2 * X)
    assert _functorch.get_interpreter_stack() is None


def test_pull_after_the_level_was_left() -> None:
    """The engine may run after _grad_decrement_nesting: the tape's pull does."""
    with _torch.grad_level() as level:
        x = _torch.wrap_tracked(X, level)
        y = (x**2).sum()
    (slope,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(_torch.unwrap(slope, level), 2 * X)


def test_requires_grad_inside_a_level_must_be_allowed() -> None:
    """set_inplace_requires_grad_allowed lets a level watch its inputs, and only them."""
    with _torch.grad_level() as level:
        allowed = _functorch.get_inplace_requires_grad_allowed()
        assert not allowed
        wrapped = _torch.wrap(X, level)
        with pytest.raises(RuntimeError, match="requires_grad_"):
            wrapped.requires_grad_()
        _torch.wrap_tracked(X, level)
        assert _functorch.get_inplace_requires_grad_allowed() == allowed


def test_jvp_level_nests() -> None:
    """_jvp_increment_nesting makes forward mode over forward mode possible on torch's single level."""
    with _torch.functorch_forward_level() as outer:
        x = _torch.make_dual(X, torch.ones_like(X))
        with _torch.functorch_forward_level() as inner:
            y = _torch.make_dual(x, torch.ones_like(X)) ** 3
            _, first = _torch.unpack_dual(y)
            first = _torch.unwrap(first, inner)
        _, second = _torch.unpack_dual(first)
        second = _torch.unwrap(second, outer)
    torch.testing.assert_close(second, 6 * X)


def test_vmap_level_hides_a_dimension() -> None:
    """_add_batch_dim, is_batchedtensor, maybe_get_level and _remove_batch_dim are what vmap is."""
    x = torch.arange(6.0).reshape(2, 3)
    with _torch.batch_level(3, "error") as level:
        row = _functorch._add_batch_dim(x, 1, level)
        assert row.shape == (2,)
        assert _functorch.is_batchedtensor(row)
        assert not _functorch.is_batchedtensor(x)
        assert _functorch.maybe_get_level(row) == level
        assert _functorch._remove_batch_dim(row * 2, level, 3, 0).tolist() == (2 * x.T).tolist()
        assert _functorch._remove_batch_dim(x, level, 3, 0).shape == (3, 2, 3)


@pytest.mark.parametrize(("randomness", "distinct"), [("same", 1), ("different", 3)])
def test_vmap_level_takes_randomness_by_name(randomness: str, distinct: int) -> None:
    """_vmap_increment_nesting(size, randomness) knows "error", "same" and "different"."""
    with _torch.batch_level(3, randomness) as level:
        row = _functorch._add_batch_dim(torch.zeros(3), 0, level)
        drawn = _functorch._remove_batch_dim(row + torch.rand(()) + torch.rand_like(row), level, 3, 0)
    assert len(set(drawn.tolist())) == distinct


def test_fallback_warning_is_silenced_by_its_first_words_and_nothing_stays() -> None:
    slope = torch.func.vmap(torch.func.grad(lambda x: torch.nn.functional.soft_margin_loss(x, torch.ones(2))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with pytest.raises(UserWarning, match="There is a performance drop"):
            slope(torch.ones(2, 2))
        with _torch.silenced_fallback_warning, _torch.silenced_fallback_warning:
            slope(torch.ones(2, 2))
        assert warnings.filters == before
        with pytest.raises(UserWarning, match="There is a performance drop"):
            slope(torch.ones(2, 2))


def test_one_dual_level_per_process_by_a_global() -> None:
    """forward_ad._current_level is a process-wide global: a second thread sees this one's level."""
    assert forward_ad._current_level == -1
    assert torch._C._enter_dual_level() == 0
    forward_ad._current_level = 0
    try:
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(forward_ad._current_level))
        thread.start()
        thread.join()
        assert seen == [0]
    finally:
        torch._C._exit_dual_level(level=0)
        forward_ad._current_level = -1
    # The number is all that Python adds to the level.
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, X)
        assert forward_ad.unpack_dual(dual).tangent is not None
    assert forward_ad._current_level == -1


def test_loading_forward_rules_is_what_warns() -> None:
    """_maybe_load_decompositions is the import whose TorchScript warning we silence in advance."""
    assert callable(forward_ad._maybe_load_decompositions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forward_ad._maybe_load_decompositions()


def test_torch_func_jvp_enters_a_level_only_when_it_is_the_first() -> None:
    """JVP_NESTING > 0 tells torch.func.jvp that a level is open; ours counts as its outermost."""
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append((eager_transforms.JVP_NESTING, forward_ad._current_level))
        return x.sin()

    with _torch.functorch_forward_level():
        torch.func.jvp(look, (X,), (X,))
    assert seen == [(2, 0)]
    torch.func.jvp(look, (X,), (X,))
    assert seen[1] == (1, 0)


def test_modes_are_switched_without_context_managers() -> None:
    """_set_grad_enabled and _set_fwd_grad_enabled are the flags themselves, cheaper than managers."""
    try:
        torch._C._set_grad_enabled(False)
        assert not torch.is_grad_enabled()
        assert torch._C._is_fwd_grad_enabled()
        torch._C._set_fwd_grad_enabled(False)
        assert not torch._C._is_fwd_grad_enabled()
    finally:
        torch._C._set_grad_enabled(True)
        torch._C._set_fwd_grad_enabled(True)


def test_hooks_of_all_modules_are_a_dict_whose_keys_may_be_anything() -> None:
    """_global_forward_pre_hooks: called before every module with the module and its arguments."""
    key, seen = object(), []
    layer = torch.nn.Identity()
    _torch.module_pre_hooks[key] = lambda module, args: seen.append((module, args))
    try:
        layer(X[:2])
    finally:
        del _torch.module_pre_hooks[key]
    layer(X[:2])
    ((module, (argument,)),) = seen
    assert module is layer
    assert torch.equal(argument, X[:2])


@pytest.mark.parametrize(("mode", "fake"), [("real", False), ("fake", True)])
def test_tracers_and_fake_tensors_are_modes_of_their_own(mode: str, fake: bool) -> None:
    """_get_dispatch_mode(key) says whether numbers can be looked at: not while make_fx traces, nor of fake tensors."""
    keys = torch._C._TorchDispatchModeKey
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.extend(torch._C._get_dispatch_mode(key) is not None for key in (keys.PROXY, keys.FAKE))
        return x * 2

    look(X)
    make_fx(look, tracing_mode=mode)(X)
    assert seen == [False, False, True, fake]
    assert _torch.computes_numbers([X])
    assert not _torch.computes_numbers([X.to("meta")])
    with FakeTensorMode():
        fake_tensor = torch.ones(2)
    assert not _torch.computes_numbers([fake_tensor])


def test_second_run_of_a_checkpoint_can_be_surrounded() -> None:
    """torch takes _recomputation_hook by its name in the module, each time."""
    seen: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        seen.append("entered")
        yield
        seen.append("left")

    x = X.clone().requires_grad_()
    output = checkpoint.checkpoint(lambda x: (seen.append("runs"), x.sin())[1], x, use_reentrant=False)
    _torch.around_recomputation["here"] = around
    try:
        output.sum().backward()
    finally:
        del _torch.around_recomputation["here"]
    assert seen == ["runs", "entered", "runs", "left"]
    assert torch.equal(x.grad, X.cos())


def test_checkpoint_has_its_generator_in_a_frame_of_its_file() -> None:
    """What torch.utils.checkpoint has entered is ended by closing its local ``gen``, also after an error."""

    def fail(x: Tensor) -> Tensor:
        raise ValueError

    try:
        checkpoint.checkpoint(fail, X, use_reentrant=False)
    except ValueError as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    of_checkpoint = [one.f_locals for one in frames if one.f_code.co_filename == checkpoint.__file__]
    found = [names["gen"] for names in of_checkpoint if "gen" in names]
    assert found
    for generator in found:
        generator.close()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_second_run_of_a_checkpoint_ends_by_an_exception() -> None:
    """_StopRecomputationError goes through the function, which has to let it pass."""
    raised: list[type] = []

    def func(x: Tensor) -> Tensor:
        try:
            return x.sin()
        except Exception as error:
            raised.append(type(error))
            raise

    x = X.clone().requires_grad_()
    checkpoint.checkpoint(func, x, use_reentrant=False).sum().backward()
    assert raised == [_torch.StopRecomputation]


def test_hooks_of_checkpoints_can_be_put_aside() -> None:
    """The hooks of torch.utils.checkpoint are known by their module; others stay."""
    tops: list[Any] = []

    def func(x: Tensor) -> Tensor:
        top = torch._C._autograd._top_saved_tensors_default_hooks
        taken = take_checkpoint_hooks()
        tops.append(top(True))
        put_back_checkpoint_hooks(taken)
        tops.append(top(True)[0].__module__)
        with autograd_graph.save_on_cpu():
            assert take_checkpoint_hooks() == []
            tops.append(top(True)[0].__module__)
        return x.sin()

    x = X.clone().requires_grad_()
    checkpoint.checkpoint(func, x, use_reentrant=False).sum().backward()
    assert tops == [None, checkpoint.__name__, autograd_graph.__name__] * 2


def test_dual_tensors_are_made_and_opened() -> None:
    """_VF._make_dual and _VF._unpack_dual take the level as an argument and give None for no tangent."""
    with forward_ad.dual_level():
        primal, tangent = torch._VF._unpack_dual(torch._VF._make_dual(X, 2 * X, level=0) * 3, level=0)
        torch.testing.assert_close((primal, tangent), (3 * X, 6 * X))
        assert torch._VF._unpack_dual(X, level=0)[1] is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(1, 3))])
def test_scripted_modules_are_copied_by_their_slots(make: Any) -> None:
    """RecursiveScriptModule.__copy__ gives slots of its own, which _c.setattr and _modules fill."""
    whole = make(torch.nn.Sequential(torch.nn.Linear(3, 2)))
    inner = next(iter(whole._modules.items()))[1]
    twin, layer = _torch.copy_of_scripted(whole), _torch.copy_of_scripted(inner)
    weight = inner.weight.clone()
    layer._c.setattr("weight", torch.zeros(2, 3))
    twin._modules["0"] = layer
    assert torch.equal(twin(torch.ones(1, 3))[0], inner.bias)
    assert torch.equal(inner.weight, weight)
    assert torch.equal(whole(torch.ones(1, 3))[0], weight.sum(1) + inner.bias)


@pytest.mark.parametrize(
    "run",
    [autograd_graph._engine_run_backward, Variable._execution_engine.run_backward],
    ids=["wrapped", "bare"],
)
def test_engine_is_called_like_autograd_grad(run: Any) -> None:
    """The engine gives cotangents of inputs, None where there is none, without accumulating.

    _engine_run_backward is what torch.autograd.grad calls; _execution_engine is under it.
    """
    x, unused = X.clone().requires_grad_(), X.clone().requires_grad_()
    y = (x**2).sum()
    slope, nothing = run(
        (y,), (torch.ones_like(y),), False, False, (x, unused), allow_unreachable=True, accumulate_grad=False
    )
    torch.testing.assert_close(slope, 2 * X)
    assert nothing is None
    assert x.grad is None


def test_wrapper_of_a_level_that_was_left_can_be_taken_off() -> None:
    """unwrap_if_dead() gives what a pull outside of its level sees of a saved tensor."""
    kept: list[Tensor] = []
    torch.func.grad(lambda x: (kept.append(x), (x**2).sum())[1])(X)
    assert _functorch.is_functorch_wrapped_tensor(kept[0])
    assert not _functorch.is_functorch_wrapped_tensor(_functorch.unwrap_if_dead(kept[0]))
    torch.func.grad(lambda x: (kept.append(_functorch.unwrap_if_dead(x)), x.sum())[1])(X)
    assert _functorch.is_functorch_wrapped_tensor(kept[1])


def test_upper_levels_can_be_stepped_out_of() -> None:
    """pop_dynamic_layer_stack() leads to the level below, where plain autograd may record; and push goes back."""
    seen: list[Any] = []
    depth = _functorch.get_dynamic_layer_stack_depth

    def look(x: Tensor) -> Tensor:
        outer, before = [], depth()
        while depth():
            outer.append(_functorch.pop_dynamic_layer_stack())
        seen.append((before, _functorch.peek_interpreter_stack()))
        seen.append(torch.func.vmap(torch.func.grad(lambda y: y**3))(X))
        while outer:
            _functorch.push_dynamic_layer_stack(outer.pop())
        seen.append(depth())
        return (x**2).sum()

    assert torch.equal(torch.func.vmap(torch.func.grad(look))(X[:, None]), 2 * X[:, None])
    assert seen[0] == (2, None)
    assert torch.equal(seen[1], 3 * X**2)
    assert seen[2] == 2


def test_torch_forbids_its_own_functions_outside_levels() -> None:
    """set_single_level_autograd_function_allowed is off, but while torch applies a Function on a level."""
    assert not _functorch.get_single_level_autograd_function_allowed()
    _functorch.set_single_level_autograd_function_allowed(False)
    assert not _functorch.get_single_level_autograd_function_allowed()


def test_end_of_a_generators_context_waits_in_the_traceback() -> None:
    """A ``with`` of a generator holds it as ``self.gen``; where ``__exit__`` is not run, it ends when it is closed."""
    ended = []

    @contextlib.contextmanager
    def context() -> Any:
        try:
            yield
        finally:
            ended.append(True)

    left = context()
    assert isinstance(left, contextlib._GeneratorContextManager)
    left.__enter__()
    left.gen.close()
    assert ended == [True]


def test_inference_mode_is_left_in_c() -> None:
    """_InferenceMode(False) is a context manager in C, which puts grad mode back too."""
    with torch.inference_mode():
        with torch._C._InferenceMode(False):
            assert not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
    assert not isinstance(torch._C._InferenceMode.__enter__, types.FunctionType)


class Double(torch.autograd.Function):
    """An autograd Function, for what sees it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class Seeing(TorchFunctionMode):
    """Notes what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_function_mode_sees_autograd_functions_inside_levels() -> None:
    """Inside a level an autograd Function is applied by custom_function_call(cls, *args)."""
    with Seeing() as mode:
        torch.func.vmap(Double.apply)(X)
    assert autograd_function.custom_function_call in mode.seen


def test_function_modes_can_be_left_out() -> None:
    """torch._C.DisableTorchFunction switches them off; _get_current_function_mode() tells the fully_unwrapped."""
    with Seeing() as mode:
        assert overrides._get_current_function_mode() is mode
        with torch._C.DisableTorchFunction():
            X.sin()
    assert mode.seen == []
    assert overrides._get_current_function_mode() is None


def test_function_modes_stand_on_a_stack() -> None:
    """_get_current_function_mode_stack() lists them, the innermost last; they can be counted, and popped."""
    with Seeing() as outer, Seeing() as inner:
        assert overrides._get_current_function_mode_stack() == [outer, inner]
        assert torch._C._pop_torch_function_stack() is inner
        inner.__enter__()


def test_code_can_be_kept_from_being_compiled_alone() -> None:
    """set_code_exec_strategy(code, skip) keeps a function and all it calls eager, unless its caller is traced."""
    seen: list[bool] = []

    def inside(x: Tensor) -> Tensor:
        seen.append(torch.compiler.is_compiling())
        return x.sin()

    def marked(x: Tensor) -> Tensor:
        return inside(x)

    def calling(x: Tensor) -> Tensor:
        return marked(x)

    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(marked.__code__, eval_frame._FrameExecStrategy(skip, skip))
    torch.compile(marked, backend="eager")(X)
    torch.compile(calling, backend="eager", fullgraph=True)(X)
    assert seen == [False, True]
    torch.compiler.reset()


def test_graph_can_be_broken_with_words() -> None:
    """graph_break(msg=...) is nothing outside of a trace, and raises our words where there has to be one graph."""

    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break(msg="our words")
        return x.sin()

    assert torch.equal(broken(X), X.sin())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="our words"):
        torch.compile(broken, backend="eager", fullgraph=True)(X)
    torch.compiler.reset()


class NamesWhatIsAsked:
    """What behaves like a tensor, and says by numbers what the tracer asks of it."""

    NAMES = ("__rmatmul__", "matmul", "__rsub__", "sub")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        (tensor,) = (arg for arg in args if isinstance(arg, Tensor))
        return tensor * 0 + cls.NAMES.index(func.__name__)

    def __matmul__(self, other: Any) -> Any:
        return other["x"] + 10 if isinstance(other, dict) else NotImplemented

    def __rmatmul__(self, other: Any) -> Any:
        return other["x"] + 20 if isinstance(other, dict) else NotImplemented


@pytest.mark.skipif(_torch.version < TorchVersion("2.13"), reason="older tracers are not supported")
def test_tracer_tells_the_order_of_the_operands_of_matmul() -> None:
    """The seam names Tensor.__rmatmul__ in the tracer's table, and gives it ``@`` for what is not a tensor."""
    one = NamesWhatIsAsked()

    def asked(x: Tensor) -> Any:
        return one @ x, x @ one, one - x, x - one, one @ {"x": x}, {"x": x} @ one

    zero = torch.zeros(())
    assert torch.compile(asked, backend="eager", fullgraph=True)(zero) == (0, 1, 2, 3, 10, 20)
    assert _torch.tells_order_of_matmul()
    torch.compiler.reset()


def test_stance_is_asked_at_every_call_of_a_compiled_function() -> None:
    """torch._dynamo.eval_frame._stance is a global, whose ``stance`` decides whether the call is compiled."""
    graphs: list[Any] = []
    compiled = torch.compile(
        torch.sin, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True
    )
    tracer: Any = torch._dynamo.eval_frame
    before = tracer._stance
    tracer._stance = SimpleNamespace(stance="force_eager", skip_guard_eval_unsafe=False, backend=None)
    try:
        assert torch.equal(compiled(X), X.sin())
        assert graphs == []
        tracer._stance.stance = "default"
        compiled(X)
    finally:
        tracer._stance = before
    assert len(graphs) == 1
    torch.compiler.reset()


def test_kernels_of_higher_order_operators_are_in_tables() -> None:
    """``py_kernels`` and ``functorch_table`` are asked by dispatch key and by transform, unless the cache knows."""
    operator: Any = torch.ops.higher_order.cond
    key = torch._C.DispatchKey.Autograd
    assert {key, torch._C.DispatchKey.CompositeExplicitAutograd} <= set(operator.py_kernels)
    before, levels = operator.py_kernels[key], dict(operator.functorch_table)
    operator.py_kernels[key] = lambda *_: "a kernel"
    operator.functorch_table[_functorch.TransformType.Grad] = lambda *_: X
    operator._dispatch_cache.clear()
    try:
        assert operator(torch.tensor(True), torch.sin, torch.cos, (X,)) == "a kernel"
        seen = torch.func.grad(
            lambda x: (operator(torch.tensor(True), torch.sin, torch.cos, (x,)) * x).sum()
        )(X)
    finally:
        operator.py_kernels[key] = before
        operator.functorch_table.clear()
        operator.functorch_table.update(levels)
        operator._dispatch_cache.clear()
    assert torch.equal(seen, X)


def test_stack_of_dispatch_modes_has_a_length() -> None:
    """_len_torch_dispatch_stack() counts the tracers' own modes too."""
    count = torch._C._len_torch_dispatch_stack
    assert count() == 0
    with _torch.DispatchMode():
        assert count() == 1
    with torch._subclasses.FakeTensorMode():
        assert count() == 1


def test_saved_tensor_hooks_can_be_forbidden() -> None:
    """_saved_tensors_hooks_disable(message) makes a hook inside a level an error with our words."""
    assert _autograd._saved_tensors_hooks_get_disabled_error_message() is None
    torch._C._autograd._saved_tensors_hooks_disable("our words")
    try:
        assert _autograd._saved_tensors_hooks_get_disabled_error_message() == "our words"
        with (
            pytest.raises(RuntimeError, match="our words"),
            autograd_graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        ):
            pass
    finally:
        _autograd._saved_tensors_hooks_enable()
    assert _autograd._saved_tensors_hooks_get_disabled_error_message() is None


def test_saved_tensor_hooks_stand_on_a_stack() -> None:
    """_top_saved_tensors_default_hooks(True) is the last pair, None where there is none; and it can be popped."""
    assert _autograd._top_saved_tensors_default_hooks(True) is None
    hooks = autograd_graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    hooks.__enter__()
    assert _autograd._top_saved_tensors_default_hooks(True) == (hooks.pack_hook, hooks.unpack_hook)
    _autograd._pop_saved_tensors_default_hooks()
    assert _autograd._top_saved_tensors_default_hooks(True) is None


def test_decompositions_load_lazily() -> None:
    """lazy_load_decompositions gives vmap the batching rules that torch keeps as decompositions."""
    predispatch.lazy_load_decompositions()
    assert torch.func.vmap(torch.nn.functional.silu)(X).shape == X.shape


def test_torchs_own_trees_learn_a_class() -> None:
    """_private_register_pytree_node registers with torch's Python trees, not also with optree."""

    class Box:
        def __init__(self, x: Any) -> None:
            self.x = x

    _torch.register_with_torch(Box, lambda b: ([b.x], None), lambda children, _: Box(*children))
    leaves, spec = torch_pytree.tree_flatten(Box(X))
    assert leaves[0] is X
    assert torch_pytree.tree_unflatten([1], spec).x == 1
    assert optree.tree_leaves(Box(X), namespace="torch")[0].__class__ is Box


def test_torchs_registry_holds_its_dataclasses() -> None:
    """SUPPORTED_NODES maps a class to its flatten_fn and unflatten_fn: what optree is told of it."""

    @dataclasses.dataclass
    class Pair:
        x: Tensor
        y: Tensor

    torch_pytree.register_dataclass(Pair)
    node = torch_pytree.SUPPORTED_NODES[Pair]
    children, context = node.flatten_fn(Pair(X, 2 * X))
    assert node.unflatten_fn(children, context).y is children[1]
    gradient = ad.grad(lambda pair: (pair.x * pair.y).sum())(Pair(X, 2 * X))
    torch.testing.assert_close((gradient.x, gradient.y), (2 * X, X))


def test_accumulators_know_their_leaf() -> None:
    """A graph's AccumulateGrad node has .variable and no next_functions: the walk finds leaves by it."""
    w = X.clone().requires_grad_()
    (node, _), *_ = (w * 2).grad_fn.next_functions
    assert node.variable is w
    assert node.next_functions == ()
    assert not hasattr((w * 2).grad_fn, "variable")


def test_writes_are_counted() -> None:
    """A tensor's _version goes up with every write in place, also through a view: a write is noticed."""
    tensor = torch.zeros(2)
    before = tensor._version
    tensor[0].add_(1)
    assert tensor._version == before + 1


def test_zeros_without_memory_are_told() -> None:
    """_is_zerotensor() tells a zero that a dispatch mode must not hand on: torch ends the process there."""
    zero = torch._efficientzerotensor(2)
    assert zero._is_zerotensor()
    assert not zero.clone()._is_zerotensor()


def test_nodes_know_the_shapes_of_their_cotangents() -> None:
    """A node's _input_metadata has shape and dtype of what comes into it: the size of a batched pull."""
    (metadata,) = (X.clone().requires_grad_() * 2).grad_fn._input_metadata
    assert (tuple(metadata.shape), metadata.dtype) == ((3,), torch.float64)


def test_nodes_of_norms_show_what_they_saved() -> None:
    """The pullback of layer_norm's pullback has grad_out, input, rstd; its inputs are six, in this order."""
    x, weight, bias = (
        torch.randn(2, 3).requires_grad_(),
        X.float().requires_grad_(),
        X.float().requires_grad_(),
    )
    norm = torch.nn.functional.layer_norm(x, (3,), weight, bias)
    (slope,) = torch.autograd.grad(norm, x, torch.ones(2, 3, requires_grad=True), create_graph=True)
    node = slope.grad_fn
    assert type(node).__name__ == "NativeLayerNormBackwardBackward0"
    assert [parent is not None for parent, _ in node.next_functions] == [True, True, False, False, True, True]
    saved = [_torch.saved_by(node, name) for name in ("grad_out", "input", "rstd", "weight")]
    assert [tuple(one.shape) for one in saved] == [(2, 3), (2, 3), (2, 1), (3,)]
    assert saved[1] is x


def test_torch_registers_its_classes_with_optree_under_its_namespace() -> None:
    """torch.utils._cxx_pytree puts torch's own containers into optree's namespace "torch"."""
    result = torch.max(X, 0)
    assert len(optree.tree_leaves(result, namespace="torch")) == 2


def test_switches_of_attention_are_those_of_the_public_functions() -> None:
    """The kernels of scaled_dot_product_attention are switched for the process, on the CPU as well."""
    pairs = (
        (torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash, torch.backends.cuda.flash_sdp_enabled),
        (torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math, torch.backends.cuda.math_sdp_enabled),
    )
    for is_on, switch, public in pairs:
        assert is_on() is public() is True
        switch(False)
        assert is_on() is public() is False
        switch(True)


def test_dispatch_mode_sees_operations_beneath_transforms() -> None:
    """A TorchDispatchMode is shown what vmap runs, with the batch in sight, and what backward runs."""
    shapes: dict[str, tuple[int, ...]] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            shapes[func.name()] = tuple(result.shape)
            return result

    with Watch():
        torch.func.vmap(torch.func.grad(lambda x: x.sin().sum()))(torch.ones(5, 3))
    assert shapes["aten::sin"] == (5, 3)
    assert shapes["aten::cos"] == (5, 3)


def test_nodes_are_numbered_in_the_order_of_their_making() -> None:
    """Older nodes have smaller numbers, and the thread tells the next one; a leaf's node has the largest there is."""
    x = X.clone().requires_grad_()
    first = (x * 2).grad_fn
    following = torch._C._autograd._get_sequence_nr()
    second = (x * 3).grad_fn
    assert first is not None
    assert second is not None
    assert first._sequence_nr() < following <= second._sequence_nr()  # type: ignore[attr-defined]
    assert second.next_functions[0][0]._sequence_nr() > 2**60  # type: ignore[union-attr]


def test_nodes_of_functions_know_their_class() -> None:
    """_forward_cls is the user's Function; inside a level it is one of torch's, whose backward encloses the user's."""
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    def func(x: Tensor) -> Tensor:
        y = Double.apply(x)
        seen.append(y.grad_fn)
        return y.sum()

    func(X.clone().requires_grad_())
    torch.func.grad(func)(X)
    assert seen[0]._forward_cls is Double
    assert not issubclass(seen[1]._forward_cls, torch.autograd.Function)
    assert [_torch.user_function(node) for node in seen] == [Double, Double]
    assert all(map(_torch.is_differentiable_once, seen))


def test_hooks_are_counted() -> None:
    """Every hook on a tensor or a node takes a number: so it is noticed that a function registers one."""
    y = X.clone().requires_grad_() * 2
    assert y.grad_fn is not None
    before = _torch.HookHandle.next_id
    y.register_hook(lambda g: g)
    y.grad_fn.register_hook(lambda inputs, outputs: None)
    y.grad_fn.register_prehook(lambda outputs: None)
    assert _torch.HookHandle.next_id == before + 3


def test_overlap_is_seen() -> None:
    """_debug_has_internal_overlap is 0 where elements cannot share memory, and not 0 where they may."""
    overlaps = [X, X.unfold(0, 2, 1), X.expand(2, 3), torch.ones(3, 4).t()]
    assert [torch._debug_has_internal_overlap(x) != 0 for x in overlaps] == [False, True, True, False]


def test_torch_func_wraps_tensors_by_names_that_others_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose subclass of Tensor is to keep its class replaces these three, as PyPose does."""
    seen = []

    def watched(module: Any, name: str) -> None:
        original = getattr(module, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, replacement)

    watched(torch_vmap, "_add_batch_dim")
    watched(eager_transforms, "_wrap_tensor_for_grad")
    watched(forward_ad, "make_dual")
    torch.func.vmap(torch.sin)(X)
    torch.func.grad(torch.sum)(X)
    torch.func.jvp(torch.sin, (X,), (X,))
    assert seen[0] == "_add_batch_dim"
    assert {"_wrap_tensor_for_grad", "make_dual"} <= set(seen)


def test_operation_can_be_run_otherwise_inside_levels() -> None:
    """A kernel for FuncTorchDynamicLayerFrontMode is asked inside levels alone, for an operation that torch composes."""
    seen = []

    def other(args: tuple[Any, ...]) -> Any:
        seen.append(args)
        return None if args[1] == 0 else lambda x, dim: x.movedim(0, dim)

    # An operation that nothing else in these tests uses.
    _torch.inside_levels(torch.ops.aten.moveaxis.int, lambda args: other(args[:2]))
    operator = torch.ops.aten.moveaxis.int
    assert operator(torch.zeros(2, 3), 0, 1).shape == (3, 2)
    assert not seen
    assert torch.func.vmap(lambda x: operator(x, 0, 1))(torch.zeros(5, 2, 3)).shape == (5, 3, 2)
    assert len(seen) == 1


def private_names(tree: ast.AST) -> set[str]:
    """Dotted names in the file that begin with one of torch's private modules, or end in a private part."""
    roots = {
        "_functorch",
        "forward_ad",
        "eager_transforms",
        "predispatch",
        "autograd_function",
        "autograd_graph",
        "torch_pytree",
        "torch_vmap",
        "overrides",
        "eval_frame",
        "_python_dispatch",
        "checkpoint",
        "_C",
        "_autograd",
    }
    names = set()
    for node in ast.walk(tree):
        dotted = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else []
        if not all(part.isidentifier() for part in dotted):
            continue
        if dotted[:2] in (["torch", "_C"], ["torch", "_VF"]):
            names.add(".".join(dotted[:3]))
        elif dotted and (
            dotted[0] in roots
            or (dotted[1].startswith("_") and dotted[0] != "self" and dotted[1] not in OF_PYTHON)
        ):
            names.add(".".join(dotted[:2]))
    return names - {"torch._C", "torch._VF"}


def test_every_private_symbol_of_the_seam_has_a_contract() -> None:
    used = set().union(*(private_names(ast.parse(source.read_text())) for source in SOURCES))
    assert used - set(CONTRACTS) == set(), "a private symbol without a contract test"
    assert set(CONTRACTS) - used == set(), "a contract for a symbol that nothing uses"
    assert {name for name in CONTRACTS.values() if name not in globals()} == set()


def test_version_can_be_compared() -> None:
    assert _torch.version >= TorchVersion("2.11")
    assert torch.__version__.startswith(str(_torch.version))
