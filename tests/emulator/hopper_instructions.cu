// Products of a warpgroup and copies of boxes by csrc/cuda/wgmma.cuh and tma.cuh, for the tests of
// their host versions.
#include <stdexcept>

#include "kernels.h"

namespace tim::cuda {
namespace {

constexpr int kImageRows = 256;  // of 8 halves, that one copy takes

// Fetches `rows` rows of 16 bytes to `to`, for all threads.
TIM_DEVICE void fetch_image(char* to, const TensorMap& map, int rows) {
    Mbarrier* const full = shared_array<struct ImageFull, Mbarrier, 1>();
    if (threadIdx.x == 0) {
        init_mbarrier(full, 1);
        publish_mbarriers();
    }
    barrier();
    if (threadIdx.x == 0) {
        const int copies = int(ceil_div(rows, kImageRows));
        arrive_and_expect(full, copies * kImageRows * 16);
        for (int i = 0; i < copies; ++i)
            copy_box(to + i * kImageRows * 16, map, full, 0, i * kImageRows, 0, 0);
    }
    wait_for_phase(full, 0);
}

TIM_DEVICE char* aligned_shared() {
    char* const shared = reinterpret_cast<char*>(shared_memory());
    return shared + (1024 - shared_address(shared) % 1024) % 1024;
}

// d of each thread after one product: of the registers a [128, 4] and of shared memory that holds
// the image from a multiple of 1024 on, from `start` on.
template <class T, bool transposed, int units>
__global__ void product(const __grid_constant__ TensorMap image, const uint32_t* a, float* d,
                        int rows, Descriptor b) {
    char* const shared = aligned_shared();
    fetch_image(shared, image, rows);
    uint32_t left[4];
    for (int i = 0; i < 4; ++i) left[i] = a[threadIdx.x * 4 + i];
    float sums[units][4];
    for (int i = 0; i < units * 4; ++i) sums[i / 4][i % 4] = d[threadIdx.x * units * 4 + i];
    fence_products();
    multiply<T, transposed>(sums, left,
                            matrix_descriptor(shared_address(shared) + b.start, b.leading, b.stride,
                                              Swizzle(b.swizzle)),
                            b.adds);
    commit_products();
    wait_for_products<0>();
    for (int i = 0; i < units * 4; ++i) d[threadIdx.x * units * 4 + i] = sums[i / 4][i % 4];
}

// The bytes of a box, as they lie in shared memory.
__global__ void box(const __grid_constant__ TensorMap map, uint16_t* out, int elements, int c0,
                    int c1, int c2, int c3) {
    char* const shared = aligned_shared();
    Mbarrier* const full = shared_array<struct BoxFull, Mbarrier, 1>();
    if (threadIdx.x == 0) {
        init_mbarrier(full, 1);
        publish_mbarriers();
        arrive_and_expect(full, elements * 2);
        copy_box(shared, map, full, c0, c1, c2, c3);
    }
    barrier();
    wait_for_phase(full, 0);
    const uint16_t* const halves = reinterpret_cast<uint16_t*>(shared);
    for (int i = threadIdx.x; i < elements; i += blockDim.x) out[i] = halves[i];
}

template <class T, bool transposed, int units>
void launch_product(const TensorMap& image, const void* a, float* d, int rows,
                    const Descriptor& b) {
    const Call call{"product", {}, nullptr};
    const auto kernel = product<T, transposed, units>;
    const size_t bytes = size_t(ceil_div(rows, kImageRows)) * kImageRows * 16 + 1024;
    allow_shared_memory(call, kernel, bytes);
    launch(call, kernel, dim3(1), kWarpgroup, bytes, image, array<uint32_t>(a), d, rows, b);
}

}  // namespace

void warpgroup_product(const void* image, int rows, const void* a, float* d, Descriptor b,
                       int columns, bool transposed, int dtype) {
    TensorMap map;
    if (!make_tensor_map(&map, array<BFloat16>(image), {8, rows, 1, 1}, {8, 0, 0},
                         {8, kImageRows, 1, 1}, Swizzle::kNone))
        throw std::invalid_argument("image must be aligned to 16 bytes");
    const auto with_units = [&](auto type, auto turned) {
        using T = decltype(type);
        constexpr bool kTurned = decltype(turned)::value;
        const auto run = columns == 8    ? launch_product<T, kTurned, 1>
                         : columns == 32 ? launch_product<T, kTurned, 4>
                                         : launch_product<T, kTurned, 8>;
        run(map, a, d, rows, b);
    };
    const auto with_type = [&](auto turned) {
        if (dtype == kBFloat16)
            with_units(BFloat16{}, turned);
        else
            with_units(Float16{}, turned);
    };
    if (transposed)
        with_type(std::true_type{});
    else
        with_type(std::false_type{});
}

bool copied_box(const void* in, void* out, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                const int (&extent)[4], const int (&at)[4], int swizzle) {
    TensorMap map;
    if (!make_tensor_map(&map, array<Float16>(in), sizes, strides, extent, Swizzle(swizzle)))
        return false;
    const int elements = extent[0] * extent[1] * extent[2] * extent[3];
    const Call call{"box", {}, nullptr};
    const size_t bytes = size_t(elements) * 2 + 1024;
    allow_shared_memory(call, box, bytes);
    launch(call, box, dim3(1), kWarp, bytes, map, array<uint16_t>(out), elements, at[0], at[1],
           at[2], at[3]);
    return true;
}

}  // namespace tim::cuda
