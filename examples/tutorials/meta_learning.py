r"""
Meta-learning through the gradient of a gradient
================================================

A network that was trained on many tasks can learn a new one from a few points, if it was trained to do so.
Model-agnostic meta-learning (C. Finn, P. Abbeel and S. Levine, *ICML* 2017,
`arXiv:1703.03400 <https://arxiv.org/abs/1703.03400>`_) looks for parameters from which a single step of gradient
descent on the points of a new task makes much progress. The step is itself a gradient, so training differentiates a
gradient, for every task of a batch.

Written with transforms, the code is close to the formula: ``grad`` is called inside the function that another ``grad``
differentiates, and ``vmap`` maps over the tasks.
"""

from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from autodiff import functional_call, grad, vmap
from autodiff.pytree import ravel

# %%
# The tasks
# ---------
#
# As in the paper, a task is a sine wave with an amplitude drawn from [0.1, 5] and a phase drawn from [0, pi]. For every
# task, the network gets ten points to adapt to, and is evaluated on other points.

SHOTS = 10
Params = dict[str, Tensor]


class Tasks(NamedTuple):
    """One row for each task."""

    amplitude: Tensor  # [tasks, 1]
    phase: Tensor  # [tasks, 1]
    x: Tensor  # [tasks, SHOTS], to adapt to
    x_test: Tensor  # [tasks, SHOTS], to evaluate on

    def y(self, x: Tensor) -> Tensor:
        """The waves at ``x``."""
        return self.amplitude * torch.sin(x - self.phase)


def draw_tasks(count: int, generator: torch.Generator) -> Tasks:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    return Tasks(
        uniform(0.1, 5, count, 1),
        uniform(0, np.pi, count, 1),
        uniform(-5, 5, count, SHOTS),
        uniform(-5, 5, count, SHOTS),
    )


# %%
# A step inside a loss
# --------------------
#
# The network is an ordinary module. ``functional_call`` runs it with the parameters that it is given, so the loss is a
# function of them. ``adapt`` is gradient descent on the points of a task, starting from ``params``:
#
# .. math:: A(\theta) = \theta - \alpha \nabla L_\text{train}(\theta)
#
# and ``meta_loss`` is the loss on the other points of the task after that step, :math:`L_\text{test}(A(\theta))`. Both
# are written for a single task.

RATE = 0.01  # alpha, as in the paper

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(1, 40),
    torch.nn.ReLU(),
    torch.nn.Linear(40, 40),
    torch.nn.ReLU(),
    torch.nn.Linear(40, 1),
).requires_grad_(False)


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    return (functional_call(model, params, (x[:, None],))[:, 0] - y).square().mean()


def adapt(params: Params, x: Tensor, y: Tensor, steps: int = 1) -> Params:
    for _ in range(steps):
        gradient = grad(loss)(params, x, y)
        params = {name: params[name] - RATE * gradient[name] for name in params}
    return params


def meta_loss(
    params: Params, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor
) -> Tensor:
    return loss(adapt(params, x, y), x_test, y_test)


# %%
# ``vmap`` turns it into a loss for a batch of tasks: parameters are shared, points are mapped. ``grad(mean_meta_loss)``
# then differentiates through the inner ``grad``. Its chain rule contains the Hessian of the inner loss, but only its
# product with a vector is computed:
#
# .. math:: \nabla_\theta L_\text{test}(A(\theta)) = (1 - \alpha \nabla^2 L_\text{train}(\theta))\,
#           \nabla L_\text{test}(A(\theta)).


def mean_meta_loss(params: Params, tasks: Tasks) -> Tensor:
    data = (tasks.x, tasks.y(tasks.x), tasks.x_test, tasks.y(tasks.x_test))
    return vmap(meta_loss, in_dims=(None, 0, 0, 0, 0))(params, *data).mean()


# %%
# For comparison, the same network can be trained without the inner step, to fit all tasks at once.


def mean_plain_loss(params: Params, tasks: Tasks) -> Tensor:
    per_task = vmap(loss, in_dims=(None, 0, 0))(
        params, tasks.x_test, tasks.y(tasks.x_test)
    )
    return per_task.mean()


# %%
# Is the gradient right?
# ----------------------
#
# If the inner step were treated as a constant, the result would be a different gradient, the "first-order" one, without
# any error. We therefore compare the gradient with two others, in float64: with central differences along a random
# direction, and with the gradient that plain ``torch.autograd`` computes task by task.

some = Tasks(
    *(column.double() for column in draw_tasks(3, torch.Generator().manual_seed(1)))
)
params64 = {name: value.double() for name, value in model.named_parameters()}
meta_gradient, _ = ravel(grad(mean_meta_loss)(params64, some))

vector, unravel = ravel(params64)
direction = torch.randn_like(vector)
ahead, behind = (
    mean_meta_loss(unravel(vector + h * direction), some) for h in (1e-6, -1e-6)
)
difference = ((ahead - behind) / 2e-6).item()
print(
    f"along a direction: grad of grad {meta_gradient @ direction:.9f}, central difference {difference:.9f}"
)
assert abs(meta_gradient @ direction - difference) < 1e-6 * abs(difference)


def by_autograd(tasks: Tasks) -> Tensor:
    leaves = {name: value.clone().requires_grad_() for name, value in params64.items()}
    total = torch.zeros((), dtype=torch.float64)
    for amplitude, phase, x, x_test in zip(*tasks, strict=True):
        inner = loss(leaves, x, amplitude * torch.sin(x - phase))
        slopes = torch.autograd.grad(inner, list(leaves.values()), create_graph=True)
        adapted = {
            name: value - RATE * g
            for (name, value), g in zip(leaves.items(), slopes, strict=True)
        }
        total = total + loss(adapted, x_test, amplitude * torch.sin(x_test - phase))
    (total / len(tasks.x)).backward()
    return ravel({name: value.grad for name, value in leaves.items()})[0]


print(
    f"largest difference from torch.autograd: {(meta_gradient - by_autograd(some)).abs().max():.1e}"
)
torch.testing.assert_close(meta_gradient, by_autograd(some), rtol=1e-10, atol=1e-12)

# %%
# Training
# --------
#
# Any torch optimizer can use gradients computed by a transform: store them where ``backward()`` would store them.


def train(objective, steps: int, tasks_per_step: int = 25) -> Params:
    generator = torch.Generator().manual_seed(2)
    params = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.Adam(params.values(), lr=0.002)
    for _ in range(steps):
        gradient = grad(objective)(params, draw_tasks(tasks_per_step, generator))
        for name, parameter in params.items():
            parameter.grad = gradient[name]
        optimizer.step()
    return params


trained = {
    "meta-learned": train(mean_meta_loss, steps=3000),
    "trained without the inner step": train(mean_plain_loss, steps=3000),
}

# %%
# Learning from ten points
# ------------------------
#
# Both networks adapt to 1000 new tasks, with up to ten steps of the same gradient descent. ``vmap`` of ``adapt`` gives
# every task its own parameters.

new = draw_tasks(1000, torch.Generator().manual_seed(3))
STEPS = range(11)
errors = {}  # for each network: [steps, tasks]
for name, params in trained.items():
    own, after_steps = (
        {key: value.expand(len(new.x), *value.shape) for key, value in params.items()},
        [],
    )
    for _ in STEPS:
        after_steps.append(vmap(loss)(own, new.x_test, new.y(new.x_test)))
        own = vmap(adapt)(own, new.x, new.y(new.x))
    errors[name] = torch.stack(after_steps)
    means = errors[name].mean(dim=1)
    print(
        f"{name}: mean squared error {means[0]:.2f} before, {means[1]:.2f} after one step, {means[10]:.2f} after ten"
    )

meta, plain = errors.values()
assert meta[1].mean() < plain[10].mean()  # one step does more than ten
assert meta[10].mean() < 0.5 * plain[10].mean()

# %%
# The meta-learned network is no better before it adapts, since no network can know which wave comes next. It is better
# after the first step, and keeps improving after that, although it was trained for one step only. The upper panels show
# a task whose points all lie in the left half of the range: the shape of the wave was learnt from other tasks.

BLUE, ORANGE = (
    "#0072B2",
    "#D55E00",
)  # from Okabe and Ito's colour-blind safe palette

figure, panels = plt.subplot_mosaic(
    [["meta", "plain"], ["errors", "errors"]], figsize=(8, 7), layout="constrained"
)
grid = torch.linspace(-5, 5, 200)
shown = draw_tasks(1, torch.Generator().manual_seed(4))
shown = shown._replace(
    amplitude=torch.tensor([[3.5]]), phase=torch.tensor([[1.0]]), x=shown.x / 2 - 2.5
)
for panel, (name, params), color in zip(
    (panels["meta"], panels["plain"]), trained.items(), (BLUE, ORANGE), strict=True
):
    panel.plot(
        grid,
        shown.y(grid)[0],
        color="0.3",
        linewidth=1,
        linestyle="--",
        label="the wave",
    )
    for steps, style in ((0, ":"), (1, "-."), (10, "-")):
        adapted = adapt(params, shown.x[0], shown.y(shown.x)[0], steps)
        label = "before" if steps == 0 else f"after {steps} step{'s' * (steps > 1)}"
        panel.plot(
            grid,
            functional_call(model, adapted, (grid[:, None],)),
            color=color,
            linestyle=style,
            label=label,
        )
    panel.plot(
        shown.x[0],
        shown.y(shown.x)[0],
        "o",
        color="black",
        markersize=5,
        label="points given",
    )
    panel.set(xlabel="x", ylabel="y", ylim=(-5, 8.5), title=name.capitalize())
    panel.legend(frameon=False, ncols=2, loc="upper center", fontsize=9)

panel = panels["errors"]
for (name, of_tasks), color in zip(errors.items(), (BLUE, ORANGE), strict=True):
    low, high = np.quantile(of_tasks.numpy(), (0.25, 0.75), axis=1)
    panel.fill_between(STEPS, low, high, color=color, alpha=0.2, linewidth=0)
    panel.plot(STEPS, of_tasks.mean(dim=1), "o-", color=color, markersize=4, label=name)
panel.set(
    xlabel="steps of gradient descent on ten points",
    ylabel="squared error on other points",
    yscale="log",
    ylim=(0.02, 10),
)
panel.set_title("Mean and middle half of 1000 new tasks")
panel.grid(visible=True, color="0.9")
panel.legend(frameon=False)

plt.show()
