// h = x + gate y, out = xhat (1 + scale) + shift, xhat the layer norm of h without parameters.
#pragma once

#include "common.h"
#include "layer_norm.h"

namespace tim::math {

template <class V>
TIM_HD V gated_residual(V x, V gate, V y) {
    return x + gate * y;
}

template <class V>
TIM_HD V gated_residual_tangent(V tx, V gate, V y, V tgate, V ty) {
    return tx + (tgate * y + gate * ty);
}

template <class V>
TIM_HD V modulate(V xhat, V scale, V shift) {
    return xhat * (1.0f + scale) + shift;
}

// Gradient of xhat.
template <class V>
TIM_HD V modulate_gradient(V dout, V scale) {
    return dout * (1.0f + scale);
}

template <class V>
TIM_HD V modulate_tangent(V xhat, V txhat, V scale, V tscale, V tshift) {
    return txhat * (1.0f + scale) + (xhat * tscale + tshift);
}

}  // namespace tim::math
