// Python module tim._C: one submodule per back end.

#include "bindings.h"

#include "build_info.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of transition-models. Private: tim.ops checks what these functions trust.";
    m.def("build_info", [] { return py::module_::import("json").attr("loads")(kBuildInfo); });
    py::module_ cpu = m.def_submodule("cpu");
    tim::define_kernels(cpu, tim::cpu::kernels());
    cpu.def("isa", &tim::cpu::isa);
#ifdef TIM_HAS_CUDA
    tim::define_kernels(m.def_submodule("cuda"), tim::cuda::kernels());
#endif
}
