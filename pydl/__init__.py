"""Fused deep-learning kernels for PyTorch in CUDA, Triton and vectorised C++.

>>> import pydl
>>> report = pydl.replace(model)           # torch.nn modules become fused ones, reversibly
>>> y = pydl.functional.mish(x)            # or call a function
>>> with pydl.use_backend("triton"): ...   # or say who computes
"""

from pydl import functional, nn, pool
from pydl.backends import use_backend
from pydl.replace import replace

__all__ = ["functional", "nn", "pool", "replace", "use_backend"]
__version__ = "0.1.0"
