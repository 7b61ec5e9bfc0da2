// The forward pass of attention, alone or with its tangent in the same sweep over the keys.
//
// Weights are relative to a maximum that is only raised, and the sums with it, when a score exceeds
// it by more than some slack: sums in float32 have the room, and after the first keys that is rare.
#pragma once

#include <float.h>

#include "attention_products.cuh"

namespace tim::cuda {
namespace {

// With a tangent there are twice as many sums to hold. Few rows are split into bands first.
template <int D, Subset subset, int parts>
using PassGeometry = Geometry<D, subset == Subset::kNone && D <= 96 && parts == 1 ? 2 : 1, parts>;

// The logarithm of the largest weight. Tangents in float16 need the room themselves.
template <class T, Subset subset>
constexpr float kSlack = subset == Subset::kNone || std::is_same_v<T, BFloat16> ? 5.5f : 0.0f;

// Raises the maxima of all rows of the warp to those of the scores when one is exceeded by more
// than `slack`, and calls rescale(band, half, factor) for the sums to follow. `visit` calls its
// argument as for_each_score does.
template <int bands, class Visit, class Rescale>
TIM_DEVICE void raise_maxima(RowNumbers<bands>& maxima, const Visit& visit, float slack,
                             const Rescale& rescale) {
    RowNumbers<bands> top;
    bool exceeded = false;
#pragma unroll
    for (int band = 0; band < bands; ++band)
#pragma unroll
        for (int half = 0; half < 2; ++half) top[band][half] = maxima[band][half];
    visit([&](float& score, int band, int, int i) {
        top[band][i / 2] = fmaxf(top[band][i / 2], score);
    });
#pragma unroll
    for (int band = 0; band < bands; ++band)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            exceeded = exceeded || top[band][half] > maxima[band][half] + slack;
    if (!any_lane(exceeded)) return;
#pragma unroll
    for (int band = 0; band < bands; ++band)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float& maximum = maxima[band][half];
            const float raised = row_maximum(top[band][half]);
            rescale(band, half, math::attention_weight(maximum, 1.0f, raised));
            maximum = raised;
        }
}

// Gives the groups of a block the same maxima.
template <int bands, class Rescale>
TIM_DEVICE void unite_maxima(const WarpPlace& place, RowNumbers<bands>& maxima,
                             const Rescale& rescale) {
    if (place.groups == 1) return;
    barrier();  // nobody reads tiles any more
    const int rows = place.positions * bands * kBandRows;
    float* const shared = shared_memory() + place.position * bands * kBandRows + lane() / 4;
#pragma unroll
    for (int band = 0; band < bands; ++band)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (lane() % 4 == 0)
                shared[place.group * rows + band * kBandRows + half * 8] = maxima[band][half];
        }
    barrier();
#pragma unroll
    for (int band = 0; band < bands; ++band)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float raised = maxima[band][half];
            for (int group = 0; group < place.groups; ++group)
                raised = fmaxf(raised, shared[group * rows + band * kBandRows + half * 8]);
            rescale(band, half, math::attention_weight(maxima[band][half], 1.0f, raised));
            maxima[band][half] = raised;
        }
}

template <class T, int D, Subset subset, int parts>
__global__ void __launch_bounds__(PassGeometry<D, subset, parts>::kThreads,
                                  PassGeometry<D, subset, parts>::kResident)
    pass(Inputs<T> x, T* outs, float* lses, T* t_outs, float* t_lses, Problem problem, Plan plan) {
    using G = PassGeometry<D, subset, parts>;
    constexpr int kPitch = G::kPitch, kBands = G::kBands, kColumns = G::kColumns;
    constexpr bool kMoving = subset != Subset::kNone;
    const Tangents there = tangents_of<subset>(x);
    const Task task = find_task<parts>(problem, plan);
    const int count = task.rows.count;
    if (task.row >= count) return;
    const WarpPlace place = warp_place<G>(plan);
    const int first_row = task.row + place.position * G::kWarpRows;

    Queries<D, kBands> queries;
    read_queries(queries, x, there, problem, task, first_row);
    HeadRows<T> swept[kSweptOperands<subset>];
    swept_rows<G, subset>(swept, x, task);
    const int tile_size = plan.tile * kPitch;
    const float scale = problem.scale;
    Sums<kColumns, kBands> sums = {}, t_sums = {};
    RowNumbers<kBands> maxima, totals = {}, t_lse = {};
    for_each_row_number(maxima, [](float& maximum) { maximum = -FLT_MAX; });
    const auto rescale = [&](int band, int half, float factor) {
        totals[band][half] *= factor;
        t_lse[band][half] *= factor;
#pragma unroll
        for (int i = 0; i < kColumns / 4; ++i) {
            sums[band][i / 2][half * 2 + i % 2] *= factor;
            if (kMoving) t_sums[band][i / 2][half * 2 + i % 2] *= factor;
        }
    };
    const auto add_chunk = [&](const T* rows, int tokens) {
        float p[kBands][2][4] = {}, g[kBands][2][4] = {};
        score_chunk<T, D, kPitch>(p, g, queries, there, rows, tile_size);
        for_each_score(p, [&](float& score, int, int, int) { score *= scale; });
        fill_behind(p, tokens, -INFINITY);
        raise_maxima(
            maxima, [&](const auto& body) { for_each_score(p, body); }, kSlack<T, subset>, rescale);
        for_each_score(p, [&](float& score, int band, int, int i) {
            score = math::attention_weight(score, 1.0f, maxima[band][i / 2]);
            totals[band][i / 2] += score;
        });
        for_each_score(
            g, [&](float& score, int band, int half, int i) { score *= p[band][half][i] * scale; });
        uint32_t weights[kBands][4], products[kBands][4];
        round_to_left<T>(weights, p);
        round_to_left<T>(products, g);
        add_values<kColumns, kPitch>(sums, weights, rows + kValues * tile_size);
        if (there.of_scores) {
            // Of the rounded numbers: the tangent is a difference of sums over them.
            add_rows<T>(t_lse, products);
            add_values<kColumns, kPitch>(t_sums, products, rows + kValues * tile_size);
        }
        if (there.of_v) add_values<kColumns, kPitch>(t_sums, weights, rows + kTValues * tile_size);
    };
    sweep<G, D>(
        swept, task.swept.count, plan, problem.aligned, [&](const T* tiles, int, int tokens) {
            if (first_row >= count) return;
            for_each_chunk(place, tokens,
                           [&](int chunk) { add_chunk(tiles + chunk * kPitch, tokens - chunk); });
        });

    unite_maxima(place, maxima, rescale);
    add_groups(place, kBands * ((kMoving ? 2 : 1) * (kColumns / 2 + 2)), [&](const auto& add) {
        for_each_sum<kColumns, kBands>(sums, add);
        for_each_row_number(totals, add);
        if (kMoving) {
            for_each_sum<kColumns, kBands>(t_sums, add);
            for_each_row_number(t_lse, add);
        }
    });
    if (place.group > 0) return;
    RowNumbers<kBands> lse, inverse;
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float total = row_total(totals[band][half]);
            lse[band][half] = maxima[band][half] + logf(total);
            inverse[band][half] = task.swept.count == 0 ? 0.0f : 1.0f / total;
            t_lse[band][half] = row_total(t_lse[band][half]) * inverse[band][half];
        }
    write_row_numbers(lses, problem, task, first_row, lse);
    write_rows<T, D, kBands, kColumns>(
        outs, problem, task, first_row, [&](int band, int half, int unit, int i) {
            return sums[band][unit][half * 2 + i] * inverse[band][half];
        });
    if constexpr (kMoving) {
        write_row_numbers(t_lses, problem, task, first_row, t_lse);
        write_rows<T, D, kBands, kColumns>(
            t_outs, problem, task, first_row, [&](int band, int half, int unit, int i) {
                const int at = half * 2 + i;
                return inverse[band][half] * math::attention_tangent(t_sums[band][unit][at],
                                                                     t_lse[band][half],
                                                                     sums[band][unit][at]);
            });
    }
}

template <Subset subset, int D, int parts = 1, class T>
void launch_pass(const Call& call, const Inputs<T>& x, void* out, float* lse, void* t_out,
                 float* t_lse, const Problem& problem) {
    using G = PassGeometry<D, subset, parts>;
    const int sums = G::kBands * (subset == Subset::kNone ? 1 : 2) * (G::kColumns / 2 + 2);
    const Plan plan = make_plan<G>(call, problem, kSweptOperands<subset>, sums);
    if constexpr (parts == 1) {
        constexpr Subset split = subset == Subset::kNone ? Subset::kNone : Subset::kSome;
        if (leaves_half_idle(call, plan))
            return launch_pass<split, D, kColumnParts<D>>(call, x, out, lse, t_out, t_lse, problem);
    }
    launch_plan<G>(call, pass<T, D, subset, parts>, plan, x, array<T>(out), lse, array<T>(t_out),
                   t_lse, problem, plan);
}

}  // namespace
}  // namespace tim::cuda
