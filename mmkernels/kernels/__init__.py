"""Kernels that several operations are built of: no autograd, results written into tensors the caller owns."""
