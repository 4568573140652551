"""make_fx traces every transform to plain operations that compute what eager mode does."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from every_transform import Every, T, W, X, cubic, each
from scenarios import assert_close


@each
def test_traced_graph_equals_the_closed_form_at_another_point(every: Every) -> None:
    graph = make_fx(lambda x: every.apply(cubic, x))(X)
    assert len(list(graph.graph.nodes)) > 2
    assert_close(graph(T), every.expected(T, W))


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_fake_tensors_trace_too(mode: str) -> None:
    import autodiff as ad

    for transform in (ad.grad, ad.jacrev, ad.jacfwd, ad.hessian):
        graph = make_fx(transform(lambda x: (x**3).sum()), tracing_mode=mode)(X)
        expected = torch.diag(6 * T) if transform is ad.hessian else 3 * T**2
        assert_close(graph(T), expected)
