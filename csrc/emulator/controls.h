// What tests set of the emulated device, as functions of a Python module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "block.h"
#include "device.h"

namespace tim::emulator {

inline void define_controls(pybind11::module_& m) {
    m.def(
        "set_device",
        [](int multiprocessors, uint32_t order) {
            device().multiprocessors = multiprocessors;
            device().order = order;
        },
        pybind11::arg("multiprocessors") = 2, pybind11::arg("order") = 0,
        "Size of the device, and the seed that shuffles blocks and threads (0: natural order).");
    m.def(
        "set_memory",
        [](const std::vector<std::pair<uintptr_t, size_t>>& ranges) {
            block().memory().set_global(ranges);
        },
        "The (address, bytes) that kernels may touch; none: any.");
    m.def(
        "run_last_blocks", [](uint64_t count) { device().last_blocks = count; },
        pybind11::arg("count") = UINT64_MAX,
        "Run only so many blocks of each launch, the last ones, until told otherwise.");
    m.attr("traced") = kTraced;
}

}  // namespace tim::emulator
