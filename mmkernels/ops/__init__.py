"""One fused operation a module, each with its reference, kernels and autograd."""
