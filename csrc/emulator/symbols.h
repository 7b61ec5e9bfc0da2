// Names of addresses in the code, for messages.
#pragma once

#include <string>
#include <vector>

namespace tim::emulator {

struct Frame {
    std::string function, file;
    int line;
};

// The source lines that the instruction before `code` was made of, innermost first; empty where
// addr2line (of binutils) or its information is missing. Functions that were not inlined end it.
const std::vector<Frame>& frames(const void* code);

// "at csrc/cuda/adaln.cuh:95 (row_sum), adaln.cu:53 (forward)", or nothing.
std::string describe(const void* code);

// Of a function, without its parameters: "forward<float, 4>".
std::string function_name(const void* function);

}  // namespace tim::emulator
