"""Kernels in CUDA for many atoms: messages and what lies between two of them, on tensor cores.

Filters are products of few functions of the distance; matrices and what they multiply are sums of two halves, which
keeps 22 bits. Everything else is float32, and so is all of the messages within many small molecules by tables
(molecules.cu).
"""
