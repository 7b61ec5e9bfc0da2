// y = xhat weight + bias over the head dimension (layer_norm.h), then the rotary embedding: every
// pair of adjacent channels (a, b) becomes (a cos - b sin, b cos + a sin).
#pragma once

#include "common.h"
#include "layer_norm.h"

namespace tim::math {

template <class V>
TIM_HD V affine(V xhat, V weight, V bias) {
    return xhat * weight + bias;
}

// cos_a belongs to the channel of a; tables repeat each frequency, but need not.
template <class V>
TIM_HD void rotate(V a, V b, V cos_a, V cos_b, V sin_a, V sin_b, V* out_a, V* out_b) {
    *out_a = a * cos_a - b * sin_a;
    *out_b = b * cos_b + a * sin_b;
}

TIM_HD void rotate(float a, float b, const float* cos, const float* sin, float* out_a,
                   float* out_b) {
    rotate(a, b, cos[0], cos[1], sin[0], sin[1], out_a, out_b);
}

// The transpose of `rotate`: gradients of its outputs in, gradients of a and b out.
template <class V>
TIM_HD void rotate_transposed(V grad_a, V grad_b, V cos_a, V cos_b, V sin_a, V sin_b, V* da,
                              V* db) {
    *da = grad_a * cos_a + grad_b * sin_b;
    *db = grad_b * cos_b - grad_a * sin_a;
}

TIM_HD void rotate_transposed(float grad_a, float grad_b, const float* cos, const float* sin,
                              float* da, float* db) {
    rotate_transposed(grad_a, grad_b, cos[0], cos[1], sin[0], sin[1], da, db);
}

}  // namespace tim::math
