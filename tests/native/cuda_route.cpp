// The native entries of the CUDA kernels as a Python module whose launches run on the host, on fibers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "entry.h"

PYBIND11_MODULE(cuda_route, m) {
  m.def("group_norm_silu_conv_forward_cuda", mm::group_norm_silu_conv_forward_cuda);
  m.def("group_norm_silu_conv_weight_gradient_cuda", mm::group_norm_silu_conv_weight_gradient_cuda);
  m.def("group_norm_silu_conv_norm_backward_cuda", mm::group_norm_silu_conv_norm_backward_cuda);
  m.def("temporal_attention_forward_cuda", mm::temporal_attention_forward_cuda);
  m.def("temporal_attention_backward_cuda", mm::temporal_attention_backward_cuda);
  m.def("temporal_attention_shared_bytes_cuda", mm::temporal_attention_shared_bytes_cuda);
}
