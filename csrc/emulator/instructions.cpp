#include "instructions.h"

#include <string.h>

#include <string>

#include "block.h"
#include "elements.h"

namespace tim::emulator {
namespace {

constexpr unsigned kAllLanes = ~0u;

struct MmaOperands {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
};

// Lane 4 g + t holds, of each 8 x 8 tile of A, the columns 2 t and 2 t + 1 of row g; the tiles
// follow each other down the rows, then along the columns. Of B it holds the rows 2 t and 2 t + 1
// of column g, tile below tile; of D the columns 2 t and 2 t + 1 of the rows g and g + 8.
template <Half type, int depth>
void evaluate_mma(const Warp& warp, unsigned) {
    float a[16][depth], b[depth][8];
    for (int lane = 0; lane < kWarpLanes; ++lane) {
        const auto& own = *static_cast<const MmaOperands*>(warp.lane(lane).collective.operands);
        const int g = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; ++half) {
            for (int tile = 0; tile < depth / 4; ++tile)
                a[g + tile % 2 * 8][tile / 2 * 8 + 2 * t + half] = element<type>(own.a[tile], half);
            for (int tile = 0; tile < depth / 8; ++tile)
                b[tile * 8 + 2 * t + half][g] = element<type>(own.b[tile], half);
        }
    }
    for (int lane = 0; lane < kWarpLanes; ++lane) {
        const auto& own = *static_cast<const MmaOperands*>(warp.lane(lane).collective.operands);
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            double sum = own.d[i];
            for (int k = 0; k < depth; ++k) sum += double(a[row][k]) * double(b[k][column]);
            own.d[i] = float(sum);
        }
    }
}

struct MatrixOperands {
    uint32_t* to;
    const char* row;
};

// Of matrix j, whose rows the lanes 8 j to 8 j + 7 point at, lane 4 g + t receives the columns 2 t
// and 2 t + 1 of row g, or, transposed, the rows 2 t and 2 t + 1 of column g.
template <int count, bool transposed>
void evaluate_ldmatrix(const Warp& warp, unsigned) {
    const auto operands = [&](int lane) -> const MatrixOperands& {
        return *static_cast<const MatrixOperands*>(warp.lane(lane).collective.operands);
    };
    for (int lane = 0; lane < kWarpLanes; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int j = 0; j < count; ++j) {
            uint16_t pair[2];
            const Thread& thread = warp.lane(lane);
            for (int i = 0; i < 2; ++i) {
                const int row = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
                const char* const p = operands(8 * j + row).row + 2 * column;
                block().memory().access_shared(thread, p, sizeof(pair[i]), Access::kRead,
                                               thread.collective.code);
                memcpy(&pair[i], p, sizeof(pair[i]));
            }
            operands(lane).to[j] = pair[0] | uint32_t(pair[1]) << 16;
        }
    }
}

void check_alignment(const char* what, const void* p, const void* code) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0)
        block().fail(std::string("calls ") + what + " with an address that is no multiple of 16",
                     code);
}

}  // namespace

void mma_m16n8(Half type, int depth, float* d, const uint32_t* a, const uint32_t* b) {
    MmaOperands operands{d, a, b};
    const bool deep = depth == 16;
    const auto evaluate =
        type == Half::kBFloat16
            ? (deep ? evaluate_mma<Half::kBFloat16, 16> : evaluate_mma<Half::kBFloat16, 8>)
            : (deep ? evaluate_mma<Half::kFloat16, 16> : evaluate_mma<Half::kFloat16, 8>);
    block().meet({"mma", kAllLanes, kWarpLanes, &operands, evaluate, __builtin_return_address(0)});
}

void ldmatrix(int count, bool transposed, uint32_t* to, const void* row) {
    const Inside inside;
    const void* const code = __builtin_return_address(0);
    if (block().current().number % kWarpLanes < 8 * count) check_alignment("ldmatrix", row, code);
    MatrixOperands operands{to, static_cast<const char*>(row)};
    using Evaluate = void (*)(const Warp&, unsigned);
    const Evaluate evaluate =
        count == 1   ? (transposed ? evaluate_ldmatrix<1, true> : evaluate_ldmatrix<1, false>)
        : count == 2 ? (transposed ? evaluate_ldmatrix<2, true> : evaluate_ldmatrix<2, false>)
                     : (transposed ? evaluate_ldmatrix<4, true> : evaluate_ldmatrix<4, false>);
    block().meet({"ldmatrix", kAllLanes, kWarpLanes, &operands, evaluate, code});
}

void cp_async(void* to, const void* from, int bytes) {
    const Inside inside;
    const void* const code = __builtin_return_address(0);
    check_alignment("cp.async", to, code);
    check_alignment("cp.async", from, code);
    if (bytes < 0 || bytes > 16)
        block().fail("calls cp.async for " + std::to_string(bytes) + " bytes of 16", code);
    Thread& thread = block().current();
    block().memory().begin_copy(thread, to, from, bytes, code);
    thread.copies.back().push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes});
}

void cp_async_commit() {
    const Inside inside;
    block().current().copies.emplace_back();
}

void cp_async_wait(int groups_left) {
    const Inside inside;
    Thread& thread = block().current();
    // The last group is the one that has not been committed.
    while (thread.copies.size() > size_t(groups_left) + 1) {
        for (const AsyncCopy& copy : thread.copies.front()) {
            memcpy(copy.to, copy.from, size_t(copy.bytes));
            memset(copy.to + copy.bytes, 0, size_t(16 - copy.bytes));
            block().memory().end_copy(thread, copy.to);
        }
        thread.copies.erase(thread.copies.begin());
    }
}

}  // namespace tim::emulator
