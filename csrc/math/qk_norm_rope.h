// y = xhat weight + bias over the head dimension (layer_norm.h), then the rotary embedding: every
// pair of adjacent channels (a, b) becomes (a cos - b sin, b cos + a sin).
#pragma once

#include "common.h"
#include "layer_norm.h"

namespace tim::math {

TIM_HD float affine(float xhat, float weight, float bias) { return xhat * weight + bias; }

// cos and sin point at the two channels of the pair; tables repeat each frequency, but need not.
TIM_HD void rotate(float a, float b, const float* cos, const float* sin, float* out_a,
                   float* out_b) {
    *out_a = a * cos[0] - b * sin[0];
    *out_b = b * cos[1] + a * sin[1];
}

// The transpose of `rotate`: gradients of its outputs in, gradients of a and b out.
TIM_HD void rotate_transposed(float grad_a, float grad_b, const float* cos, const float* sin,
                              float* da, float* db) {
    *da = grad_a * cos[0] + grad_b * sin[1];
    *db = grad_b * cos[1] - grad_a * sin[0];
}

}  // namespace tim::math
