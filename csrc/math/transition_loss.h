// target    = c_x x + c_z z + c_d d + c_minus d_minus + c_cond F_cond + c_null F_null
// denoising = mean((F - target)^2) + mean over positions of 1 - cos(F, target)
// loss      = weight denoising, weight = time_weight / (denoising + 1e-5)
#pragma once

#include "common.h"

namespace tim::math {

constexpr float kAdaptiveEps = 1e-5f;
// |F| and |target| are at least this in the cosine, as in torch.nn.functional.cosine_similarity.
constexpr float kCosineEps = 1e-8f;

// c d + c_minus d_minus. For the central difference, c_minus = -c, the nearly equal numbers are
// subtracted before anything rounds them.
TIM_HD float weighted_difference(float c, float d, float c_minus, float d_minus) {
    return c * (d - d_minus) + (c + c_minus) * d_minus;
}

TIM_HD float squared_error(float F, float target) { return (F - target) * (F - target); }

TIM_HD float adaptive_weight(float time_weight, float denoising) {
    return time_weight / (denoising + kAdaptiveEps);
}

TIM_HD float clamped_norm(float sum_of_squares) {
    const float norm = sqrtf(sum_of_squares);
    return norm < kCosineEps ? kCosineEps : norm;
}

TIM_HD float cosine(float dot, float F_norm, float target_norm) {
    return dot / (F_norm * target_norm);
}

// A number that many are divided by, where divisions are slow: the remainder of the product with
// its inverse corrects it to the quotient.
struct Divisor {
    float value, inverse;
};

TIM_HD Divisor make_divisor(float value) { return {value, 1.0f / value}; }

TIM_HD float quotient(float a, float b) { return a / b; }

TIM_HD float quotient(float a, Divisor b) {
    const float q = a * b.inverse;
    return fmaf(fmaf(-q, b.value, a), b.inverse, q);
}

// d/dF of the two terms; `squares` and `cosines` are their weights, 2 scale / (C P) and scale / P.
// The gradient of -cos is (cos u - v) / |F| with u and v the directions of F and target. They are
// true quotients, as products with 1 / |F| would leave rounding noise where the difference is zero
// (always with one channel), and dividing by a small |F| would make that noise large.
template <class Number>
TIM_HD float loss_gradient(float F, float target, float squares, float cosines, float cosine,
                           Number F_norm, Number target_norm) {
    const float across =
        quotient(cosine * quotient(F, F_norm) - quotient(target, target_norm), F_norm);
    return squares * (F - target) + cosines * across;
}

}  // namespace tim::math
