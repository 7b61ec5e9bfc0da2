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

TIM_HD float normalise(float x, float mean, float rstd) { return (x - mean) * rstd; }

// One entry of J v, with J = rstd (I - 1 1^T / n - xhat xhat^T / n) the Jacobian of xhat. J is
// symmetric, so this is the tangent of xhat for v = dx and the gradient of x for v = grad of xhat.
TIM_HD float layer_norm_jacobian(float v, float xhat, float mean_v, float mean_xhat_v, float rstd) {
    return rstd * (v - mean_v - xhat * mean_xhat_v);
}

}  // namespace tim::math
