// The tangent of attention on Hopper. While one of the warpgroups with rows takes exponentials, the
// other one's products keep the tensor cores busy.

#include "attention_hopper.cuh"

namespace tim::cuda {

const Kernels& kernels();

namespace {

template <class T, int D, Subset subset>
__global__ void __launch_bounds__(kHopperThreads, 1)
    tangent_hopper(const __grid_constant__ TileMaps<kSweptOperands<subset>> maps, Inputs<T> x,
                   const T* outs, const float* lses, T* t_outs, float* t_lses, Problem problem,
                   Plan plan) {
    if constexpr (kHasWarpgroupProducts) {
        constexpr int kOperands = kSweptOperands<subset>;
        constexpr int kTileBytes = HopperTile<D>::kBytes;
        const Tangents there = tangents_of<subset>(x);
        const Task task = find_task(problem, plan);
        const HopperStages stages = hopper_stages();
        const auto fetch = [&] {
            bool fetched[kOperands];
            fetched[kKeys] = true;
            fetched[kValues] = there.of_scores;
            if constexpr (kOperands == 4) {
                fetched[kTKeys] = there.of_k;
                fetched[kTValues] = there.of_v;
            }
            fetch_tiles<D>(stages, maps, fetched, task, plan.stages);
        };
        divide_roles(stages, task, plan.stages, fetch, [&](int first_row) {
            Queries<D, 1> queries;
            read_queries(queries, x, there, problem, task, first_row);
            RowNumbers<1> lse = {}, t_lse = {};
            for_each_row<1>(first_row, task.rows.count, [&](int, int half, int row) {
                lse[0][half] = load_global(lses + scalar_index(problem, task, row));
            });
            const float scale = problem.scale;
            Sums<D, 1> sums = {};
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
                uint32_t weights[kKeyChunks][4], products[kKeyChunks][4];
#pragma unroll
                for (int chunk = 0; chunk < kKeyChunks; ++chunk) {
                    auto& p_chunk = reinterpret_cast<Scores<1>&>(p[2 * chunk]);
                    auto& g_chunk = reinterpret_cast<Scores<1>&>(g[2 * chunk]);
                    weigh(p_chunk, scale, lse);
                    fill_behind(p_chunk, tokens - chunk * kChunkTokens, 0.0f);
                    for_each_score(g_chunk, [&](float& score, int, int half, int i) {
                        score *= p_chunk[0][half][i] * scale;
                    });
                    auto& w = reinterpret_cast<uint32_t (&)[1][4]>(weights[chunk]);
                    auto& r = reinterpret_cast<uint32_t (&)[1][4]>(products[chunk]);
                    round_to_left<T>(w, p_chunk);
                    round_to_left<T>(r, g_chunk);
                    if (there.of_scores) add_rows<T>(t_lse, r);
                }
                fence_registers(sums[0]);
                if (there.of_scores)
                    multiply_values<T, D>(sums, products, tiles + kValues * kTileBytes);
                if constexpr (kOperands == 4)
                    if (there.of_v)
                        multiply_values<T, D>(sums, weights, tiles + kTValues * kTileBytes);
                commit_products();
                wait_for_products<0>();
                fence_registers(sums[0]);
                if (lane() == 0) arrive(stages.empty + now.stage);
                now.advance(plan.stages);
            }
            write_tangent<T, D, 1>(t_outs, t_lses, outs, sums, t_lse, there, problem, task,
                                   first_row);
        });
    }
}

// Launches the kernel where it can run.
template <class T, int D>
bool launch_tangent(const Call& call, const Inputs<T>& x, const void* out, const float* lse,
                    void* t_out, float* t_lse, const Problem& problem, int64_t batch) {
    bool launched = false;
    with_subset(x, [&](auto constant) {
        constexpr Subset subset = decltype(constant)::value;
        constexpr int kOperands = kSweptOperands<subset>;
        Plan plan;
        TileMaps<kOperands> maps{};
        if (!make_hopper_plan<D>(call, problem, kOperands, &plan) ||
            !map_swept<subset, D>(&maps, x, problem, batch))
            return;
        const auto kernel = tangent_hopper<T, D, subset>;
        allow_shared_memory(call, kernel, plan.shared_bytes);
        launch(call, kernel, dim3(unsigned(plan.all_blocks)), dim3(kHopperThreads),
               plan.shared_bytes, maps, x, array<T>(out), lse, array<T>(t_out), t_lse, problem,
               plan);
        launched = true;
    });
    return launched;
}

void attention_tangent_hopper(const void* q, const void* k, const void* v, const void* out,
                              const float* lse, const void* t_q, const void* t_k, const void* t_v,
                              const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, void* t_out,
                              float* t_lse, Strides q_strides, Strides k_strides, Strides v_strides,
                              Strides t_q_strides, Strides t_k_strides, Strides t_v_strides,
                              int64_t batch, int64_t n, int64_t m, int64_t heads, int64_t head_dim,
                              int64_t sequences, int64_t max_n, int64_t max_m, double scale,
                              int dtype, int64_t where) {
    const Call call = make_call("attention_tangent_hopper", batch, n, heads, head_dim, where);
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
            launched = launch_tangent<T, D>(call, x, out, lse, t_out, t_lse, problem, batch);
        });
    }
    if (!launched)
        kernels().attention_tangent(q, k, v, out, lse, t_q, t_k, t_v, cu_seqlens_q, cu_seqlens_k,
                                    t_out, t_lse, q_strides, k_strides, v_strides, t_q_strides,
                                    t_k_strides, t_v_strides, batch, n, m, heads, head_dim,
                                    sequences, max_n, max_m, scale, dtype, where);
}

}  // namespace

void add_attention_tangent_hopper(Kernels& kernels) {
    kernels.attention_tangent_hopper = attention_tangent_hopper;
}

}  // namespace tim::cuda
