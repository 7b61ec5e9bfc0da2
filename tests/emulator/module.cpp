// Python module tim_test_kernels: kernels with planted faults, and products of tiles.
#include <array>
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
    for (const RingKernel& test : ring_faults()) {
        m.def(test.name, [test](uintptr_t in, uintptr_t out) {
            launch_ring(test, pointer<const float>(in), pointer<float>(out));
        });
    }
    m.def("warpgroup_product", [](uintptr_t image, int rows, uintptr_t a, uintptr_t d,
                                  std::array<int, 4> descriptor, bool adds, int columns,
                                  bool transposed, int dtype) {
        const auto [start, leading, stride, swizzle] = descriptor;
        warpgroup_product(pointer<void>(image), rows, pointer<void>(a), pointer<float>(d),
                          {start, leading, stride, swizzle, adds}, columns, transposed, dtype);
    });
    m.def("copied_box", [](uintptr_t in, uintptr_t out, std::array<int64_t, 4> sizes,
                           std::array<int64_t, 3> strides, std::array<int, 4> extent,
                           std::array<int, 4> at, int swizzle) {
        return copied_box(
            pointer<void>(in), pointer<void>(out), {sizes[0], sizes[1], sizes[2], sizes[3]},
            {strides[0], strides[1], strides[2]}, {extent[0], extent[1], extent[2], extent[3]},
            {at[0], at[1], at[2], at[3]}, swizzle);
    });
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
