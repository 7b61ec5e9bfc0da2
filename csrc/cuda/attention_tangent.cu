// The tangent of attention from the forward's output and log-sum-exp: five products, two of them
// with the same tile of keys, and no maximum to follow.

#include "attention_products.cuh"

namespace tim::cuda {
namespace {

// Registers hold two bands of q, t_q and sums up to this width. Few rows are split into bands
// first.
template <int D, int parts>
using TangentGeometry = Geometry<D, D <= 72 && parts == 1 ? 2 : 1, parts>;

template <class T, int D, Subset subset, int parts>
__global__ void __launch_bounds__(TangentGeometry<D, parts>::kThreads,
                                  TangentGeometry<D, parts>::kResident)
    tangent(Inputs<T> x, const T* outs, const float* lses, T* t_outs, float* t_lses,
            Problem problem, Plan plan) {
    using G = TangentGeometry<D, parts>;
    constexpr int kPitch = G::kPitch, kBands = G::kBands, kColumns = G::kColumns;
    const Tangents there = tangents_of<subset>(x);
    const Task task = find_task<parts>(problem, plan);
    const int count = task.rows.count;
    if (task.row >= count) return;
    const WarpPlace place = warp_place<G>(plan);
    const int first_row = task.row + place.position * G::kWarpRows;

    Queries<D, kBands> queries;
    read_queries(queries, x, there, problem, task, first_row);
    float lse[kBands][2] = {};
    for_each_row<kBands>(first_row, count, [&](int band, int half, int row) {
        lse[band][half] = load_global(lses + scalar_index(problem, task, row));
    });

    HeadRows<T> swept[kSweptOperands<subset>];
    swept_rows<G, subset>(swept, x, task);
    if (!there.of_scores) swept[kValues].data = nullptr;
    const int tile_size = plan.tile * kPitch;
    const float scale = problem.scale;
    Sums<kColumns, kBands> sums = {};
    float t_lse[kBands][2] = {};
    const auto add_chunk = [&](const T* rows, int tokens) {
        float p[kBands][2][4] = {}, g[kBands][2][4] = {};
        score_chunk<T, D, kPitch>(p, g, queries, there, rows, tile_size);
        weigh(p, scale, lse);
        // The zeros behind the last key have a score too.
        fill_behind(p, tokens, 0.0f);
        for_each_score(
            g, [&](float& score, int band, int half, int i) { score *= p[band][half][i] * scale; });
        uint32_t weights[kBands][4], products[kBands][4];
        round_to_left<T>(weights, p);
        round_to_left<T>(products, g);
        if (there.of_scores) {
            // Of the rounded numbers: the tangent is a difference of sums over them.
            add_rows<T>(t_lse, products);
            add_values<kColumns, kPitch>(sums, products, rows + kValues * tile_size);
        }
        if (there.of_v) add_values<kColumns, kPitch>(sums, weights, rows + kTValues * tile_size);
    };
    sweep<G, D>(
        swept, task.swept.count, plan, problem.aligned, [&](const T* tiles, int, int tokens) {
            if (first_row >= count) return;
            for_each_chunk(place, tokens,
                           [&](int chunk) { add_chunk(tiles + chunk * kPitch, tokens - chunk); });
        });

    add_groups(place, kBands * (kColumns / 2 + 2), [&](const auto& add) {
        for_each_sum<kColumns, kBands>(sums, add);
        for_each_row_number(t_lse, add);
    });
    if (place.group > 0) return;
    write_tangent<T, D, kBands, kColumns>(t_outs, t_lses, outs, sums, t_lse, there, problem, task,
                                          first_row);
}

template <Subset subset, int D, int parts = 1, class T>
void launch_tangent(const Call& call, const Inputs<T>& x, const void* out, const float* lse,
                    void* t_out, float* t_lse, const Problem& problem) {
    using G = TangentGeometry<D, parts>;
    const int sums = G::kBands * (G::kColumns / 2 + 2);
    const Plan plan = make_plan<G>(call, problem, kSweptOperands<subset>, sums);
    if constexpr (parts == 1) {
        if (leaves_half_idle(call, plan))
            return launch_tangent<Subset::kSome, D, kColumnParts<D>>(call, x, out, lse, t_out,
                                                                     t_lse, problem);
    }
    launch_plan<G>(call, tangent<T, D, subset, parts>, plan, x, array<T>(out), lse, array<T>(t_out),
                   t_lse, problem, plan);
}

void attention_tangent(const void* q, const void* k, const void* v, const void* out,
                       const float* lse, const void* t_q, const void* t_k, const void* t_v,
                       const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, void* t_out,
                       float* t_lse, Strides q_strides, Strides k_strides, Strides v_strides,
                       Strides t_q_strides, Strides t_k_strides, Strides t_v_strides, int64_t batch,
                       int64_t n, int64_t m, int64_t heads, int64_t head_dim, int64_t sequences,
                       int64_t max_n, int64_t max_m, double scale, int dtype, int64_t where) {
    const Call call = make_call("attention_tangent", batch, n, heads, head_dim, where);
    if (batch == 0 || n == 0 || heads == 0 || head_dim == 0) return;
    check_tangents(call, t_q, t_k, t_v);
    Problem problem = make_problem(call, {cu_seqlens_q, n, max_n}, {cu_seqlens_k, m, max_m}, batch,
                                   heads, sequences, scale);
    with_type_and_width(call.op, dtype, head_dim, [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int D = decltype(width)::kValue;
        const Inputs<T> x = make_inputs<T>(q, k, v, t_q, t_k, t_v, q_strides, k_strides, v_strides,
                                           t_q_strides, t_k_strides, t_v_strides);
        problem.aligned = are_aligned({out, t_out}) && are_aligned(x);
        with_subset(x, [&](auto subset) {
            launch_tangent<decltype(subset)::value, D>(call, x, out, lse, t_out, t_lse, problem);
        });
    });
}

}  // namespace

void add_attention_tangent(Kernels& kernels) { kernels.attention_tangent = attention_tangent; }

}  // namespace tim::cuda
