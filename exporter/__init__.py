"""Encoder packages, merging, ONNX graphs, quantisation and parity."""
