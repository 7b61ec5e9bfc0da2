#include "../math/transition_loss.h"

#include "kernel.h"
#include "rows.h"

namespace tim::cpu::TIM_ISA {
namespace {

struct Size {
    int64_t batch, channels, positions;
};

// Work is cut into blocks of this many positions, all channels each, whatever the number of
// threads: the sums depend on the input alone, and a block's cosine sums stay in the first-level
// cache.
constexpr int64_t kBlock = 512;

// Without the cosine term channels and positions are one dimension.
inline Size flatten(Size size, bool cosine) {
    return cosine ? size : Size{size.batch, 1, size.channels * size.positions};
}

// Calls body(sample, offset, n, id): the positions offset .. offset + n - 1 of one sample.
template <class Body>
void parallel_blocks(Size size, int64_t threads, const Body& body) {
    const int64_t blocks = ceil_div(size.positions, kBlock);
    const int64_t elements = size.channels * (size.positions < kBlock ? size.positions : kBlock);
    parallel_for(size.batch * blocks, elements, threads,
                 [&](int64_t begin, int64_t end, int64_t id) {
                     for (int64_t i = begin; i < end; ++i) {
                         const int64_t offset = i % blocks * kBlock;
                         const int64_t left = size.positions - offset;
                         body(i / blocks, offset, left < kBlock ? left : kBlock, id);
                     }
                 });
}

// Per position, over channels: first F . target, F . F and target . target, then, by finish_angles,
// the cosine and the two norms in their places.
struct Angles {
    float* cosine;
    float* F_norm;
    float* target_norm;

    explicit Angles(float* memory)
        : cosine(memory), F_norm(memory + kBlock), target_norm(memory + 2 * kBlock) {}
};

template <class T, class D>
void add_products(const T* F, const D* target, Angles sums, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float f = load(F + i), t = load(target + i);
        sums.cosine[i] += f * t;
        sums.F_norm[i] += f * f;
        sums.target_norm[i] += t * t;
    }
}

inline void finish_angles(Angles sums, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float F_norm = math::clamped_norm(sums.F_norm[i]);
        const float target_norm = math::clamped_norm(sums.target_norm[i]);
        sums.cosine[i] = math::cosine(sums.cosine[i], F_norm, target_norm);
        sums.F_norm[i] = F_norm;
        sums.target_norm[i] = target_norm;
    }
}

// out += c x
template <class T>
void add_scaled(float* out, float c, const T* x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] += c * load(x + i);
}

// T: dtype of the network's outputs, D: of the data.
template <class T, class D>
struct Inputs {
    const T* F;
    const D* x;
    const D* z;
    const T* d;  // of the samples from `first` on, as d_minus
    const T* d_minus;
    const T* cond;
    const T* null;
    const float* coefficients;  // [B, 6]
    int64_t first;
};

// The target of n positions of one channel; `at` is their place in a full tensor, `at_d` in d.
template <class T, class D>
void compute_target(const Inputs<T, D>& in, int64_t sample, int64_t at, int64_t at_d, float* out,
                    int64_t n) {
    const float* c = in.coefficients + 6 * sample;
    const float c_x = c[0], c_z = c[1], c_d = c[2], c_minus = c[3];
    const D* x = in.x + at;
    const D* z = in.z + at;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = c_x * load(x + i) + c_z * load(z + i);
    if (in.d != nullptr && sample >= in.first) {
        const T* d = in.d + at_d;
        if (in.d_minus == nullptr) {
            add_scaled(out, c_d, d, n);
        } else {
            const T* d_minus = in.d_minus + at_d;
#pragma omp simd
            for (int64_t i = 0; i < n; ++i)
                out[i] += math::weighted_difference(c_d, load(d + i), c_minus, load(d_minus + i));
        }
    }
    if (in.cond != nullptr) add_scaled(out, c[4], in.cond + at, n);
    if (in.null != nullptr) add_scaled(out, c[5], in.null + at, n);
}

template <class T, class D>
void forward(const Inputs<T, D>& in, const float* time_weight, D* target, float* loss,
             float* denoising, float* weight, Size full, bool cosine, int64_t threads) {
    const Size size = flatten(full, cosine);
    const int64_t numel = size.channels * size.positions;
    const int64_t blocks = ceil_div(size.positions, kBlock);
    const Scratch scratch(threads * 4 * kBlock);
    const Scratch partial(size.batch * blocks * 2);
    parallel_blocks(size, threads, [&](int64_t sample, int64_t offset, int64_t n, int64_t id) {
        float* const row = scratch.data + id * 4 * kBlock;
        const Angles angles(row + kBlock);
        if (cosine) fill_zero(row + kBlock, 3 * kBlock);
        double squares = 0.0;
        for (int64_t channel = 0; channel < size.channels; ++channel) {
            const int64_t at = sample * numel + channel * size.positions + offset;
            compute_target(in, sample, at, at - in.first * numel, row, n);
            const T* F = in.F + at;
            D* out = target + at;
            // The loss sees the stored target, rounded to its dtype, as the backward pass will.
            float channel_squares = 0.0f;
#pragma omp simd reduction(+ : channel_squares)
            for (int64_t i = 0; i < n; ++i) {
                store(out + i, row[i]);
                channel_squares += math::squared_error(load(F + i), load(out + i));
            }
            squares += channel_squares;
            if (cosine) add_products(F, out, angles, n);
        }
        float distance = 0.0f;
        if (cosine) {
            finish_angles(angles, n);
#pragma omp simd reduction(+ : distance)
            for (int64_t i = 0; i < n; ++i) distance += 1.0f - angles.cosine[i];
        }
        float* const result = partial.data + 2 * (sample * blocks + offset / kBlock);
        result[0] = float(squares);
        result[1] = distance;
    });
    for (int64_t sample = 0; sample < size.batch; ++sample) {
        double squares = 0.0, distance = 0.0;
        for (int64_t block = 0; block < blocks; ++block) {
            squares += partial.data[2 * (sample * blocks + block)];
            distance += partial.data[2 * (sample * blocks + block) + 1];
        }
        denoising[sample] = float(squares / double(numel) + distance / double(size.positions));
        weight[sample] = math::adaptive_weight(time_weight[sample], denoising[sample]);
        loss[sample] = weight[sample] * denoising[sample];
    }
}

template <class T, class D>
void backward(const float* scales, const T* Fs, const D* targets, T* dFs, Size full, bool cosine,
              int64_t threads) {
    const Size size = flatten(full, cosine);
    const int64_t numel = size.channels * size.positions;
    const Scratch scratch(threads * 3 * kBlock);
    parallel_blocks(size, threads, [&](int64_t sample, int64_t offset, int64_t n, int64_t id) {
        const Angles angles(scratch.data + id * 3 * kBlock);
        const float squares = 2.0f * scales[sample] / float(numel);
        const float cosines = scales[sample] / float(size.positions);
        const int64_t start = sample * numel + offset;
        if (!cosine) {
            const T* F = Fs + start;
            const D* target = targets + start;
            T* dF = dFs + start;
#pragma omp simd
            for (int64_t i = 0; i < n; ++i)
                store(dF + i, squares * (load(F + i) - load(target + i)));
            return;
        }
        fill_zero(angles.cosine, 3 * kBlock);
        for (int64_t channel = 0; channel < size.channels; ++channel) {
            const int64_t at = start + channel * size.positions;
            add_products(Fs + at, targets + at, angles, n);
        }
        finish_angles(angles, n);
        for (int64_t channel = 0; channel < size.channels; ++channel) {
            const int64_t at = start + channel * size.positions;
            const T* F = Fs + at;
            const D* target = targets + at;
            T* dF = dFs + at;
#pragma omp simd
            for (int64_t i = 0; i < n; ++i)
                store(dF + i, math::loss_gradient(load(F + i), load(target + i), squares, cosines,
                                                  angles.cosine[i], angles.F_norm[i],
                                                  angles.target_norm[i]));
        }
    });
}

// Calls body with one value of each storage type; the data may be wider than the network's outputs.
template <class Body>
void with_dtypes(int dtype, int data_dtype, int64_t threads, const Body& body) {
    if (dtype == data_dtype) {
        with_dtype(dtype, threads, [&](auto type) { body(type, type); });
    } else if (dtype == kBFloat16 && data_dtype == kFloat32) {
        with_dtype(dtype, threads, [&](auto type) { body(type, float{}); });
    } else {
        refuse(
            "transition_loss: data_dtype must be dtype, or 0 (float32) beside dtype 1 (bfloat16)");
    }
}

void transition_loss(const void* F, const void* x, const void* z, const void* d,
                     const void* d_minus, const void* cond, const void* null,
                     const float* coefficients, const float* time_weight, int64_t first,
                     void* target, float* loss, float* denoising, float* weight, int64_t batch,
                     int64_t channels, int64_t positions, bool cosine, int dtype, int data_dtype,
                     int64_t where) {
    with_dtypes(dtype, data_dtype, where, [&](auto type, auto data_type) {
        using T = decltype(type);
        using D = decltype(data_type);
        const Inputs<T, D> in{static_cast<const T*>(F),
                              static_cast<const D*>(x),
                              static_cast<const D*>(z),
                              static_cast<const T*>(d),
                              static_cast<const T*>(d_minus),
                              static_cast<const T*>(cond),
                              static_cast<const T*>(null),
                              coefficients,
                              first};
        forward(in, time_weight, static_cast<D*>(target), loss, denoising, weight,
                {batch, channels, positions}, cosine, where);
    });
}

void transition_loss_backward(const float* scale, const void* F, const void* target, void* dF,
                              int64_t batch, int64_t channels, int64_t positions, bool cosine,
                              int dtype, int data_dtype, int64_t where) {
    with_dtypes(dtype, data_dtype, where, [&](auto type, auto data_type) {
        using T = decltype(type);
        using D = decltype(data_type);
        backward(scale, static_cast<const T*>(F), static_cast<const D*>(target),
                 static_cast<T*>(dF), {batch, channels, positions}, cosine, where);
    });
}

}  // namespace

void add_transition_loss(Kernels& kernels) {
    kernels.transition_loss = transition_loss;
    kernels.transition_loss_backward = transition_loss_backward;
}

}  // namespace tim::cpu::TIM_ISA
