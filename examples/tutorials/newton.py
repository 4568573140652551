r"""
Newton's method over a batch of problems
========================================

How strongly should a logistic regression be regularised? Cross-validation answers by fitting it
again and again: here for 10 folds and 20 strengths, 200 fits. Each is a small convex problem. Three
methods are written for one problem, and :func:`autodiff.vmap` makes each one of all 200 at once:
gradient descent, Newton's method with the :func:`autodiff.hessian`, and Newton-CG, which only
multiplies by the Hessian.
"""

# %%
# The problems
# ------------
# Scikit-learn's breast cancer data: 569 samples with 30 features, standardised, and a label of -1
# or 1. Here is the loss of one problem. Its unknowns are one vector ``w``: 30 coefficients, and an
# intercept that is not regularised. Its data are a strength, and a mask of the samples that are
# kept.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import softplus

import autodiff as ad

data = load_breast_cancer()
features = torch.tensor(StandardScaler().fit_transform(data.data))
X = torch.cat([features, torch.ones(len(features), 1)], dim=1)  # [569, 31]
y = torch.tensor(2.0 * data.target - 1, dtype=X.dtype)


def loss(w, strength, kept):
    losses = softplus(-y * (X @ w))
    return (kept @ losses) / kept.sum() + strength / 2 * w[:-1].square().sum()


# %%
# There are 200 of them: every strength with every fold left out.

FOLDS, STRENGTHS = 10, 20
strengths = torch.logspace(-5, 0, STRENGTHS, dtype=X.dtype)
torch.manual_seed(0)
folds = torch.randperm(len(X)) % FOLDS
masks = (folds != torch.arange(FOLDS)[:, None]).to(X.dtype)  # [10, 569]
problems = strengths.repeat_interleave(FOLDS), masks.repeat(STRENGTHS, 1)

# %%
# Three ways to take a step
# -------------------------
# **Gradient descent** steps by the inverse of the largest curvature that the loss can have
# anywhere. For this loss it is known, because the second derivative of softplus is at most 1/4;
# longer steps may overshoot.


def safe_length(strength, kept):
    largest = torch.linalg.eigvalsh((X.mT * kept) @ X)[-1] / (4 * kept.sum()) + strength
    return 1 / largest


def gradient_step(w, strength, kept, length):
    return w - length * ad.grad(loss)(w, strength, kept)


# %%
# **Newton's method** solves a linear system with the Hessian. Its direction may be too long when it
# starts far away, so a few lengths are tried, and the best is taken. A function that is to be
# batched cannot branch on its data: instead of trying the lengths one after the other, it tries all
# in a ``vmap`` of its own.


def best_along(direction, w, strength, kept):
    lengths = 0.5 ** torch.arange(6, dtype=w.dtype)

    def loss_after(length):
        return loss(w + length * direction, strength, kept)

    return w + lengths[ad.vmap(loss_after)(lengths).argmin()] * direction


def newton_step(w, strength, kept):
    gradient = ad.grad(loss)(w, strength, kept)
    hessian = ad.hessian(loss)(w, strength, kept)
    return best_along(-torch.linalg.solve(hessian, gradient), w, strength, kept)


# %%
# **Newton-CG** solves the system with conjugate gradients, which only ask for products with the
# Hessian. :func:`autodiff.linearize` runs the gradient once, and gives a function that multiplies
# by its derivative; each product then costs about as much as a gradient. Ten products, whatever the
# number of unknowns, leave the system unsolved to a small part. The same limit of ten serves all
# problems, because none may stop before the others.

PRODUCTS = 10


def newton_cg_step(w, strength, kept):
    gradient_at = ad.grad(lambda w: loss(w, strength, kept))
    gradient, times_hessian = ad.linearize(gradient_at, w)
    direction = torch.zeros_like(w)
    residual = search = -gradient
    for _ in range(PRODUCTS):
        product = times_hessian(search)
        squared = residual @ residual
        # The bound keeps 0 / 0 away from problems that are solved.
        length = squared / (search @ product).clamp_min(1e-300)
        direction = direction + length * search
        residual = residual - length * product
        search = residual + (residual @ residual) / squared.clamp_min(1e-300) * search
    return best_along(direction, w, strength, kept)


# %%
# All problems at once
# --------------------
# Here is where the batch comes in: ``vmap`` of a step, with all its arguments mapped. The unknowns
# of the problems are the rows of one matrix.


def minimise(step, steps, *arguments):
    """The last unknowns, [200, 31], and all losses on the way there, [steps + 1, 200]."""
    w = torch.zeros(STRENGTHS * FOLDS, X.shape[1], dtype=X.dtype)
    step_all, loss_all = ad.vmap(step), ad.vmap(loss)
    losses = [loss_all(w, *problems)]
    for _ in range(steps):
        w = step_all(w, *arguments)
        losses.append(loss_all(w, *problems))
    return w, torch.stack(losses)


w, newton = minimise(newton_step, 16, *problems)
_, newton_cg = minimise(newton_cg_step, 40, *problems)
_, descent = minimise(gradient_step, 2000, *problems, ad.vmap(safe_length)(*problems))

# %%
# An independent answer
# ---------------------
# Scikit-learn fits the 200 problems one by one. Instead of regularising the mean of the losses it
# weighs their sum by ``C``, so ``C`` is the inverse of the strength times the number of samples.

fitted = []
for strength, kept in zip(*problems, strict=True):
    chosen = kept.bool()
    C = 1 / (strength * kept.sum()).item()
    model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10)
    model.fit(features[chosen].numpy(), y[chosen].numpy())
    fitted.append(np.append(model.coef_[0], model.intercept_))
fitted = torch.tensor(np.stack(fitted))

difference = ((w - fitted).norm(dim=1) / fitted.norm(dim=1)).max().item()
print(f"Newton's method against scikit-learn: relative difference {difference:.0e}")
assert difference < 1e-6

# %%
# What is left of the loss
# ------------------------
# How far is each method from the least loss? The table counts a problem as solved when ten digits of
# its loss are right. In the figure steps are counted in gradients, because they cost differently: a
# Hessian is 31 of them, one for each row, a product with it one more, and the trial of six lengths
# about three.

least = torch.minimum(newton.min(dim=0).values, newton_cg.min(dim=0).values)
methods = {
    "gradient descent": (descent, 1),
    "Newton-CG, 10 products": (newton_cg, 1 + PRODUCTS + 3),
    "Newton": (newton, 1 + X.shape[1] + 3),
}
print("method                  steps  solved   half of them after")
for name, (losses, _) in methods.items():
    gaps = losses / least - 1
    solved = (gaps < 1e-10).double().mean(dim=1)  # [steps + 1]
    half = f"{(solved < 0.5).sum()} steps" if solved[-1] >= 0.5 else "more"
    print(f"{name:24}{len(losses) - 1:5}{solved[-1]:8.0%}   {half}")

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
plt.rcParams |= {
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
}

figure, panel = plt.subplots(figsize=(7, 4.4))
styles = (
    {"color": ORANGE},
    {"color": GREEN, "marker": "s"},
    {"color": BLUE, "marker": "o"},
)
levels = torch.tensor([0.1, 0.5, 0.9], dtype=X.dtype)
for (name, (losses, work)), style in zip(methods.items(), styles, strict=True):
    gaps = (losses[1:] / least - 1).clamp_min(1e-16)
    low, middle, high = gaps.quantile(levels, dim=1)
    cost = work * torch.arange(1, len(losses))
    panel.fill_between(cost, low, high, color=style["color"], alpha=0.2, linewidth=0)
    panel.plot(cost, middle, markersize=4, label=name, **style)
panel.set(xscale="log", yscale="log", ylim=(3e-17, 30))
panel.set_xlabel("work (gradients of one problem)")
panel.set_ylabel("relative distance to the least loss")
panel.set_title("200 problems: the median, and the middle 80 %", fontsize=11)
panel.legend(loc="lower left")
plt.show()

# %%
# Newton's method doubles its digits in every step once it is close, on every problem. Newton-CG
# needs as many steps for half of the problems, with less than half of the work, and would save more
# if there were more unknowns; where the regularisation is weak, the eigenvalues of the Hessian are
# too far apart for ten products, and it slows down. Gradient descent suffers from the same, and
# much more.
#
# The answer
# ----------
# And the question that was asked? The losses of the 200 solutions on the samples that were left out
# answer it: with much less regularisation than the best strength some folds are read badly, and
# with much more all of them.

nothing = torch.zeros_like(problems[0])
held_out = ad.vmap(loss)(w, nothing, 1 - problems[1]).reshape(STRENGTHS, FOLDS)
mean, spread = held_out.mean(dim=1), held_out.std(dim=1) / FOLDS**0.5
best = mean.argmin()

figure, panel = plt.subplots(figsize=(7, 4.4))
thin = {"color": "0.8", "linewidth": 0.8}
panel.plot(strengths, held_out, **thin)
panel.plot([], [], label="one fold", **thin)
band = mean - spread, mean + spread
panel.fill_between(strengths, *band, color=BLUE, alpha=0.2, linewidth=0)
panel.plot(strengths, mean, "o-", color=BLUE, label="mean, with its standard error")
panel.plot(strengths[best], mean[best], "o", color=ORANGE, markersize=10)
panel.plot(
    [], [], "o", color=ORANGE, markersize=10, label=f"best: {strengths[best]:.1e}"
)
panel.set(xscale="log", ylim=(0, 0.4), xlabel="strength of the regularisation")
panel.set_ylabel("loss of the samples left out (nats)")
panel.set_title("What the solutions are worth", fontsize=11)
panel.legend(loc="upper center")
plt.show()
