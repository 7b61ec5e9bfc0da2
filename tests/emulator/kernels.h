// What the kernels of this folder share.
#pragma once

#include <pybind11/pybind11.h>

#include "cuda/mma.cuh"

namespace py = pybind11;

namespace tim::cuda {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void define_faults(py::module_& m);
void define_instructions(py::module_& m);

}  // namespace tim::cuda
