r"""
Per-sample Hessians of a classifier
===================================

The loss of a classifier is a mean over samples, and so is its Hessian. What does the Hessian of a
single sample say about that sample? Here a small network learns handwritten digits, and we compute a
Hessian for each of 1,497 digits that it has not seen: with ``vmap(hessian(loss), in_dims=(None, 0,
0))``, and with :func:`autodiff.per_sample` for large numbers of samples.
"""

# %%
# A network, and the loss of one sample
# -------------------------------------
# The data are scikit-learn's digits, averaged to 4 x 4 pixels, so that the network can be small: 16
# inputs, 8 hidden units, 10 classes, 226 parameters. It learns from only 300 digits, so that it
# misclassifies many of the others.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import avg_pool2d, cross_entropy

import autodiff as ad

torch.manual_seed(0)
digits = load_digits()
pictures = torch.tensor(digits.images / 16, dtype=torch.float32)  # [1797, 8, 8]
images = avg_pool2d(pictures[:, None], 2).flatten(1)  # [1797, 16]
labels = torch.tensor(digits.target)
HIDDEN, CLASSES, TRAINED = 8, 10, 300

model = torch.nn.Sequential(
    torch.nn.Linear(16, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, CLASSES)
)
optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
for _ in range(300):
    optimizer.zero_grad()
    cross_entropy(model(images[:TRAINED]), labels[:TRAINED]).backward()
    optimizer.step()
model.requires_grad_(False)

images, labels, pictures = images[TRAINED:], labels[TRAINED:], pictures[TRAINED:]
p = model(images).softmax(dim=1)  # [1497, 10], predicted by the network
wrong = p.argmax(dim=1) != labels
print(f"{wrong.sum()} of {len(labels)} digits are misclassified")

# %%
# ``sample_loss`` returns a function of the parameters, one image and one label. Its Hessian is a tree
# of blocks, one for each pair of parameters.

loss = ad.sample_loss(model, cross_entropy)
params = dict(model.named_parameters())
one = ad.hessian(loss)(params, images[0], labels[0])
print({name: tuple(block.shape) for name, block in one["2.bias"].items()})

# %%
# A hundred samples at once
# -------------------------
# ``vmap`` maps the Hessian over the samples. All samples share the parameters; images and labels are
# mapped. The block of the last layer's biases is known in closed form: it is
# :math:`\operatorname{diag}(p) - p p^\mathsf{T}`, for any label.

batched = ad.vmap(ad.hessian(loss), in_dims=(None, 0, 0))
hessians = batched(params, images[:100], labels[:100])
print(hessians["2.bias"]["0.weight"].shape)

expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
error = (hessians["2.bias"]["2.bias"] - expected[:100]).abs().max().item()
print(f"Compared with the closed form: {error:.0e}")
assert error < 1e-6

# %%
# All samples
# -----------
# All 1,497 Hessians would fit into memory here. For larger networks they would not, and we need only
# the eigenvalues of each. ``per_sample`` processes the samples in chunks whose size it learns, and
# makes a matrix of each tree. ``map`` keeps only what a function computes from that matrix.

curvature = ad.per_sample(ad.hessian(loss), in_dims=(None, 0, 0), as_matrix=True)
spectra = curvature.map(torch.linalg.eigvalsh, params, images, labels)
print(spectra.shape)  # each row in ascending order
print(curvature.report)

i = int(wrong.nonzero()[0])
vector, unravel = ad.pytree.ravel(params)
loss_of_vector = lambda v: loss(unravel(v), images[i], labels[i])
by_torch = torch.autograd.functional.hessian(loss_of_vector, vector)
difference = (spectra[i] - torch.linalg.eigvalsh(by_torch)).abs().max()
error = difference / spectra[i].abs().max()
print(f"Compared with torch.autograd.functional: relative difference {error:.0e}")
assert error < 1e-4

# %%
# Few directions matter
# ---------------------
# With the Jacobian :math:`J` of the logits, and with :math:`r = p - e_{label}`, the Hessian has two
# parts:
#
# .. math:: H = J^\mathsf{T} (\operatorname{diag}(p) - p p^\mathsf{T}) J + \sum_c r_c \nabla^2 \text{logit}_c
#
# The first part has rank at most nine, and no negative eigenvalue. The second gives one positive and
# one negative eigenvalue for each hidden unit. So of the 226 eigenvalues, at most 17 are positive and
# at most 8 negative. The others are zero up to rounding.

rest = spectra[:, HIDDEN : -(CLASSES - 1 + HIDDEN)].abs().max() / spectra.abs().max()
print(f"The 201 others, relative to the largest: at most {rest:.0e}")
assert rest < 1e-5

# %%
# What the eigenvalues say
# ------------------------
# The largest eigenvalue comes from the first part. It is large where the network is undecided between
# classes, and small where it is confident, whether right or wrong. The most negative one comes from
# the second part, which is weighted by the errors :math:`r`. It is far below zero where the network
# is wrong, and furthest where it is also confident.

up, down = spectra[:, -1], -spectra[:, 0]
confidence = p.max(dim=1).values
groups = {
    "confident and right": (confidence > 0.99) & ~wrong,
    "undecided": confidence < 0.6,
    "confident and wrong": (confidence > 0.99) & wrong,
}
print("medians                     digits   largest   most negative")
for name, chosen in groups.items():
    medians = f"{up[chosen].median():9.2f} {-down[chosen].median():15.3f}"
    print(f"{name:27} {chosen.sum():6} {medians}")

# %%
# The figure has a point for every digit. Those above the line curve down more than up, and all of
# them are misclassified.

assert wrong[down > up].all()

BLUE, ORANGE = "#0072B2", "#D55E00"
figure, panel = plt.subplots(figsize=(7, 4.4), layout="constrained")
for chosen, color, marker, name in (
    (~wrong, BLUE, "o", "correctly classified"),
    (wrong, ORANGE, "^", "misclassified"),
):
    label = f"{name} ({chosen.sum()} digits)"
    style = {"s": 14, "color": color, "marker": marker, "alpha": 0.6, "linewidth": 0}
    panel.scatter(up[chosen], down[chosen], label=label, **style)
panel.axline((1, 1), slope=1, color="0.5", linewidth=1, label="equally far down and up")
panel.set(xscale="log", yscale="log", xlim=(1e-3, 200), ylim=(1e-5, 50))
panel.set_xlabel("largest eigenvalue (nats per squared unit of weight)")
panel.set_ylabel("most negative eigenvalue (absolute value)")
panel.set_title("Curvature of the loss of each digit", fontsize=11)
panel.grid(visible=True, color="0.9")
panel.set_axisbelow(True)
panel.legend()
plt.show()

# %%
# And here are the digits themselves: the flattest of the first group, those of the second that
# curve up most, and those of the third that curve down most. Among these are ones with a base, which
# the network takes for twos.

SHOWN = 6
figure = plt.figure(figsize=(7, 5), layout="constrained")
rows = figure.subfigures(3, 1)
orders = up, -up, -down
for row, (name, chosen), order in zip(rows, groups.items(), orders, strict=True):
    row.suptitle(name, fontsize=11)
    members = chosen.nonzero().flatten()
    first = members[order[members].argsort()[:SHOWN]].tolist()
    for panel, i in zip(row.subplots(1, SHOWN), first, strict=True):
        panel.imshow(pictures[i], cmap="gray_r", vmin=0, vmax=1)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_color("0.8")
        panel.set_xlabel(f"{labels[i]} as {p[i].argmax()}")
plt.show()
