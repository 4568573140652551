"""Recurrent layers as formulas, which torch batches and differentiates in every mode: step by step in time.

torch's own are one operation for the whole sequence, without a rule for a batch, or write in place to a state that has
none. Imports nothing from the package.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    # The state of a cell: the hidden state first, which is its output, and an LSTM's cell state.
    State = tuple[Tensor, ...]
    # From what the input gives to all gates, and the state, to the next state; the weights are those of the state.
    Cell = Callable[..., State]


def _rnn(
    activation: Callable[[Tensor], Tensor], gates: Tensor, state: State, *weights: Tensor | None
) -> State:
    return (activation(gates + _linear(state[0], *weights)),)


def _gru(gates: Tensor, state: State, *weights: Tensor | None) -> State:
    reset, update, new = gates.chunk(3, -1)
    h_reset, h_update, h_new = _linear(state[0], *weights).chunk(3, -1)
    new = torch.tanh(new + torch.sigmoid(reset + h_reset) * h_new)
    return (new + torch.sigmoid(update + h_update) * (state[0] - new),)


def _lstm(
    gates: Tensor, state: State, weight: Tensor, bias: Tensor | None = None, projection: Tensor | None = None
) -> State:
    hidden, cell = state
    put, forget, new, out = (gates + _linear(hidden, weight, bias)).chunk(4, -1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(put) * torch.tanh(new)
    hidden = torch.sigmoid(out) * torch.tanh(cell)
    return hidden if projection is None else _linear(hidden, projection), cell


def _linear(x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    return functional.linear(x, weight, bias)


_CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": partial(_rnn, torch.tanh),
    "rnn_relu": partial(_rnn, torch.relu),
}


def _cell(
    name: str,
    x: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """As torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell."""
    is_lstm = name == "lstm"
    state = _CELLS[name](_linear(x, w_ih, b_ih), tuple(hx) if is_lstm else (hx,), w_hh, b_hh)
    return state if is_lstm else state[0]


def _layers(
    name: str,
    x: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """As torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu of a tensor: ``[time, batch, features]``."""
    x = x.transpose(0, 1) if batch_first else x
    steps, count = x.shape[:2]
    output, *state = _packed_layers(
        name,
        x.flatten(0, 1),
        [count] * steps,
        hx,
        weights,
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
    )
    output = output.unflatten(0, (steps, count))
    return (output.transpose(0, 1) if batch_first else output, *state)


def _packed_layers(
    name: str,
    x: Tensor,
    batch_sizes: Tensor | Sequence[int],
    hx: Any,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    """The same of packed sequences: all steps of all sequences in one dimension, ``batch_sizes[t]`` at step ``t``."""
    sizes = batch_sizes.tolist() if isinstance(batch_sizes, Tensor) else list(batch_sizes)
    initial = [one.unbind(0) for one in (hx if name == "lstm" else [hx])]
    directions = 2 if bidirectional else 1
    runs = num_layers * directions
    each = len(weights) // runs
    last: list[State] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            run = layer * directions + direction
            w_ih, w_hh, *rest = weights[run * each : (run + 1) * each]
            b_ih, b_hh, *projection = rest if has_biases else (None, None, *rest)
            gates = _linear(x, w_ih, b_ih).split(sizes)
            state = tuple(one[run] for one in initial)
            output, state = _steps(
                _CELLS[name], gates, state, (w_hh, b_hh, *projection), reverse=direction == 1
            )
            outputs.append(output)
            last.append(state)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if dropout and train and layer < num_layers - 1:
            x = functional.dropout(x, dropout)
    return (x, *(torch.stack(one) for one in zip(*last, strict=True)))


def _steps(
    cell: Cell, gates: Sequence[Tensor], state: State, weights: Sequence[Tensor | None], *, reverse: bool
) -> tuple[Tensor, State]:
    """All hidden states, in the order of time, and the last state."""
    outputs = []
    for gate in reversed(gates) if reverse else gates:
        count = gate.shape[0]
        if count == state[0].shape[0]:
            state = new = cell(gate, state, *weights)
        else:
            # The sequences that have ended, or going back have not begun, keep their state.
            new = cell(gate, tuple(one[:count] for one in state), *weights)
            kept = (one[count:] for one in state)
            state = tuple(torch.cat(parts) for parts in zip(new, kept, strict=True))
        outputs.append(new[0])
    return torch.cat(outputs[::-1] if reverse else outputs), state


_ATEN = torch.ops.aten
# By the operation that torch.func sees; ``data`` is the overload for packed sequences.
FORMULAS: dict[Any, Callable[..., Any]] = {}
for _name in _CELLS:
    FORMULAS[getattr(_ATEN, _name).input] = partial(_layers, _name)
    FORMULAS[getattr(_ATEN, _name).data] = partial(_packed_layers, _name)
    FORMULAS[getattr(_ATEN, f"{_name}_cell").default] = partial(_cell, _name)
