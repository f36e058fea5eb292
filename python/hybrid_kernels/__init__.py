"""CPU kernels for training and generation on one set of weights, with plain PyTorch references.

``hybrid_kernels.ops`` holds the operators, ``hybrid_kernels.nn`` thin modules over them,
``hybrid_kernels.reference`` the same operators in plain PyTorch. The native library is found or
built when the first operator runs, not when the package is imported.
"""

from hybrid_kernels._loader import native_available, native_module

__version__ = "0.1.0"
__all__ = ["native_available", "native_module"]
