// a = c0 x + c1 z, b = c2 x + c3 z
#pragma once

#include "common.h"

namespace tim::math {

template <class V>
TIM_HD V combine(V c_x, V x, V c_z, V z) {
    return c_x * x + c_z * z;
}

}  // namespace tim::math
