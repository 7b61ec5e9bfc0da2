#include "../math/interpolate.h"

#include "common.cuh"

namespace tim::cuda {
namespace {

template <class T, int n>
__global__ void __launch_bounds__(kPieceThreads)
    forward(const T* xs, const T* zs, const float* coefficients, T* as, T* bs, int64_t batch,
            int64_t packs) {
    for_each_piece(batch, packs, [&](int64_t sample, int64_t first) {
        Pack<T, n> x[kUnroll], z[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int64_t pack = first + i * kWarp;
            if (pack >= packs) continue;
            x[i] = read<n>(xs + (sample * packs + pack) * n);
            z[i] = read<n>(zs + (sample * packs + pack) * n);
        }
        float c[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) c[i] = load_global(coefficients + 4 * sample + i);
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int64_t pack = first + i * kWarp;
            if (pack >= packs) continue;
            float a[n], b[n];
#pragma unroll
            for (int j = 0; j < n; ++j) {
                const float x_j = load(x[i], j), z_j = load(z[i], j);
                a[j] = math::combine(c[0], x_j, c[1], z_j);
                b[j] = math::combine(c[2], x_j, c[3], z_j);
            }
            write(as + (sample * packs + pack) * n, narrow<T>(a));
            write(bs + (sample * packs + pack) * n, narrow<T>(b));
        }
    });
}

void interpolate(const void* x, const void* z, const float* coefficients, void* a, void* b,
                 int64_t batch, int64_t n, int dtype, int64_t where) {
    if (batch == 0 || n == 0) return;
    const Call call{"interpolate", {batch, n}, reinterpret_cast<cudaStream_t>(where)};
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        with_width<T>({x, z, a, b}, {n}, [&](auto width) {
            constexpr int kWidth = decltype(width)::kValue;
            const int64_t packs = n / kWidth;
            launch(call, forward<T, kWidth>, piece_grid(call, batch, packs), kPieceThreads, 0,
                   array<T>(x), array<T>(z), coefficients, array<T>(a), array<T>(b), batch, packs);
        });
    });
}

}  // namespace

void add_interpolate(Kernels& kernels) { kernels.interpolate = interpolate; }

}  // namespace tim::cuda
