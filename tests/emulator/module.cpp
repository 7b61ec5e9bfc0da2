// Python module tim_test_kernels: kernels with planted faults, and products of tiles.
#include <stdexcept>
#include <string>

#include "controls.h"
#include "kernels.h"

namespace py = pybind11;

namespace tim::cuda {

// As csrc/cuda/kernels.cu has them, which is not part of this module.
void fail(const Call& call, cudaError_t error) {
    throw std::runtime_error(std::string(call.op) + ": " + cudaGetErrorString(error));
}

void refuse_dtype(int dtype) { throw std::invalid_argument(std::to_string(dtype)); }

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void define(py::module_& m) {
    emulator::define_controls(m);
    for (const TestKernel& test : faults()) {
        m.def(test.name, [test](uintptr_t in, uintptr_t out) {
            launch(Call{test.name, {}, nullptr}, test.kernel, dim3(test.blocks), test.threads,
                   test.shared_bytes, pointer<const float>(in), pointer<float>(out));
        });
    }
    m.def("limit_shared_memory", limit_shared_memory);
    m.def("multiply", [](uintptr_t a, uintptr_t b, uintptr_t out, int steps, int depth, int dtype,
                         bool transposed) {
        multiply(pointer<void>(a), pointer<void>(b), pointer<float>(out), steps, depth, dtype,
                 transposed);
    });
    m.def("load", [](uintptr_t in, uintptr_t out, int tiles, bool transposed) {
        load(pointer<void>(in), pointer<void>(out), tiles, transposed);
    });
}

}  // namespace
}  // namespace tim::cuda

PYBIND11_MODULE(tim_test_kernels, m) { tim::cuda::define(m); }
