// What the CPU kernels need from outside their instruction set; compiled once, for any machine.
#pragma once

#include <stdint.h>

namespace tim::cpu {

// Memory of `count` floats, aligned to a cache line, for the lifetime of the object.
class Scratch {
  public:
    explicit Scratch(int64_t count);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    float* const data;
};

// Throw std::invalid_argument, which Python sees as ValueError.
[[noreturn]] void refuse(const char* message);
[[noreturn]] void refuse_dtype(int dtype);

}  // namespace tim::cpu
