"""Every check at the boundary, named for what it checks, and what always raises, as `raise_...`.

The first parameter of each is the public name that the user called. A message has four parts: that name and the leaf's
path, what was expected, what came, and the way out. Phrases by which programs know torch.func's errors are kept.
"""

from autodiff.checks.jacobians import jacobian_block as jacobian_block
from autodiff.checks.jacobians import raise_jacobian_of_other_inputs as raise_jacobian_of_other_inputs
from autodiff.checks.jacobians import shape as shape
from autodiff.checks.leaves import holomorphic_dtypes as holomorphic_dtypes
from autodiff.checks.leaves import raise_no_differentiable_leaf as raise_no_differentiable_leaf
from autodiff.checks.leaves import raise_not_a_tensor as raise_not_a_tensor
from autodiff.checks.leaves import real_tensors as real_tensors
from autodiff.checks.operators import block_patterns as block_patterns
from autodiff.checks.operators import losses_of_samples as losses_of_samples
from autodiff.checks.operators import model_and_target as model_and_target
from autodiff.checks.operators import raise_captured_inside as raise_captured_inside
from autodiff.checks.operators import raise_complex_factor as raise_complex_factor
from autodiff.checks.operators import raise_not_adjoint as raise_not_adjoint
from autodiff.checks.operators import raise_not_convex as raise_not_convex
from autodiff.checks.operators import raise_not_linear as raise_not_linear
from autodiff.checks.operators import raise_not_over_samples as raise_not_over_samples
from autodiff.checks.operators import raise_not_positive as raise_not_positive
from autodiff.checks.operators import raise_not_symmetric as raise_not_symmetric
from autodiff.checks.operators import raise_samples_missing as raise_samples_missing
from autodiff.checks.operators import raise_unknown_likelihood as raise_unknown_likelihood
from autodiff.checks.operators import same_space as same_space
from autodiff.checks.operators import shown_function as shown_function
from autodiff.checks.operators import square_operator as square_operator
from autodiff.checks.options import argnums as argnums
from autodiff.checks.options import choice as choice
from autodiff.checks.options import chunk_size as chunk_size
from autodiff.checks.options import eigenvalue_count as eigenvalue_count
from autodiff.checks.options import positive_int as positive_int
from autodiff.checks.options import raise_argnum_out_of_range as raise_argnum_out_of_range
from autodiff.checks.options import raise_repeated_argnums as raise_repeated_argnums
from autodiff.checks.options import raise_unknown_argname as raise_unknown_argname
from autodiff.checks.options import raise_unmatched_wrt as raise_unmatched_wrt
from autodiff.checks.options import randomness as randomness
from autodiff.checks.options import untraced_call as untraced_call
from autodiff.checks.options import wrt as wrt
from autodiff.checks.outputs import advise as advise
from autodiff.checks.outputs import aux_pair as aux_pair
from autodiff.checks.outputs import raise_independent as raise_independent
from autodiff.checks.outputs import raise_nonlinear_backward as raise_nonlinear_backward
from autodiff.checks.outputs import scalar_output as scalar_output
from autodiff.checks.outputs import tensor_outputs as tensor_outputs
from autodiff.checks.solvers import disjoint_blocks as disjoint_blocks
from autodiff.checks.solvers import number_of_starts as number_of_starts
from autodiff.checks.solvers import operator as operator
from autodiff.checks.solvers import positive_number as positive_number
from autodiff.checks.solvers import raise_indefinite as raise_indefinite
from autodiff.checks.solvers import raise_no_inverse as raise_no_inverse
from autodiff.checks.solvers import raise_not_finite as raise_not_finite
from autodiff.checks.solvers import raise_not_positive_for as raise_not_positive_for
from autodiff.checks.solvers import raise_not_symmetric_for as raise_not_symmetric_for
from autodiff.checks.solvers import raise_preconditioner_not_positive as raise_preconditioner_not_positive
from autodiff.checks.solvers import raise_right_side_not_finite as raise_right_side_not_finite
from autodiff.checks.solvers import rank as rank
from autodiff.checks.solvers import solver_dtypes as solver_dtypes
from autodiff.checks.solvers import square_system as square_system
from autodiff.checks.solvers import tolerance as tolerance
from autodiff.checks.solvers import untraced_iteration as untraced_iteration
from autodiff.checks.vectors import flat_vectors as flat_vectors
from autodiff.checks.vectors import matching_leaf as matching_leaf
from autodiff.checks.vectors import matching_structure as matching_structure
from autodiff.checks.vectors import matching_vector as matching_vector
from autodiff.checks.vectors import tuple_of_primals as tuple_of_primals
