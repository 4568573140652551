"""A function of one sample, run over many in bounded memory. The public name is autodiff.per_sample."""
