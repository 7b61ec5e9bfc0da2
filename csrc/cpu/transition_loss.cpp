#include "../math/transition_loss.h"

#include <type_traits>

#include "kernel.h"
#include "vector.h"

namespace tim::cpu::TIM_ISA {
namespace {

struct Size {
    int64_t batch, channels, positions;
};

// Work is cut into blocks of this many positions, all channels each, whatever the number of
// threads: the sums depend on the input alone.
constexpr int64_t kBlock = 512;

// Without the cosine term channels and positions are one dimension.
inline Size flatten(Size size, bool cosine) {
    return cosine ? size : Size{size.batch, 1, size.channels * size.positions};
}

// Calls body(sample, offset, n): the positions offset .. offset + n - 1 of one sample.
template <class Body>
void parallel_blocks(Size size, int64_t threads, const Body& body) {
    const int64_t blocks = ceil_div(size.positions, kBlock);
    const int64_t elements = size.channels * (size.positions < kBlock ? size.positions : kBlock);
    parallel_for(size.batch * blocks, elements, threads, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t offset = i % blocks * kBlock;
            const int64_t left = size.positions - offset;
            body(i / blocks, offset, left < kBlock ? left : kBlock);
        }
    });
}

// Elements of type D in the order of T's vectors.
template <class T, class D, class Extent>
Vector load_as(const D* p, Extent extent) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        return load_split(p, extent);
    } else {
        return load(p, extent);
    }
}

template <class T, class D, class Extent>
Vector store_as(D* p, Vector x, Extent extent) {
    if constexpr (std::is_same_v<T, D>) {
        return store_rounded(p, x, extent);
    } else {
        store_split(p, x, extent);
        return x;
    }
}

// Per position, over channels.
struct Products {
    Vector dot = 0.0f, F_squares = 0.0f, target_squares = 0.0f;

    void add(Vector F, Vector target) {
        dot += F * target;
        F_squares += F * F;
        target_squares += target * target;
    }
};

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
    const float* coefficients;  // [B, 5]
    float spacing;              // 2 epsilon
    int64_t first;
};

// The target of one sample: everything that is the same at all of its positions.
template <class T, class D>
struct Target {
    Vector c_x, c_z, c_d, c_cond, c_null;
    const D* x;
    const D* z;
    const T* d;  // null where the sample has none, as the others
    const T* d_minus;
    const T* cond;
    const T* null;

    Target(const Inputs<T, D>& in, int64_t sample, int64_t numel) {
        const float* c = in.coefficients + 5 * sample;
        c_x = c[0], c_z = c[1], c_cond = c[3], c_null = c[4];
        c_d = in.d_minus != nullptr ? c[2] / in.spacing : c[2];
        const int64_t at = sample * numel;
        x = in.x + at;
        z = in.z + at;
        const bool moves = in.d != nullptr && sample >= in.first;
        d = moves ? in.d + at - in.first * numel : nullptr;
        d_minus = moves && in.d_minus != nullptr ? in.d_minus + at - in.first * numel : nullptr;
        cond = in.cond != nullptr ? in.cond + at : nullptr;
        null = in.null != nullptr ? in.null + at : nullptr;
    }

    template <class Extent>
    Vector operator()(int64_t i, Extent extent) const {
        Vector sum = c_x * load_as<T>(x + i, extent) + c_z * load_as<T>(z + i, extent);
        if (d_minus != nullptr) {
            sum += math::weighted_difference(c_d, load(d + i, extent), load(d_minus + i, extent));
        } else if (d != nullptr) {
            sum += c_d * load(d + i, extent);
        }
        if (cond != nullptr) sum += c_cond * load(cond + i, extent);
        if (null != nullptr) sum += c_null * load(null + i, extent);
        return sum;
    }
};

template <class T, class D>
void forward(const Inputs<T, D>& in, const float* time_weight, D* targets, float* loss,
             float* denoising, float* weight, Size full, bool cosine, int64_t threads) {
    const Size size = flatten(full, cosine);
    const int64_t numel = size.channels * size.positions;
    const int64_t blocks = ceil_div(size.positions, kBlock);
    const Scratch partial(size.batch * blocks * 2);
    parallel_blocks(size, threads, [&](int64_t sample, int64_t offset, int64_t n) {
        const Target<T, D> target(in, sample, numel);
        const T* F = in.F + sample * numel;
        D* out = targets + sample * numel;
        Vector squares = 0.0f, distance = 0.0f;
        sweep(n, [&](int64_t i, auto extent) {
            Products products;
            Vector errors = 0.0f;
            for (int64_t channel = 0; channel < size.channels; ++channel) {
                const int64_t at = channel * size.positions + offset + i;
                // The loss sees the stored target, rounded to its dtype, as the backward pass will.
                const Vector target_i = store_as<T>(out + at, target(at, extent), extent);
                const Vector F_i = load(F + at, extent);
                errors += math::squared_error(F_i, target_i);
                products.add(F_i, target_i);
            }
            squares += errors;
            if (!cosine) return;
            const Vector angle = math::cosine(products.dot, math::clamped_norm(products.F_squares),
                                              math::clamped_norm(products.target_squares));
            distance += keep<T>(1.0f - angle, extent);
        });
        float* const result = partial.data + 2 * (sample * blocks + offset / kBlock);
        result[0] = sum(squares);
        result[1] = sum(distance);
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
    parallel_blocks(size, threads, [&](int64_t sample, int64_t offset, int64_t n) {
        const Vector squares = 2.0f * scales[sample] / float(numel);
        const Vector cosines = scales[sample] / float(size.positions);
        const int64_t start = sample * numel + offset;
        sweep(n, [&](int64_t i, auto extent) {
            if (!cosine) {
                const int64_t at = start + i;
                const Vector error = load(Fs + at, extent) - load_as<T>(targets + at, extent);
                store(dFs + at, squares * error, extent);
                return;
            }
            Products products;
            for (int64_t channel = 0; channel < size.channels; ++channel) {
                const int64_t at = start + channel * size.positions + i;
                products.add(load(Fs + at, extent), load_as<T>(targets + at, extent));
            }
            const Vector F_norm = math::clamped_norm(products.F_squares);
            const Vector target_norm = math::clamped_norm(products.target_squares);
            const Vector angle = math::cosine(products.dot, F_norm, target_norm);
            const auto by_F = math::make_divisor(F_norm),
                       by_target = math::make_divisor(target_norm);
            for (int64_t channel = 0; channel < size.channels; ++channel) {
                const int64_t at = start + channel * size.positions + i;
                store(dFs + at,
                      math::loss_gradient(load(Fs + at, extent), load_as<T>(targets + at, extent),
                                          squares, cosines, angle, by_F, by_target),
                      extent);
            }
        });
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
                     const float* coefficients, double epsilon, const float* time_weight,
                     int64_t first, void* target, float* loss, float* denoising, float* weight,
                     float*, int64_t batch, int64_t channels, int64_t positions, int64_t,
                     bool cosine, int dtype, int data_dtype, int64_t where) {
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
                              float(2 * epsilon),
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
