// Python module tim_emulator, for tests: the CUDA kernels, as functions like those of tim._C.cuda,
// for arrays of the CPU.
#include "bindings.h"
#include "controls.h"

PYBIND11_MODULE(tim_emulator, m) {
    m.doc() = "The CUDA kernels of transition-models on an emulated device.";
    tim::define_kernels(m, tim::cuda::kernels());
    tim::emulator::define_controls(m);
}
