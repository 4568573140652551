r"""
Lyapunov exponents of the Lorenz system
=======================================

Two states of a chaotic system that start close together drift apart, on average at an exponential rate. That rate is
the system's largest Lyapunov exponent. A system of three variables has three exponents: the rates at which a small
ball of states is stretched along its three axes.

The deformation of a small ball of states is a derivative. The map from a state to the state a moment later has a
Jacobian, and :func:`autodiff.jvp` and :func:`autodiff.linearize` compute its products with tangent vectors. This
tutorial integrates the Lorenz equations together with three tangents, and computes the spectrum of exponents, which is
known to be about :math:`(0.906, 0, -14.572)`.
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
# These are E. Lorenz's equations of 1963, with the parameters that he chose:
#
# .. math::
#    \dot x = \sigma (y - x), \qquad \dot y = x (\rho - z) - y, \qquad \dot z = x y - \beta z.
#
# The classical Runge-Kutta method integrates them with a time step of 0.01. The functions are written for one state of
# three numbers; everything else is a transform of them.

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
# Tangents along a trajectory
# ---------------------------
#
# Let :math:`F` be one step and :math:`u` a tangent. ``jvp(runge_kutta, (state,), (u,))`` computes :math:`F(s)` and
# :math:`J_F(s)\, u` in one evaluation, without forming a Jacobian. For one tangent the result is known: a flow maps its
# velocity :math:`v` to the velocity at the new state, so :math:`J_F(s)\, v(s) = v(F(s))`, up to the error of the
# integrator.

state = torch.tensor([-5.0, -7.0, 20.0], dtype=torch.float64)
after, carried = jvp(runge_kutta, (state,), (velocity(state),))
print("velocity pushed forward:", carried.tolist())
print("velocity at the end:    ", velocity(after).tolist())
torch.testing.assert_close(carried, velocity(after), rtol=1e-6, atol=0)

# %%
# Three tangents at the same state are a batch.
# ``linearize`` evaluates the step once, and returns its value and the linear map from tangents to tangents. ``vmap``
# applies that map to all three tangents; the step itself is not repeated.


def push(state: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """One step for the state, [3], and for tangents at that state, [3, number of tangents]."""
    following, pushforward = linearize(runge_kutta, state)
    return following, vmap(pushforward, in_dims=1, out_dims=1)(tangents)


torch.testing.assert_close(push(state, velocity(state)[:, None])[1][:, 0], carried)

# %%
# The exponents
# -------------
#
# In the long run, all tangents turn towards the direction that grows fastest. They are therefore orthonormalised again
# at regular intervals, by a QR decomposition (G. Benettin et al., *Meccanica* 15 (1980), pages 9 and 21). The diagonal
# of R says by how much each tangent has grown. The exponents are the means of its logarithms per unit of time.
#
# A time average over one long run converges slowly, and its steps have to be computed one after the other. An average
# over many simultaneous runs converges as well, and
# ``vmap`` computes all of them in the same operations: ``vmap(push)`` is a step for a batch of trajectories, each with
# a batch of tangents.

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
# The first five units of time are left out, because the tangents start in random directions.

skipped = round(5 / (STEP * EVERY))
rates = torch.stack(growth[skipped:]) / (STEP * EVERY)  # [periods, TRAJECTORIES, 3]
by_trajectory = rates.mean(dim=0)
exponents = by_trajectory.mean(dim=0)
errors = by_trajectory.std(dim=0) / TRAJECTORIES**0.5

# %%
# Three answers to compare with
# -----------------------------
#
# The spectrum is published: (0.9056, 0, -14.5723) in J. C. Sprott, *Chaos and Time-Series Analysis* (Oxford University
# Press, 2003). The middle exponent is zero because, on average, a flow neither stretches nor shrinks along its own
# velocity. And the sum is known exactly: volumes change at the rate of the divergence of the velocity, the trace of its
# Jacobian, which is :math:`-(\sigma + 1 + \beta)` in every state.

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
# The exponents determine the dimension of the attractor. By the formula of J. Kaplan and J. Yorke it is
# :math:`2 + (\lambda_1 + \lambda_2) / |\lambda_3|`: a little more than that of a surface.

dimension = 2 + (exponents[0] + exponents[1]) / exponents[2].abs()
print(f"dimension {dimension:.3f}, published 2.062")

# %%
# Here are four of the trajectories, coloured by how fast the first tangent grows. Nearby states move apart in the lower
# half, and closer together on their way over the top. The first exponent is the average growth rate.

BLUE, ORANGE, GREEN = (
    "#0072B2",
    "#D55E00",
    "#009E73",
)  # from Okabe and Ito's colour-blind safe palette

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
    xlabel="x", ylabel="z", title="Where nearby states diverge and where they converge"
)
figure.colorbar(
    lines,
    ax=panel,
    label="growth of the first tangent (per unit of time)",
    extend="both",
)

# %%
# And the means, as they converge to the published values:

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
lower.set(xlabel="averaging time", ylim=(-15.1, -14.1))
for panel in (upper, lower):
    panel.set_ylabel("exponent\n(per unit of time)")
    panel.grid(visible=True, color="0.9")
    panel.legend(frameon=False, loc="center right" if panel is upper else "upper right")

plt.show()
