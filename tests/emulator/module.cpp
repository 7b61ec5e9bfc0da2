// Python module tim_test_kernels: kernels with planted faults, and products of tiles.
#include <stdexcept>
#include <string>

#include "controls.h"
#include "kernels.h"

namespace tim::cuda {

// As csrc/cuda/kernels.cu has them, which is not part of this module.
void fail(const Call& call, cudaError_t error) {
    throw std::runtime_error(std::string(call.op) + ": " + cudaGetErrorString(error));
}

void refuse_dtype(int dtype) { throw std::invalid_argument(std::to_string(dtype)); }

}  // namespace tim::cuda

PYBIND11_MODULE(tim_test_kernels, m) {
    tim::emulator::define_controls(m);
    tim::cuda::define_faults(m);
    tim::cuda::define_instructions(m);
}
