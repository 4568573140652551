r"""The curvature of the loss, image by image: one Hessian for every handwritten digit.

A small network (64 inputs, 16 hidden units, 10 classes) learns scikit-learn's 1797 digits. Then, for
every image on its own, this script computes the Hessian of its loss with respect to the last layer's
170 parameters,

    H_n = d^2 loss(last, image_n, label_n) / d last^2        one 170 x 170 matrix for each image,

as ``vmap(hessian(loss), in_dims=(None, 0, 0), chunk_size=...)``: the parameters are shared, images and
labels are mapped, and never more than a chunk of images is in memory at once. It prints the ten images
at which the loss is most curved, and draws them beneath the Hessians' spectra by class.

What comes out can be checked by hand. With hidden activations h, a trailing 1 for the bias, z = (h, 1),
logits W z and p = softmax(W z), the cross-entropy has

    H = (diag(p) - p p^T) (x) (z z^T)

whatever the label. So at most 9 of the 170 eigenvalues are not zero: those of diag(p) - p p^T, times
|z|^2. A network that is certain (p near a corner of the simplex) sees a flat loss, even where it is
wrong; the most curved images are those on which it hesitates. Every Hessian is compared with this form,
and three of them with ``torch.autograd.functional.hessian``.

Run it with ``python examples/per_sample_hessians.py``; ``--help`` lists the options.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optree
import torch
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from tqdm import tqdm

from autodiff import hessian, value_and_grad, vmap
from autodiff.pytree import ravel, to_matrix

PIXELS, HIDDEN, CLASSES = 64, 16, 10
IMAGES = 1797
RANK = CLASSES - 1  # of every Hessian: softmax does not see a shift of all logits
CHECKED, SHOWN = 3, 10
FIGURE = "per_sample_hessians.png"

# Two layers, {"hidden": {"weight", "bias"}, "last": {"weight", "bias"}}.
Params = dict[str, Any]


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    images, labels = load_images(options.device)

    params = train(initial_params(options.device), images, labels, steps=300)
    images, labels = images[: options.samples], labels[: options.samples]

    hessians = per_sample_hessians(params, images, labels, options.chunk_size)
    check_against_closed_form(hessians, params, images)
    check_against_torch(hessians, params, images, labels)

    report = examine(hessians, params, images, labels)
    print_table(report)
    path = options.output / FIGURE
    draw(report, images, path)
    print(f"\nFigure: {path}")


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


# One Hessian for each image.


def per_sample_hessians(params: Params, images: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    """The Hessian of each image's loss in the last layer's parameters: [N, 170, 170]."""

    def loss(last: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return mean_loss({**params, "last": last}, image, label)

    def hessian_matrix(last: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        progress.update()  # vmap calls its function once for every chunk
        return to_matrix(hessian(loss)(last, image, label), last)

    with tqdm(total=math.ceil(len(images) / chunk_size), desc="Hessians", unit="chunk") as progress:
        return vmap(hessian_matrix, in_dims=(None, 0, 0), chunk_size=chunk_size)(
            params["last"], images, labels
        )


def check_against_closed_form(hessians: Tensor, params: Params, images: Tensor) -> None:
    """Compare every Hessian with J^T (diag(p) - p p^T) J, J the Jacobian of the logits."""
    last = params["last"]
    classes = torch.eye(CLASSES, dtype=images.dtype, device=images.device)
    error = 0.0
    for computed, image in zip(hessians, images, strict=True):
        h = hidden_activations(params, image)
        p = torch.softmax(linear(h, **last), dim=0)
        # J: [10, 170]: the weights, class by class, then the biases.
        jacobian = torch.cat([torch.kron(classes, h[None]), classes], dim=1)
        expected = jacobian.mT @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
        error = max(error, (computed - expected).abs().max().item())
    confirm(f"all {len(hessians)} Hessians against the closed form", error)


def check_against_torch(hessians: Tensor, params: Params, images: Tensor, labels: Tensor) -> None:
    """Compare some Hessians with those that torch.autograd.functional computes, one image at a time."""
    vector, unravel = ravel(params["last"])
    indices = np.linspace(0, len(images) - 1, min(CHECKED, len(images)), dtype=int).tolist()
    error = 0.0
    for i in indices:

        def loss(last: Tensor, i: int = i) -> Tensor:
            return mean_loss({**params, "last": unravel(last)}, images[i], labels[i])

        expected = torch.autograd.functional.hessian(loss, vector)
        error = max(error, (hessians[i] - expected).abs().max().item())
    which = ", ".join(map(str, indices))
    confirm(f"images {which} against torch.autograd.functional.hessian", error)


def confirm(what: str, error: float) -> None:
    if not error < 1e-10:
        raise SystemExit(f"Checked {what}: they differ by {error:.1e}. One of the two is wrong.")
    print(f"Checked {what}: largest difference {error:.1e}")


# What the Hessians say.


class Report(NamedTuple):
    """One entry for each image, as NumPy arrays."""

    labels: np.ndarray  # [N]
    probabilities: np.ndarray  # [N, 10], what the network thinks
    losses: np.ndarray  # [N]
    traces: np.ndarray  # [N]
    spectra: np.ndarray  # [N, 170], largest eigenvalue first
    most_curved: np.ndarray  # [10], indices of images


def examine(hessians: Tensor, params: Params, images: Tensor, labels: Tensor) -> Report:
    logits = linear(hidden_activations(params, images), **params["last"])
    spectra = torch.linalg.eigvalsh(hessians).flip(-1)
    columns = (
        labels,
        logits.softmax(dim=1),
        cross_entropy(logits, labels, reduction="none"),
        vmap(torch.trace)(hessians),
        spectra,
        spectra[:, 0].argsort(descending=True)[:SHOWN],
    )
    return Report(*(column.cpu().numpy() for column in columns))


def print_table(report: Report) -> None:
    guesses = report.probabilities.argmax(axis=1)
    beyond = np.abs(report.spectra[:, RANK:]).max()
    print(f"Images read wrongly: {(guesses != report.labels).sum()} of {len(guesses)}")
    print(f"Eigenvalues {RANK + 1} to {report.spectra.shape[1]}, zero in theory: at most {beyond:.1e}")
    print(f"\nThe {len(report.most_curved)} most curved images:")
    print(f"{'image':>6} {'label':>6} {'read as':>8} {'loss':>8} {'trace':>8} {'largest eigenvalue':>19}")
    for i in report.most_curved:
        print(
            f"{i:>6} {report.labels[i]:>6} {guesses[i]:>8} {report.losses[i]:>8.3f} "
            f"{report.traces[i]:>8.3f} {report.spectra[i, 0]:>19.3f}"
        )


# The figure.

BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito's palette, which every eye tells apart


def draw(report: Report, images: Tensor, path: Path) -> None:
    """The spectra by class in two rows of five panels; below, the most curved digits."""
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.2, 1], hspace=0.05)
    draw_spectra(above, report)
    draw_digits(below, report, images.cpu().numpy())
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    figure.savefig(path, dpi=150)


def draw_spectra(figure: SubFigure, report: Report) -> None:
    figure.suptitle(
        f"Curvature of each image's loss in the last layer: the {RANK} nonzero Hessian eigenvalues"
    )
    figure.supxlabel("rank of the eigenvalue, largest first", fontsize=11)
    figure.supylabel("eigenvalue (nats per squared unit of weight)", fontsize=11)
    panels = figure.subplots(2, CLASSES // 2, sharex=True, sharey=True)
    ranks = np.arange(1, RANK + 1)
    for digit, panel in enumerate(panels.flat):
        # [images of this class, 9]. Rounding may leave one below zero, which has no logarithm.
        spectra = report.spectra[report.labels == digit, :RANK].clip(min=1e-16)
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
        Patch(color=BLUE, alpha=0.4, linewidth=0, label="middle 80 % of the images"),
        Line2D([], [], color=BLUE, alpha=0.5, linewidth=0.6, label="one image"),
    ]
    figure.legend(handles=legend, loc="outside lower right", ncols=3, frameon=False)


def draw_digits(figure: SubFigure, report: Report, images: np.ndarray) -> None:
    figure.suptitle(
        "The most curved images, with their largest eigenvalue λ; below each, the network's two best guesses"
    )
    panels = figure.subplots(1, SHOWN)
    for panel in panels:
        panel.set(xticks=[], yticks=[], visible=False)
        panel.spines[:].set_color("0.8")
    for panel, i in zip(panels, report.most_curved, strict=False):
        panel.set_visible(True)
        panel.imshow(images[i].reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        panel.set_title(f"{report.labels[i]}: λ = {report.spectra[i, 0]:.2g}", fontsize=11)
        best = report.probabilities[i].argsort()[:-3:-1]
        guesses = [f"{digit} with {report.probabilities[i, digit]:.0%}" for digit in best]
        panel.set_xlabel("\n".join(guesses), fontsize=10)


# The command line.


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The Hessian of the loss in a small network's last layer, for every handwritten digit.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--samples", type=image_count, default=IMAGES, help=f"images to examine, 1 to {IMAGES}"
    )
    parser.add_argument(
        "--chunk-size", type=positive, default=64, help="images whose Hessians are computed at once"
    )
    parser.add_argument(
        "--device", type=usable_device, default="cpu", help="where to compute: cpu, cuda, cuda:1, ..."
    )
    parser.add_argument(
        "--output", type=folder, default="output", help="folder for the figure, made if missing"
    )
    return parser.parse_args()


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, got {text!r}")
    return int(text)


def image_count(text: str) -> int:
    count = positive(text)
    if count > IMAGES:
        raise argparse.ArgumentTypeError(f"there are {IMAGES} images, got {count}")
    return count


def usable_device(text: str) -> torch.device:
    try:
        probe = torch.zeros((), device=text)
        probe.item()  # which a device without values, such as meta, refuses
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
