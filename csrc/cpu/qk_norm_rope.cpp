#include "kernel.h"

namespace tim::cpu::TIM_ISA {
void add_qk_norm_rope(Kernels&) {}
}  // namespace tim::cpu::TIM_ISA
