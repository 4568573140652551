r"""
Newton's method over a batch of problems
========================================

How strongly should a logistic regression be regularised? Cross-validation answers by fitting it many
times: here for 10 folds and 20 strengths, which makes 200 fits. Each fit is a small convex problem.
We write three methods for a single problem, and :func:`autodiff.vmap` applies each to all 200 at
once: gradient descent, Newton's method with the :func:`autodiff.hessian`, and Newton-CG, which only
multiplies by the Hessian.
"""

# %%
# The problems
# ------------
# The data are scikit-learn's breast cancer data: 569 samples with 30 standardised features, and a
# label of -1 or 1. Here is the loss of one problem. The unknowns are one vector ``w``: 30
# coefficients, and an intercept that is not regularised. A problem is given by a strength, and by a
# mask of the samples to keep.

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
# There are 200 problems: every strength, with each fold left out in turn.

FOLDS, STRENGTHS = 10, 20
strengths = torch.logspace(-5, 0, STRENGTHS, dtype=X.dtype)
torch.manual_seed(0)
folds = torch.randperm(len(X)) % FOLDS
masks = (folds != torch.arange(FOLDS)[:, None]).to(X.dtype)  # [10, 569]
problems = strengths.repeat_interleave(FOLDS), masks.repeat(STRENGTHS, 1)

# %%
# Three ways to take a step
# -------------------------
# **Gradient descent** uses the inverse of the largest possible curvature of the loss as its step
# size. For this loss it is known, because the second derivative of softplus is at most 1/4; longer
# steps may overshoot.


def safe_length(strength, kept):
    largest = torch.linalg.eigvalsh((X.mT * kept) @ X)[-1] / (4 * kept.sum()) + strength
    return 1 / largest


def gradient_step(w, strength, kept, length):
    return w - length * ad.grad(loss)(w, strength, kept)


# %%
# **Newton's method** solves a linear system with the Hessian. Far from the solution, the full step
# may be too long, so several lengths are tried and the best is used. A function that is to be batched
# cannot branch on its data, so instead of trying one length after the other, it tries all of them
# with an inner ``vmap``.


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
# **Newton-CG** solves the system with conjugate gradients, which need only products with the Hessian.
# :func:`autodiff.linearize` evaluates the gradient once, and returns a function that multiplies by
# its derivative; each product then costs about as much as a gradient. Ten products solve the system
# only approximately, but their number does not grow with the number of unknowns. All problems use
# the same limit of ten, because in a batch none can stop before the others.

PRODUCTS = 10


def newton_cg_step(w, strength, kept):
    gradient_at = ad.grad(lambda w: loss(w, strength, kept))
    gradient, times_hessian = ad.linearize(gradient_at, w)
    direction = torch.zeros_like(w)
    residual = search = -gradient
    for _ in range(PRODUCTS):
        product = times_hessian(search)
        squared = residual @ residual
        # The bound avoids 0 / 0 for problems that are already solved.
        length = squared / (search @ product).clamp_min(1e-300)
        direction = direction + length * search
        residual = residual - length * product
        search = residual + (residual @ residual) / squared.clamp_min(1e-300) * search
    return best_along(direction, w, strength, kept)


# %%
# All problems at once
# --------------------
# Now ``vmap`` comes in: it maps a step over all of its arguments. The unknowns of the problems are the
# rows of one matrix.


def minimise(step, steps, *arguments):
    """The final unknowns, [200, 31], and the losses after every step, [steps + 1, 200]."""
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
# Scikit-learn fits the 200 problems one by one. Instead of regularising the mean of the losses, it
# weights their sum by ``C``. So ``C`` is the inverse of the strength times the number of samples.

fitted = []
for strength, kept in zip(*problems, strict=True):
    chosen = kept.bool()
    C = 1 / (strength * kept.sum()).item()
    model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10)
    model.fit(features[chosen].numpy(), y[chosen].numpy())
    fitted.append(np.append(model.coef_[0], model.intercept_))
fitted = torch.tensor(np.stack(fitted))

difference = ((w - fitted).norm(dim=1) / fitted.norm(dim=1)).max().item()
print(f"Newton's method and scikit-learn: relative difference {difference:.0e}")
assert difference < 1e-6

# %%
# Convergence
# -----------
# How far is each method from the smallest loss? The table counts a problem as solved when ten digits
# of its loss are correct. Steps of different methods have different costs, so the figure measures
# them in gradients: a Hessian costs 31 gradients, one for each row, a product with it costs one, and
# trying six lengths costs about three.

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
panel.set_ylabel("relative distance to the smallest loss")
panel.set_title("200 problems: the median, and the middle 80%", fontsize=11)
panel.legend(loc="lower left")
plt.show()

# %%
# Once it is close, Newton's method doubles the number of correct digits in every step, on every
# problem. For half of the problems, Newton-CG needs as many steps with less than half of the work, and
# it would save more if there were more unknowns. Where the regularisation is weak, the eigenvalues of
# the Hessian are too widely spread for ten products, and it slows down. Gradient descent suffers from
# the same problem, and much more.
#
# The answer
# ----------
# How strong should the regularisation be? The losses of the 200 solutions on the left-out samples give
# the answer. With much less regularisation than the best strength, some folds are predicted badly;
# with much more, all of them are.

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
panel.set_title("Loss of the solutions on new samples", fontsize=11)
panel.legend(loc="upper center")
plt.show()
