// target    = c_x x + c_z z + c_d d + c_cond F_cond + c_null F_null
//             d: the derivative, or (d - d_minus) / (2 epsilon)
// denoising = mean((F - target)^2) + mean over positions of 1 - cos(F, target)
// loss      = weight denoising, weight = time_weight / (denoising + 1e-5)
#pragma once

#include "common.h"

namespace tim::math {

constexpr float kAdaptiveEps = 1e-5f;
// |F| and |target| are at least this in the cosine, as in torch.nn.functional.cosine_similarity.
constexpr float kCosineEps = 1e-8f;

// The nearly equal numbers of a central difference are subtracted before anything rounds them.
template <class V>
TIM_HD V weighted_difference(V c, V d, V d_minus) {
    return c * (d - d_minus);
}

template <class V>
TIM_HD V squared_error(V F, V target) {
    return (F - target) * (F - target);
}

TIM_HD float adaptive_weight(float time_weight, float denoising) {
    return time_weight / (denoising + kAdaptiveEps);
}

template <class V>
TIM_HD V clamped_norm(V sum_of_squares) {
    return not_below(square_root(sum_of_squares), kCosineEps);
}

template <class V>
TIM_HD V cosine(V dot, V F_norm, V target_norm) {
    return dot / (F_norm * target_norm);
}

// A number that many are divided by, where divisions are slow: the remainder of the product with
// its inverse corrects it to the quotient.
template <class V>
struct Divisor {
    V value, inverse;
};

template <class V>
TIM_HD Divisor<V> make_divisor(V value) {
    return {value, V(1.0f) / value};
}

template <class V>
TIM_HD V quotient(V a, V b) {
    return a / b;
}

template <class V>
TIM_HD V quotient(V a, Divisor<V> b) {
    const V q = a * b.inverse;
    return fused_multiply_add(fused_multiply_add(-q, b.value, a), b.inverse, q);
}

// d/dF of the two terms; `squares` and `cosines` are their weights, 2 scale / (C P) and scale / P.
// The gradient of -cos is (cos u - v) / |F| with u and v the directions of F and target. They are
// true quotients, as products with 1 / |F| would leave rounding noise where the difference is zero
// (always with one channel), and dividing by a small |F| would make that noise large.
template <class V, class Norm>
TIM_HD V loss_gradient(V F, V target, V squares, V cosines, V cosine, Norm F_norm,
                       Norm target_norm) {
    const V across = quotient(cosine * quotient(F, F_norm) - quotient(target, target_norm), F_norm);
    return squares * (F - target) + cosines * across;
}

}  // namespace tim::math
