// Python module tim_emulator, for tests: the CUDA kernels, as functions like those of tim._C.cuda,
// for arrays of the CPU.
#include "bindings.h"
#include "device.h"

PYBIND11_MODULE(tim_emulator, m) {
    m.doc() = "The CUDA kernels of transition-models on an emulated device.";
    tim::define_kernels(m, tim::cuda::kernels());
    m.def(
        "set_device",
        [](int multiprocessors, uint32_t order) {
            tim::emulator::device().multiprocessors = multiprocessors;
            tim::emulator::device().order = order;
        },
        py::arg("multiprocessors") = 2, py::arg("order") = 0);
}
