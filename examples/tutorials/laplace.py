r"""
A Laplace approximation with calibrated predictions
===================================================

A network that has been trained on few samples is too sure of itself. Its weights are one of many settings that explain
the samples about as well. A Laplace approximation takes the others into account: it replaces the trained weights by a
normal distribution around them, whose precision is the curvature of the objective (D. MacKay, *Neural Computation* 4,
1992). The curvature is the Gauss-Newton matrix plus the weight decay, and
:func:`autodiff.operators.gauss_newton` multiplies by it without forming it: in the last layer, or in all weights.

The data are made here, so that the true probability of every class is known everywhere. We compare with it.
"""

# %%
# A network that is too sure
# --------------------------
# Three classes of points in the plane overlap. A network with 747 weights learns them from 150 points, with a weight
# decay that is fairly strong. Training minimises the sum of the losses and ``DECAY / 2`` times the squared norm of the
# weights. So the trained weights are the most probable ones if every weight has a normal prior of precision ``DECAY``.

from functools import partial

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import autodiff as ad
from autodiff import operators

DOUBLE = torch.float64
torch.manual_seed(0)
CLASSES, WIDTH, SPREAD, DECAY = 3, 24, 0.9, 0.3
centres = torch.tensor([[0.0, 1.2], [-1.1, -0.7], [1.1, -0.7]], dtype=DOUBLE)


def draw(number: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(CLASSES, (number,))
    return centres[labels] + SPREAD * torch.randn(number, 2, dtype=DOUBLE), labels


def true_probabilities(points: Tensor) -> Tensor:
    squares = (points[:, None] - centres).square().sum(dim=-1)
    return (-squares / (2 * SPREAD**2)).softmax(dim=-1)


X, y = draw(150)
network = nn.Sequential(
    nn.Linear(2, WIDTH),
    nn.Tanh(),
    nn.Linear(WIDTH, WIDTH),
    nn.Tanh(),
    nn.Linear(WIDTH, CLASSES),
).double()
loss = partial(cross_entropy, reduction="sum")
optimizer = torch.optim.LBFGS(
    network.parameters(), max_iter=2000, history_size=50, line_search_fn="strong_wolfe"
)


def objective() -> Tensor:
    optimizer.zero_grad()
    squares = sum(weight.square().sum() for weight in network.parameters())
    total = loss(network(X), y) + DECAY / 2 * squares
    total.backward()
    return total


optimizer.step(objective)
network.requires_grad_(False)
params = dict(network.named_parameters())
right = (network(X).argmax(dim=1) == y).double().mean()
print(f"{right:.0%} of the training points are classified correctly")

# %%
# The precision of the weights
# ----------------------------
# To second order in the weights, and with a model that is linear in them, the precision is
#
# .. math:: \Lambda = \sum_n J_n^\top \left( \operatorname{diag} p_n - p_n p_n^\top \right) J_n + \delta I,
#
# where :math:`J_n` is the Jacobian of the logits of point :math:`n`, :math:`p_n` its predicted probabilities, and
# :math:`\delta` the weight decay. The sum is the Gauss-Newton matrix of the loss, and adding a number to an operator
# adds it to the diagonal. ``wrt`` selects the weights of the last layer by their names.


def model(params: dict[str, Tensor], points: Tensor) -> Tensor:
    return ad.functional_call(network, params, (points,))


curvature = operators.gauss_newton(model, loss)(params, X, y)
last_curvature = operators.gauss_newton(model, loss, wrt="4.*")(params, X, y)
print(curvature)
precision, last_precision = curvature + DECAY, last_curvature + DECAY

# %%
# An independent answer: torch.func's Jacobian, and the formula above. The curvature in the last layer is a block of the
# curvature in all weights.

J = torch.func.jacrev(lambda p: torch.func.functional_call(network, p, (X,)))(params)
J = torch.cat([block.flatten(2) for block in J.values()], dim=2)  # [150, 3, 747]
p = network(X).softmax(dim=1)
inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
expected = torch.einsum("nci,ncd,ndj->ij", J, inner, J)
torch.testing.assert_close(curvature.to_matrix(), expected)
torch.testing.assert_close(
    curvature["4.*", "4.*"].to_matrix(), last_curvature.to_matrix()
)

# %%
# Predictions
# -----------
# The weights have the covariance :math:`\Lambda^{-1}`. With a model that is linear in the weights, the logits of a new
# point are then normally distributed, with the network's logits as their mean and the covariance
# :math:`J \Lambda^{-1} J^\top`. This takes a linear solve for each logit, and no matrix of the weights. Conjugate
# gradients do it with products, here for the three logits of a point far from the samples:

far = torch.tensor([[4.0, 1.0]], dtype=DOUBLE)
logits = operators.jacobian(model)(params, far)  # 3 x 747
solution, info = operators.solve(precision, logits.H.to_matrix(), rtol=1e-8, info=True)
covariance = logits @ solution  # [3, 3]
print("steps:", info.iterations.tolist())
print(covariance)

# %%
# For a network as small as this one, a factorisation is faster when there are many points. ``per_sample`` gives the
# Jacobian of each of them as a matrix.


def logit_covariances(
    precision: operators.Operator, points: Tensor, wrt=None
) -> Tensor:
    """The covariance matrix of the logits of each point."""
    one = lambda params, point: model(params, point[None])[0]
    rows = ad.per_sample(ad.jacrev(one, wrt=wrt), in_dims=(None, 0), as_matrix=True)
    factor = torch.linalg.cholesky(precision.to_matrix())
    J = rows(params, points)  # [points, classes, weights]
    scaled = torch.linalg.solve_triangular(factor, J.flatten(0, 1).mT, upper=False)
    scaled = scaled.mT.reshape(J.shape)
    return scaled @ scaled.mT


torch.testing.assert_close(
    covariance, logit_covariances(precision, far)[0], rtol=1e-6, atol=0
)

# %%
# The predicted probabilities are the mean of the softmax over that distribution, here over 300 draws.


def predicted(points: Tensor, covariances: Tensor) -> Tensor:
    roots = torch.linalg.cholesky(covariances)[:, None]  # [points, 1, classes, classes]
    noise = torch.randn(300, CLASSES, 1, dtype=DOUBLE)
    logits = model(params, points)[:, None] + (roots @ noise)[..., 0]
    return logits.softmax(dim=-1).mean(dim=1)


predictors = {
    "true": true_probabilities,
    "trained weights": lambda points: model(params, points).softmax(dim=1),
    "last layer": lambda points: predicted(
        points, logit_covariances(last_precision, points, "4.*")
    ),
    "all weights": lambda points: predicted(
        points, logit_covariances(precision, points)
    ),
}

# %%
# Are they right?
# ---------------
# Since the true probabilities are known, neither the loss nor the calibration needs labels: the expected loss of a
# prediction :math:`q` is :math:`-\sum_c p_c \log q_c`, and the probability that the guessed class is right is the true
# one. A prediction is calibrated if its confidence agrees with that on average, whatever the confidence is.

test, _ = draw(4000)
truth = true_probabilities(test)
EDGES = torch.linspace(1 / CLASSES, 1, 11, dtype=DOUBLE)
results = {}
print("                 expected loss   confidence   true   calibration error")
for name, predictor in predictors.items():
    torch.manual_seed(1)
    probabilities = predictor(test)
    confidence, guess = probabilities.max(dim=1)
    correct = truth.gather(1, guess[:, None])[:, 0]
    bins = torch.bucketize(confidence, EDGES[1:-1])
    counts = bins.bincount(minlength=10)
    means = torch.stack([bins.bincount(w, minlength=10) for w in (confidence, correct)])
    means = means / counts.clamp_min(1)  # [2, bins]
    error = (means[0] - means[1]).abs() @ (counts.double() / len(test))
    expected_loss = -(truth * probabilities.log()).sum(dim=1).mean()
    results[name] = expected_loss.item(), error.item(), means[:, counts > 20]
    print(
        f"{name:17}{expected_loss:13.3f}{confidence.mean():13.3f}"
        f"{correct.mean():7.3f}{error:20.3f}"
    )
losses = [results[name][0] for name in predictors]
assert losses[0] < losses[3] < losses[2] < losses[1]
assert results["all weights"][1] < results["trained weights"][1] / 2

# %%
# The trained weights alone are far too sure: where they give 98%, the guess is right in less than 90%. The last
# layer corrects some of it. With all weights the predictions are on average a little too cautious, and their expected
# loss is the smallest: it is nearer to the least possible one by more than half.

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
COLORS = {"trained weights": ORANGE, "last layer": GREEN, "all weights": BLUE}
plt.rcParams |= {
    "figure.constrained_layout.use": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
}
figure, panel = plt.subplots(figsize=(5.6, 5))
panel.axline((0.5, 0.5), slope=1, color="0.5", linewidth=1, linestyle="--")
for name, color in COLORS.items():
    _, error, (confidence, correct) = results[name]
    label = f"{name}: off by {error:.3f}"
    panel.plot(confidence, correct, "o-", color=color, markersize=5, label=label)
panel.set(xlim=(0.3, 1.02), ylim=(0.3, 1.02), aspect="equal")
panel.set_xlabel("confidence of the prediction")
panel.set_ylabel("true probability of the guessed class")
panel.set_title("Calibration on 4,000 new points", fontsize=11)
panel.grid(visible=True)
panel.legend(loc="upper left")
plt.show()

# %%
# Where is it sure?
# -----------------
# The trained network is sure almost everywhere, also far away from the points, where they do not say where one class
# ends and the next begins. With the last layer it is a little less so, and with all weights it doubts what it has not
# seen. The true probabilities know more than the points do: that every class is a normal distribution.

side = torch.linspace(-6, 6, 61, dtype=DOUBLE)
grid = torch.cartesian_prod(side, side)
figure, panels = plt.subplots(2, 2, figsize=(7.5, 7), sharex=True, sharey=True)
for panel, (name, predictor) in zip(panels.flat, predictors.items(), strict=True):
    torch.manual_seed(1)
    confidence = predictor(grid).max(dim=1).values.reshape(61, 61).mT
    filled = panel.contourf(side, side, confidence, levels=EDGES, cmap="Blues")
    for label, marker in zip(range(CLASSES), "os^", strict=True):
        points = X[y == label].mT
        panel.plot(
            *points, marker, color="0.15", markersize=2.5, linewidth=0, alpha=0.7
        )
    panel.set(title=name, aspect="equal")
figure.colorbar(filled, ax=panels, shrink=0.6, format="%.2f", label="confidence")
plt.show()
