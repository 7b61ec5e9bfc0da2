#include "memory.h"

#include <link.h>
#include <stdio.h>

#include <algorithm>
#include <string>

#include "block.h"

namespace tim::emulator {
namespace {

constexpr size_t kCopyBytes = 16;

uintptr_t number(const void* p) { return reinterpret_cast<uintptr_t>(p); }

bool within(const void* p, size_t bytes, uintptr_t begin, size_t length) {
    const uintptr_t offset = number(p) - begin;
    return number(p) >= begin && offset <= length && length - offset >= bytes;
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

Memory::Memory() : module_(own_segments()) {}

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

void Memory::begin_launch(const void* arguments, size_t bytes) {
    time_.begin_launch();
    arguments_ = {number(arguments), bytes};
}

void Memory::end_launch() {
    pages_.clear();
    last_page_ = nullptr;
}

void Memory::begin_block(uint3 index, size_t shared_bytes) {
    time_.begin_block(index);
    shared_.begin_block(shared_bytes);
    product_reads_.begin_block();
}

void Memory::access(const Thread& thread, const void* p, size_t bytes, Access kind,
                    const void* code) {
    if (thread.fiber.holds(p)) return;
    if (shared_.is_near(p)) return access_shared(thread, p, bytes, kind, code);
    if (within(p, bytes, arguments_.first, arguments_.second)) return;
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
    if (shared_.find(p, bytes) == nullptr) {
        const SharedMemory::Piece& piece = shared_.nearest(p);
        fail(access, "out of bounds, at offset " +
                         std::to_string(int64_t(number(p)) - int64_t(number(piece.data))) + " of " +
                         (piece.key == nullptr ? "the block's " : "an array of ") +
                         plural(piece.bytes));
    }
    if (!kTraced) return;
    if (kind == Access::kReadConstant) fail(access, "the read-only path is one of global memory");
    const char* const begin = static_cast<const char*>(p);
    int who;
    if (kind == Access::kWrite && product_reads_.race(shared_.address_of(begin), thread, &who))
        fail(access, "a race with the wgmma of thread " + to_string(block().thread(who).index) +
                         ", which may not have read there yet");
    for (const char* at = begin - number(p) % kCellBytes; at < begin + bytes; at += kCellBytes)
        check(shared_.cell(at), access);
}

void Memory::check_product_read(const Thread& thread, const void* p, const void* code) {
    if (shared_.find(p, kCopyBytes) == nullptr || !kTraced)
        return access_shared(thread, p, kCopyBytes, Access::kRead, code);
    const Description access{thread, p, kCopyBytes, Access::kRead, true, code};
    for (size_t i = 0; i < kCopyBytes; i += kCellBytes)
        check_read(shared_.cell(static_cast<const char*>(p) + i), access);
}

// What must have happened before shared memory is read.
void Memory::check_read(const History& cell, const Description& access) const {
    if (!cell.written_in_block(time_) && !cell.awaits_copy(time_))
        fail(access, "the block has not written there");
    check_copy(cell, access);
    if (const Moment* const race = cell.race_of_read(time_, access.thread, true))
        fail_race(access, *race);
}

void Memory::check_copy(const History& cell, const Description& access) const {
    if (cell.awaits_copy(time_))
        fail(access, "the cp.async of thread " +
                         to_string(block().thread(int(cell.copier())).index) +
                         " to there has not been waited for");
}

void Memory::check_bounds(const Description& access) const {
    if (global_.empty()) return;
    const auto next = global_.upper_bound(number(access.p));
    const auto own = next == global_.begin() ? global_.end() : std::prev(next);
    if (own != global_.end() &&
        within(access.p, access.bytes, own->first, own->second - own->first))
        return;
    constexpr uintptr_t kFar = uintptr_t(1) << 20;
    const uintptr_t beyond = own == global_.end() ? kFar : number(access.p) - own->second;
    const uintptr_t before = next == global_.end() ? kFar : next->first - number(access.p);
    std::string where;
    if (beyond < kFar && beyond <= before)
        where = ", " + plural(beyond + access.bytes) + " beyond the end of an array";
    else if (before < kFar)
        where = ", " + plural(before) + " before the start of an array";
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
        check_copy(cell, access);
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

void Memory::begin_copy(const Thread& thread, const void* to, const void* from, int bytes,
                        const void* code) {
    if (kTraced && bytes > 0) access(thread, from, size_t(bytes), Access::kRead, code);
    access_shared(thread, to, kCopyBytes, Access::kWrite, code);
    if (!kTraced) return;
    for (size_t i = 0; i < kCopyBytes; i += kCellBytes)
        shared_.cell(static_cast<const char*>(to) + i).begin_copy(time_, uint32_t(thread.number));
}

void Memory::end_copy(const Thread& thread, const void* to) {
    if (!kTraced) return;
    for (size_t i = 0; i < kCopyBytes; i += kCellBytes) {
        History& cell = shared_.cell(static_cast<const char*>(to) + i);
        cell.end_copy();
        cell.write(time_, thread);
    }
}

void Memory::end_copy(const Thread& thread, const void* to, uint32_t clock) {
    if (!kTraced) return;
    for (size_t i = 0; i < kCopyBytes; i += kCellBytes) {
        History& cell = shared_.cell(static_cast<const char*>(to) + i);
        cell.end_copy();
        cell.arrive(time_, thread, clock);
    }
}

}  // namespace tim::emulator
