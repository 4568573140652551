r"""
Sharpness along training
========================

Gradient descent with step size :math:`\eta` on a quadratic function diverges along every direction whose curvature is
larger than :math:`2 / \eta`. A network's loss is not quadratic, and its curvature is not given beforehand: it changes
while the network is trained. J. Cohen and others (*ICLR* 2021, `arXiv:2103.00065 <https://arxiv.org/abs/2103.00065>`_)
found how. The largest eigenvalue of the Hessian, called the sharpness, grows until it reaches :math:`2 / \eta`, and
stays there: training runs at the edge of stability.

This tutorial measures it. :func:`autodiff.operators.hessian` gives the Hessian of the loss as an operator that is
never formed. Its largest eigenvalues show the edge, and its spectral density shows what the other thousands of
eigenvalues do meanwhile.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import autodiff as ad
from autodiff import operators

# %%
# A small network, trained by gradient descent
# --------------------------------------------
# It has 3,466 parameters, and classifies 1,000 of scikit-learn's digits by their squared error. Every step uses all
# digits, so that a step is an epoch, and nothing in it is random.

digits = load_digits()
images = torch.tensor(digits.data[:1000] / 16, dtype=torch.float32)
classes = torch.eye(10)[digits.target[:1000]]

model = torch.nn.Sequential(
    torch.nn.Linear(64, 32),
    torch.nn.Tanh(),
    torch.nn.Linear(32, 32),
    torch.nn.Tanh(),
    torch.nn.Linear(32, 10),
)


def start():
    """The same parameters each time."""
    generator = torch.Generator().manual_seed(0)
    params = {}
    for name, one in model.named_parameters():
        fans = one.shape[-1] if one.dim() == 2 else 64
        params[name] = (torch.rand(one.shape, generator=generator) * 2 - 1) / fans**0.5
    return params


def loss(params):
    outputs = ad.functional_call(model, params, (images,))
    return (outputs - classes).square().sum(1).mean() / 2


# %%
# The largest eigenvalues
# -----------------------
# :func:`autodiff.operators.eigsh` multiplies the Hessian by blocks of vectors, until its outermost eigenvalues have
# converged. We look at the largest three, every hundred steps, and keep the parameters of some steps for later.

STEPS, EVERY = 2000, 100
hessian = operators.hessian(loss)
value_and_gradient = ad.value_and_grad(loss)


def train(step_size):
    """Losses and the three largest eigenvalues, every hundred steps, with the parameters there."""
    params, losses, largest, kept = start(), [], [], {}
    for step in range(STEPS + 1):
        value, slope = value_and_gradient(params)
        if step % EVERY == 0:
            losses.append(value)
            largest.append(operators.eigsh(hessian(params), k=3, tol=1e-3)[0])
            kept[step] = params
        params = {name: one - step_size * slope[name] for name, one in params.items()}
    return torch.stack(losses), torch.stack(largest), kept


runs = {step_size: train(step_size) for step_size in (0.1, 0.2)}
for step_size, (losses, largest, _) in runs.items():
    sharpness = "  ".join(f"{value:.1f}" for value in largest[::4, 0])
    print(
        f"step size {step_size}: loss {losses[0]:.2f} to {losses[-1]:.3f}, "
        f"2 / step size {2 / step_size:.0f}, sharpness {sharpness}"
    )

# %%
# With the larger step the sharpness is at :math:`2 / \eta = 10` after some 200 steps, with the smaller one at 20 after
# 1,400. From there on it stays at the edge, or slightly above it, and the second and third eigenvalue come up to it as
# well. The loss keeps falling.

for step_size, (_, largest, _) in runs.items():
    at_the_end = largest[-4:, 0] * step_size / 2
    assert ((at_the_end > 0.9) & (at_the_end < 1.15)).all()

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
plt.rcParams |= {
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
}

steps = range(0, STEPS + 1, EVERY)
figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(7, 5.6), sharex=True, height_ratios=(2, 1)
)
for (step_size, (losses, largest, _)), color in zip(
    runs.items(), (BLUE, ORANGE), strict=True
):
    label = rf"$\eta$ = {step_size}"
    top.plot(steps, largest[:, 0], color=color, marker="o", markersize=4, label=label)
    top.plot(steps, largest[:, 1:], color=color, linewidth=0.8, alpha=0.6)
    top.axhline(2 / step_size, color=color, linestyle="--", linewidth=1)
    place = (1.01, 2 / step_size)
    edge = rf"$2 / \eta$ = {2 / step_size:.0f}"
    top.text(
        *place, edge, color=color, va="center", transform=top.get_yaxis_transform()
    )
    bottom.plot(steps, losses, color=color)
top.set(ylabel="three largest eigenvalues", ylim=(0, 24))
top.set_title("The sharpness grows to the edge of stability", fontsize=11)
top.legend(loc="lower right")
bottom.set(xlabel="step of gradient descent", ylabel="loss", yscale="log")
plt.show()

# %%
# The whole spectrum
# ------------------
# ``spectral_density`` estimates the density of all eigenvalues from Lanczos iterations (B. Ghorbani and others, *ICML*
# 2019). Ten random vectors take 80 products each; they differ by the statistical error, which is drawn as a band of
# two standard errors. A generator makes the vectors the same in every run.

_, _, kept = runs[0.2]
densities = {}
for step in (0, 200, STEPS):
    A = hessian(kept[step])
    generator = torch.Generator().manual_seed(1)
    densities[step] = operators.spectral_density(A, probes=10, generator=generator)

figure, panel = plt.subplots(figsize=(7, 4.2))
for (step, density), color in zip(
    densities.items(), (ORANGE, GREEN, BLUE), strict=True
):
    density.plot(panel, color=color, label=f"step {step}")
panel.axvline(2 / 0.2, color="0.3", linestyle="--", linewidth=1, label=r"$2 / \eta$")
panel.set(yscale="log", ylim=(1e-5, 20), xlim=(-4, 13))
panel.set(xlabel="eigenvalue of the Hessian", ylabel="density of the spectrum")
panel.set_title(r"3,466 eigenvalues, $\eta$ = 0.2", fontsize=11)
panel.legend()
plt.show()

# %%
# The quadrature also counts eigenvalues: its weights are fractions of all of them.

size = sum(one.numel() for one in start().values())
for step, density in densities.items():
    above, error = density.mean_of(lambda eigenvalue: (eigenvalue > 2).to(eigenvalue))
    below, _ = density.mean_of(lambda eigenvalue: (eigenvalue < -0.5).to(eigenvalue))
    print(
        f"step {step:4}: {size * above:.0f} +- {size * error:.0f} eigenvalues are above 2, "
        f"{size * below:.0f} below -0.5"
    )

# %%
# Nearly all eigenvalues are close to zero, from the first step to the last. The few at the right of the bulk move to
# the edge, and gather there. The negative ones disappear with the errors of the network.
#
# A density integrates to one, and its mean is the trace over the number of parameters. :func:`autodiff.operators.trace`
# estimates the trace from its own random vectors. As the spectrum decays, ``"xtrace"`` needs few products for it: 200
# where the exact trace would take 3,466.

print("step   mean of the density     trace / n")
for step, density in densities.items():
    A = hessian(kept[step])
    mean, error = (one.item() for one in density.mean_of(lambda eigenvalue: eigenvalue))
    generator = torch.Generator().manual_seed(2)
    trace, trace_error = operators.trace(A, "xtrace", samples=200, generator=generator)
    trace, trace_error = trace.item() / A.shape[0], trace_error.item() / A.shape[0]
    print(
        f"{step:4}   {mean:.4f} +- {error:.4f}        {trace:.4f} +- {trace_error:.4f}"
    )
    assert abs(mean - trace) < 4 * (error + trace_error)
