"""First and second derivatives of a scalar function of two tensors, in every combination of modes, and by plain autograd."""

import torch

import autodiff as ad

BOTH = (0, 1)


def by_autograd(f, *tensors):
    """The gradient and the Hessian in two tensors, row by row: reverse over reverse, by torch alone."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    gradient = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    hessian = []
    for part, leaf in zip(gradient, leaves, strict=True):
        rows = [torch.autograd.grad(number, leaves, retain_graph=True) for number in part.reshape(-1)]
        columns = zip(*rows, strict=True)
        hessian.append(
            tuple(torch.stack(c).reshape(leaf.shape + o.shape) for c, o in zip(columns, leaves, strict=True))
        )
    return tuple(part.detach() for part in gradient), tuple(hessian)


# Of a function, a number t and a vector b; then which of the two derivatives it is.
COMBINATIONS = {
    "reverse": (lambda f, t, b: ad.grad(f, BOTH)(t, b), 0),
    "forward": (lambda f, t, b: ad.jacfwd(f, BOTH)(t, b), 0),
    "jacrev": (lambda f, t, b: ad.jacrev(f, BOTH)(t, b), 0),
    "torch.func reverse": (lambda f, t, b: torch.func.grad(f, BOTH)(t, b), 0),
    "backward": (lambda f, t, b: by_autograd(f, t, b)[0], 0),
    "forward over reverse": (lambda f, t, b: ad.jacfwd(ad.grad(f, BOTH), BOTH)(t, b), 1),
    "reverse over reverse": (lambda f, t, b: ad.jacrev(ad.grad(f, BOTH), BOTH)(t, b), 1),
    "reverse over forward": (lambda f, t, b: ad.jacrev(ad.jacfwd(f, BOTH), BOTH)(t, b), 1),
    "forward over forward": (lambda f, t, b: ad.jacfwd(ad.jacfwd(f, BOTH), BOTH)(t, b), 1),
    "hessian": (lambda f, t, b: ad.hessian(f, BOTH)(t, b), 1),
    "torch.func hessian": (lambda f, t, b: torch.func.hessian(f, BOTH)(t, b), 1),
    "backward twice": (lambda f, t, b: by_autograd(f, t, b)[1], 1),
}

# Of a function, several t and one b; then which derivative in t it is, for each t.
BATCHES = {
    "vmap of grad": (lambda f, ts, b: ad.vmap(ad.grad(f), (0, None))(ts, b), 0),
    "grad of vmap": (lambda f, ts, b: ad.grad(lambda s: ad.vmap(f, (0, None))(s, b).sum())(ts), 0),
    "vmap of jacfwd": (lambda f, ts, b: ad.vmap(ad.jacfwd(f), (0, None))(ts, b), 0),
    "vmap of hessian": (lambda f, ts, b: ad.vmap(ad.hessian(f), (0, None))(ts, b), 1),
    "hessian of vmap": (
        lambda f, ts, b: ad.hessian(lambda s: ad.vmap(f, (0, None))(s, b).sum())(ts).diagonal(),
        1,
    ),
}


def expected_in_batch(f, ts, b, order):
    """The derivative in t, for each t, by plain autograd."""
    of_samples = [by_autograd(f, t, b)[order] for t in ts]
    return torch.stack([one[0] if order == 0 else one[0][0] for one in of_samples])
