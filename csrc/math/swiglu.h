// swiglu(a, b) = silu(a) b with silu(a) = a sigmoid(a) and silu'(a) = s (1 + a (1 - s)), s =
// sigmoid(a).
#pragma once

#include "common.h"

namespace tim::math {

TIM_HD float swiglu(float gate, float up) { return divide(gate, one_plus_exp(-gate)) * up; }

TIM_HD float silu_derivative(float gate, float s) { return s * (1.0f + gate * (1.0f - s)); }

TIM_HD void swiglu_backward(float grad, float gate, float up, float* dgate, float* dup) {
    const float s = sigmoid(gate);
    *dgate = grad * up * silu_derivative(gate, s);
    *dup = grad * (gate * s);
}

TIM_HD void swiglu_tangent(float gate, float up, float tgate, float tup, float* out, float* tout) {
    const float s = sigmoid(gate);
    const float silu = gate * s;
    *out = silu * up;
    *tout = tgate * up * silu_derivative(gate, s) + silu * tup;
}

}  // namespace tim::math
