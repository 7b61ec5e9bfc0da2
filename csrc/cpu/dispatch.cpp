// Chooses the copy of the kernels for this processor, once, when the extension is imported.

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../kernels.h"

#define TIM_DECLARE_KERNELS(ISA)           \
    namespace tim::cpu::ISA {              \
    void add_interpolate(Kernels&);        \
    void add_swiglu(Kernels&);             \
    void add_adaln(Kernels&);              \
    void add_qk_norm_rope(Kernels&);       \
    void add_attention(Kernels&);          \
    void add_attention_backward(Kernels&); \
    void add_transition_loss(Kernels&);    \
    static Kernels kernels() {             \
        Kernels table{};                   \
        add_interpolate(table);            \
        add_swiglu(table);                 \
        add_adaln(table);                  \
        add_qk_norm_rope(table);           \
        add_attention(table);              \
        add_attention_backward(table);     \
        add_transition_loss(table);        \
        return table;                      \
    }                                      \
    }

TIM_DECLARE_KERNELS(baseline)
#ifdef TIM_X86_KERNELS
TIM_DECLARE_KERNELS(avx2)
TIM_DECLARE_KERNELS(avx512)
#endif

#ifdef TIM_AVX512BF16_KERNELS
TIM_DECLARE_KERNELS(avx512bf16)
#endif

namespace tim::cpu {
namespace {

struct Choice {
    const char* isa;
    bool supported;
    Kernels (*make)();
};

struct Selection {
    const char* isa;
    Kernels kernels;
};

// Best first. The environment variable TIM_ISA forces one, so that a test can run them all.
Selection select() {
#ifdef TIM_X86_KERNELS
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    const Choice choices[] = {
#ifdef TIM_AVX512BF16_KERNELS
        {"avx512bf16", avx512 && __builtin_cpu_supports("avx512bf16"), avx512bf16::kernels},
#endif
#ifdef TIM_X86_KERNELS
        {"avx512", avx512, avx512::kernels},
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::kernels},
#endif
        {"baseline", true, baseline::kernels},
    };
    const char* forced = std::getenv("TIM_ISA");
    for (const Choice& choice : choices) {
        if (forced == nullptr ? choice.supported : std::strcmp(forced, choice.isa) == 0) {
            if (choice.supported) return {choice.isa, choice.make()};
            throw std::runtime_error(std::string("TIM_ISA=") + forced +
                                     ": this processor lacks these instructions");
        }
    }
    std::string names;
    for (const Choice& choice : choices)
        names += (names.empty() ? "" : ", ") + std::string(choice.isa);
    throw std::runtime_error("TIM_ISA must be one of " + names + ", got " + forced);
}

const Selection& selection() {
    static const Selection chosen = select();
    return chosen;
}

}  // namespace

const Kernels& kernels() { return selection().kernels; }
const char* isa() { return selection().isa; }

}  // namespace tim::cpu
