"""The mechanics of safety fine-tuning in JAX.

Submodules are imported by name (``from jaxsafety import analysis, losses, methods, world``); importing them touches no
device and reads no environment.
"""

__version__ = "0.2.0"
