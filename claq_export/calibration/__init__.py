"""Calibration as a compilation stage: data in, a node-major walk over the captured graph, quantized layers out."""
