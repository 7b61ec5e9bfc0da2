#include "fault.h"

#include <pthread.h>
#include <ucontext.h>

#include <cstdio>
#include <string>

#include "block.h"

namespace tim::emulator {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
constexpr int kCount = sizeof(kSignals) / sizeof(kSignals[0]);
constexpr size_t kStackBytes = size_t(1) << 18;

struct sigaction before[kCount];
pthread_t launching;

const void* code_of(const void* context) {
#if defined(__x86_64__)
    return reinterpret_cast<const void*>(
        static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] + 1);
#else
    static_cast<void>(context);
    return nullptr;
#endif
}

void handle(int signal, siginfo_t* info, void* context) {
    Block& block = tim::emulator::block();
    if (!block.running() || !pthread_equal(launching, pthread_self())) {
        for (int i = 0; i < kCount; ++i)
            if (kSignals[i] == signal) sigaction(signal, &before[i], nullptr);
        return;  // to the instruction that trapped, which traps again
    }
    const Inside inside;
    std::string what;
    if (block.current().fiber.overflows_at(info->si_addr)) {
        what = "overflows its stack of " + std::to_string(Block::kStackBytes / 1024) + " KiB";
    } else if (signal == SIGFPE) {
        what = "divides an integer by zero";
    } else if (signal == SIGILL) {
        what = "executes an illegal instruction";
    } else {
        char address[32];
        snprintf(address, sizeof(address), "%p", info->si_addr);
        what = std::string("accesses the address ") + address + ", where there is no memory";
    }
    block.fail(what, code_of(context));
}

}  // namespace

FaultHandler::FaultHandler() : stack_(kStackBytes) {
    launching = pthread_self();
    stack_t stack = {};
    stack.ss_sp = stack_.data();
    stack.ss_size = stack_.size();
    sigaltstack(&stack, &stack_before_);
    struct sigaction action = {};
    action.sa_sigaction = handle;
    // The handler leaves by switching stacks, so that no return would unblock the signal.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &action, &before[i]);
}

FaultHandler::~FaultHandler() {
    for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &before[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
}

}  // namespace tim::emulator
