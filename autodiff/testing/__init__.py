"""Derivatives checked against finite differences, after JAX's ``jax.test_util``."""

from autodiff.testing.check import check_grads as check_grads
from autodiff.testing.check import check_jvp as check_jvp
from autodiff.testing.check import check_vjp as check_vjp
