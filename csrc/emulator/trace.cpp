// What the kernels were compiled to call: before each access to memory (-fsanitize=thread, whose
// runtime is this file), where an address is not a multiple of what its type demands
// (-fsanitize=alignment), and where they use CUDA's functions for memory and barriers.
#include <stddef.h>
#include <stdint.h>

#include <string>

#include "block.h"

namespace {

using namespace tim::emulator;

void trace(const void* p, size_t bytes, Access kind, const void* code) {
    Block& block = tim::emulator::block();
    // Host functions of the same sources call, too, and functions of the standard library, of which
    // the linker keeps one copy for kernels and emulator.
    if (!block.running() || Inside::now()) return;
    const Inside inside;
    block.memory().access(block.current(), p, bytes, kind, code);
}

}  // namespace

#ifndef __SANITIZE_ADDRESS__

// The names are the compiler's; macros make them.
#define TIM_TRACE(bytes)                                              \
    void __tsan_read##bytes(void* p) {                                \
        trace(p, bytes, Access::kRead, __builtin_return_address(0));  \
    }                                                                 \
    void __tsan_write##bytes(void* p) {                               \
        trace(p, bytes, Access::kWrite, __builtin_return_address(0)); \
    }                                                                 \
    void __tsan_unaligned_read##bytes(void* p) {                      \
        trace(p, bytes, Access::kRead, __builtin_return_address(0));  \
    }                                                                 \
    void __tsan_unaligned_write##bytes(void* p) {                     \
        trace(p, bytes, Access::kWrite, __builtin_return_address(0)); \
    }

extern "C" {

TIM_TRACE(1)
TIM_TRACE(2)
TIM_TRACE(4)
TIM_TRACE(8)
TIM_TRACE(16)

void __tsan_read_range(void* p, size_t bytes) {
    trace(p, bytes, Access::kRead, __builtin_return_address(0));
}

void __tsan_write_range(void* p, size_t bytes) {
    trace(p, bytes, Access::kWrite, __builtin_return_address(0));
}

// Clang calls these in place of the functions of their names.
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
    trace(from, bytes, Access::kRead, __builtin_return_address(0));
    trace(to, bytes, Access::kWrite, __builtin_return_address(0));
    return __builtin_memcpy(to, from, bytes);
}

void* __tsan_memmove(void* to, const void* from, size_t bytes) {
    trace(from, bytes, Access::kRead, __builtin_return_address(0));
    trace(to, bytes, Access::kWrite, __builtin_return_address(0));
    return __builtin_memmove(to, from, bytes);
}

void* __tsan_memset(void* to, int value, size_t bytes) {
    trace(to, bytes, Access::kWrite, __builtin_return_address(0));
    return __builtin_memset(to, value, bytes);
}

// Atomic operations come from the standard library in host functions. They do the work, too.
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) {
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}

uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* p, uint32_t value, int) {
    return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// As UBSan's runtime lays out its first argument.
struct TimTypeMismatch {
    const char* file;
    uint32_t line, column;
    const void* type;
    unsigned char log_alignment, kind;
};

void __ubsan_handle_type_mismatch_v1(TimTypeMismatch* what, void*) {
    Block& block = tim::emulator::block();
    if (!block.running()) return;
    const Inside inside;
    block.fail("accesses memory at an address that is no multiple of " +
                   std::to_string(1u << what->log_alignment),
               __builtin_return_address(0));
}

void __ubsan_handle_type_mismatch_v1_abort(TimTypeMismatch* what, void* p) {
    __ubsan_handle_type_mismatch_v1(what, p);
}

}  // extern "C"

#endif

namespace tim::emulator {

void* dynamic_shared_memory() { return block().memory().shared().dynamic(); }

void* static_shared_memory(const void* key, size_t bytes) {
    const Inside inside;
    return block().memory().shared().array(key, bytes);
}

uint32_t shared_address(const void* p) {
    const Inside inside;
    return block().memory().shared().address_of(p);
}

void read_constant(const void* p, size_t bytes) {
    if (kTraced) trace(p, bytes, Access::kReadConstant, __builtin_return_address(0));
}

void sync_block() { block().sync_block(__builtin_return_address(0)); }

}  // namespace tim::emulator
