"""Modules as functions of their parameters."""

from autodiff.nn.call import functional_call as functional_call
from autodiff.nn.call import sample_loss as sample_loss
from autodiff.nn.call import stack_module_state as stack_module_state
