// Small kernels with a fault each, and the same kernels without it, for the tests of the emulator.
//
// Each writes to `out`, of as many floats as threads, what the healthy version has of `in`.
#include "kernels.h"

namespace tim::cuda {
namespace {

constexpr int kThreads = 64;

// Each thread hands its value to the next one through shared memory, around the block.
enum class Pass { kHealthy, kNoBarrier, kUnwritten, kOutOfBounds, kWarpBarrier, kOverwrite };

template <Pass fault>
__global__ void pass_on(const float* in, float* out) {
    const int i = threadIdx.x;
    float* const slots = shared_memory();
    const int to = (i + 1) % kThreads + (fault == Pass::kOutOfBounds);
    if (fault != Pass::kUnwritten || i != 5) slots[to] = load_global(in + i);
    if (fault == Pass::kWarpBarrier) {
        __syncwarp();
    } else if (fault != Pass::kNoBarrier) {
        barrier();
    }
    out[i] = slots[i];
    if (fault == Pass::kOverwrite) slots[i ^ 1] = 0.0f;
}

// The same within a warp, back and forth.
enum class Swap { kHealthy, kNoWarpBarrier, kHalfWarpBarrier, kOverwrite };

template <Swap fault>
__global__ void swap_within_warp(const float* in, float* out) {
    const int i = threadIdx.x, other = i ^ 16;
    float* const slots = shared_memory();
    slots[i] = in[i];
    if (fault == Swap::kHalfWarpBarrier) {
        __syncwarp(lane() < 16 ? 0xffffu : 0xffff0000u);
    } else if (fault != Swap::kNoWarpBarrier) {
        __syncwarp();
    }
    const float value = slots[other];
    if (fault != Swap::kOverwrite) __syncwarp();
    slots[i] = value + 1.0f;
    out[i] = slots[i];
}

// Sums over groups of 16 lanes.
enum class Sum { kHealthy, kWidth, kNoPower, kLanesDiffer, kLaneMissing, kOutsideMask, kOtherMask };

template <Sum fault>
__global__ void group_sum(const float* in, float* out) {
    const int i = threadIdx.x;
    float value = in[i];
    const int width = fault == Sum::kWidth                       ? 32
                      : fault == Sum::kNoPower                   ? 24
                      : fault == Sum::kLanesDiffer && i % 2 == 0 ? 8
                                                                 : 16;
    if (fault == Sum::kLaneMissing && i == 7) return;
    if (fault == Sum::kOutsideMask) {
        if (i % 32 < 8) value += __shfl_down_sync(0xffu, value, 1, width);
        return;
    }
    if (fault == Sum::kOtherMask) {
        value += __shfl_xor_sync(i % 32 < 8 ? 0xffu : 0xffff00ffu, value, 1, width);
        return;
    }
    for (int delta = 8; delta > 0; delta /= 2)
        value += __shfl_down_sync(0xffffffffu, value, delta, width);
    out[i] = __shfl_sync(0xffffffffu, value, 0, width);
}

// Reverses the array through its neighbours in global memory.
enum class Reverse { kHealthy, kBeyondEnd, kBeforeStart, kMisaligned, kRace, kInPlace, kReadOnly };

template <Reverse fault>
__global__ void reverse(const float* in, float* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    if (fault == Reverse::kMisaligned && i == 3) {
        *reinterpret_cast<float2*>(out + i) = float2{0, 0};
        return;
    }
    if (fault == Reverse::kReadOnly) {
        out[i] = in[n - 1 - i];
        barrier();
        out[i] = load_global(out + i);
        return;
    }
    if (fault == Reverse::kInPlace) {
        const float value = out[n - 1 - i];
        barrier();
        out[i] = value;
        return;
    }
    const int from = fault == Reverse::kBeyondEnd     ? n - i
                     : fault == Reverse::kBeforeStart ? n - 2 - i
                                                      : n - 1 - i;
    out[fault == Reverse::kRace ? threadIdx.x : i] = in[from];
}

// Barriers that not all threads reach, or not the same one.
enum class Meet { kHealthy, kEarlyExit, kBranch, kOneMore };

template <Meet fault>
__global__ void meet(const float* in, float* out) {
    const int i = threadIdx.x;
    if (fault == Meet::kEarlyExit && i == 40) return;
    if (fault == Meet::kBranch && i < 32) {
        barrier();
    } else {
        out[i] = in[i];
        barrier();
    }
    if (fault == Meet::kOneMore && i == 63) barrier();
    if (fault == Meet::kBranch) return;
    out[i] = in[i];
}

// Static shared memory, written by one thread.
enum class Static { kHealthy, kNoBarrier, kOutOfBounds };

template <Static fault>
__global__ void broadcast(const float* in, float* out) {
    float* const value = shared_array<Static, float, 1>();
    if (threadIdx.x == 9) value[fault == Static::kOutOfBounds] = in[9];
    if (fault != Static::kNoBarrier) barrier();
    out[threadIdx.x] = value[0];
}

// Two tiles by asynchronous copies, the second on its way while the first is read.
enum class Copy { kHealthy, kNoWait, kNoBarrier, kNotCommitted, kMisaligned, kOverwrite, kEnds };

template <Copy fault>
__global__ void copy_tiles(const float* in, float* out) {
    const int i = threadIdx.x;
    float* const tiles = shared_memory();  // [2, 4 kThreads]
    float* const own = tiles + 4 * i + (fault == Copy::kMisaligned);
    copy_async(own, in + i / 4 * 4);
    if (fault != Copy::kNotCommitted) commit_copies();
    copy_async(own + 4 * kThreads, in + i / 4 * 4, 8);
    commit_copies();
    if (fault != Copy::kNoWait) wait_for_copies<1>();
    if (fault != Copy::kNoBarrier) barrier();
    const float first = tiles[4 * (i ^ 1) + i % 4];
    if (fault == Copy::kOverwrite) {
        copy_async(tiles + 4 * i, in);
        commit_copies();
    }
    if (fault != Copy::kEnds) wait_for_copies<0>();
    barrier();
    // Of the second copy, only two values were read; the others are zeros.
    out[i] = fault == Copy::kEnds ? first : first + tiles[4 * kThreads + 4 * i + i % 4];
}

__global__ void overflow(const float* in, float* out) {
    volatile float deep[1 << 16];
    for (int i = 0; i < 1 << 16; ++i) deep[i] = in[threadIdx.x];
    out[threadIdx.x] = deep[threadIdx.x];
}

__global__ void divide(const float* in, float* out) {
    const int zero = int(in[threadIdx.x] * 0.0f);
    out[threadIdx.x] = float(7 / zero);
}

}  // namespace

const std::vector<TestKernel>& faults() {
    constexpr size_t kSlots = kThreads * sizeof(float), kTiles = 8 * kSlots + 16;
    static const std::vector<TestKernel> kernels = {
        {"pass_on", pass_on<Pass::kHealthy>, 1, kThreads, kSlots},
        {"pass_on_no_barrier", pass_on<Pass::kNoBarrier>, 1, kThreads, kSlots},
        {"pass_on_unwritten", pass_on<Pass::kUnwritten>, 1, kThreads, kSlots},
        {"pass_on_out_of_bounds", pass_on<Pass::kOutOfBounds>, 1, kThreads, kSlots},
        {"pass_on_warp_barrier", pass_on<Pass::kWarpBarrier>, 1, kThreads, kSlots},
        {"pass_on_overwrite", pass_on<Pass::kOverwrite>, 1, kThreads, kSlots},
        {"swap", swap_within_warp<Swap::kHealthy>, 1, kThreads, kSlots},
        {"swap_no_warp_barrier", swap_within_warp<Swap::kNoWarpBarrier>, 1, kThreads, kSlots},
        {"swap_half_warp_barrier", swap_within_warp<Swap::kHalfWarpBarrier>, 1, kThreads, kSlots},
        {"swap_overwrite", swap_within_warp<Swap::kOverwrite>, 1, kThreads, kSlots},
        {"group_sum", group_sum<Sum::kHealthy>, 1, kThreads, 0},
        {"group_sum_width", group_sum<Sum::kWidth>, 1, kThreads, 0},
        {"group_sum_no_power", group_sum<Sum::kNoPower>, 1, kThreads, 0},
        {"group_sum_lanes_differ", group_sum<Sum::kLanesDiffer>, 1, kThreads, 0},
        {"group_sum_lane_missing", group_sum<Sum::kLaneMissing>, 1, kThreads, 0},
        {"group_sum_outside_mask", group_sum<Sum::kOutsideMask>, 1, kThreads, 0},
        {"group_sum_other_mask", group_sum<Sum::kOtherMask>, 1, kThreads, 0},
        {"reverse", reverse<Reverse::kHealthy>, 3, kThreads, 0},
        {"reverse_beyond_end", reverse<Reverse::kBeyondEnd>, 3, kThreads, 0},
        {"reverse_before_start", reverse<Reverse::kBeforeStart>, 3, kThreads, 0},
        {"reverse_misaligned", reverse<Reverse::kMisaligned>, 3, kThreads, 0},
        {"reverse_race", reverse<Reverse::kRace>, 3, kThreads, 0},
        {"reverse_in_place", reverse<Reverse::kInPlace>, 3, kThreads, 0},
        {"reverse_read_only", reverse<Reverse::kReadOnly>, 3, kThreads, 0},
        {"meet", meet<Meet::kHealthy>, 1, kThreads, 0},
        {"meet_early_exit", meet<Meet::kEarlyExit>, 1, kThreads, 0},
        {"meet_branch", meet<Meet::kBranch>, 1, kThreads, 0},
        {"meet_one_more", meet<Meet::kOneMore>, 1, kThreads, 0},
        {"broadcast", broadcast<Static::kHealthy>, 1, kThreads, 0},
        {"broadcast_no_barrier", broadcast<Static::kNoBarrier>, 1, kThreads, 0},
        {"broadcast_out_of_bounds", broadcast<Static::kOutOfBounds>, 1, kThreads, 0},
        {"copy", copy_tiles<Copy::kHealthy>, 1, kThreads, kTiles},
        {"copy_no_wait", copy_tiles<Copy::kNoWait>, 1, kThreads, kTiles},
        {"copy_no_barrier", copy_tiles<Copy::kNoBarrier>, 1, kThreads, kTiles},
        {"copy_not_committed", copy_tiles<Copy::kNotCommitted>, 1, kThreads, kTiles},
        {"copy_misaligned", copy_tiles<Copy::kMisaligned>, 1, kThreads, kTiles},
        {"copy_overwrite", copy_tiles<Copy::kOverwrite>, 1, kThreads, kTiles},
        {"copy_ends", copy_tiles<Copy::kEnds>, 1, kThreads, kTiles},
        {"overflow", overflow, 1, kThreads, 0},
        {"divide", divide, 1, kThreads, 0},
        {"too_many_threads", meet<Meet::kHealthy>, 1, 1056, 0},
        {"no_blocks", meet<Meet::kHealthy>, 0, kThreads, 0},
        {"too_much_shared_memory", pass_on<Pass::kHealthy>, 1, kThreads, 48 * 1024 + 4},
    };
    return kernels;
}

void limit_shared_memory(int bytes) {
    const cudaError_t error = cudaFuncSetAttribute(
        pass_on<Pass::kHealthy>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    check(Call{"limit_shared_memory", {}, nullptr}, error);
}

}  // namespace tim::cuda
