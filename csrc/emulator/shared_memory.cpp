#include "shared_memory.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

namespace tim::emulator {
namespace {

constexpr size_t kGuardBytes = size_t(1) << 20;
constexpr size_t kZoneBytes = size_t(512) << 10;
constexpr size_t kGapBytes = 1024;  // between pieces
constexpr size_t kAlignment = 16;
constexpr int kUnwritten = 0xff;

}  // namespace

bool SharedMemory::Piece::holds(const void* p, size_t size) const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
    return address >= begin && address - begin <= bytes && bytes - (address - begin) >= size;
}

SharedMemory::SharedMemory() {
    if (!kTraced) return;
    void* const memory = mmap(nullptr, kGuardBytes + kZoneBytes + kGuardBytes, PROT_NONE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    zone_ = static_cast<char*>(memory) + kGuardBytes;
    if (mprotect(zone_, kZoneBytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    cells_ = std::make_unique<History[]>(kZoneBytes / kCellBytes);
}

SharedMemory::~SharedMemory() {
    remove_all();
    if (zone_ != nullptr) munmap(zone_ - kGuardBytes, kGuardBytes + kZoneBytes + kGuardBytes);
}

void SharedMemory::remove_all() {
    // Without traces every piece is one of the heap, so that AddressSanitizer sees its ends.
    if (!kTraced)
        for (const Piece& piece : pieces_) delete[] piece.data;
    pieces_.clear();
    used_ = 0;
}

void SharedMemory::add(const void* key, size_t bytes) {
    char* data = nullptr;
    if (kTraced) {
        if (used_ + bytes > kZoneBytes) throw std::bad_alloc();
        data = zone_ + used_;
        used_ += (bytes + kGapBytes + kAlignment - 1) / kAlignment * kAlignment;
    } else {
        data = new char[bytes];
    }
    memset(data, kUnwritten, bytes);
    pieces_.push_back({key, data, bytes});
}

void SharedMemory::begin_block(size_t dynamic_bytes) {
    remove_all();
    add(nullptr, dynamic_bytes);
}

void* SharedMemory::array(const void* key, size_t bytes) {
    for (const Piece& piece : pieces_)
        if (piece.key == key) return piece.data;
    add(key, bytes);
    return pieces_.back().data;
}

bool SharedMemory::is_near(const void* p) const {
    return kTraced &&
           Piece{nullptr, zone_ - kGuardBytes, kGuardBytes + kZoneBytes + kGuardBytes}.holds(p, 1);
}

const SharedMemory::Piece* SharedMemory::find(const void* p, size_t bytes) const {
    for (const Piece& piece : pieces_)
        if (piece.holds(p, bytes)) return &piece;
    return nullptr;
}

const SharedMemory::Piece& SharedMemory::nearest(const void* p) const {
    size_t found = 0;
    for (size_t i = 0; i < pieces_.size(); ++i)
        if (pieces_[i].data <= p) found = i;
    return pieces_[found];
}

}  // namespace tim::emulator
