r"""
Influence of training images
============================

A classifier misclassifies a digit. Which training images are responsible, and which ones favoured the correct answer?
More precisely: how would the loss on this digit change if a training image had been left out? One could train again
without it, and then again without the next one. Influence functions (P. W. Koh and P. Liang, *ICML* 2017,
`arXiv:1703.04730 <https://arxiv.org/abs/1703.04730>`_) answer for all images at once, from derivatives of the trained
model: one linear solve with the curvature of the objective, by conjugate gradients that only multiply by it, and one
product with the Jacobian of the losses of all images.

This tutorial computes them for a small neural network on scikit-learn's digits. To check them, scikit-learn then trains
the network again without an image, for 60 of the images.
"""

from copy import deepcopy
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from torch.nn.functional import cross_entropy

import autodiff as ad
from autodiff import operators

# %%
# The network
# -----------
#
# The network has 12 hidden units and 910 parameters. Scikit-learn trains it on 400 digits of 8 x 8 pixels. It minimises
# the sum of the losses of the images and ``DECAY / 2`` times the squared norm of the weights; the biases are free.
# Influence functions are valid at a minimum, so we check that the gradient is small there.

TRAINED, DECAY = 400, 3.0

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
pixels, classes = digits.data[order] / 16, digits.target[order]
everything = np.arange(TRAINED)
network = MLPClassifier(
    (12,),
    activation="tanh",
    solver="lbfgs",
    alpha=DECAY,
    tol=1e-6,
    max_iter=5000,
    random_state=0,
    warm_start=True,
)
network.fit(pixels[:TRAINED], classes[:TRAINED])


def weights_of(network: MLPClassifier) -> list[tuple[Tensor, Tensor]]:
    """The weights and biases of each layer."""
    layers = zip(network.coefs_, network.intercepts_, strict=True)
    return [(torch.tensor(weight), torch.tensor(bias)) for weight, bias in layers]


def model(params, images: Tensor) -> Tensor:
    (weight, bias), (last_weight, last_bias) = params
    return torch.tanh(images @ weight + bias) @ last_weight + last_bias


def objective(params, images: Tensor, labels: Tensor) -> Tensor:
    squares = sum(weight.square().sum() for weight, _ in params)
    total = cross_entropy(model(params, images), labels, reduction="sum")
    return total + DECAY / 2 * squares


params = weights_of(network)
X, labels = torch.from_numpy(pixels), torch.from_numpy(classes)
X_train, labels_train = X[:TRAINED], labels[:TRAINED]

# %%
# The Hessian of the objective at the trained parameters is an operator. Making it runs the objective once and records
# its gradient. The matrix, 910 x 910, is not formed.

H = operators.hessian(objective)(params, X_train, labels_train)
print(H)
largest = max(part.abs().max() for layer in H.gradient for part in layer)
print(f"objective {H.value:.3f}, largest entry of its gradient {largest:.0e}")
assert largest < 0.05

# %%
# Of the digits that the network has not seen, this one has the largest loss:


def losses(params, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of each image."""
    return cross_entropy(model(params, images), labels, reduction="none")


wrong = TRAINED + losses(params, X[TRAINED:], labels[TRAINED:]).argmax().item()
x, label = X[[wrong]], labels[[wrong]]
guess = model(params, x).argmax().item()
before = losses(params, x, label).item()
print(f"a {label.item()} is classified as a {guess}, loss {before:.3f}")

# %%
# The derivatives
# ---------------
#
# Let :math:`g_i` be the gradient of the loss of training image :math:`i`, and :math:`H` the Hessian of the objective.
# Without this image, the minimum moves by :math:`H^{-1} g_i`, to first order. The loss on the misclassified digit,
# whose gradient is :math:`g`, changes by
#
# .. math:: \Delta_i = g_i^\top s, \qquad H s = g.
#
# One solve is enough for all images. It is a solve with trees: :math:`g` is a list of weights and biases like the
# parameters, and so is :math:`s`. Adding the same number to all output biases changes nothing, so :math:`H` has an
# eigenvalue of zero; a little damping makes it positive definite. Then conjugate gradients can be used, which stop
# with an error if they meet a direction of negative curvature.

DAMPING = 1e-3
g = ad.grad(lambda params: losses(params, x, label)[0])(params)
s, info = operators.solve(H + DAMPING, g, "cg", rtol=1e-8, info=True)
print(f"{info.iterations} products, relative residual {info.residual_norm:.0e}")

# %%
# The gradients :math:`g_i` are the rows of the Jacobian of the losses of all images. It is never formed either: all
# inner products with :math:`s` are one product with it.

J = operators.jacobian(losses)(params, X_train, labels_train)
predicted = J @ s
print(J, list(predicted.shape))

# %%
# Here the Hessian is small enough to form it with torch.func, and to solve the system directly:

flat, unravel = ad.pytree.ravel(params)
dense = torch.func.hessian(lambda v: objective(unravel(v), X_train, labels_train))(flat)
dense += DAMPING * torch.eye(len(flat))
gradients = torch.func.jacrev(lambda v: losses(unravel(v), X_train, labels_train))(flat)
direct = gradients @ torch.linalg.solve(dense, H.domain.ravel(g))
torch.testing.assert_close(predicted, direct, rtol=1e-5, atol=1e-6)

# %%
# The Hessian is positive definite here because the network is at a minimum. The Gauss-Newton matrix, which leaves out
# the second derivatives of the network, is positive semidefinite at any point, and so it is often taken instead. The
# decay of the weights is a diagonal operator that is added to it.

total_loss = partial(cross_entropy, reduction="sum")
decay = operators.diagonal(
    [
        (torch.full_like(weight, DECAY), torch.zeros_like(bias))
        for weight, bias in params
    ]
)
G = operators.gauss_newton(model, total_loss)(params, X_train, labels_train)
by_gauss_newton = J @ operators.solve(G + decay + DAMPING, g, rtol=1e-8)

# %%
# Leaving images out
# ------------------
#
# Scikit-learn continues the training without an image, until it is at a minimum again. No derivative from this page is
# used for that. It does so for the 40 images with the largest influence, and for 20 others.

ranked = predicted.abs().argsort(descending=True)
others = 40 + np.random.default_rng(1).choice(TRAINED - 40, 20, replace=False)
chosen = torch.cat([ranked[:40], ranked[others]])


def retrained(image: int) -> float:
    """The change of the loss on the digit after training without an image."""
    kept = np.delete(everything, image)
    again = deepcopy(network).fit(pixels[kept], classes[kept])
    return losses(weights_of(again), x, label).item() - before


actual = torch.full((TRAINED,), torch.nan, dtype=X.dtype)
actual[chosen] = torch.tensor([retrained(image) for image in chosen.tolist()]).double()
for name, change in (("Hessian", predicted), ("Gauss-Newton", by_gauss_newton)):
    correlation = np.corrcoef(change[chosen], actual[chosen])[0, 1]
    print(f"{name:>12}: correlation with the actual changes {correlation:.3f}")
    assert correlation > 0.9

# %%
# A step further
# --------------
#
# The ranking is right, but the strongest images have a larger effect than predicted. There is a reason: an image helps
# to keep the weights where they are, and :math:`H` still includes its contribution. If the Hessian :math:`H_i` of the
# image's own loss is subtracted, the weights move by :math:`(H - H_i)^{-1} g_i`, which is a step of Newton's method on
# the objective without the image. It takes a solve for each image. Differences of operators are operators; this one
# is not known to be positive, and so ``solve`` takes MINRES, which does not rely on it.


def newton_step(image: int) -> float:
    """The change of the loss on the digit after one step without an image."""
    one = X_train[[image]], labels_train[[image]]
    own = operators.hessian(lambda params: losses(params, *one)[0])(params)
    rest = H + DAMPING - own
    step = operators.solve(rest, H.domain.ravel(own.gradient), rtol=1e-5)
    return losses(unravel(flat + step), x, label).item() - before


strongest = ranked[:20]
stepped = torch.tensor([newton_step(image) for image in strongest.tolist()]).double()
for name, change in (
    ("influence function", predicted[strongest]),
    ("Newton step", stepped),
):
    ratio = change / actual[strongest]
    print(
        f"{name:>18}: predicted over actual change from {ratio.min():.2f} to "
        f"{ratio.max():.2f}, median {ratio.median():.2f}"
    )
closer = (stepped - actual[strongest]).abs() < (predicted - actual)[strongest].abs()
assert closer.double().mean() >= 0.9

# %%
# For most of them the step is right to a few percent. For one image it falls far short: without it the network moves
# too far for a quadratic model.
#
# Points above zero are images that favour the correct answer: the loss grows without them.

BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito's colour-blind safe palette

figure, panel = plt.subplots(figsize=(7.5, 6), layout="constrained")
near_zero = panel.inset_axes((0.56, 0.1, 0.42, 0.42))
for axes in (panel, near_zero):
    axes.axline(
        (0, 0), slope=1, color="0.5", linewidth=1, linestyle="--", label="as predicted"
    )
    axes.scatter(
        predicted[chosen],
        actual[chosen],
        s=22,
        color=BLUE,
        linewidth=0,
        label=f"influence, {len(chosen)} images",
    )
    axes.scatter(
        stepped,
        actual[strongest],
        s=40,
        color="none",
        edgecolor=ORANGE,
        label=f"Newton step, the {len(strongest)} strongest",
    )
    axes.grid(visible=True, color="0.9")
    axes.set_axisbelow(True)
near_zero.set(xlim=(-0.06, 0.06), ylim=(-0.06, 0.06))
near_zero.tick_params(labelsize=8)
panel.indicate_inset_zoom(near_zero, edgecolor="0.4")
panel.set(
    xlabel="predicted change of the loss (nats)",
    ylabel="change after training without the image (nats)",
    title=f"Influence on the digit, of {TRAINED} training images",
)
panel.legend(frameon=False, loc="upper left")
plt.show()

# %%
# The digit itself, and the images that influence it most, with the change of its loss when they are left out:

figure = plt.figure(figsize=(8.5, 3.4), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(1, 3))
panel = left.subplots()
panel.imshow(pixels[wrong].reshape(8, 8), cmap="gray_r")
panel.set_title(f"a {label.item()}, classified as a {guess}")
panel.set_axis_off()
panels = right.subplots(2, 5)
signed = predicted.argsort(descending=True).tolist()
for row, images, color in (
    (panels[0], signed[:5], BLUE),
    (panels[1], signed[-1:-6:-1], ORANGE),
):
    for panel, image in zip(row, images, strict=True):
        panel.imshow(pixels[image].reshape(8, 8), cmap="gray_r")
        panel.set_title(
            f"a {labels[image]}: {actual[image]:+.3f}", color=color, fontsize=10
        )
        panel.set_axis_off()
plt.show()
