// Turns a trap of the processor in a kernel, such as the overflow of a thread's stack, into an
// error of the launch.
#pragma once

#include <signal.h>

#include <vector>

namespace tim::emulator {

// While it lives, traps of emulated threads end the launch. Other traps go where they went before.
class FaultHandler {
  public:
    FaultHandler();
    ~FaultHandler();
    FaultHandler(const FaultHandler&) = delete;
    FaultHandler& operator=(const FaultHandler&) = delete;

  private:
    stack_t stack_before_ = {};
    std::vector<char> stack_;  // a thread that has used up its own cannot handle a signal on it
};

}  // namespace tim::emulator
