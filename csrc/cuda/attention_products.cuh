// The products of the attention kernels, and what becomes of their results.
//
// A warp owns bands of 16 rows. Lane 4 g + t holds, of each band, numbers of the rows g and g + 8.
#pragma once

#include "attention_tiles.cuh"

namespace tim::cuda {
namespace {

// Scores of 16 columns, as a warp's products leave them.
template <int bands>
using Scores = float[bands][2][4];

// The sums of D columns that they collect.
template <int D, int bands>
using Sums = float[bands][D / 8][4];

// A number for each of the rows that a lane has a part of.
template <int bands>
using RowNumbers = float[bands][2];

// 16 rows as the left operand of products over D.
template <int D>
struct Left {
    uint32_t whole[D / 16][4];
    uint32_t rest[D % 16 == 0 ? 1 : 2];
};

// Reads 16 rows from `first` on; those from `count` on are zeros.
template <class T, int D>
TIM_DEVICE void read_left(Left<D>& to, HeadRows<T> rows, int first, int count, bool aligned) {
    with_pairs(aligned, [&](auto pairs) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first + lane() / 4 + half * 8;
            const bool there = row < count && rows.data != nullptr;
            const T* const p = rows.data + row * rows.stride + lane() % 4 * 2;
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                to.whole[k][half] = there ? pairs.read(p + 16 * k) : 0;
                to.whole[k][half + 2] = there ? pairs.read(p + 16 * k + 8) : 0;
            }
            if constexpr (D % 16 != 0) to.rest[half] = there ? pairs.read(p + D - 8) : 0;
        }
    });
}

// Calls add(B, k) for the 16-channel slices of 16 rows of a tile as the right operands of products
// over D: B holds the registers for the first eight rows, then those for the others. The last
// slice may be 8 channels wide.
template <int D, int pitch, class T, class Add>
TIM_DEVICE void for_each_slice(const T* rows, const Add& add) {
    const int tile = lane() / 8;
    const T* const p = rows + (lane() % 8 + tile / 2 * 8) * pitch + tile % 2 * 8;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t b[4];
        load_tiles(b, p + 16 * k);
        add(b, k);
    }
    if constexpr (D % 16 != 0) {
        uint32_t b[2];
        load_tiles(b, rows + lane() % 16 * pitch + D - 8);
        add(b, D / 16);
    }
}

// scores += x B, for 16 columns, with what for_each_slice passes.
template <class T, int D, int bands>
TIM_DEVICE void add_scores(Scores<bands>& scores, const Left<D> (&x)[bands], const uint32_t (&b)[4],
                           int k) {
#pragma unroll
    for (int band = 0; band < bands; ++band) {
        mma_m16n8k16<T>(scores[band][0], x[band].whole[k], {b[0], b[1]});
        mma_m16n8k16<T>(scores[band][1], x[band].whole[k], {b[2], b[3]});
    }
}

template <class T, int D, int bands>
TIM_DEVICE void add_scores(Scores<bands>& scores, const Left<D> (&x)[bands], const uint32_t (&b)[2],
                           int) {
    static_assert(D % 16 != 0);
#pragma unroll
    for (int band = 0; band < bands; ++band) {
        mma_m16n8k8<T>(scores[band][0], x[band].rest, {b[0]});
        mma_m16n8k8<T>(scores[band][1], x[band].rest, {b[1]});
    }
}

// sums += weights values, for 16 rows of a tile.
template <int D, int pitch, class T, int bands>
TIM_DEVICE void add_values(Sums<D, bands>& sums, const uint32_t (&weights)[bands][4],
                           const T* values) {
    const T* const p = values + lane() % 16 * pitch + lane() / 16 * 8;
#pragma unroll
    for (int pair = 0; pair < D / 16; ++pair) {
        uint32_t b[4];
        load_tiles_transposed(b, p + 16 * pair);
#pragma unroll
        for (int band = 0; band < bands; ++band) {
            mma_m16n8k16<T>(sums[band][2 * pair], weights[band], {b[0], b[1]});
            mma_m16n8k16<T>(sums[band][2 * pair + 1], weights[band], {b[2], b[3]});
        }
    }
    if constexpr (D % 16 != 0) {
        uint32_t b[2];
        load_tiles_transposed(b, values + lane() % 16 * pitch + D - 8);
#pragma unroll
        for (int band = 0; band < bands; ++band)
            mma_m16n8k16<T>(sums[band][D / 8 - 1], weights[band], b);
    }
}

// Calls body(score, band, half of the columns, i).
template <int bands, class Body>
TIM_DEVICE void for_each_score(Scores<bands>& scores, const Body& body) {
#pragma unroll
    for (int band = 0; band < bands; ++band)
#pragma unroll
        for (int i = 0; i < 8; ++i) body(scores[band][i / 4][i % 4], band, i / 4, i % 4);
}

// Products of queries and keys become weights.
template <int bands>
TIM_DEVICE void weigh(Scores<bands>& scores, float scale, const RowNumbers<bands>& lse) {
    for_each_score(scores, [&](float& score, int band, int, int i) {
        score = math::attention_weight(score, scale, lse[band][i / 2]);
    });
}

// Sets the numbers in columns from `left` on.
template <int bands>
TIM_DEVICE void fill_behind(Scores<bands>& scores, int left, float value) {
    if (left >= kChunkTokens) return;
    for_each_score(scores, [&](float& score, int, int half, int i) {
        if (half * 8 + lane() % 4 * 2 + i % 2 >= left) score = value;
    });
}

// Scores as the left operand of the next product.
template <class T, int bands>
TIM_DEVICE void round_to_left(uint32_t (&to)[bands][4], const Scores<bands>& from) {
#pragma unroll
    for (int band = 0; band < bands; ++band)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* pair = from[band][i / 2] + i % 2 * 2;
            to[band][i] = pair_bits(T{}, pair[0], pair[1]);
        }
}

// Adds up the rounded numbers of each row.
template <class T, int bands>
TIM_DEVICE void add_rows(RowNumbers<bands>& sums, const uint32_t (&rounded)[bands][4]) {
#pragma unroll
    for (int band = 0; band < bands; ++band)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Pack<T, 2> pair{{rounded[band][i]}};
            sums[band][i % 2] += load(pair, 0) + load(pair, 1);
        }
}

// The sum over the four lanes that hold a row.
TIM_DEVICE float row_total(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}

TIM_DEVICE float row_maximum(float value) {
    value = fmaxf(value, shuffle_xor(value, 1));
    return fmaxf(value, shuffle_xor(value, 2));
}

template <int bands, class Body>
TIM_DEVICE void for_each_row_number(RowNumbers<bands>& numbers, const Body& body) {
#pragma unroll
    for (int band = 0; band < bands; ++band) {
        body(numbers[band][0]);
        body(numbers[band][1]);
    }
}

template <int D, int bands, class Body>
TIM_DEVICE void for_each_sum(Sums<D, bands>& sums, const Body& body) {
#pragma unroll
    for (int band = 0; band < bands; ++band)
#pragma unroll
        for (int i = 0; i < D / 2; ++i) body(sums[band][i / 4][i % 4]);
}

// Adds what the other groups have summed to the first group's numbers; `visit` calls its argument
// with each number that a thread holds. Afterwards only the first group's are right.
template <class Visit>
TIM_DEVICE void add_groups(const WarpPlace& place, int numbers, const Visit& visit) {
    if (place.groups == 1) return;
    barrier();  // nobody reads tiles any more
    const int size = numbers * kWarp;
    float* const shared = shared_memory() + place.position * size + lane();
    if (place.group > 0) {
        float* to = shared + (place.group - 1) * place.positions * size;
        visit([&](float& number) {
            *to = number;
            to += kWarp;
        });
    }
    barrier();
    if (place.group > 0) return;
    for (int group = 1; group < place.groups; ++group) {
        const float* from = shared + (group - 1) * place.positions * size;
        visit([&](float& number) {
            number += *from;
            from += kWarp;
        });
    }
}

// Calls body(band, half, row) for the rows of this lane that are there.
template <int bands, class Body>
TIM_DEVICE void for_each_row(int first, int count, const Body& body) {
#pragma unroll
    for (int band = 0; band < bands; ++band)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first + band * kBandRows + half * 8 + lane() / 4;
            if (row < count) body(band, half, row);
        }
}

// Writes what value(band, half, unit, 0 or 1) returns for this lane's columns of a row's units
// of 8, or of those of the block's columns.
template <class T, int D, int bands, int columns = D, class Value>
TIM_DEVICE void write_rows(T* to, const Problem& problem, const Task& task, int first,
                           const Value& value) {
    with_pairs(problem.aligned, [&](auto pairs) {
        for_each_row<bands>(first, task.rows.count, [&](int band, int half, int row) {
            T* const p =
                to + vector_index<D>(problem, task, row) + task.part * columns + lane() % 4 * 2;
#pragma unroll
            for (int unit = 0; unit < columns / 8; ++unit)
                pairs.write(p + unit * 8,
                            pair_bits(T{}, value(band, half, unit, 0), value(band, half, unit, 1)));
        });
    });
}

// The block with a row's first columns writes what all of them know.
template <int bands>
TIM_DEVICE void write_row_numbers(float* to, const Problem& problem, const Task& task, int first,
                                  const RowNumbers<bands>& numbers) {
    if (to == nullptr || task.part > 0 || lane() % 4 != 0) return;
    for_each_row<bands>(first, task.rows.count, [&](int band, int half, int row) {
        store_global(to + scalar_index(problem, task, row), numbers[band][half]);
    });
}

// The queries and their tangents, which a warp holds while it sweeps over the keys.
template <int D, int bands>
struct Queries {
    Left<D> q[bands], t_q[bands];
};

template <class T, int D, int bands>
TIM_DEVICE void read_queries(Queries<D, bands>& to, const Inputs<T>& x, const Tangents& there,
                             const Problem& problem, const Task& task, int first) {
    const HeadRows<T> q = head_rows(x.q, task, task.rows), t_q = head_rows(x.t_q, task, task.rows);
#pragma unroll
    for (int band = 0; band < bands; ++band) {
        const int row = first + band * kBandRows;
        read_left(to.q[band], q, row, task.rows.count, problem.aligned);
        if (there.of_q) read_left(to.t_q[band], t_q, row, task.rows.count, problem.aligned);
    }
}

// The scores of a chunk of keys and their tangents, but for the scale.
template <class T, int D, int pitch, int bands>
TIM_DEVICE void score_chunk(Scores<bands>& scores, Scores<bands>& t_scores,
                            const Queries<D, bands>& queries, const Tangents& there, const T* keys,
                            int tile_size) {
    for_each_slice<D, pitch>(keys, [&](const auto& b, int k) {
        add_scores<T>(scores, queries.q, b, k);
        if (there.of_q) add_scores<T>(t_scores, queries.t_q, b, k);
    });
    if (there.of_k)
        for_each_slice<D, pitch>(keys + kTKeys * tile_size, [&](const auto& b, int k) {
            add_scores<T>(t_scores, queries.q, b, k);
        });
}

// Subtracts the outputs' share from the sums of a tangent and writes both results. `t_lse` is what
// each lane has summed of its rows.
template <class T, int D, int bands, int columns = D>
TIM_DEVICE void write_tangent(T* t_outs, float* t_lses, const T* outs, Sums<columns, bands>& sums,
                              RowNumbers<bands>& t_lse, const Tangents& there,
                              const Problem& problem, const Task& task, int first) {
    for_each_row_number(t_lse, [](float& sum) { sum = row_total(sum); });
    // Without keys `out` is zero, but it is the caller's.
    const bool subtract = there.of_scores && task.swept.count > 0;
    with_pairs(problem.aligned, [&](auto pairs) {
        for_each_row<bands>(first, task.rows.count, [&](int band, int half, int row) {
            const T* const p =
                outs + vector_index<D>(problem, task, row) + task.part * columns + lane() % 4 * 2;
            uint32_t out[columns / 8];
#pragma unroll
            for (int unit = 0; unit < columns / 8; ++unit)
                out[unit] = subtract ? pairs.read(p + unit * 8) : 0;
#pragma unroll
            for (int unit = 0; unit < columns / 8; ++unit)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& sum = sums[band][unit][half * 2 + i];
                    sum = math::attention_tangent(sum, t_lse[band][half],
                                                  load(Pack<T, 2>{{out[unit]}}, i));
                }
        });
    });
    write_rows<T, D, bands, columns>(
        t_outs, problem, task, first,
        [&](int band, int half, int unit, int i) { return sums[band][unit][half * 2 + i]; });
    write_row_numbers(t_lses, problem, task, first, t_lse);
}

}  // namespace
}  // namespace tim::cuda
