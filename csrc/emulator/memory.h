// What is known of the memory that an emulated kernel touches, and the checks of each access.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace tim::emulator {

enum class Access { kRead, kWrite, kReadConstant };

class Memory {
  public:
    // A new block with so many bytes of dynamic shared memory, none of them written.
    void begin_block(size_t shared_bytes);
    void end_block();

    char* shared() { return shared_; }
    size_t shared_bytes() const { return shared_bytes_; }
    bool is_shared(const void* p) const;

  private:
    char* shared_ = nullptr;
    size_t shared_bytes_ = 0, capacity_ = 0;
};

}  // namespace tim::emulator
