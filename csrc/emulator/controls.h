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
        [](int multiprocessors, uint32_t order, int shared_bytes, bool runs, int capability,
           int max_grid_y) {
            device().multiprocessors = multiprocessors;
            device().order = order;
            device().shared_bytes = shared_bytes;
            device().runs = runs;
            device().capability = capability;
            device().max_grid_y = max_grid_y;
            launches().clear();
        },
        pybind11::arg("multiprocessors") = 2, pybind11::arg("order") = 0,
        pybind11::arg("shared_bytes") = Device().shared_bytes, pybind11::arg("runs") = true,
        pybind11::arg("capability") = Device().capability,
        pybind11::arg("max_grid_y") = Device().max_grid_y,
        "Size of the device and of a block's shared memory, the seed that shuffles blocks and "
        "threads (0: natural order), and whether kernels run or are only recorded.");
    m.def(
        "launches",
        [] {
            pybind11::list list;
            for (const Launch& launch : launches())
                list.append(pybind11::make_tuple(launch.kernel, launch.blocks, launch.threads,
                                                 launch.shared_bytes));
            return list;
        },
        "(kernel, blocks, threads of a block, bytes of shared memory) of the launches that did not "
        "run, since set_device.");
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
