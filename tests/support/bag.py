"""A container of another package's that hides a batch dimension itself: what tensordict's are, in little."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch._C import _functorch
from torch.utils import _pytree as torch_pytree

if TYPE_CHECKING:
    from collections.abc import Callable


class Bag:
    """Tensors that share their first ``batch_dims`` dimensions, whose sizes it remembers."""

    def __init__(self, tensors: dict[str, Tensor], batch_dims: int) -> None:
        self.tensors, self.shape = tensors, next(iter(tensors.values())).shape[:batch_dims]
        for tensor in tensors.values():
            assert tensor.shape[:batch_dims] == self.shape

    def dim(self) -> int:
        return len(self.shape)

    def apply(self, func: Callable[[Tensor], Tensor], more: int = 0) -> Bag:
        return Bag({name: func(tensor) for name, tensor in self.tensors.items()}, self.dim() + more)

    def clone(self, *, recurse: bool) -> Bag:
        assert not recurse
        return self.apply(lambda tensor: tensor)

    def auto_batch_size_(self, dims: int) -> Self:
        self.shape = next(iter(self.tensors.values())).shape[:dims]
        return self

    def new_zeros(self, shape: list[int]) -> Bag:
        return self.apply(lambda tensor: tensor.new_zeros([*shape, *tensor.shape[len(shape) :]]))

    def unsqueeze(self, dim: int) -> Bag:
        return self.apply(lambda tensor: tensor.unsqueeze(dim), 1)

    def __getitem__(self, index: tuple[Any, ...]) -> Bag:
        return self.apply(lambda tensor: tensor[index], -sum(isinstance(one, int) for one in index))

    def _add_batch_dim(self, *, in_dim: int, vmap_level: int) -> Bag:
        return self.apply(lambda tensor: _functorch._add_batch_dim(tensor, in_dim, vmap_level), -1)

    def _maybe_remove_batch_dim(self, funcname: str, vmap_level: int, batch_size: int, out_dim: int) -> Bag:
        def removed(one: Any) -> Any:
            if isinstance(one, Bag):
                return one._maybe_remove_batch_dim(funcname, vmap_level, batch_size, out_dim)
            return _functorch._remove_batch_dim(one, vmap_level, batch_size, out_dim)

        return self.apply(removed, 1)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        assert func is torch.cat
        bags, dim = args
        names = bags[0].tensors
        return Bag(
            {name: torch.cat([bag.tensors[name] for bag in bags], dim) for name in names}, bags[0].dim()
        )


class UnregisteredBag(Bag):
    """As a TensorDictParams: torch's pytree does not know it, and what its methods give is a `Bag`."""


torch_pytree.register_pytree_node(
    Bag,
    lambda bag: (list(bag.tensors.values()), (list(bag.tensors), bag.dim())),
    # A tree alone does not know that one dimension of the tensors, and of the bag, is hidden.
    lambda tensors, context: Bag(dict(zip(context[0], tensors, strict=True)), context[1]),
)
