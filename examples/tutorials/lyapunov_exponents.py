r"""
Lyapunov exponents of the Lorenz system
=======================================

Two states of a chaotic system that start close together drift apart, on average at an exponential rate. That rate is
the system's largest Lyapunov exponent. A system of three variables has three exponents: the rates at which a small
ball of states is drawn out along its three axes.

What a small ball of states does is a derivative. The map from a state to the state a moment later has a Jacobian, and
its products with tangent vectors are what :func:`autodiff.jvp` and :func:`autodiff.linearize` compute. This tutorial
integrates the Lorenz equations, carries three tangents along, and finds the spectrum of exponents, known to be about
:math:`(0.906, 0, -14.572)`.
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.collections import LineCollection
from torch import Tensor

from autodiff import jvp, linearize, vmap

# %%
# The system and its flow
# -----------------------
#
# E. Lorenz's equations of 1963, with the parameters that he chose:
#
# .. math::
#    \dot x = \sigma (y - x), \qquad \dot y = x (\rho - z) - y, \qquad \dot z = x y - \beta z.
#
# A step of the classical Runge-Kutta method follows them for a time of 0.01. The functions are written for one state
# of three numbers; everything else is a transform of them.

SIGMA, RHO, BETA = 10.0, 28.0, 8.0 / 3.0
STEP = 0.01


def velocity(state: Tensor) -> Tensor:
    x, y, z = state.unbind()
    return torch.stack([SIGMA * (y - x), x * (RHO - z) - y, x * y - BETA * z])


def runge_kutta(state: Tensor) -> Tensor:
    k1 = velocity(state)
    k2 = velocity(state + STEP / 2 * k1)
    k3 = velocity(state + STEP / 2 * k2)
    k4 = velocity(state + STEP * k3)
    return state + STEP / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


# %%
# Tangents go with the state
# --------------------------
#
# Let :math:`F` be one step and :math:`u` a tangent. ``jvp(runge_kutta, (state,), (u,))`` gives :math:`F(s)` and
# :math:`J_F(s)\, u` from one evaluation, and no Jacobian is formed. One tangent has an answer of its own: a flow
# carries its velocity :math:`v` along, so that :math:`J_F(s)\, v(s) = v(F(s))`, but for the error of the integrator.

state = torch.tensor([-5.0, -7.0, 20.0], dtype=torch.float64)
after, carried = jvp(runge_kutta, (state,), (velocity(state),))
print("velocity carried along:", carried.tolist())
print("velocity at the end:   ", velocity(after).tolist())
torch.testing.assert_close(carried, velocity(after), rtol=1e-6, atol=0)

# %%
# Three tangents at the same state are a batch. ``linearize`` evaluates the step once, and returns with its value the
# linear map from tangents to tangents. ``vmap`` of that map takes all three; the step itself is not repeated for them.


def push(state: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the state, [3], and of tangents there, [3, number of tangents]."""
    following, pushforward = linearize(runge_kutta, state)
    return following, vmap(pushforward, in_dims=1, out_dims=1)(tangents)


torch.testing.assert_close(push(state, velocity(state)[:, None])[1][:, 0], carried)

# %%
# The exponents
# -------------
#
# Tangents that are carried along for long all turn into the direction that grows fastest. So they are made orthonormal
# again now and then, by a QR decomposition (G. Benettin et al., *Meccanica* 15 (1980), pages 9 and 21). The diagonal of
# R says by how much each has grown; the means of the logarithms per unit of time are the exponents.
#
# A time average over one long run converges slowly, and its steps come one after the other. An average over many runs
# at once converges as well, and ``vmap`` takes all of them in the same operations: ``vmap(push)`` is a batch of
# trajectories, each with a batch of tangents.

TRAJECTORIES, STEPS, EVERY = 500, 4000, 5

torch.manual_seed(0)
states = torch.randn(TRAJECTORIES, 3, dtype=torch.float64) + torch.tensor(
    [0.0, 0.0, 25.0]
)
for _ in range(1000):  # until all of them are on the attractor
    states = vmap(runge_kutta)(states)

tangents = torch.linalg.qr(torch.randn(TRAJECTORIES, 3, 3, dtype=torch.float64)).Q
growth = []  # of each [TRAJECTORIES, 3]
path = []  # of the first few trajectories
for step in range(1, STEPS + 1):
    states, tangents = vmap(push)(states, tangents)
    path.append(states[:4])
    if step % EVERY == 0:
        tangents, R = torch.linalg.qr(tangents)
        growth.append(R.diagonal(dim1=1, dim2=2).abs().log())

# %%
# The first five units of time are left out: the tangents start in random directions.

skipped = round(5 / (STEP * EVERY))
rates = torch.stack(growth[skipped:]) / (STEP * EVERY)  # [periods, TRAJECTORIES, 3]
by_trajectory = rates.mean(dim=0)
exponents = by_trajectory.mean(dim=0)
errors = by_trajectory.std(dim=0) / TRAJECTORIES**0.5

# %%
# Three answers to compare with
# -----------------------------
#
# The literature has the spectrum: (0.9056, 0, -14.5723) in J. C. Sprott, *Chaos and Time-Series Analysis* (Oxford
# University Press, 2003). The middle exponent is zero because a flow neither stretches nor shrinks along its own
# velocity, on average. And the sum is known exactly: volumes change at the rate of the velocity's divergence, the trace
# of its Jacobian, which is :math:`-(\sigma + 1 + \beta)` in every state.

published = torch.tensor([0.9056, 0.0, -14.5723], dtype=torch.float64)
divergence = -(SIGMA + 1 + BETA)
for name, found, error, expected in zip(
    ("first", "second", "third"), exponents, errors, published, strict=True
):
    print(f"{name:>6} exponent {found:9.4f} +- {error:.4f}   published {expected:9.4f}")
print(f"   sum of them {exponents.sum():9.4f}              exact {divergence:9.4f}")
assert ((exponents - published).abs() < 4 * errors + 1e-3).all()
assert abs(exponents.sum() - divergence) < 1e-3

# %%
# From the exponents follows how much of space the attractor fills. By the formula of J. Kaplan and J. Yorke its
# dimension is :math:`2 + (\lambda_1 + \lambda_2) / |\lambda_3|`: a little more than a surface.

dimension = 2 + (exponents[0] + exponents[1]) / exponents[2].abs()
print(f"dimension {dimension:.3f}, published 2.062")

# %%
# Four of the trajectories, coloured by how fast the first tangent grows there. The states part in the lower half, and
# close in on their way over the top; the first exponent is the mean of the two.

BLUE, ORANGE, GREEN = (
    "#0072B2",
    "#D55E00",
    "#009E73",
)  # of Okabe and Ito's palette, which every eye tells apart

figure, panel = plt.subplots(figsize=(7.5, 5.5), layout="constrained")
stretches = torch.stack(path[EVERY * (skipped - 1) :]).unfold(
    0, EVERY + 1, EVERY
)  # [periods, 4, 3, EVERY + 1]
stretches = stretches[:, :, [0, 2]].flatten(0, 1).mT  # [periods * 4, EVERY + 1, (x, z)]
lines = LineCollection(
    stretches.numpy(),
    array=rates[:, :4, 0].flatten().numpy(),
    cmap="managua_r",
    linewidth=1,
)
lines.set_clim(-12, 12)
panel.add_collection(lines)
panel.autoscale()
panel.set(
    xlabel="x", ylabel="z", title="Where nearby states part and where they close in"
)
figure.colorbar(
    lines,
    ax=panel,
    label="growth of the first tangent (per unit of time)",
    extend="both",
)

# %%
# And the means, as they converge to what is published:

times = STEP * EVERY * torch.arange(1, len(rates) + 1)
means = rates.mean(dim=1).cumsum(dim=0) / torch.arange(1, len(rates) + 1)[:, None]
figure, (upper, lower) = plt.subplots(
    2, 1, sharex=True, height_ratios=(1.6, 1), figsize=(7.5, 5), layout="constrained"
)
for index, color in enumerate((BLUE, GREEN, ORANGE)):
    panel = (upper, upper, lower)[index]
    panel.plot(
        times,
        means[:, index],
        color=color,
        label=f"$\\lambda_{index + 1}$ = {exponents[index]:.4f}",
    )
    panel.axhline(published[index], color="0.3", linewidth=1, linestyle="--")
upper.plot([], [], color="0.3", linewidth=1, linestyle="--", label="published")
upper.set(title=f"Means over {TRAJECTORIES} trajectories", ylim=(-0.25, 1.25))
lower.set(xlabel="time averaged over", ylim=(-15.1, -14.1))
for panel in (upper, lower):
    panel.set_ylabel("exponent\n(per unit of time)")
    panel.grid(visible=True, color="0.9")
    panel.legend(frameon=False, loc="center right" if panel is upper else "upper right")

plt.show()
