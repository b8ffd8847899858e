"""Kernels in Triton, one module an op, and what launches them. Imported when the first tensor on a GPU arrives."""
