// The part of CUDA's runtime that launches kernels and reports errors.
#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "block.h"
#include "cuda_runtime.h"
#include "device.h"
#include "fault.h"
#include "symbols.h"

namespace tim::emulator {
namespace {

constexpr int kDefaultSharedBytes = 48 * 1024;

cudaError_t last_error = cudaSuccess;
std::string last_message;
std::map<const void*, int> shared_limits;

cudaError_t remember(cudaError_t error, const std::string& message) {
    last_error = error;
    last_message = message;
    return error;
}

std::string to_string(dim3 size) { return emulator::to_string(uint3{size.x, size.y, size.z}); }

std::string why_invalid(const cudaLaunchConfig_t& config, int shared_limit) {
    const dim3 grid = config.gridDim, block = config.blockDim;
    if (uint64_t(grid.x) * grid.y * grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535u ||
        grid.z > 65535u)
        return "a grid of " + to_string(grid) + " blocks cannot be launched";
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > kMaxThreads || block.z > 64)
        return "a block of " + to_string(block) + " threads cannot be launched";
    if (config.dynamicSmemBytes > size_t(shared_limit))
        return std::to_string(config.dynamicSmemBytes) +
               " bytes of dynamic shared memory, where the kernel has a limit of " +
               std::to_string(shared_limit) + " (cudaFuncSetAttribute raises it)";
    return "";
}

struct Call {
    const void* kernel;
    const void* arguments;
    void (*invoke)(const void*, const void*);
};

void call(void* context) {
    const Call& call = *static_cast<const Call*>(context);
    call.invoke(call.kernel, call.arguments);
}

}  // namespace

Device& device() {
    static Device device;
    return device;
}

std::vector<Launch>& launches() {
    static std::vector<Launch> launches;
    return launches;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || value > device().shared_bytes)
        return remember(cudaErrorInvalidValue,
                        "a block has at most " + std::to_string(device().shared_bytes) +
                            " bytes of shared memory, not " + std::to_string(value));
    shared_limits[kernel] = value;
    return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const void* arguments,
                   size_t argument_bytes,
                   void (*invoke)(const void* kernel, const void* arguments)) {
    const auto found = shared_limits.find(kernel);
    const int limit = found == shared_limits.end() ? kDefaultSharedBytes : found->second;
    const std::string invalid = why_invalid(config, limit);
    if (!invalid.empty()) return remember(cudaErrorInvalidConfiguration, invalid);

    static std::mutex mutex;  // there is one device, with room for one block
    const std::lock_guard<std::mutex> lock(mutex);
    gridDim = config.gridDim;
    const uint64_t count = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
    if (!device().runs) {
        const dim3 block = config.blockDim;
        launches().push_back(
            {function_name(kernel), count, block.x * block.y * block.z, config.dynamicSmemBytes});
        return cudaSuccess;
    }
    std::vector<uint64_t> blocks(count);
    std::iota(blocks.begin(), blocks.end(), uint64_t(0));
    std::mt19937 order(device().order);
    if (device().order != 0) std::shuffle(blocks.begin(), blocks.end(), order);
    Call context{kernel, arguments, invoke};
    block().memory().begin_launch(arguments, argument_bytes);
    const FaultHandler faults;
    std::string error;
    for (const uint64_t i : blocks) {
        if (blocks.size() - i > device().last_blocks) continue;
        const uint3 index = {unsigned(i % gridDim.x), unsigned(i / gridDim.x % gridDim.y),
                             unsigned(i / gridDim.x / gridDim.y)};
        if (!block().run(index, config.blockDim, config.dynamicSmemBytes,
                         device().order != 0 ? &order : nullptr, call, &context)) {
            error = function_name(kernel) + ", " + block().error();
            break;
        }
    }
    block().memory().end_launch();
    return error.empty() ? cudaSuccess : remember(cudaErrorLaunchFailure, error);
}

}  // namespace tim::emulator

using tim::emulator::device;
using tim::emulator::last_error;
using tim::emulator::last_message;

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : last_message.c_str();
}

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaGetDevice(int* number) {
    *number = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMaxGridDimY:
            *value = device().max_grid_y;
            return cudaSuccess;
        case cudaDevAttrMultiProcessorCount:
            *value = device().multiprocessors;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = device().shared_bytes;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = device().shared_bytes + 1024;  // which the system takes from each block
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            *value = device().capability / 10;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            *value = device().capability % 10;
            return cudaSuccess;
    }
    return tim::emulator::remember(cudaErrorInvalidValue, "an unknown attribute of the device");
}
