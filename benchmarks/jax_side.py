"""JAX's side of the benchmark, in an environment of its own, where torch need not be.

Runs as ``python jax_side.py``: reads requests from standard input and answers on standard output, both
pickled. ``("make", transform, function, arguments)`` compiles and gives the result and the seconds that
took, ``("time", runs)`` runs it and gives the seconds, ``("matrix rate", size)`` gives multiplications and
additions per second. Imports nothing of this project.
"""

from __future__ import annotations

import os
import pickle
import sys
import time

# One thread, like the others: XLA takes as many as it sees processors.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp


def tiny(x):
    return (x * jnp.sin(x)).sum()


def tiny_vector(x):
    return x * jnp.sin(x)


def chain(length):
    def func(x):
        for _ in range(length):
            x = jnp.sin(x)
        return x.sum()

    return func


def perceptron_of(layers, x):
    *hidden, weight, bias = layers
    for hidden_weight, hidden_bias in zip(hidden[::2], hidden[1::2], strict=True):
        x = jnp.tanh(x @ hidden_weight.T + hidden_bias)
    return (x @ weight.T + bias).squeeze(-1)


def perceptron(x, layers):
    return perceptron_of(layers, x)


def error_of_perceptron(layers, x, y):
    return ((perceptron_of(layers, x) - y) ** 2).mean()


def squared_laplacian(layers, x):
    hessians = jax.vmap(jax.hessian(lambda one: perceptron_of(layers, one)))(x)
    return (hessians.trace(axis1=-2, axis2=-1) ** 2).mean()


def _normalised(x, weight, bias):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5) * weight + bias


def encoder(params, x):
    """torch.nn.TransformerEncoderLayer of 4 heads, normalised after each part."""
    in_weight, in_bias, out_weight, out_bias, w1, b1, w2, b2, n1, m1, n2, m2 = params
    *batch, tokens, width = x.shape
    parts = jnp.split(x @ in_weight.T + in_bias, 3, -1)
    query, key, value = (part.reshape(*batch, tokens, 4, width // 4).swapaxes(-3, -2) for part in parts)
    attention = jax.nn.softmax(query @ key.swapaxes(-2, -1) / (width // 4) ** 0.5)
    attended = (attention @ value).swapaxes(-3, -2).reshape(*batch, tokens, width)
    x = _normalised(x + attended @ out_weight.T + out_bias, n1, m1)
    x = _normalised(x + jax.nn.relu(x @ w1.T + b1) @ w2.T + b2, n2, m2)
    return jnp.sin(x).mean()


def _features(convolutions, x):
    x = x[None]
    for weight, bias in zip(convolutions[::2], convolutions[1::2], strict=True):
        x = jax.lax.conv_general_dilated(x, weight, (2, 2), ((1, 1), (1, 1)))
        x = jnp.tanh(x + bias[:, None, None])
    return x[0].mean((-2, -1))


def _entropy(last, feature, label):
    weight, bias = last
    return -jax.nn.log_softmax(weight @ feature + bias)[label]


def entropy_of_convolutions(params, x, label):
    *convolutions, weight, bias = params
    return _entropy((weight, bias), _features(convolutions, x), label)


def entropy_of_last(last, x, label, convolutions):
    return _entropy(last, _features(convolutions, x), label)


def sum_of_leaves(leaves):
    return sum((jnp.sin(leaf) * leaf).sum() for leaf in leaves)


FUNCTIONS = {
    function.__name__: function
    for function in (
        tiny,
        tiny_vector,
        perceptron,
        error_of_perceptron,
        squared_laplacian,
        encoder,
        entropy_of_convolutions,
        entropy_of_last,
        sum_of_leaves,
    )
} | {f"chain_{length}": chain(length) for length in (10, 100, 1000)}

# Which arguments of a function differ from sample to sample.
SAMPLES = {
    "perceptron": (0, None),
    "error_of_perceptron": (None, 0, 0),
    "encoder": (None, 0),
    "entropy_of_convolutions": (None, 0, 0),
    "entropy_of_last": (None, 0, 0, None),
}


def transformed(transform, name):
    func = FUNCTIONS[name]
    match transform:
        case "grad" | "hessian":
            return getattr(jax, transform)(func)
        case "grad_of_samples" | "hessian_of_samples":
            return jax.vmap(getattr(jax, transform.removesuffix("_of_samples"))(func), SAMPLES[name])
        case "jvp":
            return lambda x, v: jax.jvp(func, (x,), (v,))
        case "vjp":

            def product(x, v):
                output, pullback = jax.vjp(func, x)
                return output, pullback(v)[0]

            return product
        case "hvp":

            def second_product(x, v, *others):
                def slope(x):
                    value, gradient = jax.value_and_grad(func)(x, *others)
                    return gradient, value

                _, product, value = jax.jvp(slope, (x,), (v,), has_aux=True)
                return value, product

            return second_product
        case _:
            raise ValueError(f"no transform of this name: {transform}")


class Server:
    """Answers requests, one after the other."""

    def make(self, transform, name, arguments):
        self._arguments = jax.tree.map(jnp.asarray, arguments)
        self._run = jax.jit(transformed(transform, name))
        start = time.perf_counter()
        result = jax.block_until_ready(self._run(*self._arguments))
        seconds = time.perf_counter() - start
        return [jax.device_get(leaf) for leaf in jax.tree.leaves(result)], seconds

    def time(self, runs):
        run, arguments = self._run, self._arguments
        start = time.perf_counter()
        for _ in range(runs):
            jax.block_until_ready(run(*arguments))
        return time.perf_counter() - start

    def version(self):
        return jax.__version__

    def matrix_rate(self, size):
        a = jnp.ones((size, size))
        multiply = jax.jit(jnp.matmul)
        multiply(a, a).block_until_ready()
        seconds = []
        for _ in range(10):
            start = time.perf_counter()
            multiply(a, a).block_until_ready()
            seconds.append(time.perf_counter() - start)
        return 2 * size**3 / min(seconds)


def main():
    server = Server()
    while True:
        try:
            name, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = ("ok", getattr(server, name)(*arguments))
        except Exception as error:  # noqa: BLE001  the other process raises it
            answer = ("error", f"{type(error).__name__}: {error}")
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
