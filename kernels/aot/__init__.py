"""Ahead-of-time compilation of the Triton kernels for GPUs that need not be present."""
