"""README's tour as a script: the same statements, each result printed.

A test compares the two, statement by statement, and compares what they print. Run it with
``python examples/tour.py``.
"""

from dataclasses import dataclass

import torch

import autodiff as ad

# Trees in, trees out. Arguments are selected by position or by name, including keyword arguments.
params = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(0.5), "name": "line"}
loss = lambda params, x, y: (params["w"] @ x + params["b"] - y) ** 2
x, y = torch.tensor([1.0, -1.0]), torch.tensor(2.0)
print(ad.grad(loss)(params, x, y))
print(ad.grad(loss, argnums=("x", "y"))(params, x=x, y=y))

# A Hessian has a block for each pair of leaves.
H = ad.hessian(loss)(params, x, y)
print(H["w"]["b"])
print(ad.pytree.to_matrix(H, params))

# A gradient for each sample, and a Hessian for each sample. per_sample learns a chunk size.
X, Y = torch.randn(1000, 2), torch.randn(1000)
print(ad.vmap(ad.grad(loss), in_dims=(None, 0, 0))(params, X, Y)["w"].shape)
curvature = ad.per_sample(ad.hessian(loss), in_dims=(None, 0, 0), memory="1GiB", as_matrix=True)
print(curvature(params, X, Y).shape)
print(curvature.map(torch.linalg.eigvalsh, params, X, Y).shape)

# The same for the loss of a module, in all its parameters or in those of one layer.
model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
labels = torch.randint(3, (1000,))
model_loss = ad.sample_loss(model, torch.nn.functional.cross_entropy)
weights = dict(model.named_parameters())
full = ad.per_sample(ad.hessian(model_loss), in_dims=(None, 0, 0), as_matrix=True)
print(full(weights, X, labels).shape)
last = ad.per_sample(ad.hessian(model_loss, wrt="2.*"), in_dims=(None, 0, 0), as_matrix=True)
print(last(weights, X, labels).shape)

# Products without forming a matrix.
value, product = ad.hvp(lambda x: (x**3).sum(), (x,), (torch.ones(2),))
print(product)
value, pushforward = ad.linearize(torch.sin, torch.zeros(2))
print(pushforward(torch.tensor([1.0, 3.0])))

# Matrices that are never formed: they multiply, solve, and sum over a data set.
A = ad.operators.hessian(lambda x: (x**4).sum())(torch.tensor([1.0, 2.0]))
print(A @ torch.tensor([1.0, 1.0]))
print(ad.operators.solve(A + 1, torch.tensor([13.0, 98.0])).round(decimals=3))
curvature_of_batch = ad.operators.gauss_newton(
    lambda weights, x: ad.functional_call(model, weights, (x,)), torch.nn.functional.cross_entropy
)
G = curvature_of_batch.over((X, labels), batch_size=256)(weights)
print((G.shape, G.positive))


# A registered dataclass is a tree.
@ad.pytree.register_dataclass
@dataclass
class Line:  # noqa: D101  as short as README shows it
    slope: torch.Tensor
    offset: torch.Tensor


print(ad.grad(lambda line: line.slope * 3 + line.offset)(Line(torch.tensor(2.0), torch.tensor(1.0))))
