#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace tim::emulator {
namespace {

Fiber* from = nullptr;  // of the switch under way
Fiber* to = nullptr;

size_t page_bytes() {
    static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
    return bytes;
}

}  // namespace

#ifndef TIM_FIBERS_UCONTEXT
// Saves what a call must preserve on the stack it leaves and takes it from the one it enters.
extern "C" void tim_switch_stack(void** save, void* load);
asm(R"(
    .text
    .type tim_switch_stack, @function
    .hidden tim_switch_stack
tim_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size tim_switch_stack, .-tim_switch_stack
)");
constexpr size_t kSavedRegisters = 6;
#endif

Fiber::Fiber(size_t stack_bytes) {
    const size_t page = page_bytes();
    bytes_ = (stack_bytes + page - 1) / page * page;
    void* const memory = mmap(nullptr, bytes_ + page, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    stack_ = memory_ + page;
    if (mprotect(memory_, page, PROT_NONE) != 0) {
        munmap(memory_, bytes_ + page);
        throw std::bad_alloc();
    }
}

Fiber::~Fiber() {
    if (memory_ != nullptr) munmap(memory_, bytes_ + page_bytes());
}

bool Fiber::overflows_at(const void* p) const {
    return memory_ != nullptr && p >= memory_ && p < stack_;
}

void Fiber::start(void (*entry)()) {
    entry_ = entry;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack_, bytes_);
    fake_stack_ = nullptr;
#endif
#ifdef TIM_FIBERS_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = bytes_;
    context_.uc_link = nullptr;
    makecontext(&context_, first_entry, 0);
#else
    // As if first_entry had been called from address 0, where debuggers stop to look for callers,
    // and had been left before its first instruction.
    void** top = reinterpret_cast<void**>(stack_ + bytes_) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(first_entry);
    for (size_t i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
    stack_pointer_ = top;
#endif
}

void Fiber::arrive() {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(to->fake_stack_, &bottom, &bytes);
    // Only AddressSanitizer knows where the stack of the program itself lies.
    if (from->memory_ == nullptr) {
        from->stack_ = static_cast<char*>(const_cast<void*>(bottom));
        from->bytes_ = bytes;
    }
#endif
}

void Fiber::first_entry() {
    arrive();
    to->entry_();
    abort();
}

void Fiber::switch_to(Fiber& next) {
    from = this;
    to = &next;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fake_stack_, next.stack_, next.bytes_);
#endif
#ifdef TIM_FIBERS_UCONTEXT
    swapcontext(&context_, &next.context_);
#else
    tim_switch_stack(&stack_pointer_, next.stack_pointer_);
#endif
    arrive();
}

void Fiber::leave_to(Fiber& next) {
    from = this;
    to = &next;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(nullptr, next.stack_, next.bytes_);
#endif
#ifdef TIM_FIBERS_UCONTEXT
    setcontext(&next.context_);
#else
    tim_switch_stack(&stack_pointer_, next.stack_pointer_);
#endif
    abort();
}

}  // namespace tim::emulator
