// What the attention kernels share: their operands, the split into tasks, packed tiles.
//
// Lanes of a vector are queries. The scores of a block of queries against a tile of keys are
// computed transposed, [keys][queries], and so are outputs, [D][queries]; then sums over keys need
// no exchange between lanes, and keys and values enter the products one broadcast number at a time,
// in the layout in which they lie in memory, at any head dimension.
#pragma once

#include "../math/attention.h"
#include "multiply.h"
#include "vector.h"

namespace tim::cpu::TIM_ISA {
namespace {

// Queries of a block, keys of a tile, queries that share one packing of the keys.
constexpr int64_t kBlockQueries = kRegisterVectors * kRegister;
constexpr int64_t kTileKeys = 128;
constexpr int64_t kAhead = 12;
constexpr int64_t kGroupQueries = 4 * kBlockQueries < 192 ? 192 : 4 * kBlockQueries;
// The head dimension is padded to whole tiles of registers.
constexpr int64_t kDepthUnit = 8;
static_assert(kTileKeys % kRegisterRows == 0 && kDepthUnit % kRegisterRows == 0, "whole tiles");

template <class T>
struct Operand {
    const T* data;
    Strides strides;

    explicit operator bool() const { return data != nullptr; }
};

struct Shape {
    int64_t batch, n, m, heads, head_dim, sequences;
    const int32_t *cu_seqlens_q, *cu_seqlens_k;

    int64_t count() const { return sequences > 0 ? sequences : batch; }
};

// Rows [row, row + rows) of the queries of one head of one sample or packed sequence, and its keys.
struct Task {
    int64_t sample, head, row, rows, key, keys;
};

template <class T>
const T* first_query(Operand<T> x, const Task& task) {
    return x.data + task.sample * x.strides.batch + task.row * x.strides.token +
           task.head * x.strides.head;
}

template <class T>
const T* first_key(Operand<T> x, const Task& task) {
    return x.data + task.sample * x.strides.batch + task.key * x.strides.token +
           task.head * x.strides.head;
}

// The queries of sequence `index` of the shape as one task.
inline Task whole_sequence(const Shape& shape, int64_t index) {
    if (shape.sequences == 0) return {index, 0, 0, shape.n, 0, shape.m};
    const int32_t *q = shape.cu_seqlens_q + index, *k = shape.cu_seqlens_k + index;
    return {0, 0, q[0], q[1] - q[0], k[0], k[1] - k[0]};
}

// Tasks of at most `group` queries that the shape makes.
inline int64_t count_tasks(const Shape& shape, int64_t group) {
    int64_t parts = 0;
    for (int64_t i = 0; i < shape.count(); ++i)
        parts += ceil_div(whole_sequence(shape, i).rows, group);
    return parts * shape.heads;
}

// Calls body(task) for tasks [begin, end); those of one head are neighbours.
template <class Body>
void for_tasks(const Shape& shape, int64_t group, int64_t begin, int64_t end, const Body& body) {
    int64_t index = 0;
    for (int64_t sequence = 0; sequence < shape.count() && index < end; ++sequence) {
        const Task whole = whole_sequence(shape, sequence);
        const int64_t parts = ceil_div(whole.rows, group);
        const int64_t next = index + parts * shape.heads;
        // Parts of about equal size, in whole vectors.
        const int64_t size = parts == 0 ? 0 : round_up(ceil_div(whole.rows, parts), kRegister);
        for (int64_t i = begin > index ? begin : index; i < (end < next ? end : next); ++i) {
            const int64_t start = (i - index) % parts * size;
            Task task = whole;
            task.head = (i - index) / parts;
            task.row += start;
            task.rows = whole.rows - start < size ? whole.rows - start : size;
            if (task.rows > 0) body(task);
        }
        index = next;
    }
}

// Queries of a task: many share the packing of keys, few keep all threads busy.
inline int64_t group_size(const Shape& shape, int64_t threads) {
    const int64_t queries = shape.batch * shape.n * shape.heads;
    const int64_t fair = round_up(ceil_div(queries, 4 * threads), kRegister);
    return fair < kBlockQueries ? kBlockQueries : fair < kGroupQueries ? fair : kGroupQueries;
}

// The head dimension as it is, and padded to whole register tiles and to whole vectors.
struct Depths {
    explicit Depths(int64_t head_dim)
        : head_dim(head_dim),
          depth(round_up(head_dim, kDepthUnit)),
          padded(round_up(depth, kRegister)) {}

    int64_t head_dim, depth, padded;
};

template <class T>
Operand<T> operand(const void* data, Strides strides) {
    return {static_cast<const T*>(data), strides};
}

// Words that hold as many numbers, an even count of them.
template <class T>
int64_t words(int64_t numbers) {
    return Words<T>::kPairs ? numbers / 2 : numbers;
}

inline uint32_t pair(BFloat16 low, BFloat16 high) {
    return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}

// words = pairs of neighbours of x [count], a zero beside an odd last one.
inline void copy_pairs(float* words, const BFloat16* x, int64_t count) {
    int64_t i = 0;
    for (; i + 2 * kRegister <= count; i += 2 * kRegister) {
        Register whole;
        __builtin_memcpy(&whole, x + i, sizeof(whole));
        store_register(words + i / 2, whole);
    }
    for (; i < count; i += 2)
        words[i / 2] = math::from_bits(pair(x[i], i + 1 < count ? x[i + 1] : BFloat16{0}));
}

// words[row][:] = x[row][0 .. columns), zeros up to `words_stride`, and whole rows of zeros from
// `count` to `rows`.
template <class T>
void pack_rows(const T* x, int64_t stride, int64_t count, int64_t rows, int64_t columns, float* to,
               int64_t words_stride) {
    for (int64_t row = 0; row < rows; ++row) {
        float* words = to + row * words_stride;
        const T* from = x + row * stride;
        const int64_t filled = row < count ? columns : 0;
        if (row + kAhead < count)
            for (int64_t i = 0; i < columns; i += 64 / int64_t(sizeof(T)))
                __builtin_prefetch(from + kAhead * stride + i);
        if constexpr (Words<T>::kPairs) {
            copy_pairs(words, from, filled);
            for (int64_t i = ceil_div(filled, 2); i < words_stride; ++i) words[i] = 0.0f;
        } else {
#pragma omp simd
            for (int64_t i = 0; i < filled; ++i) words[i] = load(from + i);
            for (int64_t i = filled; i < words_stride; ++i) words[i] = 0.0f;
        }
    }
}

// Left operand of a sum over rows: as pack_rows, or pairs (x[2 row][i], x[2 row + 1][i]), `count`
// rounded up. Returns the number of its rows.
template <class T>
int64_t pack_sum(const T* x, int64_t stride, int64_t count, int64_t columns, float* to,
                 int64_t words_stride) {
    if constexpr (Words<T>::kPairs) {
        for (int64_t row = 0; row < count; row += 2) {
            float* words = to + row / 2 * words_stride;
            const BFloat16 *low = x + row * stride, *high = low + stride;
            if (row + 1 < count) {
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i)
                    words[i] = math::from_bits(pair(low[i], high[i]));
            } else {
                for (int64_t i = 0; i < columns; ++i)
                    words[i] = math::from_bits(pair(low[i], BFloat16{0}));
            }
            for (int64_t i = columns; i < words_stride; ++i) words[i] = 0.0f;
        }
        return ceil_div(count, 2);
    } else {
        pack_rows(x, stride, count, count, columns, to, words_stride);
        return count;
    }
}

// [words][queries] of `count` rows x, `vectors` vectors of them, through `staging` of that size.
template <class T>
void pack_transposed(const T* x, int64_t stride, int64_t count, int64_t vectors,
                     const Depths& depths, float* to, float* staging) {
    const int64_t queries = vectors * kRegister;
    const int64_t width = round_up(words<T>(depths.depth), kRegister);
    pack_rows(x, stride, count, queries, depths.head_dim, staging, width);
    transpose(staging, width, queries, width, to, queries);
}

inline Vector both(Register x) { return {x, x}; }

// Words (x.low, x.high), each number rounded to nearest.
inline Register paired(Vector x) {
#ifdef __AVX512BF16__
    return rounded_normal_halves(x.low, x.high);
#else
    return rounded_halves(x.low, x.high);
#endif
}

// to[i] = x[i] rounded to nearest.
inline void store_row(BFloat16* to, Register x) {
#ifdef __AVX512BF16__
    const __m256bh row = _mm512_cvtneps_pbh(__m512(x));
    __builtin_memcpy(to, &row, sizeof(row));
#else
    for (int i = 0; i < kRegister; ++i) store(to + i, x[i]);
#endif
}

}  // namespace
}  // namespace tim::cpu::TIM_ISA
