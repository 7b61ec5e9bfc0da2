// swiglu(a, b) = silu(a) b with silu(a) = a sigmoid(a) and silu'(a) = s (1 + a (1 - s)), s =
// sigmoid(a).
#pragma once

#include "common.h"

namespace tim::math {

template <class V>
TIM_HD V swiglu(V gate, V up) {
    return divide(gate, one_plus_exp(-gate)) * up;
}

template <class V>
TIM_HD V silu_derivative(V gate, V s) {
    return s * (1.0f + gate * (1.0f - s));
}

template <class V>
TIM_HD void swiglu_backward(V grad, V gate, V up, V* dgate, V* dup) {
    const V s = sigmoid(gate);
    *dgate = grad * up * silu_derivative(gate, s);
    *dup = grad * (gate * s);
}

template <class V>
TIM_HD void swiglu_tangent(V gate, V up, V tgate, V tup, V* out, V* tout) {
    const V s = sigmoid(gate);
    const V silu = gate * s;
    *out = silu * up;
    *tout = tgate * up * silu_derivative(gate, s) + silu * tup;
}

}  // namespace tim::math
