"""One fused operation a module, each with its reference, kernels, autograd and `why_unsupported`."""
