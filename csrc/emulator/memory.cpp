#include "memory.h"

#include "block.h"

namespace tim::emulator {

void Memory::begin_block(size_t shared_bytes) {
    shared_bytes_ = shared_bytes;
    if (shared_bytes > capacity_) {
        delete[] shared_;
        shared_ = new char[shared_bytes];
        capacity_ = shared_bytes;
    }
}

void Memory::end_block() {}

bool Memory::is_shared(const void* p) const {
    return reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(shared_) < shared_bytes_;
}

void* dynamic_shared_memory() { return block().memory().shared(); }

void read_constant(const void*, size_t) {}

void sync_block() { block().sync_block(__builtin_return_address(0)); }

}  // namespace tim::emulator
