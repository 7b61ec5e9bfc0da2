// Layer norm of a row of n values: xhat = (x - mean) rstd, rstd = 1 / sqrt(variance + eps).
#pragma once

#include "common.h"

namespace tim::math {

// On a GPU within 2 ulp: exact roots and quotients are long sequences with branches there.
TIM_HD float inverse_std(float variance, float eps) {
#ifdef __CUDA_ARCH__
    return rsqrtf(variance + eps);
#else
    return 1.0f / sqrtf(variance + eps);
#endif
}

TIM_HD float inverse_std(float sum_of_squares, float n, float eps) {
    return inverse_std(sum_of_squares / n, eps);
}

template <class V>
TIM_HD V normalise(V x, V mean, V rstd) {
    return (x - mean) * rstd;
}

// One entry of J v, with J = rstd (I - 1 1^T / n - xhat xhat^T / n) the Jacobian of xhat. J is
// symmetric, so this is the tangent of xhat for v = dx and the gradient of x for v = grad of xhat.
template <class V>
TIM_HD V layer_norm_jacobian(V v, V xhat, V mean_v, V mean_xhat_v, V rstd) {
    return rstd * (v - mean_v - xhat * mean_xhat_v);
}

}  // namespace tim::math
