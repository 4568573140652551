"""Floor 1, SEAM: the only folder that names torch's private parts, seen through `autodiff.core._torch`."""
