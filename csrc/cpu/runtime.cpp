#include "runtime.h"

#include <new>
#include <stdexcept>
#include <string>

namespace tim::cpu {
namespace {

constexpr std::align_val_t kCacheLine{64};

}  // namespace

Scratch::Scratch(int64_t count)
    : data(static_cast<float*>(::operator new(size_t(count) * sizeof(float), kCacheLine))) {}

Scratch::~Scratch() { ::operator delete(data, kCacheLine); }

void refuse(const char* message) { throw std::invalid_argument(message); }

void refuse_dtype(int dtype) {
    throw std::invalid_argument("dtype must be 0 (float32) or 1 (bfloat16) on a CPU, got " +
                                std::to_string(dtype));
}

}  // namespace tim::cpu
