"""Linear algebra of weight updates: stacks of matrices in, numbers with their error out. No model, no world.

``svd`` (spectra and leading directions), ``subspace`` (energies, angles, ranks, random baselines) and ``power`` (the
largest singular value of a Jacobian). Weights are ``[in, out]``: a matrix has an input space and an output space.
"""

from jaxsafety.linalg import power, subspace, svd

__all__ = ["power", "subspace", "svd"]
