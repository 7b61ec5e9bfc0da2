// The forward pass of attention on Hopper.

#include "attention_hopper.cuh"
#include "attention_pass.cuh"

namespace tim::cuda {

const Kernels& kernels();

namespace {

template <class T, int D>
__global__ void __launch_bounds__(kHopperThreads, 1)
    forward_hopper(const __grid_constant__ TileMaps<2> maps, Inputs<T> x, T* outs, float* lses,
                   Problem problem, Plan plan) {
    if constexpr (kHasWarpgroupProducts) {
        constexpr int kTileBytes = HopperTile<D>::kBytes;
        const Task task = find_task(problem, plan);
        const HopperStages stages = hopper_stages();
        const auto fetch = [&] { fetch_tiles<D>(stages, maps, {true, true}, task, plan.stages); };
        divide_roles(stages, task, plan.stages, fetch, [&](int first_row) {
            Queries<D, 1> queries;
            read_queries(queries, x, tangents_of<Subset::kNone>(x), problem, task, first_row);
            const float scale = problem.scale;
            Sums<D, 1> sums = {};
            RowNumbers<1> maxima = {{-FLT_MAX, -FLT_MAX}}, totals = {};
            const auto rescale = [&](int, int half, float factor) {
                totals[0][half] *= factor;
#pragma unroll
                for (int i = 0; i < D / 4; ++i) sums[0][i / 2][half * 2 + i % 2] *= factor;
            };
            StageAt now;
            for (int token = 0; token < task.swept.count; token += kHopperKeys) {
                const int tokens = task.swept.count - token;
                wait_for_phase(stages.full + now.stage, now.parity);
                const uint32_t tiles = shared_address(stages.tiles) + now.stage * 2 * kTileBytes;
                float p[8][4];
                multiply_keys<T>(p, queries.q[0], tiles + kKeys * kTileBytes, false);
                commit_products();
                wait_for_products<0>();
                fence_registers(p);
                const auto each_chunk = [&](const auto& body) {
#pragma unroll
                    for (int chunk = 0; chunk < kKeyChunks; ++chunk)
                        body(reinterpret_cast<Scores<1>&>(p[2 * chunk]), chunk);
                };
                each_chunk([&](Scores<1>& scores, int chunk) {
                    for_each_score(scores, [&](float& score, int, int, int) { score *= scale; });
                    fill_behind(scores, tokens - chunk * kChunkTokens, -INFINITY);
                });
                raise_maxima(
                    maxima,
                    [&](const auto& body) {
                        each_chunk([&](Scores<1>& scores, int) { for_each_score(scores, body); });
                    },
                    kSlack<T, Subset::kNone>, rescale);
                uint32_t weights[kKeyChunks][4];
                each_chunk([&](Scores<1>& scores, int chunk) {
                    for_each_score(scores, [&](float& score, int, int, int i) {
                        score = math::attention_weight(score, 1.0f, maxima[0][i / 2]);
                        totals[0][i / 2] += score;
                    });
                    round_to_left<T>(reinterpret_cast<uint32_t (&)[1][4]>(weights[chunk]), scores);
                });
                fence_registers(sums[0]);
                multiply_values<T, D>(sums, weights, tiles + kValues * kTileBytes);
                commit_products();
                wait_for_products<0>();
                fence_registers(sums[0]);
                if (lane() == 0) arrive(stages.empty + now.stage);
                now.advance(plan.stages);
            }
            RowNumbers<1> lse, inverse;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float total = row_total(totals[0][half]);
                lse[0][half] = maxima[0][half] + logf(total);
                inverse[0][half] = 1.0f / total;
            }
            write_row_numbers(lses, problem, task, first_row, lse);
            write_rows<T, D, 1>(outs, problem, task, first_row,
                                [&](int, int half, int unit, int i) {
                                    return sums[0][unit][half * 2 + i] * inverse[0][half];
                                });
        });
    }
}

// Launches the kernel where it can run.
template <class T, int D>
bool launch_forward(const Call& call, const Inputs<T>& x, void* out, float* lse,
                    const Problem& problem, int64_t batch) {
    Plan plan;
    TileMaps<2> maps{};
    if (!make_hopper_plan<D>(call, problem, 2, &plan) ||
        !map_swept<Subset::kNone, D>(&maps, x, problem, batch))
        return false;
    const auto kernel = forward_hopper<T, D>;
    allow_shared_memory(call, kernel, plan.shared_bytes);
    launch(call, kernel, dim3(unsigned(plan.all_blocks)), dim3(kHopperThreads), plan.shared_bytes,
           maps, x, array<T>(out), lse, problem, plan);
    return true;
}

void attention_hopper(const void* q, const void* k, const void* v, const int32_t* cu_seqlens_q,
                      const int32_t* cu_seqlens_k, void* out, float* lse, Strides q_strides,
                      Strides k_strides, Strides v_strides, int64_t batch, int64_t n, int64_t m,
                      int64_t heads, int64_t head_dim, int64_t sequences, int64_t max_n,
                      int64_t max_m, double scale, int dtype, int64_t where) {
    const Call call = make_call("attention_hopper", batch, n, heads, head_dim, where);
    if (batch == 0 || n == 0 || heads == 0 || head_dim == 0) return;
    Problem problem = make_problem(call, {cu_seqlens_q, n, max_n}, {cu_seqlens_k, m, max_m}, batch,
                                   heads, sequences, scale);
    bool launched = false;
    if (hopper_takes(call, problem)) {
        with_type_and_width(call.op, dtype, head_dim, [&](auto type, auto width) {
            using T = decltype(type);
            constexpr int D = decltype(width)::kValue;
            const Inputs<T> x = make_inputs<T>(q, k, v, nullptr, nullptr, nullptr, q_strides,
                                               k_strides, v_strides, {}, {}, {});
            problem.aligned = are_aligned({out}) && are_aligned(x);
            launched = launch_forward<T, D>(call, x, out, lse, problem, batch);
        });
    }
    if (!launched)
        kernels().attention(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, q_strides, k_strides,
                            v_strides, batch, n, m, heads, head_dim, sequences, max_n, max_m, scale,
                            dtype, where);
}

}  // namespace

void add_attention_hopper(Kernels& kernels) { kernels.attention_hopper = attention_hopper; }

}  // namespace tim::cuda
