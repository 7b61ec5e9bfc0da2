// How the attention kernels for Hopper divide their work: tiles by TMA, products by wgmma.
//
// A block has up to 128 queries of one head: two warpgroups with 64 each, and a third one that only
// fetches tiles of 64 keys (k, v and their tangents). A tile of D columns lies in shared memory as
// two blocks, 64 columns and the rest, each in rows of the widest permutation that fits, so that no
// product is wider than D: for D = 72 the rest is 8 columns wide, and as an operand of q k^T, whose
// products are 16 deep, 8 columns of zeros follow.
#pragma once

#include "attention_products.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace tim::cuda {
namespace {

constexpr int kHopperKeys = 64;  // of a tile
constexpr int kGroupRows = 64;   // of a warpgroup
constexpr int kConsumers = 2;    // warpgroups with rows
constexpr int kHopperRows = kConsumers * kGroupRows;
constexpr int kHopperThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kTileAlignment = 1024;  // of the permutations
// Registers of a thread that copies, and of one that multiplies: 128 * 24 + 256 * 240 are there.
constexpr int kFewRegisters = 24, kManyRegisters = 240;
constexpr int kKeyChunks = kHopperKeys / kChunkTokens;

// Columns from `kFirst` on, as they lie in shared memory.
template <int columns>
struct ColumnBlock {
    static_assert(columns == 8 || columns == 32 || columns == 64);
    static constexpr Swizzle kSwizzle = columns == 64   ? Swizzle::k128
                                        : columns == 32 ? Swizzle::k64
                                                        : Swizzle::kNone;
    static constexpr int kRowBytes = columns * 2, kGroupBytes = 8 * kRowBytes;
    static constexpr int kBytes = kHopperKeys * kRowBytes;
};

template <int D>
struct HopperTile {
    static constexpr int kFirst = 64, kRest = D - kFirst;
    using First = ColumnBlock<kFirst>;
    using Rest = ColumnBlock<kRest == 0 ? 64 : kRest>;
    static constexpr bool kZeros = kRest == 8;  // behind the rest
    static constexpr int kBytes =
        First::kBytes + (kRest == 0 ? 0 : Rest::kBytes) * (kZeros ? 2 : 1);
};

template <int operands>
struct TileMaps {
    TensorMap first[operands], rest[operands];
};

struct HopperStages {
    struct Full;
    struct Empty;
    Mbarrier *full, *empty;
    char* tiles;
};

TIM_DEVICE HopperStages hopper_stages() {
    char* const shared = reinterpret_cast<char*>(shared_memory());
    const int behind = shared_address(shared) % kTileAlignment;
    return {shared_array<HopperStages::Full, Mbarrier, kMaxStages>(),
            shared_array<HopperStages::Empty, Mbarrier, kMaxStages>(),
            shared + (kTileAlignment - behind) % kTileAlignment};
}

// Position in the ring of stages.
struct StageAt {
    int stage = 0, parity = 0;

    __device__ __forceinline__ void advance(int stages) {
        ++stage;
        if (stage < stages) return;
        stage = 0;
        parity ^= 1;
    }
};

// To be called by all threads: `arrivals` of each phase of a stage that becomes free.
TIM_DEVICE void init_stages(const HopperStages& at, int stages, int arrivals) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; ++i) {
            init_mbarrier(at.full + i, 1);
            init_mbarrier(at.empty + i, arrivals);
        }
        publish_mbarriers();
    }
    barrier();
}

// Sets up the stages, and calls fetch() on one thread and consume(first row of the warp) on those
// of the warpgroups that have rows.
template <class Fetch, class Consume>
TIM_DEVICE void divide_roles(const HopperStages& at, const Task& task, int stages,
                             const Fetch& fetch, const Consume& consume) {
    const int left = task.rows.count - task.row;
    init_stages(at, stages, (left > kGroupRows ? 2 : 1) * kWarpgroup / kWarp);
    const int group = threadIdx.x / kWarpgroup - 1;
    if (group < 0) {
        give_registers<kFewRegisters>();
        if (threadIdx.x == 0) fetch();
    } else {
        take_registers<kManyRegisters>();
        const int warp = threadIdx.x / kWarp - kWarpgroup / kWarp;
        if (group * kGroupRows < left) consume(task.row + warp * kBandRows);
    }
}

// What one thread does while others multiply: fetches the tiles of the operands that are there.
template <int D, int operands>
TIM_DEVICE void fetch_tiles(const HopperStages& at, const TileMaps<operands>& maps,
                            const bool (&there)[operands], const Task& task, int stages) {
    using Tile = HopperTile<D>;
    int bytes = 0;
#pragma unroll
    for (int i = 0; i < operands; ++i) bytes += there[i] ? Tile::kBytes : 0;
    StageAt now;
    for (int token = 0; token < task.swept.count; token += kHopperKeys) {
        wait_for_phase(at.empty + now.stage, now.parity ^ 1);
        Mbarrier* const full = at.full + now.stage;
        arrive_and_expect(full, bytes);
#pragma unroll
        for (int i = 0; i < operands; ++i) {
            if (!there[i]) continue;
            char* const to = at.tiles + (now.stage * operands + i) * Tile::kBytes;
            copy_box(to, maps.first[i], full, 0, token, task.head, task.sample);
            char* const rest = to + Tile::First::kBytes;
            if constexpr (Tile::kRest > 0)
                copy_box(rest, maps.rest[i], full, Tile::kFirst, token, task.head, task.sample);
            if constexpr (Tile::kZeros)
                copy_box(rest + Tile::Rest::kBytes, maps.rest[i], full, D, token, task.head,
                         task.sample);
        }
        now.advance(stages);
    }
}

// scores += x k^T, or the product alone unless `adds`, for a tile of keys at this shared address.
template <class T, int D>
TIM_DEVICE void multiply_keys(float (&scores)[8][4], const Left<D>& x, uint32_t keys, bool adds) {
    using Tile = HopperTile<D>;
    using First = typename Tile::First;
    using Rest = typename Tile::Rest;
    fence_products();
#pragma unroll
    for (int k = 0; k < Tile::kFirst / 16; ++k)
        multiply<T, false>(
            scores, x.whole[k],
            matrix_descriptor(keys + 32 * k, 16, First::kGroupBytes, First::kSwizzle),
            adds || k > 0);
    keys += First::kBytes;
    if constexpr (Tile::kZeros) {
        const uint32_t left[] = {x.rest[0], x.rest[1], 0, 0};
        multiply<T, false>(scores, left,
                           matrix_descriptor(keys, Rest::kBytes, Rest::kGroupBytes, Rest::kSwizzle),
                           true);
    } else {
#pragma unroll
        for (int k = 0; k < Tile::kRest / 16; ++k)
            multiply<T, false>(
                scores, x.whole[Tile::kFirst / 16 + k],
                matrix_descriptor(keys + 32 * k, 16, Rest::kGroupBytes, Rest::kSwizzle), true);
    }
}

// sums += weights v, for a tile of values.
template <class T, int D>
TIM_DEVICE void multiply_values(Sums<D, 1>& sums, const uint32_t (&weights)[kKeyChunks][4],
                                uint32_t values) {
    using Tile = HopperTile<D>;
    using First = typename Tile::First;
    using Rest = typename Tile::Rest;
    constexpr int kUnits = Tile::kFirst / 8, kRestUnits = Tile::kRest / 8;
    auto& first = reinterpret_cast<float (&)[kUnits][4]>(sums[0][0]);
    fence_products();
#pragma unroll
    for (int chunk = 0; chunk < kKeyChunks; ++chunk) {
        multiply<T, true>(first, weights[chunk],
                          matrix_descriptor(values + chunk * 2 * First::kGroupBytes, 16,
                                            First::kGroupBytes, First::kSwizzle),
                          true);
        if constexpr (Tile::kRest > 0) {
            auto& rest = reinterpret_cast<float (&)[kRestUnits][4]>(sums[0][kUnits]);
            multiply<T, true>(
                rest, weights[chunk],
                matrix_descriptor(values + First::kBytes + chunk * 2 * Rest::kGroupBytes,
                                  Rest::kGroupBytes, Rest::kGroupBytes, Rest::kSwizzle),
                true);
        }
    }
}

// Maps of an operand's columns from `first` on; of an absent one none.
template <int D, class T>
bool map_operand(TensorMap* first, TensorMap* rest, const Operand<T>& x, const Problem& problem,
                 int64_t batch) {
    using Tile = HopperTile<D>;
    if (x.data == nullptr) return true;
    const int64_t sizes[] = {D, problem.swept.tokens, problem.heads, batch};
    const int64_t strides[] = {x.strides.token, x.strides.head, x.strides.batch};
    const auto map = [&](TensorMap* to, int columns, Swizzle swizzle) {
        return make_tensor_map(to, x.data, sizes, strides, {columns, kHopperKeys, 1, 1}, swizzle);
    };
    return map(first, Tile::kFirst, Tile::First::kSwizzle) &&
           (Tile::kRest == 0 || map(rest, Tile::kRest, Tile::Rest::kSwizzle));
}

// False where an operand has an address or strides that TMA does not take.
template <Subset subset, int D, class T>
bool map_swept(TileMaps<kSweptOperands<subset>>* maps, const Inputs<T>& x, const Problem& problem,
               int64_t batch) {
    const Operand<T> operands[] = {x.k, x.v, x.t_k, x.t_v};
    for (int i = 0; i < kSweptOperands<subset>; ++i)
        if (!map_operand<D>(maps->first + i, maps->rest + i, operands[i], problem, batch))
            return false;
    return true;
}

// Whether the device and the build have what these kernels need, and the call is one of theirs:
// packed sequences end anywhere in a tile, and their neighbours' numbers would follow.
inline bool hopper_takes(const Call& call, const Problem& problem) {
#if defined(__CUDACC__) && !defined(TIM_SM90A)
    return false;
#endif
    return device_attribute(call, cudaDevAttrComputeCapabilityMajor) == 9 &&
           device_attribute(call, cudaDevAttrComputeCapabilityMinor) == 0 &&
           problem.rows.offsets == nullptr && problem.swept.tokens > 0;
}

// Of tiles of so many operands; false where two stages of them do not fit.
template <int D>
bool make_hopper_plan(const Call& call, const Problem& problem, int operands, Plan* plan) {
    *plan = {};
    plan->rows = kHopperRows;
    plan->tile = kHopperKeys;
    count_blocks(problem, 1, plan);
    const int stage = operands * HopperTile<D>::kBytes;
    const int most = device_attribute(call, cudaDevAttrMaxSharedMemoryPerBlockOptin) -
                     kTileAlignment - kReservedBytes;
    plan->stages = most / stage < kMaxStages ? most / stage : kMaxStages;
    plan->shared_bytes = size_t(plan->stages) * size_t(stage) + kTileAlignment;
    return plan->stages >= 2 && plan->all_blocks <= kMaxGridX;
}

}  // namespace
}  // namespace tim::cuda
