// A ring of one stage that a warp fills by copies of boxes and a warpgroup multiplies, healthy and
// with planted faults.
//
// The matrix [24, 16] is three tiles of eight columns of a right operand; with ones on the left, a
// product gives the sums of its rows, which all eight entries of a row of `out` [.., 8] hold.
#include <stdexcept>

#include "kernels.h"

namespace tim::cuda {
namespace {

constexpr int kTiles = 3, kColumns = 8, kDepth = 16;
constexpr int kPlane = kColumns * 16;  // bytes: one unit of each column
constexpr uint32_t kOnes = 0x3f803f80;

enum class Ring {
    kHealthy,
    kNoWait,         // for a tile
    kEarlyRelease,   // of a stage that products still read
    kNoRelease,      // of a stage
    kNoEmptyWait,    // before a stage is filled again
    kNoFence,        // before products
    kNoProductWait,  // before the end
    kFewBytes,       // expected
    kManyBytes,
    kManyArrivals,
    kNoInit,     // of the barriers
    kNoBarrier,  // after it
    kMisaligned,
    kUnrounded,  // start of the permuted rows
    kNotAwaited,
    kOrdinaryRead,  // of a tile before it is there
};

template <Ring fault>
__global__ void ring(const __grid_constant__ TensorMap map, float* out, int entries) {
    char* const shared = reinterpret_cast<char*>(shared_memory());
    char* const tile = shared + 1024 - shared_address(shared) % 1024;
    Mbarrier* const full = shared_array<struct Full, Mbarrier, 1>();
    Mbarrier* const empty = shared_array<struct Empty, Mbarrier, 1>();
    if (threadIdx.x == 0 && fault != Ring::kNoInit) {
        init_mbarrier(full, 1);
        init_mbarrier(empty, kWarpgroup / kWarp);
        publish_mbarriers();
    }
    if (fault != Ring::kNoBarrier) barrier();
    if (threadIdx.x >= kWarpgroup) {
        if (lane() > 0) return;
        for (int i = 0; i < kTiles; ++i) {
            if (fault != Ring::kNoEmptyWait) wait_for_phase(empty, i % 2 ^ 1);
            arrive_and_expect(full, 2 * kPlane + (fault == Ring::kManyBytes ? 16 : 0) -
                                        (fault == Ring::kFewBytes ? 16 : 0));
            if (fault == Ring::kManyArrivals) arrive(full);
            for (int unit = 0; unit < 2; ++unit)
                copy_box(tile + unit * kPlane + (fault == Ring::kMisaligned ? 16 : 0), map, full,
                         8 * unit, i * kColumns, 0, 0);
        }
        return;
    }
    float d[1][4] = {};
    const uint32_t a[] = {kOnes, kOnes, kOnes, kOnes};
    for (int i = 0; i < kTiles; ++i) {
        if (fault == Ring::kOrdinaryRead && i == 1) out[0] = *reinterpret_cast<float*>(tile);
        if (fault == Ring::kNotAwaited) return;
        if (fault != Ring::kNoWait) wait_for_phase(full, i % 2);
        if (fault != Ring::kNoFence) fence_products();
        multiply<BFloat16, false>(
            d, a,
            fault == Ring::kUnrounded
                ? matrix_descriptor(shared_address(tile) + 128, 16, 1024, Swizzle::k128)
                : matrix_descriptor(shared_address(tile), kPlane, 128, Swizzle::kNone),
            true);
        commit_products();
        if (fault == Ring::kEarlyRelease && lane() == 0) arrive(empty);
        if (fault != Ring::kNoProductWait) wait_for_products<0>();
        if (fault != Ring::kEarlyRelease && fault != Ring::kNoRelease && lane() == 0) arrive(empty);
    }
    for (int row = threadIdx.x / 4; row < entries / kColumns; row += kWarpgroup / 4)
        for (int i = 0; i < 2; ++i) out[row * kColumns + lane() % 4 * 2 + i] = d[0][i];
}

}  // namespace

const std::vector<RingKernel>& ring_faults() {
    static const std::vector<RingKernel> list = {
        {"ring", ring<Ring::kHealthy>},
        {"ring_no_wait", ring<Ring::kNoWait>},
        {"ring_early_release", ring<Ring::kEarlyRelease>},
        {"ring_no_release", ring<Ring::kNoRelease>},
        {"ring_no_empty_wait", ring<Ring::kNoEmptyWait>},
        {"ring_no_fence", ring<Ring::kNoFence>},
        {"ring_no_product_wait", ring<Ring::kNoProductWait>},
        {"ring_few_bytes", ring<Ring::kFewBytes>},
        {"ring_many_bytes", ring<Ring::kManyBytes>},
        {"ring_many_arrivals", ring<Ring::kManyArrivals>},
        {"ring_no_init", ring<Ring::kNoInit>},
        {"ring_no_barrier", ring<Ring::kNoBarrier>},
        {"ring_misaligned", ring<Ring::kMisaligned>},
        {"ring_unrounded", ring<Ring::kUnrounded>},
        {"ring_not_awaited", ring<Ring::kNotAwaited>},
        {"ring_ordinary_read", ring<Ring::kOrdinaryRead>},
    };
    return list;
}

void launch_ring(const RingKernel& test, const float* in, float* out) {
    constexpr int kRows = kTiles * kColumns;
    const Call call{test.name, {}, nullptr};
    TensorMap map;
    if (!make_tensor_map(&map, reinterpret_cast<const BFloat16*>(in), {kDepth, kRows, 1, 1},
                         {kDepth, 0, 0}, {8, kColumns, 1, 1}, Swizzle::kNone))
        throw std::invalid_argument("in must be aligned to 16 bytes");
    launch(call, test.kernel, dim3(1), kWarpgroup + kWarp, 4096, map, out, kRows * kDepth / 2);
}

}  // namespace tim::cuda
