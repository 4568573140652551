r"""The curvature of the loss, image by image: one Hessian for every handwritten digit.

A small network (64 inputs, 16 hidden units, 10 classes) learns scikit-learn's 1797 digits. For every single
image, this script then computes the Hessian of the loss with respect to the 170 parameters of the last
layer,

    H_n = d^2 loss(params, image_n, label_n) / d last^2        one 170 x 170 matrix for each image,

as ``per_sample(hessian(loss, wrt="last.*"), in_dims=(None, 0, 0), as_matrix=True)``: the parameters are
shared, images and labels are mapped, and ``per_sample`` learns how many images to process at once. The script
prints the ten images at which the loss is most curved, and draws them below the spectra of the Hessians by
class.

The results can be checked by hand. With hidden activations h, a trailing 1 for the bias, z = (h, 1), logits
W z and p = softmax(W z), the Hessian of the cross-entropy is

    H = (diag(p) - p p^T) (x) (z z^T)

for any label. So at most 9 of the 170 eigenvalues are nonzero: those of diag(p) - p p^T, times |z|^2. Where
the network is confident (p near a corner of the simplex), the loss is flat, even if the network is wrong. The
most curved images are those on which the network is undecided. Every Hessian is compared with this formula,
and three of them with ``torch.autograd.functional.hessian``.

With ``--parameters all``, the script computes the Hessian in all 1210 parameters, in float32, for 200 images
or, with ``--samples all``, for every image. All of them take 10.5 GB, which a run with a budget of 512 MiB
writes to ``hessians.npy`` in the output folder. If a run is interrupted, start it again and it continues where
it stopped; if it is already complete, nothing is computed. With J the Jacobian of the logits and
r = p - onehot(label),

    H = J^T (diag(p) - p p^T) J + sum_c r_c d^2 logit_c / d params^2.

The first part has rank 9 and no negative eigenvalue. In the second part, every hidden unit contributes two
directions, one that curves up and one that curves down. So at most 25 of the 1210 eigenvalues are positive,
and at most 16 negative. Both parts vanish where the network is right and confident. Where it is wrong and
confident, only the first part vanishes: what looks flat in the last layer alone is a saddle in all parameters.

Run it with ``python examples/per_sample_hessians.py``; ``--help`` lists the options.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import optree
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from tqdm import tqdm

from autodiff import hessian, per_sample, value_and_grad
from autodiff.errors import ResumeError
from autodiff.pytree import ravel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PIXELS, HIDDEN, CLASSES = 64, 16, 10
LAST = (HIDDEN + 1) * CLASSES  # numbers in the last layer
ALL = (PIXELS + 1) * HIDDEN + LAST
IMAGES, FEW = 1797, 200
RANK = CLASSES - 1  # of every last-layer Hessian: softmax is invariant to a shift of all logits
UP, DOWN = RANK + HIDDEN, HIDDEN  # positive and negative eigenvalues in all parameters
CHECKED, SHOWN = 3, 10
# Differences are relative to the largest entry, or to 0.1 if all entries are smaller: near a corner, H shrinks
# with 1 - p, but its rounding error does not. Rounding errors are 1e-15 in float64 and 1e-6 in float32.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}

# There are two layers: {"hidden": {"weight", "bias"}, "last": {"weight", "bias"}}.
Params = dict[str, Any]


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    images, labels = load_images(options.device)
    params = train(initial_params(options.device), images, labels, steps=300)
    images, labels = images[: options.samples], labels[: options.samples]
    if options.parameters == "last":
        in_last_layer(params, images, labels, options)
    else:
        in_all_parameters(params, images, labels, options)


def in_last_layer(params: Params, images: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
    curvature = per_sample(
        hessian(mean_loss, wrt="last.*"),
        in_dims=(None, 0, 0),
        chunk_size=options.chunk_size,
        as_matrix=True,
        progress=True,
    )
    hessians = curvature(params, images, labels)  # [N, 170, 170]
    print(curvature.report)
    check_against_closed_form(hessians, params, images)
    check_against_torch(hessians, ["last"], params, images, labels)

    findings = examine(hessians, params, images, labels)
    print_table(findings)
    path = options.output / "per_sample_hessians.png"
    draw(findings, images, path)
    print(f"\nFigure: {path}")


def in_all_parameters(params: Params, images: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
    params, images = optree.tree_map(Tensor.float, params), images.float()
    hessians = hessians_on_disk(params, images, labels, options)  # [N, 1210, 1210]
    check_against_closed_form(hessians, params, images)
    check_against_torch(hessians, ["hidden", "last"], params, images, labels)

    findings = examine_all(hessians, params, images, labels)
    print_table_of_all(findings)
    path = options.output / "per_sample_hessians_all.png"
    draw_all(findings, path)
    print(f"\nFigure: {path}")


def hessians_on_disk(params: Params, images: Tensor, labels: Tensor, options: argparse.Namespace) -> Tensor:
    """The Hessians in all parameters, [N, 1210, 1210], in a memory-mapped file."""
    curvature = per_sample(
        hessian(mean_loss),
        in_dims=(None, 0, 0),
        chunk_size=options.chunk_size,
        memory="512MiB",
        as_matrix=True,
        progress=True,
    )
    path = options.output / "hessians.npy"
    size = len(images) * ALL**2 * images.element_size()
    print(f"{len(images)} Hessians of {ALL} x {ALL} numbers, {size / 1e9:.1f} GB, are written to {path}.")
    print("If the run is interrupted, start it again and it continues where it stopped.")
    try:
        hessians = curvature(params, images, labels, out=path)
    except ResumeError as error:
        raise SystemExit(str(error)) from None
    if curvature.report.resumed_at == len(images):
        print(f"{path} is already complete: nothing was computed.")
    print(curvature.report)
    return hessians


# The network and its training.


def load_images(device: torch.device) -> tuple[Tensor, Tensor]:
    """All images, [N, 64] with pixels from 0 to 1, and their labels, [N]."""
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float64, device=device)
    return images, torch.tensor(digits.target, device=device)


def initial_params(device: torch.device) -> Params:
    def layer(inputs: int, outputs: int) -> dict[str, Tensor]:
        weight = torch.randn(outputs, inputs, dtype=torch.float64) / math.sqrt(inputs)
        return {"weight": weight.to(device), "bias": torch.zeros(outputs, dtype=torch.float64, device=device)}

    return {"hidden": layer(PIXELS, HIDDEN), "last": layer(HIDDEN, CLASSES)}


def hidden_activations(params: Params, images: Tensor) -> Tensor:
    return torch.tanh(linear(images, **params["hidden"]))


def mean_loss(params: Params, images: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(linear(hidden_activations(params, images), **params["last"]), labels)


def train(params: Params, images: Tensor, labels: Tensor, steps: int) -> Params:
    """Gradient descent with momentum on all images at once."""
    rate, momentum = 0.2, 0.9
    velocity = optree.tree_map(torch.zeros_like, params)
    progress = tqdm(range(steps), desc="training", unit="step")
    for _ in progress:
        value, gradient = value_and_grad(mean_loss)(params, images, labels)
        velocity = optree.tree_map(lambda v, g: momentum * v - rate * g, velocity, gradient)
        params = optree.tree_map(torch.add, params, velocity)
        progress.set_postfix(loss=f"{value.item():.4f}", refresh=False)
    return params


# Checks of the Hessians.


def check_against_closed_form(hessians: Tensor, params: Params, images: Tensor) -> None:
    """Compare the last layer's block of every Hessian with J^T (diag(p) - p p^T) J, J the Jacobian of the logits."""
    exact = optree.tree_map(Tensor.double, params)
    classes = torch.eye(CLASSES, dtype=torch.float64, device=images.device)
    error = largest = 0.0
    for computed, image in zip(hessians, images.double(), strict=True):
        h = hidden_activations(exact, image)
        p = torch.softmax(linear(h, **exact["last"]), dim=0)
        # J: [10, 170]: the weights, class by class, then the biases.
        jacobian = torch.cat([torch.kron(classes, h[None]), classes], dim=1)
        expected = jacobian.mT @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
        block = computed[-LAST:, -LAST:].to(expected)
        error = max(error, (block - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    confirm(
        f"all {len(hessians)} last-layer blocks against the closed form",
        error / max(largest, 0.1),
        hessians.dtype,
    )


def check_against_torch(
    hessians: Tensor, layers: list[str], params: Params, images: Tensor, labels: Tensor
) -> None:
    """Compare the images with the largest loss with torch.autograd.functional, one by one and in float64."""
    exact = optree.tree_map(Tensor.double, params)
    vector, unravel = ravel({layer: exact[layer] for layer in layers})
    logits = linear(hidden_activations(params, images), **params["last"])
    losses = cross_entropy(logits, labels, reduction="none")
    indices = losses.argsort(descending=True)[:CHECKED].tolist()
    error = largest = 0.0
    for i in indices:

        def loss(vector: Tensor, i: int = i) -> Tensor:
            return mean_loss({**exact, **unravel(vector)}, images[i].double(), labels[i])

        expected = torch.autograd.functional.hessian(loss, vector)
        error = max(error, (hessians[i].to(expected) - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    which = ", ".join(map(str, indices))
    confirm(
        f"images {which} against torch.autograd.functional.hessian", error / max(largest, 0.1), hessians.dtype
    )


def confirm(what: str, error: float, dtype: torch.dtype) -> None:
    if not error < TOLERANCE[dtype]:
        raise SystemExit(f"Checked {what}: the difference is {error:.1e}. One of the two is wrong.")
    print(f"Checked {what}: largest relative difference {error:.1e}")


# The findings.


class Findings(NamedTuple):
    """One entry for each image, as NumPy arrays."""

    labels: np.ndarray  # [N]
    probabilities: np.ndarray  # [N, 10], predicted by the network
    losses: np.ndarray  # [N]
    traces: np.ndarray  # [N]
    spectra: np.ndarray  # [N, 170], largest eigenvalue first
    most_curved: np.ndarray  # [10], indices of images


def examine(hessians: Tensor, params: Params, images: Tensor, labels: Tensor) -> Findings:
    logits = linear(hidden_activations(params, images), **params["last"])
    spectra = torch.linalg.eigvalsh(hessians).flip(-1)
    columns = (
        labels,
        logits.softmax(dim=1),
        cross_entropy(logits, labels, reduction="none"),
        hessians.diagonal(dim1=1, dim2=2).sum(dim=1),
        spectra,
        spectra[:, 0].argsort(descending=True)[:SHOWN],
    )
    return Findings(*(column.cpu().numpy() for column in columns))


def print_table(findings: Findings) -> None:
    guesses = findings.probabilities.argmax(axis=1)
    beyond = np.abs(findings.spectra[:, RANK:]).max()
    print(f"Misclassified images: {(guesses != findings.labels).sum()} of {len(guesses)}")
    print(f"Eigenvalues {RANK + 1} to {LAST}, zero in theory: at most {beyond:.1e}")
    print(f"\nThe {len(findings.most_curved)} most curved images:")
    print(f"{'image':>6} {'label':>6} {'predicted':>10} {'loss':>8} {'trace':>8} {'largest eigenvalue':>19}")
    for i in findings.most_curved:
        print(
            f"{i:>6} {findings.labels[i]:>6} {guesses[i]:>10} {findings.losses[i]:>8.3f} "
            f"{findings.traces[i]:>8.3f} {findings.spectra[i, 0]:>19.3f}"
        )


class FindingsOfAll(NamedTuple):
    """Findings for all parameters, with one entry for each image, except in ``mean`` and ``beyond``."""

    labels: np.ndarray  # [N]
    guesses: np.ndarray  # [N]
    losses: np.ndarray  # [N]
    up: np.ndarray  # [N, 25], the positive eigenvalues, largest first
    down: np.ndarray  # [N, 16], the negative ones, most negative first
    last: np.ndarray  # [N, 9], those of the last layer's block, largest first
    mean: np.ndarray  # [1210, 1210], the mean of |H|
    beyond: float  # a bound on the other eigenvalues


def examine_all(hessians: Tensor, params: Params, images: Tensor, labels: Tensor) -> FindingsOfAll:
    """Read the file once, a few images at a time."""
    logits = linear(hidden_activations(params, images), **params["last"])
    spectra, last = [], []
    total = torch.zeros(ALL, ALL, dtype=torch.float64, device=images.device)
    beyond = 0.0
    for part in tqdm(hessians.split(8), desc="spectra", unit="part"):
        chunk = part.to(images.device)
        eigenvalues, rest = nonzero_eigenvalues(chunk)
        spectra.append(eigenvalues)
        last.append(torch.linalg.eigvalsh(chunk[:, -LAST:, -LAST:])[:, -RANK:].flip(-1))
        beyond = max(beyond, rest)
        total += chunk.abs().sum(dim=0)
    ordered = torch.cat(spectra)
    columns = (
        labels,
        logits.argmax(dim=1),
        cross_entropy(logits, labels, reduction="none"),
        ordered[:, -UP:].flip(-1),
        ordered[:, :DOWN],
        torch.cat(last),
        total / len(hessians),
    )
    return FindingsOfAll(*(column.cpu().numpy() for column in columns), beyond)


def nonzero_eigenvalues(hessians: Tensor) -> tuple[Tensor, float]:
    """The eigenvalues that need not be zero, in ascending order, and a bound on all others.

    If Q spans the range of H, these are the eigenvalues of Q^T H Q, which is small. A product of H with slightly
    more random vectors than its rank spans the range (Halko, Martinsson and Tropp, SIAM Review 53, 2011).
    |H - Q Q^T H| measures how well: no eigenvalue moves by more than twice that. This takes a tenth of the time
    of eigvalsh.
    """
    samples = torch.randn(ALL, UP + DOWN + 9, dtype=hessians.dtype, device=hessians.device)
    Q = torch.linalg.qr(hessians @ samples).Q
    rows = Q.mT @ hessians
    missed = torch.linalg.matrix_norm(hessians - Q @ rows).max().item()
    return torch.linalg.eigvalsh(rows @ Q), 2 * missed


def print_table_of_all(findings: FindingsOfAll) -> None:
    print(f"Misclassified images: {(findings.guesses != findings.labels).sum()} of {len(findings.labels)}")
    print(f"Eigenvalues {UP + 1} to {ALL - DOWN}, zero in theory: at most {findings.beyond:.1e}")
    lowest = findings.down[:, 0].argsort()[:SHOWN]
    print(f"\nThe {len(lowest)} images whose loss curves down most:")
    columns = f"{'most negative':>14} {'largest eigenvalue':>19} {'largest in last layer':>22}"
    print(f"{'image':>6} {'label':>6} {'predicted':>10} {'loss':>8} {columns}")
    for i in lowest:
        print(
            f"{i:>6} {findings.labels[i]:>6} {findings.guesses[i]:>10} {findings.losses[i]:>8.3f} "
            f"{findings.down[i, 0]:>14.3f} {findings.up[i, 0]:>19.3f} {findings.last[i, 0]:>22.3f}"
        )


# The figures.

BLUE, ORANGE = "#0072B2", "#D55E00"  # from Okabe and Ito's colour-blind safe palette


def draw(findings: Findings, images: Tensor, path: Path) -> None:
    """The spectra by class in two rows of five panels; below, the most curved digits."""
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.2, 1], hspace=0.05)
    draw_spectra(above, findings)
    draw_digits(below, findings, images.cpu().numpy())
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    figure.savefig(path, dpi=150)


def draw_spectra(figure: SubFigure, findings: Findings) -> None:
    figure.suptitle(
        f"Curvature of each image's loss in the last layer: the {RANK} nonzero Hessian eigenvalues"
    )
    figure.supxlabel("rank of the eigenvalue, largest first", fontsize=11)
    figure.supylabel("eigenvalue (nats per squared unit of weight)", fontsize=11)
    panels = figure.subplots(2, CLASSES // 2, sharex=True, sharey=True)
    ranks = np.arange(1, RANK + 1)
    for digit, panel in enumerate(panels.flat):
        # [images of this class, 9]. Rounding may make one negative, which has no logarithm.
        spectra = findings.spectra[findings.labels == digit, :RANK].clip(min=1e-16)
        panel.set_title(f"digit {digit} (n = {len(spectra)})", fontsize=11)
        panel.set(yscale="log", xticks=ranks)
        panel.grid(visible=True, color="0.9")
        if len(spectra) > 0:
            low, middle, high = np.quantile(spectra, [0.1, 0.5, 0.9], axis=0)
            panel.plot(ranks, spectra.T, color=BLUE, alpha=0.1, linewidth=0.6)
            panel.fill_between(ranks, low, high, color=BLUE, alpha=0.3, linewidth=0)
            panel.plot(ranks, middle, color=ORANGE, linewidth=2, marker="o", markersize=4)
    legend = [
        Line2D([], [], color=ORANGE, linewidth=2, marker="o", markersize=4, label="median"),
        Patch(color=BLUE, alpha=0.4, linewidth=0, label="middle 80% of the images"),
        Line2D([], [], color=BLUE, alpha=0.5, linewidth=0.6, label="one image"),
    ]
    figure.legend(handles=legend, loc="outside lower right", ncols=3, frameon=False)


def draw_digits(figure: SubFigure, findings: Findings, images: np.ndarray) -> None:
    figure.suptitle(
        "The most curved images, with their largest eigenvalue λ, and the network's two best guesses below"
    )
    panels = figure.subplots(1, SHOWN)
    for panel in panels:
        panel.set(xticks=[], yticks=[], visible=False)
        panel.spines[:].set_color("0.8")
    for panel, i in zip(panels, findings.most_curved, strict=False):
        panel.set_visible(True)
        panel.imshow(images[i].reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        panel.set_title(f"{findings.labels[i]}: λ = {findings.spectra[i, 0]:.2g}", fontsize=11)
        best = findings.probabilities[i].argsort()[:-3:-1]
        guesses = [f"{digit} with {findings.probabilities[i, digit]:.0%}" for digit in best]
        panel.set_xlabel("\n".join(guesses), fontsize=10)


def draw_all(findings: FindingsOfAll, path: Path) -> None:
    """The mean of |H| on the left; on the right the spectra, by rank and against the loss."""
    figure = Figure(figsize=(16, 9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.2, 1])
    draw_mean(left, findings)
    right.suptitle(f"Spectra of the Hessians: all {ALL} parameters, and the last layer's {LAST}")
    above, below = right.subplots(2, 1, sharey=True)
    groups = (
        (findings.up, BLUE, f"positive (at most {UP})"),
        (findings.down, ORANGE, f"negative (at most {DOWN})"),
        (findings.last, "black", f"in the last layer alone (at most {RANK})"),
    )
    draw_ranks(above, groups)
    draw_extremes(below, groups, findings)
    handles = [Line2D([], [], color=color, linewidth=3, label=label) for _, color, label in groups]
    right.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, handlelength=1)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.savefig(path, dpi=150)


def draw_mean(figure: SubFigure, findings: FindingsOfAll) -> None:
    figure.suptitle(f"Size of each second derivative: mean of |H| over {len(findings.labels)} images")
    panel = figure.subplots()
    high = findings.mean.max()
    # Pixels that are blank in every image have rows of zeros, which are as dark as the smallest entries.
    image = panel.imshow(
        findings.mean.clip(min=high / 1e4), cmap="magma", norm=LogNorm(high / 1e4, high), interpolation="none"
    )
    unit = "nats per squared unit of weight"
    figure.colorbar(
        image, ax=panel, location="bottom", shrink=0.7, extend="min", label=f"mean |entry| ({unit})"
    )
    first = ALL - LAST
    names = [f"hidden layer: {PIXELS} weights for each of {HIDDEN} units, {HIDDEN} biases", "last layer"]
    panel.set_xticks([first / 2, first + LAST / 2], names)
    panel.set_yticks([first / 2, first + LAST / 2], names, rotation=90, va="center")
    panel.tick_params(length=0)
    for line in (panel.axhline, panel.axvline):
        line(first - 0.5, color="white", linewidth=1.5)


# Eigenvalues, one row for each image, with a colour and a name.
Group = tuple[np.ndarray, str, str]


def draw_ranks(panel: Axes, groups: tuple[Group, ...]) -> None:
    panel.set_title("Eigenvalues that need not be zero: median, and middle 80% of the images", fontsize=11)
    for spectra, color, _ in groups:
        ranks = np.arange(1, spectra.shape[1] + 1)
        low, middle, high = np.quantile(spectra, [0.1, 0.5, 0.9], axis=0)
        panel.fill_between(ranks, low, high, color=color, alpha=0.2, linewidth=0)
        panel.plot(ranks, middle, color=color, linewidth=2, marker="o", markersize=4)
    panel.set(xlabel="rank of the eigenvalue, furthest from zero first", xticks=[1, 5, RANK, DOWN, 20, UP])
    symmetric_log(panel)


def draw_extremes(panel: Axes, groups: tuple[Group, ...], findings: FindingsOfAll) -> None:
    panel.set_title("The outermost eigenvalues of each image; rings: misclassified images", fontsize=11)
    wrong = findings.guesses != findings.labels
    for spectra, color, _ in groups:
        panel.scatter(findings.losses, spectra[:, 0], s=14, color=color, alpha=0.5, linewidth=0)
        panel.scatter(findings.losses[wrong], spectra[wrong, 0], s=90, facecolor="none", edgecolor=color)
    panel.set(xlabel="loss of the image (nats)", xscale="log")
    symmetric_log(panel)


def symmetric_log(panel: Axes) -> None:
    panel.set_yscale("symlog", linthresh=1e-5)
    panel.set(ylabel="eigenvalue (nats per squared unit of weight)", ylim=(-1e2, 1e3))
    panel.set_yticks([*(-(10.0**k) for k in (1, -1, -3, -5)), 0, *(10.0**k for k in (-5, -3, -1, 1, 3))])
    panel.grid(visible=True, color="0.9")
    panel.axhline(0, color="0.5", linewidth=0.8)
    panel.set_axisbelow(True)


# The command line.


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The Hessian of a small network's loss, for every handwritten digit on its own.",
    )
    parser.add_argument(
        "--parameters",
        choices=("last", "all"),
        default="last",
        help=f"differentiate in the last layer's {LAST} parameters or in all {ALL} (default: %(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=image_count,
        help=f"images to examine, 1 to {IMAGES}, or all (default: all; {FEW} with --parameters all)",
    )
    parser.add_argument(
        "--chunk-size",
        type=chunk_size,
        default="auto",
        help="number of Hessians to compute at once, or auto to learn it (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        type=usable_device,
        default="cpu",
        help="where to compute: cpu, cuda, cuda:1, ... (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=folder,
        default="output",
        help="folder for figures and files, created if missing (default: %(default)s)",
    )
    options = parser.parse_args()
    if options.samples is None:
        options.samples = IMAGES if options.parameters == "last" else FEW
    return options


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, got {text!r}")
    return int(text)


def chunk_size(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def image_count(text: str) -> int:
    count = IMAGES if text == "all" else positive(text)
    if count > IMAGES:
        raise argparse.ArgumentTypeError(f"there are {IMAGES} images, got {count}")
    return count


def usable_device(text: str) -> torch.device:
    try:
        probe = torch.zeros((), device=text)
        probe.item()  # fails on a device without values, such as meta
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot compute on {text!r}: {reason}") from None
    return probe.device


def folder(text: str) -> Path:
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot make the folder {text!r}: {error.strerror}") from None
    return path


if __name__ == "__main__":
    main()
