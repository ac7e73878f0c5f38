"""Other people's weight quantizers, written compactly after their papers and code, for comparison in
benchmarks/quality.py.

Every quantizer takes a weight ``[N, K]`` and returns a :class:`Quantized`: the weight that inference would see, and all
bits that storing it takes. Rows are independent in each of them, so q/k/v and gate/up may be given stacked.
"""

from .common import Quantized

__all__ = ["Quantized"]
