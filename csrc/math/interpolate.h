// a = c0 x + c1 z, b = c2 x + c3 z
#pragma once

#include "common.h"

namespace tim::math {

TIM_HD float combine(float c_x, float x, float c_z, float z) { return c_x * x + c_z * z; }

}  // namespace tim::math
