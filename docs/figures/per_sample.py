"""The figures of how_to/per_sample.md, computed while the documentation is built, so that they stay current.

Provides `draw`, which conf.py calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import autodiff as ad

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

BLUE, ORANGE = "#0072B2", "#D55E00"  # from Okabe and Ito's colour-blind safe palette


def draw(folder: Path) -> None:
    """Train a network on some of scikit-learn's digits, and draw the figures of the page."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = trained(images[:TRAINED], labels[:TRAINED])
    draw_digits(model, images[TRAINED:], labels[TRAINED:], folder / "per_sample_digits.png")
    draw_budgets(model, images, labels, folder / "per_sample_budgets.png")


TRAINED = 200  # images, so few that many of the others are misclassified


def trained(images: Tensor, labels: Tensor) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.requires_grad_(False)


def draw_digits(model: torch.nn.Module, images: Tensor, labels: Tensor, path: Path) -> None:
    """The largest eigenvalue of each digit's last-layer Hessian against its loss."""
    loss = ad.sample_loss(model, cross_entropy)
    curvature = ad.per_sample(ad.hessian(loss, wrt="2.*"), in_dims=(None, 0, 0), as_matrix=True)
    params = dict(model.named_parameters())
    largest = curvature.map(lambda matrix: torch.linalg.eigvalsh(matrix)[-1], params, images, labels)

    logits = model(images)
    losses, right = cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=1) == labels
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    panel = figure.subplots()
    for chosen, color, name in ((right, BLUE, "right"), (~right, ORANGE, "wrong")):
        label = f"the network is {name} ({chosen.sum()} digits)"
        panel.scatter(losses[chosen], largest[chosen], s=12, color=color, alpha=0.6, linewidth=0, label=label)
    # With probability p for the label, 1 - p for one other class and activations z: 2 p (1 - p) |z|^2.
    loss_values = np.geomspace(losses.min(), losses.max(), 400)
    squared_norm = 1 + model[:2](images).square().sum(dim=1).mean().item()
    expected = 2 * np.exp(-loss_values) * -np.expm1(-loss_values) * squared_norm
    panel.plot(
        loss_values,
        expected,
        color="black",
        linewidth=1,
        label="undecided between the label and one other class",
    )
    panel.set(xscale="log", yscale="log", xlabel="loss of the digit (nats)")
    panel.set_ylabel("largest eigenvalue of its Hessian\n(nats per squared unit of weight)")
    panel.grid(visible=True, color="0.9")
    panel.set_axisbelow(True)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=150)


def draw_budgets(model: torch.nn.Module, images: Tensor, labels: Tensor, path: Path) -> None:
    """The chunk sizes learnt under budgets from 1 MiB to 1 GiB, and the memory peaks they reach."""
    loss, params = ad.sample_loss(model, cross_entropy), dict(model.named_parameters())
    budgets = 2.0 ** np.arange(11)  # in MiB, like everything in the figure
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    panel = figure.subplots()
    panel.plot(budgets, 0.8 * budgets, color="0.5", linewidth=1, label="0.8 of the budget")
    panel.axhline(64, color="0.5", linewidth=1, linestyle="--", label="64 MiB, the target on a CPU")
    for budget in budgets.tolist():
        curvature = ad.per_sample(ad.hessian(loss), in_dims=(None, 0, 0), memory=f"{budget}MiB")
        # The kept results are small, so nearly the whole budget is left for the chunks.
        curvature.map(lambda blocks: blocks["2.bias"]["2.bias"], params, images[:40], labels[:40])
        report = curvature.report
        peak = report.peak / 2**20
        by_rows = report.largest == 1 and report.chunks >= 2 * report.samples
        panel.plot(budget, peak, "o", color=ORANGE if by_rows else BLUE)
        size = report.rows if by_rows else report.largest
        panel.annotate(f"{size}", (budget, peak), (0, -15), textcoords="offset points", ha="center")
    panel.plot([], [], "o", color=ORANGE, label="number of rows of one sample at a time")
    panel.plot([], [], "o", color=BLUE, label="number of samples at a time")
    panel.set(
        xlabel="memory, the budget (MiB)",
        ylabel="peak of the largest chunk (MiB)",
        xscale="log",
        yscale="log",
    )
    panel.set_xticks(budgets, [f"{budget:.0f}" for budget in budgets])
    panel.set_yticks(budgets[:8], [f"{budget:.0f}" for budget in budgets[:8]])
    panel.minorticks_off()
    panel.set_ylim(0.5, 200)
    panel.grid(visible=True, color="0.9")
    panel.set_axisbelow(True)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=150)
