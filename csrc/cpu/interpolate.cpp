#include "../math/interpolate.h"

#include "kernel.h"
#include "vector.h"

namespace tim::cpu::TIM_ISA {
namespace {

template <class T>
void forward(const T* xs, const T* zs, const float* coefficients, T* as, T* bs, int64_t batch,
             int64_t n, int64_t threads) {
    parallel_pieces(batch, n, threads, [=](int64_t sample, int64_t begin, int64_t end) {
        const float* c = coefficients + 4 * sample;
        const Vector a_x = c[0], a_z = c[1], b_x = c[2], b_z = c[3];
        const int64_t offset = sample * n + begin;
        const T* x = xs + offset;
        const T* z = zs + offset;
        T* a = as + offset;
        T* b = bs + offset;
        sweep(end - begin, [=](int64_t i, auto lanes) {
            const Vector x_i = load(x + i, lanes), z_i = load(z + i, lanes);
            store(a + i, math::combine(a_x, x_i, a_z, z_i), lanes);
            store(b + i, math::combine(b_x, x_i, b_z, z_i), lanes);
        });
    });
}

void interpolate(const void* x, const void* z, const float* coefficients, void* a, void* b,
                 int64_t batch, int64_t n, int dtype, int64_t where) {
    with_dtype(dtype, where, [&](auto type) {
        using T = decltype(type);
        forward<T>(static_cast<const T*>(x), static_cast<const T*>(z), coefficients,
                   static_cast<T*>(a), static_cast<T*>(b), batch, n, where);
    });
}

}  // namespace

void add_interpolate(Kernels& kernels) { kernels.interpolate = interpolate; }

}  // namespace tim::cpu::TIM_ISA
