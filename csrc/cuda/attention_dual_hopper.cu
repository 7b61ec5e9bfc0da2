// Attention and its tangent in one sweep on Hopper.

#include "attention_hopper.cuh"
#include "attention_pass.cuh"

namespace tim::cuda {

const Kernels& kernels();

namespace {

// Registers hold queries, scores, sums and their tangents up to this width.
constexpr int kMaxHopperDualWidth = 72;

template <class T, int D, Subset subset>
__global__ void __launch_bounds__(kHopperThreads, 1)
    dual_hopper(const __grid_constant__ TileMaps<kSweptOperands<subset>> maps, Inputs<T> x, T* outs,
                float* lses, T* t_outs, float* t_lses, Problem problem, Plan plan) {
    if constexpr (kHasWarpgroupProducts) {
        constexpr int kOperands = kSweptOperands<subset>;
        constexpr int kTileBytes = HopperTile<D>::kBytes;
        const Tangents there = tangents_of<subset>(x);
        const Task task = find_task(problem, plan);
        const HopperStages stages = hopper_stages();
        const auto fetch = [&] {
            bool fetched[kOperands];
            fetched[kKeys] = fetched[kValues] = true;
            if constexpr (kOperands == 4) {
                fetched[kTKeys] = there.of_k;
                fetched[kTValues] = there.of_v;
            }
            fetch_tiles<D>(stages, maps, fetched, task, plan.stages);
        };
        divide_roles(stages, task, plan.stages, fetch, [&](int first_row) {
            Queries<D, 1> queries;
            read_queries(queries, x, there, problem, task, first_row);
            const float scale = problem.scale;
            Sums<D, 1> sums = {}, t_sums = {};
            RowNumbers<1> maxima = {{-FLT_MAX, -FLT_MAX}}, totals = {}, t_lse = {};
            const auto rescale = [&](int, int half, float factor) {
                totals[0][half] *= factor;
                t_lse[0][half] *= factor;
#pragma unroll
                for (int i = 0; i < D / 4; ++i) {
                    sums[0][i / 2][half * 2 + i % 2] *= factor;
                    t_sums[0][i / 2][half * 2 + i % 2] *= factor;
                }
            };
            StageAt now;
            for (int token = 0; token < task.swept.count; token += kHopperKeys) {
                const int tokens = task.swept.count - token;
                wait_for_phase(stages.full + now.stage, now.parity);
                const uint32_t tiles =
                    shared_address(stages.tiles) + now.stage * kOperands * kTileBytes;
                float p[8][4], g[8][4];
                multiply_keys<T>(p, queries.q[0], tiles + kKeys * kTileBytes, false);
                if (there.of_q)
                    multiply_keys<T>(g, queries.t_q[0], tiles + kKeys * kTileBytes, false);
                if constexpr (kOperands == 4)
                    if (there.of_k)
                        multiply_keys<T>(g, queries.q[0], tiles + kTKeys * kTileBytes, there.of_q);
                commit_products();
                wait_for_products<0>();
                fence_registers(p);
                fence_registers(g);
                const auto each_chunk = [&](const auto& body) {
#pragma unroll
                    for (int chunk = 0; chunk < kKeyChunks; ++chunk)
                        body(reinterpret_cast<Scores<1>&>(p[2 * chunk]),
                             reinterpret_cast<Scores<1>&>(g[2 * chunk]), chunk);
                };
                each_chunk([&](Scores<1>& scores, Scores<1>&, int chunk) {
                    for_each_score(scores, [&](float& score, int, int, int) { score *= scale; });
                    fill_behind(scores, tokens - chunk * kChunkTokens, -INFINITY);
                });
                raise_maxima(
                    maxima,
                    [&](const auto& body) {
                        each_chunk([&](Scores<1>& scores, Scores<1>&, int) {
                            for_each_score(scores, body);
                        });
                    },
                    kSlack<T, subset>, rescale);
                uint32_t weights[kKeyChunks][4], products[kKeyChunks][4];
                each_chunk([&](Scores<1>& scores, Scores<1>& t_scores, int chunk) {
                    for_each_score(scores, [&](float& score, int, int, int i) {
                        score = math::attention_weight(score, 1.0f, maxima[0][i / 2]);
                        totals[0][i / 2] += score;
                    });
                    for_each_score(t_scores, [&](float& score, int, int half, int i) {
                        score *= scores[0][half][i] * scale;
                    });
                    auto& w = reinterpret_cast<uint32_t (&)[1][4]>(weights[chunk]);
                    auto& r = reinterpret_cast<uint32_t (&)[1][4]>(products[chunk]);
                    round_to_left<T>(w, scores);
                    round_to_left<T>(r, t_scores);
                    // Of the rounded numbers: the tangent is a difference of sums over them.
                    if (there.of_scores) add_rows<T>(t_lse, r);
                });
                fence_registers(sums[0]);
                fence_registers(t_sums[0]);
                multiply_values<T, D>(sums, weights, tiles + kValues * kTileBytes);
                if (there.of_scores)
                    multiply_values<T, D>(t_sums, products, tiles + kValues * kTileBytes);
                if constexpr (kOperands == 4)
                    if (there.of_v)
                        multiply_values<T, D>(t_sums, weights, tiles + kTValues * kTileBytes);
                commit_products();
                wait_for_products<0>();
                fence_registers(sums[0]);
                fence_registers(t_sums[0]);
                if (lane() == 0) arrive(stages.empty + now.stage);
                now.advance(plan.stages);
            }
            RowNumbers<1> lse, inverse;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float total = row_total(totals[0][half]);
                lse[0][half] = maxima[0][half] + logf(total);
                inverse[0][half] = 1.0f / total;
                t_lse[0][half] = row_total(t_lse[0][half]) * inverse[0][half];
            }
            write_row_numbers(lses, problem, task, first_row, lse);
            write_row_numbers(t_lses, problem, task, first_row, t_lse);
            write_rows<T, D, 1>(outs, problem, task, first_row,
                                [&](int, int half, int unit, int i) {
                                    return sums[0][unit][half * 2 + i] * inverse[0][half];
                                });
            write_rows<T, D, 1>(
                t_outs, problem, task, first_row, [&](int, int half, int unit, int i) {
                    const int at = half * 2 + i;
                    return inverse[0][half] * math::attention_tangent(t_sums[0][unit][at],
                                                                      t_lse[0][half],
                                                                      sums[0][unit][at]);
                });
        });
    }
}

// Launches the kernel where it can run.
template <class T, int D>
bool launch_dual(const Call& call, const Inputs<T>& x, void* out, float* lse, void* t_out,
                 float* t_lse, const Problem& problem, int64_t batch) {
    bool launched = false;
    with_subset(x, [&](auto constant) {
        constexpr Subset subset = decltype(constant)::value;
        constexpr int kOperands = kSweptOperands<subset>;
        Plan plan;
        TileMaps<kOperands> maps{};
        if (!make_hopper_plan<D>(call, problem, kOperands, &plan) ||
            !map_swept<subset, D>(&maps, x, problem, batch))
            return;
        const auto kernel = dual_hopper<T, D, subset>;
        allow_shared_memory(call, kernel, plan.shared_bytes);
        launch(call, kernel, dim3(unsigned(plan.all_blocks)), dim3(kHopperThreads),
               plan.shared_bytes, maps, x, array<T>(out), lse, array<T>(t_out), t_lse, problem,
               plan);
        launched = true;
    });
    return launched;
}

void attention_dual_hopper(const void* q, const void* k, const void* v, const void* t_q,
                           const void* t_k, const void* t_v, const int32_t* cu_seqlens_q,
                           const int32_t* cu_seqlens_k, void* out, float* lse, void* t_out,
                           float* t_lse, Strides q_strides, Strides k_strides, Strides v_strides,
                           Strides t_q_strides, Strides t_k_strides, Strides t_v_strides,
                           int64_t batch, int64_t n, int64_t m, int64_t heads, int64_t head_dim,
                           int64_t sequences, int64_t max_n, int64_t max_m, double scale, int dtype,
                           int64_t where) {
    const Call call = make_call("attention_dual_hopper", batch, n, heads, head_dim, where);
    if (batch == 0 || n == 0 || heads == 0 || head_dim == 0) return;
    check_tangents(call, t_q, t_k, t_v);
    Problem problem = make_problem(call, {cu_seqlens_q, n, max_n}, {cu_seqlens_k, m, max_m}, batch,
                                   heads, sequences, scale);
    bool launched = false;
    if (hopper_takes(call, problem)) {
        with_type_and_width(call.op, dtype, head_dim, [&](auto type, auto width) {
            using T = decltype(type);
            constexpr int D = decltype(width)::kValue;
            const Inputs<T> x = make_inputs<T>(q, k, v, t_q, t_k, t_v, q_strides, k_strides,
                                               v_strides, t_q_strides, t_k_strides, t_v_strides);
            problem.aligned = are_aligned({out, t_out}) && are_aligned(x);
            if constexpr (D <= kMaxHopperDualWidth)
                launched = launch_dual<T, D>(call, x, out, lse, t_out, t_lse, problem, batch);
        });
    }
    if (!launched)
        kernels().attention_dual(q, k, v, t_q, t_k, t_v, cu_seqlens_q, cu_seqlens_k, out, lse,
                                 t_out, t_lse, q_strides, k_strides, v_strides, t_q_strides,
                                 t_k_strides, t_v_strides, batch, n, m, heads, head_dim, sequences,
                                 max_n, max_m, scale, dtype, where);
}

}  // namespace

void add_attention_dual_hopper(Kernels& kernels) {
    kernels.attention_dual_hopper = attention_dual_hopper;
}

}  // namespace tim::cuda
