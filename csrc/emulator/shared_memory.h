// The shared memory of the block that runs: one dynamic piece and any number of static arrays.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>
#include <vector>

#include "history.h"

namespace tim::emulator {

#ifdef __SANITIZE_ADDRESS__
// Accesses do not call back then; AddressSanitizer watches them.
constexpr bool kTraced = false;
#else
constexpr bool kTraced = true;
#endif

constexpr size_t kCellBytes = 2;  // that have one history

class SharedMemory {
  public:
    struct Piece {
        const void* key;  // of an array, else null
        char* data;
        size_t bytes;

        bool holds(const void* p, size_t size) const;
    };

    SharedMemory();
    ~SharedMemory();
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;

    // Nothing of it is written yet: it holds NaNs, in every dtype.
    void begin_block(size_t dynamic_bytes);
    void* dynamic() const { return pieces_[0].data; }
    void* array(const void* key, size_t bytes);

    // Whether p lies in this memory or near it; nothing else is there.
    bool is_near(const void* p) const;
    // Of shared memory, as instructions count it: the dynamic piece begins at kFirstAddress,
    // aligned to no more than CUDA promises.
    static constexpr uint32_t kFirstAddress = 1024 + 16;
    uint32_t address_of(const void* p) const {
        return kFirstAddress + uint32_t(static_cast<const char*>(p) - pieces_[0].data);
    }
    char* at(uint32_t address) const { return pieces_[0].data + (address - kFirstAddress); }

    // The piece that holds so many bytes at p, or null.
    const Piece* find(const void* p, size_t bytes) const;
    History& cell(const char* p) { return cells_[size_t(p - zone_) / kCellBytes]; }
    // The last piece that begins before p, else the first.
    const Piece& nearest(const void* p) const;

  private:
    void add(const void* key, size_t bytes);
    void remove_all();

    char* zone_ = nullptr;  // between guards
    size_t used_ = 0;
    std::vector<Piece> pieces_;  // the dynamic one first
    std::unique_ptr<History[]> cells_;
};

}  // namespace tim::emulator
