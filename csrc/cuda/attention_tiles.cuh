// What the attention kernels read, and how tiles of it pass through shared memory.
#pragma once

#include "attention.cuh"
#include "mma.cuh"

namespace tim::cuda {
namespace {

// Rows of one head; a null pointer stands for zeros.
template <class T>
struct HeadRows {
    const T* data;
    int64_t stride;
};

// A tensor [B, N, H, D]; a null pointer stands for zeros.
template <class T>
struct Operand {
    const T* data;
    Strides strides;
};

// Without the columns before `column`.
template <class T>
TIM_DEVICE HeadRows<T> head_rows(const Operand<T>& x, const Task& task, const Span& tokens,
                                 int column = 0) {
    const int64_t first =
        task.sample * x.strides.batch + task.head * x.strides.head + tokens.first * x.strides.token;
    return {x.data == nullptr ? nullptr : x.data + first + column, x.strides.token};
}

// Which tangents there are: none, all, only that of the queries (where keys and values are a
// text's), or those with a pointer. Products with zeros are never computed; only the last kind of
// kernel decides that as it runs.
enum class Subset { kNone, kAll, kQueries, kSome };

template <class T>
struct Inputs {
    Operand<T> q, k, v, t_q, t_k, t_v;
};

struct Tangents {
    bool of_q, of_k, of_v, of_scores;
};

template <Subset subset, class T>
TIM_DEVICE Tangents tangents_of(const Inputs<T>& x) {
    constexpr bool kAll = subset == Subset::kAll, kSome = subset == Subset::kSome;
    const bool q = kAll || subset == Subset::kQueries || (kSome && x.t_q.data != nullptr);
    const bool k = kAll || (kSome && x.t_k.data != nullptr);
    const bool v = kAll || (kSome && x.t_v.data != nullptr);
    return {q, k, v, q || k};
}

// What is swept over, in this order.
enum { kKeys, kValues, kTKeys, kTValues };

template <Subset subset>
constexpr int kSweptOperands = subset == Subset::kAll || subset == Subset::kSome ? 4 : 2;

// Of the values, the block's columns.
template <class G, Subset subset, class T>
TIM_DEVICE void swept_rows(HeadRows<T> (&rows)[kSweptOperands<subset>], const Inputs<T>& x,
                           const Task& task) {
    const int column = task.part * G::kColumns;
    rows[kKeys] = head_rows(x.k, task, task.swept);
    rows[kValues] = head_rows(x.v, task, task.swept, column);
    if constexpr (kSweptOperands<subset> == 4) {
        rows[kTKeys] = head_rows(x.t_k, task, task.swept);
        rows[kTValues] = head_rows(x.t_v, task, task.swept, column);
    }
}

template <class T>
Inputs<T> make_inputs(const void* q, const void* k, const void* v, const void* t_q, const void* t_k,
                      const void* t_v, Strides q_strides, Strides k_strides, Strides v_strides,
                      Strides t_q_strides, Strides t_k_strides, Strides t_v_strides) {
    return {{array<T>(q), q_strides},     {array<T>(k), k_strides},
            {array<T>(v), v_strides},     {array<T>(t_q), t_q_strides},
            {array<T>(t_k), t_k_strides}, {array<T>(t_v), t_v_strides}};
}

template <class T>
bool are_aligned(const Inputs<T>& x) {
    const Operand<T> operands[] = {x.q, x.k, x.v, x.t_q, x.t_k, x.t_v};
    for (const Operand<T>& operand : operands)
        if (!is_aligned(operand.data, operand.strides)) return false;
    return true;
}

// Calls body with a constant of the kind of kernel that there is for these tangents.
template <class T, class Body>
void with_subset(const Inputs<T>& x, const Body& body) {
    const bool t_q = x.t_q.data != nullptr, t_k = x.t_k.data != nullptr;
    const bool t_v = x.t_v.data != nullptr;
    if (t_q && t_k && t_v) {
        body(std::integral_constant<Subset, Subset::kAll>{});
    } else if (!t_k && !t_v) {
        body(std::integral_constant<Subset, Subset::kQueries>{});
    } else {
        body(std::integral_constant<Subset, Subset::kSome>{});
    }
}

// Two neighbouring values, where they may be read and written as one word, and where not.
struct Words {
    template <class T>
    static __device__ __forceinline__ uint32_t read(const T* p) {
        return load_global(reinterpret_cast<const unsigned int*>(p));
    }
    template <class T>
    static __device__ __forceinline__ void write(T* p, uint32_t pair) {
        store_global(reinterpret_cast<unsigned int*>(p), static_cast<unsigned int>(pair));
    }
};

struct Halves {
    template <class T>
    static __device__ __forceinline__ uint32_t read(const T* p) {
        const auto* halves = reinterpret_cast<const unsigned short*>(p);
        return load_global(halves) | uint32_t(load_global(halves + 1)) << 16;
    }
    template <class T>
    static __device__ __forceinline__ void write(T* p, uint32_t pair) {
        auto* halves = reinterpret_cast<unsigned short*>(p);
        store_global(halves, static_cast<unsigned short>(pair));
        store_global(halves + 1, static_cast<unsigned short>(pair >> 16));
    }
};

// One decision for many accesses: behind a branch each, loads would wait for one another.
template <class Body>
TIM_DEVICE void with_pairs(bool aligned, const Body& body) {
    if (aligned) {
        body(Words{});
    } else {
        body(Halves{});
    }
}

// Waits until this thread's copies of the oldest of `stages` - 1 tiles have arrived.
TIM_DEVICE void wait_for_tile(int stages) {
    if (stages == 2) {
        wait_for_copies<0>();
    } else if (stages == 3) {
        wait_for_copies<1>();
    } else {
        wait_for_copies<kMaxStages - 2>();
    }
}

// Calls body(tiles, first token, tokens) for the tiles of the swept side, one after the other,
// while the next ones are on their way. The tile of operand i begins at tiles + i * plan.tile *
// kPitch; operands that are absent are not copied. Tokens behind the last are zeros. Every other
// operand are values, of which there are G::kColumns columns.
template <class G, int D, class T, int operands, class Body>
TIM_DEVICE void sweep(const HeadRows<T> (&rows)[operands], int count, const Plan& plan,
                      bool aligned, const Body& body) {
    // Each operand has its own threads, which copy one unit of 16 bytes of every kStep-th row.
    constexpr int kUnits = D / 8, kValueUnits = G::kColumns / 8;
    constexpr int kThreads = G::kThreads / operands;
    constexpr int kStep = 2 * kThreads / (kUnits + kValueUnits);
    int mine = threadIdx.x / kThreads, thread = threadIdx.x % kThreads, units = kUnits;
    if constexpr (kValueUnits < kUnits) {  // the more there are, the more threads
        constexpr int kKeyThreads = kStep * kUnits;
        thread = threadIdx.x % (2 * kThreads);
        mine = threadIdx.x / (2 * kThreads) * 2;
        if (thread >= kKeyThreads) {
            ++mine;
            thread -= kKeyThreads;
            units = kValueUnits;
        }
    }
    const int start = thread / units, unit = thread % units * 8;
    HeadRows<T> from = rows[0];
#pragma unroll
    for (int i = 1; i < operands; ++i)
        if (mine == i) from = rows[i];
    const bool copies = from.data != nullptr && start < kStep;
    from.data += unit;

    T* const shared = reinterpret_cast<T*>(shared_memory());
    const int stage_size = operands * plan.tile * G::kPitch;
    const int target = (mine * plan.tile + start) * G::kPitch + unit;
    int next = 0, next_stage = 0;
    const auto fetch = [&] {
        const T* p = from.data + (next + start) * from.stride;
        T* to = shared + next_stage * stage_size + target;
        const int left = count - next, rows_end = left > 0 && copies ? plan.tile : 0;
        if (aligned) {
#pragma unroll 1
            for (int row = start; row < rows_end; row += kStep) {
                copy_async(to, p, row < left ? 16 : 0);
                p += kStep * from.stride;
                to += kStep * G::kPitch;
            }
        } else {
#pragma unroll 1
            for (int row = start; row < rows_end; row += kStep) {
                uint4 words = {};
                if (row < left)
                    words = {Halves::read(p), Halves::read(p + 2), Halves::read(p + 4),
                             Halves::read(p + 6)};
                *reinterpret_cast<uint4*>(to) = words;
                p += kStep * from.stride;
                to += kStep * G::kPitch;
            }
        }
        commit_copies();
        next += plan.tile;
        next_stage = next_stage + 1 == plan.stages ? 0 : next_stage + 1;
    };
    for (int i = 0; i < plan.stages - 1; ++i) fetch();
    int stage = 0;
    for (int first = 0; first < count; first += plan.tile) {
        wait_for_tile(plan.stages);
        barrier();  // the tile is there for all, and the stage of the one before is free
        fetch();
        body(shared + stage * stage_size, first,
             count - first < plan.tile ? count - first : plan.tile);
        stage = stage + 1 == plan.stages ? 0 : stage + 1;
    }
}

// Calls body(first token in the tile) for the chunks of a tile that this warp takes.
template <class Body>
TIM_DEVICE void for_each_chunk(const WarpPlace& place, int tokens, const Body& body) {
#pragma unroll 1
    for (int chunk = place.group * kChunkTokens; chunk < tokens;
         chunk += place.groups * kChunkTokens)
        body(chunk);
}

}  // namespace
}  // namespace tim::cuda
