"""The instruction table, by family; importing the families fills the registry in `ptxrun.forms`."""

from ptxrun.instructions import arithmetic, bits, control, conversion, matrix, memory, tensor_memory, warpgroup

__all__ = ["arithmetic", "bits", "control", "conversion", "matrix", "memory", "tensor_memory", "warpgroup"]
