// The memory that an emulated kernel touches, and the checks of every access to it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "history.h"
#include "products.h"
#include "shared_memory.h"

namespace tim::emulator {

enum class Access { kRead, kWrite, kReadConstant };

class Memory {
  public:
    Memory();

    // The global memory that kernels may touch from now on; without any: all there is.
    void set_global(std::vector<std::pair<uintptr_t, size_t>> ranges);

    // Of a kernel with its arguments here, which the threads read.
    void begin_launch(const void* arguments, size_t bytes);
    void end_launch();
    // A block with so many bytes of dynamic shared memory, none of it written.
    void begin_block(uint3 index, size_t shared_bytes);
    void pass_barrier() { time_.pass_barrier(); }
    SharedMemory& shared() { return shared_; }
    ProductReads& product_reads() { return product_reads_; }

    // Fails the launch unless `thread` may access these bytes now. `code` made the access.
    void access(const Thread& thread, const void* p, size_t bytes, Access kind, const void* code);
    // For instructions that address nothing but shared memory.
    void access_shared(const Thread& thread, const void* p, size_t bytes, Access kind,
                       const void* code);

    // A product that is issued now reads 16 bytes of shared memory.
    void check_product_read(const Thread& thread, const void* p, const void* code);

    // An asynchronous copy of 16 bytes, the first `bytes` of them from global memory.
    void begin_copy(const Thread& thread, const void* to, const void* from, int bytes,
                    const void* code);
    void end_copy(const Thread& thread, const void* to);
    // One that the thread started at this clock, and that is there for those who know of it.
    void end_copy(const Thread& thread, const void* to, uint32_t clock);

  private:
    static constexpr size_t kPageBytes = 4096;
    struct Page {
        History cells[kPageBytes / kCellBytes];
    };
    // What an access is called in a message.
    struct Description {
        const Thread& thread;
        const void* p;
        size_t bytes;
        Access kind;
        bool shared;
        const void* code;
    };

    void check_bounds(const Description& access) const;
    void check(History& cell, const Description& access);
    void check_read(const History& cell, const Description& access) const;
    void check_copy(const History& cell, const Description& access) const;
    [[noreturn]] void fail(const Description& access, const std::string& why) const;
    [[noreturn]] void fail_race(const Description& access, const Moment& other) const;
    History& global_cell(uintptr_t address);

    Time time_;
    SharedMemory shared_;
    ProductReads product_reads_;
    std::map<uintptr_t, uintptr_t> global_;  // begin, end
    std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
    uintptr_t last_page_number_ = 0;
    Page* last_page_ = nullptr;
    std::vector<std::pair<uintptr_t, size_t>> module_;  // its constants and variables
    std::pair<uintptr_t, size_t> arguments_;
};

}  // namespace tim::emulator
