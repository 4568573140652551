r"""
Checkpointing a deep network
============================

Reverse mode keeps every intermediate result of a function until it is pulled back, so the memory of a gradient grows
with the depth. :func:`autodiff.checkpoint` keeps only the inputs of a segment of the function, and runs the segment
again when the backward pass reaches it. A chain of :math:`n` equal layers in :math:`k` segments then keeps the inputs
of :math:`k` segments, and the :math:`n / k` results of the segment that is being pulled back. The sum is smallest at
:math:`k = \sqrt n`: :math:`2 \sqrt n` results instead of :math:`n`, for one more evaluation (T. Chen et al., 2016,
`arXiv:1604.06174 <https://arxiv.org/abs/1604.06174>`_).

This tutorial counts bytes, measures time, and compares the gradients.
"""

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from autodiff import checkpoint, grad, hvp, vmap

# %%
# A deep network
# --------------
#
# 64 layers of 64 units. The batch size is much larger than the width of the layers, so the results of the layers take
# far more memory than their weights.

DEPTH, WIDTH, BATCH = 64, 64, 2048

torch.manual_seed(0)
weights = [torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(DEPTH)]
x = torch.randn(BATCH, WIDTH)


def layers(weights: list[Tensor], x: Tensor) -> Tensor:
    for weight in weights:
        x = torch.tanh(x @ weight)
    return x


def plain_loss(weights: list[Tensor], x: Tensor) -> Tensor:
    return layers(weights, x).square().mean()


# %%
# To use checkpointing, divide the function into segments and wrap each of them. ``checkpoint(layers)`` takes the same
# arguments as ``layers`` and returns the same output; as everywhere, arguments may be trees.


def loss_in(segments: int) -> Callable[[list[Tensor], Tensor], Tensor]:
    length = DEPTH // segments

    def loss(weights: list[Tensor], x: Tensor) -> Tensor:
        for start in range(0, DEPTH, length):
            x = checkpoint(layers)(weights[start : start + length], x)
        return x.square().mean()

    return loss


# %%
# The same gradient
# -----------------
#
# A segment runs again with the same operations on the same numbers, so the gradients are equal bit by bit:

SEGMENTS = [1, 2, 4, 8, 16, 32, 64]

gradients = grad(plain_loss)(weights, x)
for segments in SEGMENTS:
    assert all(map(torch.equal, grad(loss_in(segments))(weights, x), gradients))

# %%
# Counting the memory
# -------------------
#
# torch's profiler records every allocation and every release. Their running sum is the memory in use, and its maximum
# is the peak. Nothing is estimated, and nothing depends on the speed of the machine.


def memory_over_time(
    calls: dict[str, Callable[[], object]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each call: times in ms since its start, and the MiB in use at these times."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for name, call in calls.items():
            with record_function(name):
                call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = np.array(
        sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    )
    timelines = {}
    for event in events:
        if event["name"] in calls and event["ph"] == "X":
            since = changes[:, 0] - event["ts"]
            inside = (since >= 0) & (since <= event["dur"])
            timelines[event["name"]] = (
                since[inside] / 1e3,
                changes[inside, 1].cumsum() / 2**20,
            )
    return timelines


losses = {
    "plain": plain_loss,
    **{str(segments): loss_in(segments) for segments in SEGMENTS},
}
timelines = memory_over_time(
    {name: lambda f=f: grad(f)(weights, x) for name, f in losses.items()}
)
peaks = {name: held.max() for name, (_, held) in timelines.items()}

# %%
# The unit is the result of one layer, 2048 x 64 numbers of four bytes. In addition to the :math:`k + n / k` results,
# there are a cotangent and the gradients of the weights that have been computed so far.

unit = x.numel() * x.element_size() / 2**20
print(
    f"plain: {peaks['plain']:5.1f} MiB, {peaks['plain'] / unit:5.1f} results of a layer"
)
for segments in SEGMENTS:
    counted, expected = peaks[str(segments)] / unit, segments + DEPTH / segments
    print(
        f"{segments:>5}: {peaks[str(segments)]:5.1f} MiB, {counted:5.1f} results, k + n/k = {expected:.0f}"
    )
    assert expected <= counted < expected + 6
assert min(SEGMENTS, key=lambda segments: peaks[str(segments)]) == DEPTH**0.5

# %%
# What it costs
# -------------
#
# It costs one more evaluation. To measure how much that is compared with a gradient, we take the processor time, which
# other programs do not affect, run all calls in turn, and compare medians.

calls = {name: lambda f=f: grad(f)(weights, x) for name, f in losses.items()}
recorded = [weight.clone().requires_grad_() for weight in weights]
calls["evaluation"] = lambda: plain_loss(recorded, x)
seconds = {name: [] for name in calls}
for _ in range(11):
    for name, call in calls.items():
        started = time.process_time()
        call()
        seconds[name].append(time.process_time() - started)
medians = {name: np.median(taken) for name, taken in seconds.items()}
ratios = {name: medians[name] / medians["plain"] for name in losses}
one_more = 1 + medians["evaluation"] / medians["plain"]
print(f"a gradient and an evaluation: {one_more:.2f} x a gradient")
print(", ".join(f"{name}: {ratio:.2f}" for name, ratio in ratios.items()))

# %%
# Inside other transforms
# -----------------------
#
# A checkpointed function works under every transform. Here is the derivative of each sample's output with respect to
# that sample, by ``vmap(grad(...))``: the same numbers, with a similar saving of memory.


def output(x: Tensor) -> Tensor:
    return layers(weights, x).square().mean()


def output_in_eight(x: Tensor) -> Tensor:
    for start in range(0, DEPTH, 8):
        x = checkpoint(partial(layers, weights[start : start + 8]))(x)
    return x.square().mean()


torch.testing.assert_close(
    vmap(grad(output_in_eight))(x), vmap(grad(output))(x), rtol=1e-5, atol=1e-7
)

# %%
# A product with the Hessian differentiates twice. Forward mode stores nothing, so forward over reverse keeps the
# savings of checkpointing. Reverse over reverse, the default of ``hvp``, also stores what the pullbacks compute,
# including the segments that they run again, and so saves nothing.

tangent = torch.randn_like(x)


def product(func: Callable[[Tensor], Tensor]) -> Tensor:
    return hvp(func, (x,), (tangent,), mode="forward-over-reverse")[1]


torch.testing.assert_close(
    product(output_in_eight), product(output), rtol=1e-5, atol=1e-9
)

inside = memory_over_time(
    {
        "vmap(grad), plain": lambda: vmap(grad(output))(x),
        "vmap(grad), 8 segments": lambda: vmap(grad(output_in_eight))(x),
        "hvp, plain": lambda: product(output),
        "hvp, 8 segments": lambda: product(output_in_eight),
    }
)
for name, (_, held) in inside.items():
    print(f"{name:>22}: {held.max():5.1f} MiB")
for transform in ("vmap(grad)", "hvp"):
    checkpointed, plain = (
        inside[f"{transform}, {how}"][1].max() for how in ("8 segments", "plain")
    )
    assert checkpointed < 0.35 * plain

# %%
# The memory over time shows what happens. The plain gradient allocates memory layer by layer, and frees it in the
# backward pass. With eight segments, the evaluation keeps one result of each segment, and every tooth of the sawtooth
# curve is one segment that is run again and pulled back.

BLUE, ORANGE, GREEN = (
    "#0072B2",
    "#D55E00",
    "#009E73",
)  # from Okabe and Ito's colour-blind safe palette

figure, panel = plt.subplots(figsize=(8, 4), layout="constrained")
for name, color, label in (
    ("plain", "0.4", "plain"),
    ("2", BLUE, "2 segments"),
    ("8", ORANGE, "8 segments"),
):
    times, held = timelines[name]
    panel.step(times, held, where="post", color=color, label=label)
panel.set(
    xlabel="time (ms, while profiling)",
    ylabel="memory (MiB)",
    title="One gradient of 64 layers",
)
panel.grid(visible=True, color="0.9")
panel.legend(frameon=False)
plt.show()

# %%
# Here are the peaks and times for all numbers of segments. With fewer than :math:`\sqrt n` segments, each is too long;
# with more, there are too many inputs to keep. The time grows by about one evaluation, and slightly with each segment.

figure, (memory, duration) = plt.subplots(
    2, 1, figsize=(8, 6.5), sharex=True, layout="constrained", height_ratios=(3, 2)
)
many = np.geomspace(1, DEPTH)
memory.plot(
    many,
    (many + DEPTH / many) * unit,
    color="0.6",
    linewidth=1,
    label="k + n / k results of a layer",
)
memory.plot(
    SEGMENTS, [peaks[str(k)] for k in SEGMENTS], "o", color=ORANGE, label="counted"
)
memory.axhline(peaks["plain"], color="0.4", linestyle="--", linewidth=1, label="plain")
memory.axvline(DEPTH**0.5, color=GREEN, linewidth=1, label=r"$\sqrt{n}$ segments")
memory.set(
    xscale="log",
    yscale="log",
    ylabel="peak memory (MiB)",
    title="A gradient of 64 layers in k segments",
)
memory.set_yticks([8, 16, 32], ["8", "16", "32"])
memory.legend(
    edgecolor="none", framealpha=1, loc="upper center", bbox_to_anchor=(0.5, 0.92)
)

duration.plot(
    SEGMENTS, [ratios[str(k)] for k in SEGMENTS], "o", color=ORANGE, label="measured"
)
duration.axhline(
    one_more, color="0.6", linewidth=1, label="a gradient and one more evaluation"
)
duration.axhline(1, color="0.4", linestyle="--", linewidth=1, label="plain")
duration.axvline(DEPTH**0.5, color=GREEN, linewidth=1)
duration.set(
    xlabel="segments", ylabel="processor time\n(a plain gradient's = 1)", ylim=(0.8, 2)
)
duration.set_xticks(SEGMENTS, SEGMENTS)
duration.legend(edgecolor="none", framealpha=1, ncols=3, loc="upper center")
for panel in (memory, duration):
    panel.minorticks_off()
    panel.grid(visible=True, color="0.9")
    panel.set_axisbelow(True)
plt.show()
