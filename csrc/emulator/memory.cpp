#include "memory.h"

#include <link.h>
#include <stdio.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <string>

#include "block.h"

// The section that __shared__ variables are put into; it may not exist.
extern "C" {
extern char __start_tim_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_tim_shared[] __attribute__((weak, visibility("hidden")));
}

namespace tim::emulator {
namespace {

constexpr size_t kGuardBytes = size_t(1) << 20;
constexpr size_t kMaxSharedBytes = size_t(256) << 10;
constexpr size_t kZoneBytes = kGuardBytes + kMaxSharedBytes + kGuardBytes;
constexpr size_t kCopyBytes = 16;
constexpr int kUnwritten = 0xff;  // a NaN, in every dtype

uintptr_t number(const void* p) { return reinterpret_cast<uintptr_t>(p); }

bool within(const void* p, size_t bytes, uintptr_t begin, size_t length) {
    const uintptr_t offset = number(p) - begin;
    return number(p) >= begin && offset <= length && length - offset >= bytes;
}

size_t static_bytes() { return size_t(__stop_tim_shared - __start_tim_shared); }

bool is_static(const void* p, size_t bytes) {
    return within(p, bytes, number(__start_tim_shared), static_bytes());
}

std::string plural(size_t bytes) {
    return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes");
}

std::string hexadecimal(const void* p) {
    char digits[32];
    snprintf(digits, sizeof(digits), "%p", p);
    return digits;
}

// The parts of the address space that this module was loaded to.
std::vector<std::pair<uintptr_t, size_t>> own_segments() {
    std::vector<std::pair<uintptr_t, size_t>> segments;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* result) {
            std::vector<std::pair<uintptr_t, size_t>> found;
            bool own = false;
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const auto& segment = info->dlpi_phdr[i];
                if (segment.p_type != PT_LOAD) continue;
                found.emplace_back(info->dlpi_addr + segment.p_vaddr, segment.p_memsz);
                own = own || within(&gridDim, 1, found.back().first, found.back().second);
            }
            if (own) *static_cast<decltype(found)*>(result) = found;
            return int(own);
        },
        &segments);
    return segments;
}

}  // namespace

Memory::Memory() {
    void* const zone =
        mmap(nullptr, kZoneBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (zone == MAP_FAILED) throw std::bad_alloc();
    zone_ = static_cast<char*>(zone);
    if (mprotect(zone_ + kGuardBytes, kMaxSharedBytes, PROT_READ | PROT_WRITE) != 0)
        throw std::bad_alloc();
    module_ = own_segments();
    if (kTraced) {
        dynamic_cells_ = std::make_unique<History[]>(kMaxSharedBytes / kCellBytes);
        static_cells_ = std::make_unique<History[]>(static_bytes() / kCellBytes + 1);
    }
}

Memory::~Memory() {
    if (!kTraced) delete[] shared_;
    munmap(zone_, kZoneBytes);
}

void Memory::set_global(std::vector<std::pair<uintptr_t, size_t>> ranges) {
    global_.clear();
    std::sort(ranges.begin(), ranges.end());
    for (const auto& [begin, bytes] : ranges) {
        if (!global_.empty() && begin <= global_.rbegin()->second) {
            uintptr_t& end = global_.rbegin()->second;
            end = std::max(end, begin + bytes);
        } else {
            global_[begin] = begin + bytes;
        }
    }
}

void Memory::end_launch() {
    pages_.clear();
    last_page_ = nullptr;
}

void Memory::begin_block(uint3 index, size_t shared_bytes) {
    time_.begin_block(index);
    shared_bytes_ = shared_bytes;
    if (kTraced) {
        shared_ = zone_ + kGuardBytes;
    } else {
        // A piece of heap of just this size, so that AddressSanitizer sees what lies beyond.
        delete[] shared_;
        shared_ = new char[shared_bytes];
    }
    memset(shared_, kUnwritten, shared_bytes);
}

void Memory::access(const Thread& thread, const void* p, size_t bytes, Access kind,
                    const void* code) {
    if (thread.fiber.holds(p)) return;
    if (within(p, 1, number(zone_), kZoneBytes) || is_static(p, 1))
        return access_shared(thread, p, bytes, kind, code);
    for (const auto& [begin, length] : module_)
        if (within(p, bytes, begin, length)) return;
    const Description access{thread, p, bytes, kind, false, code};
    check_bounds(access);
    const uintptr_t end = number(p) + bytes;
    for (uintptr_t at = number(p) / kCellBytes * kCellBytes; at < end; at += kCellBytes)
        check(global_cell(at), access);
}

void Memory::access_shared(const Thread& thread, const void* p, size_t bytes, Access kind,
                           const void* code) {
    const Description access{thread, p, bytes, kind, true, code};
    const bool dynamic = within(p, bytes, number(shared_), shared_bytes_);
    if (!dynamic && !is_static(p, bytes))
        fail(access, "out of bounds, at offset " +
                         std::to_string(int64_t(number(p)) - int64_t(number(shared_))) +
                         " of the " + plural(shared_bytes_) + " that the block has");
    if (!kTraced) return;
    if (kind == Access::kReadConstant) fail(access, "the read-only path is one of global memory");
    const uintptr_t base = number(dynamic ? shared_ : __start_tim_shared);
    History* const cells = (dynamic ? dynamic_cells_ : static_cells_).get();
    const size_t offset = number(p) - base;
    for (size_t i = offset / kCellBytes; i * kCellBytes < offset + bytes; ++i)
        check(cells[i], access);
}

void Memory::check_bounds(const Description& access) const {
    if (global_.empty()) return;
    const auto next = global_.upper_bound(number(access.p));
    const auto own = next == global_.begin() ? global_.end() : std::prev(next);
    if (own != global_.end() &&
        within(access.p, access.bytes, own->first, own->second - own->first))
        return;
    std::string where;
    if (own != global_.end() && number(access.p) - own->second < kGuardBytes)
        where = ", " + plural(number(access.p) + access.bytes - own->second) +
                " beyond the end of an array";
    else if (next != global_.end() && next->first - number(access.p) < kGuardBytes)
        where = ", " + plural(next->first - number(access.p)) + " before the start of an array";
    fail(access, "out of bounds" + where);
}

History& Memory::global_cell(uintptr_t address) {
    const uintptr_t page = address / kPageBytes;
    if (last_page_ == nullptr || last_page_number_ != page) {
        std::unique_ptr<Page>& found = pages_[page];
        if (found == nullptr) found = std::make_unique<Page>();
        last_page_number_ = page;
        last_page_ = found.get();
    }
    return last_page_->cells[address % kPageBytes / kCellBytes];
}

void Memory::check(History& cell, const Description& access) {
    if (access.shared) {
        if (cell.awaits_copy(time_))
            fail(access, "the cp.async of thread " +
                             to_string(block().thread(int(cell.copier())).index) +
                             " to there has not been waited for");
        if (access.kind == Access::kRead && !cell.written_in_block(time_))
            fail(access, "the block has not written there");
    }
    const Moment* const race = access.kind == Access::kWrite
                                   ? cell.race_of_write(time_, access.thread, access.shared)
                                   : cell.race_of_read(time_, access.thread, access.shared);
    if (race != nullptr) fail_race(access, *race);
    if (access.kind == Access::kReadConstant) {
        if (cell.written_in_launch(time_))
            fail(access, "this launch has written there, which the read-only path may not see");
        cell.read_constant(time_);
    }
    if (access.kind != Access::kWrite) {
        cell.read(time_, access.thread, access.shared);
        return;
    }
    if (cell.constant_in_launch(time_))
        fail(access, "this launch reads there through the read-only path");
    cell.write(time_, access.thread);
}

void Memory::fail(const Description& access, const std::string& why) const {
    block().fail((access.kind == Access::kWrite ? "writes " : "reads ") + plural(access.bytes) +
                     (access.shared ? " of shared memory at " : " of global memory at ") +
                     hexadecimal(access.p) + ": " + why,
                 access.code, &access.thread);
}

void Memory::fail_race(const Description& access, const Moment& other) const {
    if (time_.in_block(other.epoch))
        fail(access, "a race with thread " + to_string(block().thread(int(other.thread)).index) +
                         ", as no barrier lies between their accesses");
    fail(access,
         "a race with block " + to_string(time_.block_of(other.epoch)) + " of the same launch");
}

History* Memory::shared_cells(const void* p) {
    return dynamic_cells_.get() + (number(p) - number(shared_)) / kCellBytes;
}

void Memory::begin_copy(const Thread& thread, const void* to, const void* from, int bytes,
                        const void* code) {
    if (kTraced && bytes > 0) access(thread, from, size_t(bytes), Access::kRead, code);
    if (!within(to, kCopyBytes, number(shared_), shared_bytes_) && is_static(to, kCopyBytes))
        block().fail("cp.async into static shared memory is not emulated", code);
    access_shared(thread, to, kCopyBytes, Access::kWrite, code);
    if (!kTraced) return;
    for (size_t i = 0; i < kCopyBytes / kCellBytes; ++i)
        shared_cells(to)[i].begin_copy(time_, uint32_t(thread.number));
}

void Memory::end_copy(const Thread& thread, const void* to) {
    if (!kTraced) return;
    for (size_t i = 0; i < kCopyBytes / kCellBytes; ++i) {
        shared_cells(to)[i].end_copy();
        shared_cells(to)[i].write(time_, thread);
    }
}

}  // namespace tim::emulator
