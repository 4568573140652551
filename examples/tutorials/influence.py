r"""
Influence of training images
============================

A classifier misclassifies a digit. Which training images are responsible, and which ones favoured the correct answer?
More precisely: how would the loss on this digit change if a training image had been left out? One could train again
without it, and then again without the next one. Influence functions (P. W. Koh and P. Liang, *ICML* 2017,
`arXiv:1703.04730 <https://arxiv.org/abs/1703.04730>`_) answer for all images at once, from derivatives of the trained
model: a gradient for each image, and one linear solve with the Hessian, which needs only products with vectors.

This tutorial computes them for a logistic regression on scikit-learn's digits. To check them, it then trains the
model 400 times, each time without one of the images.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy

from autodiff import grad, hessian, linearize, vmap

# %%
# The model
# ---------
#
# The model is scikit-learn's, trained on 400 digits of 8 x 8 pixels. It minimises the sum of the losses of the images
# and half the squared norm of the weights, [10 classes, 64 pixels]. Influence functions are valid at a minimum, so we
# check that the gradient is zero there.

TRAINED = 400

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
pixels, classes = digits.data[order] / 16, digits.target[order]


def train(chosen: np.ndarray) -> Tensor:
    """The weights, [10, 64], after training on the chosen images."""
    regression = LogisticRegression(fit_intercept=False, solver="newton-cg", tol=1e-9)
    return torch.from_numpy(regression.fit(pixels[chosen], classes[chosen]).coef_)


def loss(weights: Tensor, x: Tensor, label: Tensor) -> Tensor:
    """The loss of one image."""
    return cross_entropy(weights @ x, label)


def objective(weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    return (
        vmap(loss, in_dims=(None, 0, 0))(weights, images, labels).sum()
        + weights.square().sum() / 2
    )


everything = np.arange(TRAINED)
weights = train(everything)
X, labels = torch.from_numpy(pixels), torch.from_numpy(classes)
X_train, labels_train = X[:TRAINED], labels[:TRAINED]
slope = grad(objective)(weights, X_train, labels_train)
print(f"largest entry of the gradient at the minimum: {slope.abs().max():.1e}")
assert slope.abs().max() < 1e-5

# %%
# Of the digits that the model has not seen, this one has the largest loss:

losses = vmap(loss, in_dims=(None, 0, 0))(weights, X[TRAINED:], labels[TRAINED:])
wrong = TRAINED + losses.argmax().item()
x, label = X[wrong], labels[wrong]
guess = (weights @ x).argmax().item()
before = loss(weights, x, label)
print(f"a {label} is classified as a {guess}, loss {before:.3f}")

# %%
# The derivatives
# ---------------
#
# Let :math:`g_i` be the gradient of the loss of training image :math:`i`, and :math:`H` the Hessian of the objective.
# Without this image, the minimum moves by :math:`H^{-1} g_i`, to first order. The loss on the misclassified digit,
# whose gradient is :math:`g`, changes by
#
# .. math:: \Delta_i = g^\top H^{-1} g_i.
#
# The gradients of all training images come from one call. ``grad(loss)`` is the gradient for one image, and ``vmap``
# maps it over the images while the weights are shared:

per_image = vmap(grad(loss), in_dims=(None, 0, 0))(weights, X_train, labels_train)
print("gradients:", list(per_image.shape))

# %%
# The Hessian is symmetric, so one solve is enough, for :math:`H^{-1} g`, whatever the number of training images.
# Conjugate gradients need only products :math:`H v`. ``linearize`` of the gradient records the gradient once and
# computes these products without evaluating the objective again. (``hvp`` computes a single product.)

_, product = linearize(lambda w: grad(objective)(w, X_train, labels_train), weights)


def hessian_times(vector: np.ndarray) -> np.ndarray:
    return product(torch.from_numpy(vector).view_as(weights)).flatten().numpy()


iterations = []
size = weights.numel()
g = grad(loss)(weights, x, label).flatten()
operator = LinearOperator((size, size), hessian_times, dtype=float)
solution, failed = cg(operator, g.numpy(), rtol=1e-8, callback=iterations.append)
assert not failed
print(f"{len(iterations)} products with a Hessian of {size} rows")

# %%
# Here the Hessian is small enough to form it and solve the system directly:

H = hessian(objective)(weights, X_train, labels_train).reshape(size, size)
torch.testing.assert_close(
    torch.from_numpy(solution), torch.linalg.solve(H, g), rtol=1e-5, atol=1e-8
)

# %%
# The effect of each training image on the digit is then an inner product:

predicted = per_image.flatten(1) @ torch.from_numpy(solution)

# %%
# Leaving each one out
# --------------------
#
# Scikit-learn trains the model again without each of the images. No derivative from this page is used for that.

retrained = torch.stack([train(np.delete(everything, i)) for i in everything])
actual = vmap(loss, in_dims=(0, None, None))(retrained, x, label) - before

correlation = np.corrcoef(predicted, actual)[0, 1]
print(f"correlation of predicted and actual changes: {correlation:.4f}")
assert correlation > 0.99

# %%
# A step further
# --------------
#
# The ranking is right, but the strongest images have a larger effect than predicted. There is a reason: an image helps
# to keep the weights where they are, and :math:`H` still includes its contribution. If the Hessian :math:`h_i` of the
# image is removed, the weights move by :math:`(H - h_i)^{-1} g_i`, which is a step of Newton's method on the objective
# without the image. It takes a Hessian and a solve for each image. ``vmap`` of a function of one image does both, here
# for the forty strongest images, ten at a time, so that there are never more than ten Hessians in memory.


def newton_step(x_out: Tensor, label_out: Tensor) -> Tensor:
    own = hessian(loss)(weights, x_out, label_out).reshape(size, size)
    step = torch.linalg.solve(H - own, grad(loss)(weights, x_out, label_out).flatten())
    return loss(weights + step.view_as(weights), x, label) - before


strongest = predicted.abs().argsort(descending=True)[:40]
stepped = vmap(newton_step, chunk_size=10)(X_train[strongest], labels_train[strongest])
for name, change in (
    ("influence function", predicted[strongest]),
    ("Newton step", stepped),
):
    ratio = change / actual[strongest]
    print(
        f"{name:>18}: predicted over actual change from {ratio.min():.2f} to {ratio.max():.2f}"
    )
assert (
    (stepped - actual[strongest]).abs() < (predicted - actual)[strongest].abs()
).float().mean() > 0.9

# %%
# Every point is a training image. Points above zero are images that favour the correct answer: the loss grows without
# them.

BLUE, ORANGE = (
    "#0072B2",
    "#D55E00",
)  # from Okabe and Ito's colour-blind safe palette

figure, panel = plt.subplots(figsize=(7.5, 6), layout="constrained")
near_zero = panel.inset_axes((0.56, 0.1, 0.42, 0.42))
for axes in (panel, near_zero):
    axes.axline(
        (0, 0), slope=1, color="0.5", linewidth=1, linestyle="--", label="as predicted"
    )
    axes.scatter(
        predicted,
        actual,
        s=22,
        color=BLUE,
        linewidth=0,
        label=f"influence, all {TRAINED} images",
    )
    axes.scatter(
        stepped,
        actual[strongest],
        s=40,
        color="none",
        edgecolor=ORANGE,
        label="Newton step, the 40 strongest",
    )
    axes.grid(visible=True, color="0.9")
    axes.set_axisbelow(True)
near_zero.set(xlim=(-0.06, 0.06), ylim=(-0.06, 0.06))
near_zero.tick_params(labelsize=8)
panel.indicate_inset_zoom(near_zero, edgecolor="0.4")
panel.set(
    xlabel="predicted change of the loss (nats)",
    ylabel="change after training without the image (nats)",
    title=f"Influence on the digit: correlation {correlation:.4f}",
)
panel.legend(frameon=False, loc="upper left")
plt.show()

# %%
# The digit itself, and the images that influence it most, with the change of its loss when they are left out:

figure = plt.figure(figsize=(8.5, 3.4), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(1, 3))
panel = left.subplots()
panel.imshow(pixels[wrong].reshape(8, 8), cmap="gray_r")
panel.set_title(f"a {label}, classified as a {guess}")
panel.set_axis_off()
panels = right.subplots(2, 5)
ranked = predicted.argsort(descending=True).tolist()
for row, images, color in (
    (panels[0], ranked[:5], BLUE),
    (panels[1], ranked[-1:-6:-1], ORANGE),
):
    for panel, image in zip(row, images, strict=True):
        panel.imshow(pixels[image].reshape(8, 8), cmap="gray_r")
        panel.set_title(
            f"a {labels[image]}: {actual[image]:+.3f}", color=color, fontsize=10
        )
        panel.set_axis_off()
plt.show()
