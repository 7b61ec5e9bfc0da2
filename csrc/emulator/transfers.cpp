#include "transfers.h"

#include <string.h>

#include <algorithm>
#include <string>

#include "block.h"
#include "cuda_runtime.h"

namespace tim::emulator {
namespace {

constexpr int kUnitBytes = 16;
constexpr int kElementBytes = 2;

// What a CUtensorMap holds here.
struct EncodedMap {
    char* address;
    int64_t dims[4], strides[4];  // strides in bytes
    int box[4];
    int span;  // bytes within which units are permuted, or 0
};
static_assert(sizeof(EncodedMap) <= sizeof(CUtensorMap));

EncodedMap decoded(const CUtensorMap& map) {
    EncodedMap encoded;
    memcpy(&encoded, &map, sizeof(encoded));
    return encoded;
}

void learn(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
    if (to.size() < from.size()) to.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

}  // namespace

uint32_t permuted(uint32_t address, int span) {
    const uint32_t row = address / 128 % 8;
    return span == 0 ? address : address ^ row % uint32_t(span / kUnitBytes) * kUnitBytes;
}

Transfers::Barrier& Transfers::find(const Thread& thread, void* barrier, const char* what,
                                    const void* code) {
    block().memory().access_shared(thread, barrier, sizeof(uint64_t), Access::kRead, code);
    const auto found = barriers_.find(barrier);
    if (found == barriers_.end())
        block().fail(std::string(what) + " an mbarrier that was not initialised", code);
    return found->second;
}

void Transfers::init(Thread& thread, void* barrier, int arrivals, const void* code) {
    if (reinterpret_cast<uintptr_t>(barrier) % sizeof(uint64_t) != 0)
        block().fail("initialises an mbarrier at an address that is no multiple of 8", code);
    if (arrivals < 1 || arrivals > (1 << 20) - 1)
        block().fail("initialises an mbarrier for " + std::to_string(arrivals) + " arrivals", code);
    block().memory().access_shared(thread, barrier, sizeof(uint64_t), Access::kWrite, code);
    Barrier& state = barriers_[barrier];
    state = Barrier();
    state.arrivals = state.missing = arrivals;
}

void Transfers::end_phase(Barrier& barrier) {
    if (barrier.missing > 0 || barrier.bytes != 0) return;
    ++barrier.phases;
    barrier.missing = barrier.arrivals;
    barrier.known = std::move(barrier.gathered);
    barrier.gathered.clear();
    for (const int number : barrier.waiting) block().wake(block().thread(number));
    barrier.waiting.clear();
}

void Transfers::arrive(Thread& thread, void* barrier, int bytes, const void* code) {
    Barrier& state = find(thread, barrier, "arrives at", code);
    if (state.missing == 0)
        block().fail("arrives at an mbarrier in whose phase all " + std::to_string(state.arrivals) +
                         " have arrived",
                     code);
    --state.missing;
    state.bytes += bytes;
    thread.seen[size_t(thread.number)] = thread.clock++;
    learn(state.gathered, thread.seen);
    end_phase(state);
}

bool Transfers::wait(Thread& thread, void* barrier, int parity, const void* code) {
    Barrier& state = find(thread, barrier, "waits for", code);
    if ((state.phases & 1u) != unsigned(parity)) {
        learn(thread.seen, state.known);
        return true;
    }
    state.waiting.push_back(thread.number);
    return false;
}

void Transfers::copy(Thread& thread, void* barrier, void* to, const CUtensorMap& map,
                     const int (&at)[4], const void* code) {
    Barrier& state = find(thread, barrier, "copies to", code);
    SharedMemory& shared = block().memory().shared();
    const EncodedMap from = decoded(map);
    const uint32_t base = shared.address_of(to);
    if (at[0] % (kUnitBytes / kElementBytes) != 0)
        block().fail("copies a box that begins at column " + std::to_string(at[0]) +
                         ", no multiple of 8, which is not emulated",
                     code);
    if (base % 128 != 0)
        block().fail("copies a box to an address that is no multiple of 128", code);
    Copy copy{{}, thread.clock++, thread.number};
    const int units = from.box[0] * kElementBytes / kUnitBytes, columns = from.box[0];
    uint32_t offset = 0;
    for (int i3 = 0; i3 < from.box[3]; ++i3)
        for (int i2 = 0; i2 < from.box[2]; ++i2)
            for (int i1 = 0; i1 < from.box[1]; ++i1) {
                const int64_t c1 = at[1] + i1, c2 = at[2] + i2, c3 = at[3] + i3;
                const bool inside = c1 >= 0 && c1 < from.dims[1] && c2 >= 0 && c2 < from.dims[2] &&
                                    c3 >= 0 && c3 < from.dims[3];
                const char* const row = from.address + at[0] * kElementBytes +
                                        c1 * from.strides[1] + c2 * from.strides[2] +
                                        c3 * from.strides[3];
                const int64_t left = inside ? from.dims[0] - at[0] : 0;
                const int64_t there = std::min<int64_t>(left, columns) * kElementBytes;
                for (int unit = 0; unit < units; ++unit, offset += kUnitBytes) {
                    char* const target = shared.at(permuted(base + offset, from.span));
                    const int column = at[0] + unit * kUnitBytes / kElementBytes;
                    const int64_t bytes =
                        column < 0 ? 0
                                   : std::clamp<int64_t>(there - unit * kUnitBytes, 0, kUnitBytes);
                    const char* const source = row + unit * kUnitBytes;
                    block().memory().begin_copy(thread, target, source, int(bytes), code);
                    copy.units.push_back({target, source, int(bytes)});
                }
            }
    state.copies.push_back(std::move(copy));
}

bool Transfers::deliver() {
    for (auto& [address, barrier] : barriers_) {
        if (barrier.waiting.empty() || barrier.copies.empty()) continue;
        for (const Copy& copy : barrier.copies) {
            for (const Unit& unit : copy.units) {
                memcpy(unit.to, unit.from, size_t(unit.bytes));
                memset(unit.to + unit.bytes, 0, size_t(kUnitBytes - unit.bytes));
                block().memory().end_copy(block().thread(copy.thread), unit.to, copy.clock);
            }
            barrier.bytes -= int64_t(copy.units.size()) * kUnitBytes;
            // Who waits for the barrier knows that the copy is there.
            const size_t number = size_t(copy.thread);
            if (barrier.gathered.size() <= number) barrier.gathered.resize(number + 1);
            barrier.gathered[number] = std::max(barrier.gathered[number], copy.clock);
        }
        barrier.copies.clear();
        end_phase(barrier);
        return true;
    }
    return false;
}

bool Transfers::under_way() const {
    return std::any_of(barriers_.begin(), barriers_.end(),
                       [](const auto& entry) { return !entry.second.copies.empty(); });
}

void mbarrier_init(void* barrier, int arrivals) {
    const Inside inside;
    block().transfers().init(block().current(), barrier, arrivals, __builtin_return_address(0));
}

void mbarrier_arrive(void* barrier, int bytes) {
    const Inside inside;
    block().transfers().arrive(block().current(), barrier, bytes, __builtin_return_address(0));
}

void mbarrier_wait(void* barrier, int parity) {
    const Inside inside;
    const void* const code = __builtin_return_address(0);
    while (!block().transfers().wait(block().current(), barrier, parity, code)) block().sleep(code);
}

void copy_box(void* to, const CUtensorMap& map, void* barrier, int c0, int c1, int c2, int c3) {
    const Inside inside;
    block().transfers().copy(block().current(), barrier, to, map, {c0, c1, c2, c3},
                             __builtin_return_address(0));
}

}  // namespace tim::emulator

namespace {

// As the driver's documentation has the limits.
bool is_valid(cuuint32_t rank, void* address, const cuuint64_t* dims, const cuuint64_t* strides,
              const cuuint32_t* box, const cuuint32_t* steps, int span) {
    if (rank != 4 || reinterpret_cast<uintptr_t>(address) % 16 != 0) return false;
    for (cuuint32_t i = 0; i < rank; ++i) {
        if (dims[i] == 0 || dims[i] > cuuint64_t(1) << 32) return false;
        if (box[i] == 0 || box[i] > 256 || steps[i] != 1) return false;
        if (i + 1 < rank && (strides[i] % 16 != 0 || strides[i] >= cuuint64_t(1) << 40))
            return false;
    }
    const cuuint32_t bytes = box[0] * tim::emulator::kElementBytes;
    return bytes % 16 == 0 && (span == 0 || bytes <= cuuint32_t(span));
}

}  // namespace

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* dims, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    const int span = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16 << int(swizzle);
    const bool half =
        type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    if (!half || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
        fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE ||
        !is_valid(rank, address, dims, strides, box, element_strides, span))
        return CUDA_ERROR_INVALID_VALUE;
    tim::emulator::EncodedMap encoded{};
    encoded.address = static_cast<char*>(address);
    encoded.span = span;
    for (int i = 0; i < 4; ++i) {
        encoded.dims[i] = int64_t(dims[i]);
        encoded.strides[i] = i == 0 ? tim::emulator::kElementBytes : int64_t(strides[i - 1]);
        encoded.box[i] = int(box[i]);
    }
    memset(map, 0, sizeof(*map));
    memcpy(map, &encoded, sizeof(encoded));
    return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, uint64_t,
                                             cudaDriverEntryPointQueryResult* result) {
    const bool found = strcmp(name, "cuTensorMapEncodeTiled") == 0;
    *function = found ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
    *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
