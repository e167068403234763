// Every native entry point, one line each: the table of contents.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/instruction_set.h"
#ifdef MM_WITH_CUDA
#include "cuda/device.h"
#endif
#include "entry.h"

namespace py = pybind11;

namespace mm {
namespace {

// (devices, why there is none); a device is (name, compute capability, capability of the code it runs, bytes).
py::tuple listed_cuda_devices() {
  py::list rows;
  std::string why_not = "built without CUDA";
#ifdef MM_WITH_CUDA
  why_not.clear();
  for (const auto& device : mm::cuda_devices(&why_not))
    rows.append(
        py::make_tuple(device.name, device.compute_capability, device.compiled_capability, device.memory_bytes));
#endif
  return py::make_tuple(rows, why_not);
}

}  // namespace
}  // namespace mm

PYBIND11_MODULE(_native, m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.doc() = "Torch-free kernels of mmkernels: pointers, shapes and strides in, nothing else.";
  m.def("instruction_set", [] { return std::string(mm::instruction_set().name); });
  m.def("supported_instruction_sets", mm::supported_instruction_sets);
  m.def("select_instruction_set", mm::select_instruction_set);
  m.def("geglu_forward", mm::geglu_forward, no_gil);
  m.def("geglu_backward", mm::geglu_backward, no_gil);
  m.def("layer_norm_forward", mm::layer_norm_forward, no_gil);
  m.def("layer_norm_backward", mm::layer_norm_backward, no_gil);
  m.def("layer_norm_add_residual", mm::layer_norm_add_residual, no_gil);
  m.def("temporal_attention_forward", mm::temporal_attention_forward, no_gil);
  m.def("temporal_attention_backward", mm::temporal_attention_backward, no_gil);
  m.def("group_norm_silu_statistics", mm::group_norm_silu_statistics, no_gil);
  m.def("group_norm_silu_activate", mm::group_norm_silu_activate, no_gil);
  m.def("group_norm_silu_backward", mm::group_norm_silu_backward, no_gil);
#ifdef MM_WITH_CUDA
  m.def("group_norm_silu_conv_forward_cuda", mm::group_norm_silu_conv_forward_cuda, no_gil);
  m.def("group_norm_silu_conv_weight_gradient_cuda", mm::group_norm_silu_conv_weight_gradient_cuda, no_gil);
  m.def("group_norm_silu_conv_norm_backward_cuda", mm::group_norm_silu_conv_norm_backward_cuda, no_gil);
  m.def("temporal_attention_forward_cuda", mm::temporal_attention_forward_cuda, no_gil);
  m.def("temporal_attention_backward_cuda", mm::temporal_attention_backward_cuda, no_gil);
  m.def("temporal_attention_shared_bytes_cuda", mm::temporal_attention_shared_bytes_cuda);
#endif
  m.def("cuda_devices", mm::listed_cuda_devices);
  m.attr("compiler") = MM_COMPILER;
  m.attr("openmp") = static_cast<bool>(MM_OPENMP);
  m.attr("cuda_architectures") = MM_CUDA_ARCHITECTURES;  // empty: built without CUDA
  m.attr("cuda_why_not") = MM_CUDA_WHY_NOT;
}
