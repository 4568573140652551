r"""
A hyperparameter for every sample
=================================

Some labels of a training set are wrong, and nobody knows which. A small set is known to be right. Give every training
sample a weight, fit the model, and look at its loss on the small set: that is a function of the weights, and wherever
it has a gradient, the weights can be learnt. They are 600 hyperparameters, which no grid search would try.

The gradient follows from the implicit function theorem. A minimum, however it was found, is differentiated by what
holds for it:

.. math:: w^*(\theta) = \operatorname{argmin}_w f(w, \theta) \quad\Rightarrow\quad
    \frac{\partial w^*}{\partial \theta} =
    -\Big(\frac{\partial^2 f}{\partial w^2}\Big)^{-1} \frac{\partial^2 f}{\partial w\, \partial \theta}

:func:`autodiff.operators.minimum` puts that around any solver: here around SciPy's, which no tracer can follow.
"""

# %%
# The data
# --------
# The data are scikit-learn's digits, and the question is whether a digit is odd. 600 of them are for training, and a
# third of their labels is flipped. 150 others keep their labels; the rest is for the test.

import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import softplus

import autodiff as ad

digits = load_digits()
rng = np.random.default_rng(0)
order = rng.permutation(len(digits.target))
pixels = torch.tensor(digits.data[order] / 16)
X = torch.cat([pixels, torch.ones(len(pixels), 1)], 1).double()  # [1797, 65]
y = torch.tensor(2.0 * (digits.target[order] % 2) - 1)  # -1 or 1
train, trusted, test = slice(0, 600), slice(600, 750), slice(750, None)

wrong = torch.tensor(rng.random(600) < 1 / 3)
given = torch.where(wrong, -y[train], y[train])

# %%
# The fit
# -------
# The model is a logistic regression. Its objective is the weighted mean of the losses, and a little regularisation.


def objective(w, weights):
    losses = softplus(-given * (X[train] @ w))
    return weights @ losses / weights.sum() + 0.005 * (w**2).sum()


# %%
# The solver takes where to start, and what the objective takes besides. It gets plain tensors, without gradients, and
# may do with them what it likes. The decorator says what is minimal at its answer, and that alone is differentiated.


@ad.operators.minimum(objective)
def fit(start, weights):
    value_and_gradient = ad.value_and_grad(objective)
    hessian = ad.operators.hessian(objective)

    def value_and_slope(array):
        value, gradient = value_and_gradient(torch.tensor(array), weights)
        return value.item(), gradient.numpy()

    found = scipy.optimize.minimize(
        value_and_slope,
        start.numpy(),
        jac=True,
        hess=lambda array: hessian(torch.tensor(array), weights).to_matrix().numpy(),
        method="trust-exact",
        options={"gtol": 1e-10},
    )
    return torch.tensor(found.x)


# %%
# The loss on the trusted samples is now a function like any other. The weights are between 0 and 1.

start = torch.zeros(X.shape[1], dtype=X.dtype)


def trusted_loss(scores):
    w = fit(start, torch.sigmoid(scores))
    return softplus(-y[trusted] * (X[trusted] @ w)).mean()


# %%
# Its gradient takes one linear system with the Hessian of the objective, whatever the number of weights. A difference
# of two losses along a random direction says the same.

scores = torch.zeros(600, dtype=X.dtype)
direction = torch.tensor(rng.standard_normal(600))
slope = ad.grad(trusted_loss)(scores) @ direction
ahead, behind = (trusted_loss(scores + step * direction) for step in (1e-3, -1e-3))
difference = (ahead - behind) / 2e-3
print(f"slope {slope:.8f}, by a difference {difference:.8f}")
assert abs(slope - difference) < 1e-5 * abs(slope)

# %%
# Learning the weights
# --------------------
# The optimiser is torch's, and the backward pass plain autograd.

scores.requires_grad_()
optimizer = torch.optim.Adam([scores], lr=0.2)


def accuracy(w):
    return (X[test] @ w * y[test] > 0).double().mean().item()


losses, accuracies = [], []
for _ in range(40):
    optimizer.zero_grad()
    loss = trusted_loss(scores)
    loss.backward()
    losses.append(loss.item())
    with torch.no_grad():
        accuracies.append(accuracy(fit(start, torch.sigmoid(scores))))
    optimizer.step()

weights = torch.sigmoid(scores.detach())

# %%
# How good is that? Two fits limit it: that with all labels as they are, where the optimiser began, and one that knows
# which labels are wrong. The third one takes nothing but the trusted samples.


def fit_to_trusted(w):
    losses = softplus(-y[trusted] * (X[trusted] @ w))
    return losses.mean() + 0.005 * (w**2).sum()


alone = start
for _ in range(20):
    curvature = ad.hessian(fit_to_trusted)(alone)
    alone = alone - torch.linalg.solve(curvature, ad.grad(fit_to_trusted)(alone))

known = accuracy(fit(start, (~wrong).double()))
print(f"test accuracy with all labels:        {accuracies[0]:.3f}")
print(f"with the trusted samples alone:       {accuracy(alone):.3f}")
print(f"with learnt weights:                  {accuracies[-1]:.3f}")
print(f"with the right labels, if one knew:   {known:.3f}")
found = (weights[wrong, None] < weights[~wrong]).double().mean()
print(f"a wrong label weighs less than a right one: {found:.0%} of the pairs")

BLUE, ORANGE = "#0072B2", "#D55E00"
plt.rcParams |= {
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
left.plot(accuracies, color=BLUE, label="learnt weights")
left.axhline(known, color="0.4", linestyle="--", label="wrong labels left out")
left.axhline(
    accuracy(alone), color=ORANGE, linestyle=":", label="trusted samples alone"
)
left.set(xlabel="step of the optimiser", ylabel="accuracy on the test samples")
left.set_title("600 hyperparameters, learnt by gradients", fontsize=11)
left.legend()
bins = np.linspace(0, 1, 21)
right.hist(weights[~wrong], bins, color=BLUE, alpha=0.6, label="right labels")
right.hist(weights[wrong], bins, color=ORANGE, alpha=0.6, label="wrong labels")
right.set(xlabel="weight of a training sample", ylabel="samples")
right.set_title("What was learnt", fontsize=11)
right.legend()
plt.show()

# %%
# Most of the wrong labels end near a weight of zero, though nothing but the gradient of one loss has told so. Some
# right ones do too: samples that the model would misclassify in any case are no help to it. And 600 numbers can be
# fitted to 150 samples too closely: the accuracy sags for a while, so the number of steps is a hyperparameter still.
