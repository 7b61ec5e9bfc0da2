// The gradients of attention, from the forward's output and log-sum-exp.
//
// One kernel has blocks of queries, a second one blocks of keys. Each computes the weights anew,
// seven products in all instead of five, and every sum has a fixed order: no atomics, no memory for
// partial sums.

#include "attention_products.cuh"

namespace tim::cuda {
namespace {

template <int D>
using QueryGeometry = Geometry<D, D <= 72 ? 2 : 1>;

// Registers hold two operands and two sums.
template <int D>
using KeyGeometry = Geometry<D, 1>;

template <class T>
struct Gradients {
    Operand<T> q, k, v, dout;
    const T* out;
    const float* lse;
    float* delta;
    T *dq, *dk, *dv;
};

// The products of rows of `a` and `b` with the same number, for the rows of this lane.
//
// By the instructions that give dout v, so that the two cancel exactly where a query has one key.
template <class T, int D>
TIM_DEVICE void row_products(float (&to)[2], const Left<D>& a, const Left<D>& b) {
    Scores<1> products = {};
    const Left<D> left[] = {a};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        const auto& x = b.whole[k];
        add_scores<T>(products, left, {x[0], x[2], x[1], x[3]}, k);
    }
    if constexpr (D % 16 != 0) add_scores<T>(products, left, b.rest, D / 16);
    // Row and column g are where lane 4 g + g / 2 has its numbers.
    const int row = lane() / 4, source = row * 4 + row / 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float* pair = products[0][half] + half * 2;
        to[half] = shuffle(row % 2 == 0 ? pair[0] : pair[1], source);
    }
}

template <class T, int D>
__global__ void __launch_bounds__(QueryGeometry<D>::kThreads, QueryGeometry<D>::kResident)
    query_gradient(Gradients<T> x, Problem problem, Plan plan) {
    using G = QueryGeometry<D>;
    constexpr int kPitch = G::kPitch, kBands = G::kBands;
    const Task task = find_task(problem, plan);
    const int count = task.rows.count;
    if (task.row >= count) return;
    const WarpPlace place = warp_place<G>(plan);
    const int first_row = task.row + place.position * G::kWarpRows;

    Left<D> q[kBands], dout[kBands];
    RowNumbers<kBands> lse = {}, delta = {};
    const HeadRows<T> queries = head_rows(x.q, task, task.rows);
    const HeadRows<T> douts = head_rows(x.dout, task, task.rows);
    const HeadRows<T> outs = head_rows(Operand<T>{x.out, x.dout.strides}, task, task.rows);
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
        const int row = first_row + band * kBandRows;
        Left<D> out;
        read_left(dout[band], douts, row, count, problem.aligned);
        read_left(out, outs, row, count, problem.aligned);
        read_left(q[band], queries, row, count, problem.aligned);
        row_products<T>(delta[band], dout[band], out);
    }
    for_each_row<kBands>(first_row, count, [&](int band, int half, int row) {
        lse[band][half] = load_global(x.lse + scalar_index(problem, task, row));
    });
    if (place.group == 0) write_row_numbers(x.delta, problem, task, first_row, delta);

    const HeadRows<T> swept[] = {head_rows(x.k, task, task.swept),
                                 head_rows(x.v, task, task.swept)};
    const int tile_size = plan.tile * kPitch;
    const float scale = problem.scale;
    Sums<D, kBands> sums = {};
    const auto add_chunk = [&](const T* keys, int tokens) {
        Scores<kBands> p = {}, ds = {};
        for_each_slice<D, kPitch>(keys, [&](const auto& b, int k) { add_scores<T>(p, q, b, k); });
        for_each_slice<D, kPitch>(keys + tile_size,
                                  [&](const auto& b, int k) { add_scores<T>(ds, dout, b, k); });
        weigh(p, scale, lse);
        // The zeros behind the last key have a score too.
        fill_behind(p, tokens, 0.0f);
        for_each_score(ds, [&](float& dweight, int band, int half, int i) {
            dweight = math::attention_score_gradient(p[band][half][i], dweight, delta[band][i / 2]);
        });
        uint32_t rounded[kBands][4];
        round_to_left<T>(rounded, ds);
        add_values<D, kPitch>(sums, rounded, keys);
    };
    sweep<G, D>(
        swept, task.swept.count, plan, problem.aligned, [&](const T* tiles, int, int tokens) {
            if (first_row >= count) return;
            for_each_chunk(place, tokens,
                           [&](int chunk) { add_chunk(tiles + chunk * kPitch, tokens - chunk); });
        });
    add_groups(place, kBands * (D / 2),
               [&](const auto& add) { for_each_sum<D, kBands>(sums, add); });
    if (place.group > 0) return;
    write_rows<T, D, kBands>(x.dq, problem, task, first_row,
                             [&](int band, int half, int unit, int i) {
                                 return sums[band][unit][half * 2 + i] * scale;
                             });
}

// Everything transposed: the rows of scores are keys.
template <class T, int D>
__global__ void __launch_bounds__(KeyGeometry<D>::kThreads, KeyGeometry<D>::kResident)
    key_gradients(Gradients<T> x, Problem problem, Plan plan) {
    using G = KeyGeometry<D>;
    constexpr int kPitch = G::kPitch, kBands = G::kBands;
    const Task task = find_task(problem, plan);
    const int count = task.rows.count;
    if (task.row >= count) return;
    const WarpPlace place = warp_place<G>(plan);
    const int first_row = task.row + place.position * G::kWarpRows;

    Left<D> k[kBands], v[kBands];
    const HeadRows<T> keys = head_rows(x.k, task, task.rows);
    const HeadRows<T> values = head_rows(x.v, task, task.rows);
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
        read_left(k[band], keys, first_row + band * kBandRows, count, problem.aligned);
        read_left(v[band], values, first_row + band * kBandRows, count, problem.aligned);
    }
    const HeadRows<T> swept[] = {head_rows(x.q, task, task.swept),
                                 head_rows(x.dout, task, task.swept)};
    const int64_t head = int64_t(task.sample) * problem.heads + task.head;
    const int64_t first_number = head * problem.swept.tokens + task.swept.first;
    const int tile_size = plan.tile * kPitch;
    const float scale = problem.scale;
    Sums<D, kBands> dk = {}, dv = {};
    const auto add_chunk = [&](const T* queries, int first, int tokens) {
        // Of the queries, which are this lane's columns. Registers are short at the largest width:
        // the numbers for the second product are not read before the first is done.
        float lse[4], delta[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = i / 2 * 8 + lane() % 4 * 2 + i % 2;
            const int64_t at = first_number + first + column;
            lse[i] = column < tokens ? load_global(x.lse + at) : 0.0f;
            if (D < 128) delta[i] = column < tokens ? load_global(x.delta + at) : 0.0f;
        }
        Scores<kBands> p = {}, ds = {};
        for_each_slice<D, kPitch>(queries,
                                  [&](const auto& b, int s) { add_scores<T>(p, k, b, s); });
        for_each_score(p, [&](float& score, int, int half, int i) {
            score = math::attention_weight(score, scale, lse[half * 2 + i % 2]);
        });
        fill_behind(p, tokens, 0.0f);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = i / 2 * 8 + lane() % 4 * 2 + i % 2;
            const int64_t at = first_number + first + column;
            if (D >= 128) delta[i] = column < tokens ? load_global(x.delta + at) : 0.0f;
        }
        for_each_slice<D, kPitch>(queries + tile_size,
                                  [&](const auto& b, int s) { add_scores<T>(ds, v, b, s); });
        for_each_score(ds, [&](float& dweight, int band, int half, int i) {
            dweight =
                math::attention_score_gradient(p[band][half][i], dweight, delta[half * 2 + i % 2]);
        });
        uint32_t weights[kBands][4], gradients[kBands][4];
        round_to_left<T>(weights, p);
        round_to_left<T>(gradients, ds);
        add_values<D, kPitch>(dv, weights, queries + tile_size);
        add_values<D, kPitch>(dk, gradients, queries);
    };
    sweep<G, D>(swept, task.swept.count, plan, problem.aligned,
                [&](const T* tiles, int first, int tokens) {
                    if (first_row >= count) return;
                    for_each_chunk(place, tokens, [&](int chunk) {
                        add_chunk(tiles + chunk * kPitch, first + chunk, tokens - chunk);
                    });
                });
    // Registers are short: better find the places again than keep them.
    const Task after = find_task(problem, plan);
    add_groups(place, 2 * kBands * (D / 2), [&](const auto& add) {
        for_each_sum<D, kBands>(dk, add);
        for_each_sum<D, kBands>(dv, add);
    });
    if (place.group > 0) return;
    const int row = after.row + place.position * G::kWarpRows;
    write_rows<T, D, kBands>(x.dk, problem, after, row, [&](int band, int half, int unit, int i) {
        return dk[band][unit][half * 2 + i] * scale;
    });
    write_rows<T, D, kBands>(x.dv, problem, after, row, [&](int band, int half, int unit, int i) {
        return dv[band][unit][half * 2 + i];
    });
}

template <class T, int D>
void launch_gradients(const Call& call, const Gradients<T>& x, Problem problem) {
    using Q = QueryGeometry<D>;
    using K = KeyGeometry<D>;
    if (problem.rows.tokens > 0) {
        const Plan plan = make_plan<Q>(call, problem, 2, Q::kBands * (D / 2));
        launch_plan<Q>(call, query_gradient<T, D>, plan, x, problem, plan);
    }
    if (problem.swept.tokens > 0) {
        const Side queries = problem.rows;
        problem.rows = problem.swept;
        problem.swept = queries;
        const Plan plan = make_plan<K>(call, problem, 2, 2 * K::kBands * (D / 2));
        launch_plan<K>(call, key_gradients<T, D>, plan, x, problem, plan);
    }
}

void attention_backward(const void* dout, const void* q, const void* k, const void* v,
                        const void* out, const float* lse, const int32_t* cu_seqlens_q,
                        const int32_t* cu_seqlens_k, float* delta, void* dq, void* dk, void* dv,
                        Strides q_strides, Strides k_strides, Strides v_strides, int64_t batch,
                        int64_t n, int64_t m, int64_t heads, int64_t head_dim, int64_t sequences,
                        int64_t max_n, int64_t max_m, double scale, int dtype, int64_t where) {
    const Call call = make_call("attention_backward", batch, n, heads, head_dim, where);
    if (batch == 0 || heads == 0 || head_dim == 0) return;
    if (delta == nullptr && n > 0)
        throw std::invalid_argument("attention_backward: delta must be the address of an array");
    Problem problem = make_problem(call, {cu_seqlens_q, n, max_n}, {cu_seqlens_k, m, max_m}, batch,
                                   heads, sequences, scale);
    with_type_and_width(call.op, dtype, head_dim, [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int D = decltype(width)::kValue;
        const Gradients<T> x{{array<T>(q), q_strides},
                             {array<T>(k), k_strides},
                             {array<T>(v), v_strides},
                             {array<T>(dout), {n * heads * D, heads * D, D}},
                             array<T>(out),
                             lse,
                             delta,
                             array<T>(dq),
                             array<T>(dk),
                             array<T>(dv)};
        problem.aligned = are_aligned({dout, out, dq, dk, dv}) && is_aligned(q, q_strides) &&
                          is_aligned(k, k_strides) && is_aligned(v, v_strides);
        launch_gradients<T, D>(call, x, problem);
    });
}

}  // namespace

void add_attention_backward(Kernels& kernels) { kernels.attention_backward = attention_backward; }

}  // namespace tim::cuda
