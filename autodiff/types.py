"""The types of options, and type variables for the signatures of transforms. Imports nothing of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeAlias, TypedDict, TypeVar

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")

WithAux: TypeAlias = Callable[P, tuple[Any, A]]
"""A function that returns a pair; its second part, of type A, is not differentiated."""

Trees: TypeAlias = tuple[Any, ...]
"""Several trees, such as one for each positional argument."""

Argnums: TypeAlias = int | str | tuple[int | str, ...]
"""Arguments to differentiate: a position, a parameter name, or a tuple of them."""

NondiffArgnums: TypeAlias = Argnums
"""Arguments that are not differentiated, likewise."""

Wrt: TypeAlias = str | tuple[str, ...] | None
"""Leaves to differentiate: a pattern of their places, or a tuple of patterns; None for all."""

ChunkSize: TypeAlias = int | Literal["auto"] | None
"""How many products or samples to compute in one batch: ``"auto"`` learns it, None takes all."""

Randomness: TypeAlias = Literal["error", "different", "same"]
"""Random numbers in a batch: forbidden, drawn for each sample, or drawn once for all."""

Fallback: TypeAlias = Literal["loop"] | None
"""What ``vmap`` does with a function that cannot be batched: run it sample by sample, or raise."""

JacobianMode: TypeAlias = Literal["auto", "reverse", "forward"]
"""How a Jacobian is computed: by rows, by columns, or by whichever are fewer."""

HvpMode: TypeAlias = Literal["auto", "reverse-over-reverse", "forward-over-reverse", "reverse-over-forward"]
"""The outer mode over the inner one, or the first combination for which no operation lacks a rule."""

HessianMode: TypeAlias = HvpMode | Literal["forward-over-forward"]
"""As `HvpMode`, for a Hessian."""

Which: TypeAlias = Literal["LA", "SA", "LM", "BE"]
"""Eigenvalues: the largest, the smallest, the largest in magnitude, or half of them from both ends."""

OnError: TypeAlias = Literal["raise", "nan"]
"""What ``per_sample`` does with a sample that fails: stop there, or fill its result with NaN."""

CheckMode: TypeAlias = Literal["fwd", "rev"]
"""The mode of a derivative that is compared with finite differences."""

ModuleState: TypeAlias = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]
"""Parameters and buffers of a module by name, in one dict or several."""


class GradOptions(TypedDict, total=False):
    """Keywords of ``grad``."""

    holomorphic: bool
    strict: bool
    wrt: Wrt


class JacrevOptions(GradOptions, total=False):
    """Keywords of ``jacrev``."""

    chunk_size: ChunkSize


class JacfwdOptions(JacrevOptions, total=False):
    """Keywords of ``jacfwd``."""

    randomness: Randomness


class JacobianOptions(JacrevOptions, total=False):
    """Keywords of ``jacobian``."""

    mode: JacobianMode


class HessianOptions(JacrevOptions, total=False):
    """Keywords of ``hessian``."""

    mode: HessianMode
