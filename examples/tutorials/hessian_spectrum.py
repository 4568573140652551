r"""
The Hessian spectrum of a network by Lanczos
============================================

How is the loss of a trained network curved? Its Hessian has as many rows as there are parameters,
and is too large to form for any network of practical size. But the method of Lanczos computes its
spectrum from products with vectors alone, and a product costs little more than a gradient.
:func:`autodiff.linearize` of :func:`autodiff.grad` provides such products. As a check, we begin with
a small network, whose whole Hessian can be formed. Then we turn to one whose Hessian would take
5.5 GB.
"""

# %%
# Two networks that classify digits
# ---------------------------------
# Both are trained on scikit-learn's handwritten digits. The small one has 760 parameters, the large
# one 26,122.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import autodiff as ad

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data / 16)  # [1797, 64], in double precision
labels = torch.tensor(digits.target)


def network(*widths):
    layers = [torch.nn.Linear(64, widths[0])]
    for inputs, outputs in zip(widths, (*widths[1:], 10), strict=True):
        layers += [torch.nn.Tanh(), torch.nn.Linear(inputs, outputs)]
    return torch.nn.Sequential(*layers).double()


def train(model, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.requires_grad_(False)


small = train(network(10), steps=60)

# %%
# Products with the Hessian
# -------------------------
# The loss becomes a function of one vector that holds all parameters. ``ravel`` makes this vector,
# and returns the inverse function as well.


def loss_of(model):
    """The mean loss as a function of one vector, and the vector of the model."""
    vector, unravel = ad.pytree.ravel(dict(model.named_parameters()))

    def loss(vector):
        logits = ad.functional_call(model, unravel(vector), (images,))
        return cross_entropy(logits, labels)

    return loss, vector


# %%
# ``linearize`` evaluates the gradient once, and also returns a linear function. This function
# multiplies a vector by the derivative of the gradient, which is the Hessian, any number of times.

loss, vector = loss_of(small)
gradient, times_hessian = ad.linearize(ad.grad(loss), vector)

hessian = ad.hessian(loss)(vector)  # [760, 760]: the check
direction = torch.randn_like(vector)
product = hessian @ direction
difference = (times_hessian(direction) - product).norm() / product.norm()
print(f"A product compared with the matrix: relative difference {difference:.0e}")
assert difference < 1e-10

# %%
# Lanczos
# -------
# From a random vector :math:`v`, Lanczos builds an orthonormal basis of :math:`v, Hv, H^2v, \ldots`,
# in which :math:`H` is a small tridiagonal matrix. In exact arithmetic, each new vector is
# automatically orthogonal to all vectors before the last two. With rounding it is not, so it is
# orthogonalised against all of them, twice.


def lanczos(product, start, steps):
    """The eigenvalues of the tridiagonal matrix, [steps], and the weights of the start, [steps]."""
    basis = start.new_zeros(steps, len(start))
    diagonal, beside = start.new_zeros(steps), start.new_zeros(steps - 1)
    vector = start / start.norm()
    for step in range(steps):
        basis[step] = vector
        vector = product(vector)
        diagonal[step] = vector @ basis[step]
        for _ in range(2):
            vector = vector - basis[: step + 1].mT @ (basis[: step + 1] @ vector)
        if step + 1 < steps:
            beside[step] = vector.norm()
            vector = vector / beside[step]
    tridiagonal = torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)
    eigenvalues, eigenvectors = torch.linalg.eigh(tridiagonal)
    return eigenvalues, eigenvectors[0].square()


# %%
# The outermost eigenvalues converge first. Here are the five largest after 80 products, next to those
# of the matrix and those of :func:`autodiff.hessian_eigenvalues`, which uses its own block Lanczos
# method.

exact = torch.linalg.eigvalsh(hessian)
found, _ = lanczos(times_hessian, torch.randn_like(vector), steps=80)
blocks = ad.hessian_eigenvalues(loss, k=5)(vector)
print("matrix   Lanczos  hessian_eigenvalues")
for row in zip(exact.flip(0)[:5], found.flip(0)[:5], blocks, strict=True):
    print("   ".join(f"{value:.4f}" for value in row))
assert torch.allclose(found[-5:], exact[-5:], rtol=1e-8)

# %%
# The whole spectrum
# ------------------
# The tridiagonal matrix also contains information about the rest of the spectrum: its eigenvalues and
# weights are a quadrature rule. For a random start, :math:`\sum_i w_i\, g(\theta_i)` estimates the
# mean of :math:`g` over all eigenvalues. With a narrow Gaussian for :math:`g`, that is the spectral
# density at one point (G. H. Golub and J. H. Welsch, 1969; S. Ubaru, J. Chen and Y. Saad, 2017). The
# mean over several starts is more accurate.

WIDTH = 0.02  # of the Gaussian


def density(places, eigenvalues, weights):
    bells = torch.exp(-0.5 * ((places[:, None] - eigenvalues) / WIDTH) ** 2)
    return bells @ weights / (WIDTH * (2 * torch.pi) ** 0.5)


def quadratures(product, size, steps=80, starts=3):
    random = torch.randn(starts, size, dtype=images.dtype)
    return [lanczos(product, start, steps) for start in random]


def estimated_density(places, rules):
    return sum(density(places, *rule) for rule in rules) / len(rules)


places = torch.linspace(-0.6, 2.2, 1500, dtype=torch.float64)
from_matrix = density(places, exact, torch.full_like(exact, 1 / len(exact)))
from_products = estimated_density(places, quadratures(times_hessian, len(vector)))

between = torch.trapezoid((from_products - from_matrix).abs(), places).item()
print(f"Area between the two densities, each of area one: {between:.3f}")
mean = torch.trapezoid(places * from_products, places)
trace = ad.hessian_trace(loss)(vector)
print(f"Mean eigenvalue {mean:.4f}, by hessian_trace {trace / len(vector):.4f}")
assert between < 0.1

BLUE, ORANGE = "#0072B2", "#D55E00"
plt.rcParams |= {
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
}


def finish(panel, title):
    panel.set(yscale="log", xlim=(-0.6, 2.2), ylim=(1e-5, 100))
    panel.set_xlabel("eigenvalue (nats per squared unit of weight)")
    panel.set_ylabel("density of the spectrum")
    panel.set_title(title, fontsize=11)
    panel.legend()
    plt.show()


figure, panel = plt.subplots(figsize=(7, 4.4))
panel.fill_between(places, from_matrix, color="0.8", label="the matrix, 760 x 760")
panel.plot(places, from_products, color=BLUE, label="Lanczos, 3 x 80 products")
finish(panel, "760 parameters, after 60 steps of training")

# %%
# The positions of the peaks are exact. Their heights are not: the component of a random start along
# an eigenvector is random, and a single eigenvalue gets few samples. Much of the mean depends on the
# few largest eigenvalues.
#
# A network whose Hessian is never formed
# ---------------------------------------
# The large network has 26,122 parameters: its Hessian would take 5.5 GB in double precision. Its
# spectrum takes 240 products. Here it is at initialisation, and after 30 steps of training.

spectra = {}
for steps in (0, 30):
    torch.manual_seed(0)
    loss, vector = loss_of(train(network(128, 128), steps))
    _, times_hessian = ad.linearize(ad.grad(loss), vector)
    spectra[steps] = quadratures(times_hessian, len(vector))
    largest = spectra[steps][0][0].flip(0)[:12]
    values = "  ".join(f"{value:.2f}" for value in largest)
    print(f"{steps:2} steps, loss {loss(vector):.3f}: {values}")

# %%
# At initialisation the spectrum is nearly symmetric: the bulk extends as far below zero as above.
# Nine eigenvalues are separated from it, one fewer than there are classes. This is no accident. One
# part of the Hessian comes from the curvature of the cross-entropy, whose own Hessian in the ten
# logits has rank nine. This part is large in the directions that separate the means of the classes
# (L. Sagun and others, 2017; V. Papyan, 2019). The rest comes from the curvature of the network,
# multiplied by its errors. During training the errors vanish, and with them the negative eigenvalues,
# while the largest of the nine grow.

figure, panel = plt.subplots(figsize=(7, 4.4))
tick = {"marker": "|", "linestyle": "", "markersize": 11, "markeredgewidth": 1.5}
for steps, color, height, label in (
    (0, ORANGE, 6e-5, "as initialised"),
    (30, BLUE, 2e-5, "after 30 steps of training"),
):
    rules = spectra[steps]
    panel.plot(places, estimated_density(places, rules), color=color, label=label)
    panel.plot(rules[0][0][-9:], [height] * 9, color=color, **tick)
panel.plot([], [], color="0.3", label="the nine largest eigenvalues", **tick)
finish(panel, "26,122 parameters")

# sphinx_gallery_thumbnail_number = 2
