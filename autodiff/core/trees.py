"""The only file that names optree.

Provides flattening, unflattening, prefixes and key paths, in the namespace where torch's own
registrations live, with None as a leaf and dicts in insertion order. Imports only `_torch`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import optree
import torch.utils._cxx_pytree  # noqa: F401  registers torch's classes with optree
from torch import Tensor

from autodiff._torch import compiling, register_with_torch, torch_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Spec: TypeAlias = optree.PyTreeSpec

NAMESPACE = "torch"
LEAF = optree.treespec_leaf(none_is_leaf=True, namespace=NAMESPACE)
_ALONE = optree.treespec_tuple([LEAF], none_is_leaf=True, namespace=NAMESPACE)


def flatten(tree: Any, *, batches: bool = False) -> tuple[list[Any], Spec]:
    """Leaves and structure. An object of an unregistered class, and None, are leaves.

    With ``batches``, what hides a batch dimension itself is a leaf too; see `hides_batches`.
    """
    if not compiling():
        if isinstance(tree, Tensor):
            # Most trees are one tensor, or the only one of a tuple of arguments, and every transform flattens
            # several: 0.2 us instead of 1.0.
            return [tree], LEAF
        if type(tree) is tuple and len(tree) == 1 and isinstance(tree[0], Tensor):
            return [tree[0]], _ALONE
        if len(torch_registry) != _mirrored:
            _mirror_torchs_classes()
    is_leaf = hides_batches if batches and _some_hide_batches else None
    return optree.tree_flatten(tree, is_leaf, none_is_leaf=True, namespace=NAMESPACE)


def hides_batches(tree: Any) -> bool:
    """Whether an object is a container that hides a batch dimension itself, and shows it again, as a TensorDict does.

    By these methods torch.func.vmap, once tensordict is imported, knows them as well. They know more than a tree does:
    which dimensions are batches, their names, which batch a lazy stack is made of.
    """
    return hasattr(type(tree), "_maybe_remove_batch_dim")


_mirrored = 0
# Whether a registered class does: only then is every node of a tree asked.
_some_hide_batches = False


def _mirror_torchs_classes() -> None:
    """Register with optree what torch.utils._pytree.register_dataclass registered with torch alone."""
    global _mirrored, _some_hide_batches  # noqa: PLW0603  what has been seen
    seen = len(torch_registry)
    _some_hide_batches = any(hasattr(cls, "_maybe_remove_batch_dim") for cls in torch_registry)
    for cls, node in list(torch_registry.items()):
        if not dataclasses.is_dataclass(cls):
            continue

        def flatten_one(obj: Any, node: Any = node) -> tuple[Any, Any]:
            children, context = node.flatten_fn(obj)
            return tuple(children), context

        def unflatten_one(context: Any, children: Any, node: Any = node) -> Any:
            return node.unflatten_fn(list(children), context)

        # A class that is registered with optree as well stays as it is.
        with contextlib.suppress(ValueError):
            optree.register_pytree_node(cast("Any", cls), flatten_one, unflatten_one, namespace=NAMESPACE)
    _mirrored = seen


def with_known_classes(leaves: Sequence[Any], spec: Spec) -> Any:
    """The tree with leaves that hide batches as containers of a class that is a tree; None if there are none.

    A TensorDictParams is a TensorDict that is a module as well, and that no registry knows.
    """

    def known_class(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) or not hides_batches(leaf):
            return leaf
        container = leaf.apply(lambda tensor: tensor)
        return leaf if is_leaf(container) else container

    known = [known_class(leaf) for leaf in leaves]
    return None if all(map(operator.is_, known, leaves)) else unflatten(spec, known)


def leaves(tree: Any) -> list[Any]:
    """The leaves alone."""
    return flatten(tree)[0]


def structure(tree: Any) -> Spec:
    """The structure alone."""
    return flatten(tree)[1]


def unflatten(spec: Spec, values: Sequence[Any]) -> Any:
    """Put a tree together from its leaves in order."""
    if spec is LEAF:
        return values[0]
    return (values[0],) if spec is _ALONE else spec.unflatten(values)


def match(spec: Spec, tree: Any) -> list[Any] | None:
    """The tree's leaves in the order of ``spec``, or None where the structures differ.

    Dicts match by key, whatever their order.
    """
    found, own = flatten(tree)
    if own is spec or own == spec:
        return found
    try:
        by_key = spec.flatten_up_to(tree)
    except ValueError:
        known = with_known_classes(found, own)
        return None if known is None else match(spec, known)
    return by_key if len(found) == len(by_key) and all(map(is_leaf, by_key)) else None


def is_leaf(tree: Any) -> bool:
    """Whether the object is a leaf and not a container."""
    return optree.tree_is_leaf(tree, none_is_leaf=True, namespace=NAMESPACE)


def broadcast(prefix: Any, spec: Spec) -> list[tuple[Any, bool]] | None:
    """One value of ``prefix`` for each leaf of ``spec``, and whether it stood right at that leaf.

    None where the prefix does not fit the tree.
    """
    tree = spec.unflatten(range(spec.num_leaves))
    prefixes, prefix_spec = flatten(prefix)
    try:
        places = prefix_spec.flatten_up_to(tree)
    except ValueError:
        return None
    values: list[Any] = [(None, False)] * spec.num_leaves
    for value, place in zip(prefixes, places, strict=True):
        exact = is_leaf(place)
        for position in leaves(place):
            values[position] = (value, exact)
    return values


def subtrees(tree: Any, spec: Spec) -> list[Any]:
    """The subtrees of the structure ``spec``, in order; other leaves are left out."""

    def found(node: Any) -> bool:
        return structure(node) == spec

    nodes, _ = optree.tree_flatten(tree, is_leaf=found, none_is_leaf=True, namespace=NAMESPACE)
    return [node for node in nodes if found(node)]


def difference(came: Spec, came_root: str, wanted: Spec, wanted_root: str) -> str:
    """The first place where two structures differ, in a sentence."""
    path = ""
    while True:
        one, other = _described(came), _described(wanted)
        if one != other:
            return f"{came_root}{path} is {one}, but {wanted_root}{path} is {other}."
        for entry, child, model in zip(wanted.entries(), came.children(), wanted.children(), strict=True):
            if child != model:
                came, wanted, path = child, model, f"{path}[{entry!r}]"
                break
        else:
            return f"{came_root} and {wanted_root} differ."


def _described(spec: Spec) -> str:
    if spec.is_leaf() or spec.type is None:
        return "a leaf"
    entries = spec.entries()
    if issubclass(spec.type, dict):
        return f"a {spec.type.__name__} with keys {sorted(map(str, entries))}"
    return f"a {spec.type.__name__} of {len(entries)}"


def paths(spec: Spec, root: str) -> list[str]:
    """Each leaf's place, written as code: ``params['w'][0]``."""
    return [accessor.codify(root) for accessor in spec.accessors()]


def dotted_paths(spec: Spec, *, skip: bool = False) -> list[str]:
    """Each leaf's place, written with dots: ``layers.0.weight``; without the first step if ``skip``."""
    return [".".join(map(str, path[skip:])) for path in spec.paths()]


def register(
    cls: type,
    flatten_one: Callable[[Any], tuple[Sequence[Any], Any]],
    unflatten_one: Callable[[Any, Sequence[Any]], Any],
    fields: Sequence[str] | None = None,
) -> None:
    """Register a class with optree and with torch's own pytree.

    ``flatten_one(obj)`` gives ``(children, metadata)``, ``unflatten_one(metadata, children)`` the
    object again; ``fields`` are the attributes that the children came from, for error messages.
    """

    def flatten_for_optree(obj: Any) -> tuple[Any, ...]:
        children, metadata = flatten_one(obj)
        return (children, metadata) if fields is None else (children, metadata, tuple(fields))

    def flatten_for_torch(obj: Any) -> tuple[list[Any], Any]:
        children, metadata = flatten_one(obj)
        return list(children), metadata

    entry = optree.AutoEntry if fields is None else optree.GetAttrEntry
    optree.register_pytree_node(
        cls, flatten_for_optree, cast("Any", unflatten_one), path_entry_type=entry, namespace=NAMESPACE
    )
    register_with_torch(cls, flatten_for_torch, lambda children, metadata: unflatten_one(metadata, children))
