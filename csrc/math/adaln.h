// h = x + gate y, out = xhat (1 + scale) + shift, xhat the layer norm of h without parameters.
#pragma once

#include "common.h"
#include "layer_norm.h"

namespace tim::math {

TIM_HD float gated_residual(float x, float gate, float y) { return x + gate * y; }

TIM_HD float gated_residual_tangent(float tx, float gate, float y, float tgate, float ty) {
    return tx + (tgate * y + gate * ty);
}

TIM_HD float modulate(float xhat, float scale, float shift) {
    return xhat * (1.0f + scale) + shift;
}

// Gradient of xhat.
TIM_HD float modulate_gradient(float dout, float scale) { return dout * (1.0f + scale); }

TIM_HD float modulate_tangent(float xhat, float txhat, float scale, float tscale, float tshift) {
    return txhat * (1.0f + scale) + (xhat * tscale + tshift);
}

}  // namespace tim::math
