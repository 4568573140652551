r"""
A physics-informed network for the heat equation
================================================

A network can be trained to solve a differential equation: its own derivatives are required to
satisfy the equation at a number of points (M. Raissi, P. Perdikaris and G. E. Karniadakis, 2019).
The loss therefore contains first and second derivatives with respect to the inputs. They come from
:func:`autodiff.grad` and :func:`autodiff.hessian` at one point, and ``vmap`` over all points.
Training differentiates them once more, with respect to the parameters. Here the exact solution is
known, so that the error can be measured.
"""

# %%
# The equation
# ------------
# A rod of length 1 whose ends are kept at temperature zero cools down:
#
# .. math:: \frac{\partial u}{\partial t} = \kappa\, \frac{\partial^2 u}{\partial x^2},
#           \qquad u(0, x) = \sin \pi x + \tfrac12 \sin 4 \pi x, \qquad u(t, 0) = u(t, 1) = 0
#
# with :math:`\kappa = 0.1`. Each wave of the initial temperature decays at its own rate:

import time

import matplotlib.pyplot as plt
import torch

import autodiff as ad

torch.manual_seed(0)
KAPPA = 0.1


def exact(t, x):
    slow = torch.exp(-KAPPA * torch.pi**2 * t) * torch.sin(torch.pi * x)
    fast = torch.exp(-KAPPA * (4 * torch.pi) ** 2 * t) * torch.sin(4 * torch.pi * x)
    return slow + 0.5 * fast


# %%
# What the network has to satisfy
# -------------------------------
# ``u`` is the network as a function of its parameters and of one point :math:`(t, x)`. Its gradient
# with respect to the point contains :math:`\partial u / \partial t`, and its Hessian contains
# :math:`\partial^2 u / \partial x^2`.

model = torch.nn.Sequential(
    torch.nn.Linear(2, 20),
    torch.nn.Tanh(),
    torch.nn.Linear(20, 20),
    torch.nn.Tanh(),
    torch.nn.Linear(20, 1),
)
model.double().requires_grad_(False)
start, unravel = ad.pytree.ravel(dict(model.named_parameters()))
print(f"{len(start)} parameters")


def u(params, point):
    return ad.functional_call(model, unravel(params), (point,)).squeeze()


def heat_residual(params, point):
    slopes = ad.grad(u, argnums="point")(params, point)
    curvatures = ad.hessian(u, argnums="point")(params, point)
    return slopes[0] - KAPPA * curvatures[1, 1]


def edge_residual(params, point, temperature):
    return u(params, point) - temperature


# %%
# These are residuals at one point. ``vmap`` evaluates them at all points: 500 in the interior, and
# 180 at the edges, which have ten times the weight.

EDGE = 10
inside = torch.quasirandom.SobolEngine(2).draw(500).double()  # [500, 2], of t and x
line = torch.linspace(0, 1, 60, dtype=torch.float64)
zeros, ones = torch.zeros_like(line), torch.ones_like(line)
pairs = ((zeros, line), (line, zeros), (line, ones))
edges = torch.cat([torch.stack(pair, dim=1) for pair in pairs])  # [180, 2]
temperatures = torch.cat([exact(zeros, line), zeros, zeros])


def residuals(params):
    of_heat = ad.vmap(heat_residual, in_dims=(None, 0))(params, inside)
    of_edges = ad.vmap(edge_residual, in_dims=(None, 0, 0))(params, edges, temperatures)
    return torch.cat([of_heat, EDGE * of_edges])  # [680]


def loss(params):
    return residuals(params).square().sum()


# %%
# The error
# ---------
# The error is measured at points not used for training: on a grid of 101 x 101 points, against the
# exact solution.

ticks = torch.linspace(0, 1, 101, dtype=torch.float64)
grid = torch.cartesian_prod(ticks, ticks)
truth = exact(grid[:, 0], grid[:, 1])


def error_on_grid(params):
    return ad.vmap(u, in_dims=(None, 0))(params, grid) - truth


class Record:
    """The relative error against computing time, without the time for measuring the error."""

    def __init__(self):
        self.seconds, self.errors, self.spent = [], [], 0.0
        self.since = time.process_time()

    def add(self, params):
        """Stop the clock, measure the error, and start the clock again."""
        self.spent += time.process_time() - self.since
        self.seconds.append(self.spent)
        self.errors.append((error_on_grid(params).norm() / truth.norm()).item())
        self.since = time.process_time()


# %%
# Training by Adam
# ----------------
# This is the usual method. The gradient with respect to the parameters involves third derivatives:
# ``grad`` differentiates through ``vmap`` of ``hessian``.

params = start.clone()
optimizer = torch.optim.Adam([params], lr=5e-3)
optimizer.step()  # without a gradient: loads the optimizer before the clock starts
by_adam = Record()
for step in range(1500):
    params.grad = ad.grad(loss)(params)
    optimizer.step()
    if step % 20 == 19:
        by_adam.add(params)
print(f"Adam, {step + 1} steps: relative error {by_adam.errors[-1]:.1e}")

# %%
# Training by least squares
# -------------------------
# The loss is a sum of squares, with few residuals and few parameters. This suits the method of
# Levenberg and Marquardt, which replaces the residuals by their linear approximation and solves the
# resulting least-squares problem, with damping. It needs their Jacobian, of size 680 x 501.
# ``jacrev(residuals)`` would compute it with 680 backward passes through all points. But each
# residual depends on a single point, so each row is a gradient at one point. ``vmap`` of ``grad`` of
# a function that itself contains a ``grad`` and a ``hessian`` takes less than a hundredth of the
# time.


def jacobian(params):
    of_heat = ad.vmap(ad.grad(heat_residual), in_dims=(None, 0))(params, inside)
    gradient_at_edge = ad.vmap(ad.grad(edge_residual), in_dims=(None, 0, 0))
    of_edges = gradient_at_edge(params, edges, temperatures)
    return torch.cat([of_heat, EDGE * of_edges])


direction = torch.randn_like(start)
_, change = ad.jvp(residuals, (start,), (direction,))
assert torch.allclose(jacobian(start) @ direction, change)

params, by_least_squares = start.clone(), Record()
damping, value = 1.0, loss(params)
for step in range(150):
    J, r = jacobian(params), residuals(params)
    while damping < 1e8:
        matrix = torch.cat([J, damping**0.5 * torch.eye(len(params), dtype=J.dtype)])
        target = torch.cat([r, torch.zeros_like(params)])
        trial = params - torch.linalg.lstsq(matrix, target).solution
        if loss(trial) < value:
            params, value, damping = trial, loss(trial), damping / 2
            break
        damping *= 3
    if step % 3 == 2:
        by_least_squares.add(params)
relative = by_least_squares.errors[-1]
print(f"Levenberg-Marquardt, {step + 1} steps: relative error {relative:.1e}")
assert relative < 1e-3

BLUE, ORANGE = "#0072B2", "#D55E00"
plt.rcParams |= {
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
}

figure, panel = plt.subplots(figsize=(7, 4))
for record, color, name in (
    (by_adam, ORANGE, "Adam"),
    (by_least_squares, BLUE, "Levenberg-Marquardt"),
):
    panel.plot(record.seconds, record.errors, color=color, label=name)
panel.set(yscale="log", xlabel="time to train (s, one core)")
panel.set_ylabel("relative error of the solution")
panel.set_title("Two ways to train one network", fontsize=11)
panel.legend()
plt.show()

# %%
# The solution
# ------------
# The short wave decays sixteen times as fast as the long one, and the network reproduces both.

along = torch.linspace(0, 1, 200, dtype=torch.float64)
moments = (0.0, 0.02, 0.05, 0.2, 1.0)
shades = plt.get_cmap("viridis")(torch.linspace(0, 0.85, len(moments)))
figure, panel = plt.subplots(figsize=(7, 4.4))
for moment, shade in zip(moments, shades, strict=True):
    points = torch.stack([torch.full_like(along, moment), along], dim=1)
    panel.plot(along, exact(points[:, 0], along), color=shade, label=f"t = {moment:g}")
    found = ad.vmap(u, in_dims=(None, 0))(params, points[5::10])
    panel.plot(along[5::10], found, "o", color=shade, markersize=4)
panel.set(xlabel="position x (lengths of the rod)", ylabel="temperature u")
panel.set_title("The exact solution (lines) and the network (dots)", fontsize=11)
panel.legend()
plt.show()

# %%
# The error is largest at the beginning, where the solution changes fastest. A classical method would
# give more correct digits in less time. The advantages of the network are that it needs no mesh, and
# that for another equation only the two lines of ``heat_residual`` change.

error = error_on_grid(params).reshape(101, 101)
largest = error.abs().max().item()
print(f"Largest error {largest:.1e}, where temperatures reach {truth.max():.2f}")

figure, panel = plt.subplots(figsize=(7, 3.6))
scale = {"cmap": "RdBu_r", "vmin": -1e4 * largest, "vmax": 1e4 * largest}
place = {"origin": "lower", "extent": (0, 1, 0, 1), "aspect": "auto"}
image = panel.imshow(1e4 * error.mT, **place, **scale)
panel.set(xlabel="time t", ylabel="position x (lengths of the rod)")
panel.set_title("The error of the network", fontsize=11)
panel.grid(visible=False)
figure.colorbar(image, ax=panel, label=r"error of the temperature ($10^{-4}$)")
plt.show()

# sphinx_gallery_thumbnail_number = 2
