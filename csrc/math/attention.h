// attention: with scores s_j = scale q k_j and their log-sum-exp L over the keys j,
//   P_j = exp(s_j - L)    O = sum_j P_j v_j.
// Tangent, with ds_j = scale (dq k_j + q dk_j) and G_j = P_j ds_j:
//   dL = sum_j G_j    dO = sum_j (G_j v_j + P_j dv_j) - dL O.
// Gradient, with Delta = dO O of the incoming dO:
//   dS_j = P_j (dO v_j - Delta)    dv_j = sum P_j dO    dq = scale sum_j dS_j k_j    dk_j likewise.
#pragma once

#include "common.h"

namespace tim::math {

constexpr float kLog2E = 1.44269504088896341f;

// 2^x within 1 ulp, in plain arithmetic for vectors: the nearest integer n goes into the exponent,
// and the polynomial of degree 6 with the smallest relative error (2e-9) gives 2^(x - n). Zero
// below -125.5, infinite from 128 on, NaN for a NaN.
template <class V>
TIM_HD V power_of_two(V x) {
#ifdef __CUDA_ARCH__
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
#else
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum; the 126 is the bias
    // of the exponent of 2^(n-1), whose n, unlike that of 2^n, stays in range up to the overflow:
    // from n = 129 on its bits are those of infinity.
    constexpr float kRound = 12582912.0f + 126.0f;
    x = not_above(not_below(x, -126.0f), 129.0f);
    const V shifted = x + kRound;
    const V r = x - (shifted - kRound);
    V p = 1.5345811e-4f * r + 1.3399931e-3f;
    p = p * r + 9.618489e-3f;
    p = p * r + 5.5503286e-2f;
    p = p * r + 2.4022646e-1f;
    p = p * r + 6.931472e-1f;
    p = p * r + 1.0f;
    return 2.0f * (p * to_exponent(shifted));
#endif
}

// `product` is q k. The difference comes first: large scores would lose its digits if log2 e were
// multiplied into them before. Compilers make one fused operation of it where there is one.
template <class V>
TIM_HD V attention_weight(V product, float scale, V lse) {
    return power_of_two(kLog2E * (scale * product - lse));
}

template <class V>
TIM_HD V attention_tangent(V sum, V t_lse, V out) {
    return sum - t_lse * out;
}

template <class V>
TIM_HD V attention_score_gradient(V weight, V dweight, V delta) {
    return weight * (dweight - delta);
}

}  // namespace tim::math
