// Stacks that take turns on one thread of the operating system: the threads of an emulated block.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if !defined(__x86_64__) || defined(TIM_EMULATOR_UCONTEXT)
#include <ucontext.h>
#define TIM_FIBERS_UCONTEXT
#endif

namespace tim::emulator {

class Fiber {
  public:
    // The stack that is running already; it cannot be started.
    Fiber() = default;
    explicit Fiber(size_t stack_bytes);
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // Makes the next switch to this fiber call entry, which must never return. Whatever the fiber
    // was doing is given up.
    void start(void (*entry)());

    // Goes on where `next` has left off; returns when some fiber switches back to this one.
    void switch_to(Fiber& next);
    // The same, for a fiber that will be started anew before it runs again.
    [[noreturn]] void leave_to(Fiber& next);

    bool holds(const void* p) const {
        const uintptr_t address = reinterpret_cast<uintptr_t>(p);
        return address - reinterpret_cast<uintptr_t>(stack_) < bytes_;
    }
    // Whether p lies in the page below the stack, where its overflow traps.
    bool overflows_at(const void* p) const;

  private:
    static void arrive();
    static void first_entry();

    char* memory_ = nullptr;  // guard page, then stack
    char* stack_ = nullptr;
    size_t bytes_ = 0;
    void (*entry_)() = nullptr;
#ifdef TIM_FIBERS_UCONTEXT
    ucontext_t context_ = {};
#else
    void* stack_pointer_ = nullptr;
#endif
    void* fake_stack_ = nullptr;  // of AddressSanitizer
};

}  // namespace tim::emulator
