// What the compiler calls before each access to memory in the kernels (-fsanitize=thread).
#include <stddef.h>

#include "block.h"

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define ACCESS(bytes)                           \
    void __tsan_read##bytes(void*) {}           \
    void __tsan_write##bytes(void*) {}          \
    void __tsan_unaligned_read##bytes(void*) {} \
    void __tsan_unaligned_write##bytes(void*) {}
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void*, size_t) {}
void __tsan_write_range(void*, size_t) {}
void __ubsan_handle_type_mismatch_v1(void*, void*) {}
void __ubsan_handle_type_mismatch_v1_abort(void*, void*) {}
}
