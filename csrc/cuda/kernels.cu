// The table of the GPU's kernels, and the errors they share.

#include <stdexcept>
#include <string>

#include "common.cuh"

namespace tim::cuda {

void add_interpolate(Kernels&);
void add_swiglu(Kernels&);
void add_adaln(Kernels&);
void add_qk_norm_rope(Kernels&);
void add_transition_loss(Kernels&);
void add_attention(Kernels&);

namespace {

std::string told(const Call& call) {
    std::string shape;
    for (int64_t size : call.shape) {
        if (size == 0) break;
        shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    }
    return std::string(call.op) + " of shape [" + shape + "]: ";
}

}  // namespace

void fail(const Call& call, cudaError_t error) {
    throw std::runtime_error(told(call) + cudaGetErrorString(error) + " (CUDA error " +
                             std::to_string(int(error)) + ")");
}

int counted(const Call& call, const char* name, int64_t size, int64_t most) {
    if (size > most) {
        throw std::invalid_argument(told(call) + name + " must be at most " + std::to_string(most) +
                                    " on a GPU, got " + std::to_string(size));
    }
    return int(size);
}

void refuse_dtype(int dtype) {
    throw std::invalid_argument(
        "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16) on a GPU, got " +
        std::to_string(dtype));
}

const Kernels& kernels() {
    static const Kernels table = [] {
        Kernels kernels{};
        add_interpolate(kernels);
        add_swiglu(kernels);
        add_adaln(kernels);
        add_qk_norm_rope(kernels);
        add_transition_loss(kernels);
        add_attention(kernels);
        return kernels;
    }();
    return table;
}

}  // namespace tim::cuda
