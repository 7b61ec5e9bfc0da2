// What the forward pass and the tangent do to one block of queries between the matrix products.
#pragma once

#include "attention.h"

namespace tim::cpu::TIM_ISA {
namespace {

// What one block of queries carries from tile to tile, all transposed.
struct Block {
    int64_t first, count, vectors;
    float *q, *t_q;      // [words of D][queries]
    float *out, *t_out;  // [D][queries], sums that still lack the factor 1 / sum
    float* lse;          // largest score so far, or lse where it is given
    float* sum;          // of the weights relative to it
    float* t_sum;        // of the tangents of the scores, weighted

    int64_t queries() const { return vectors * kRegister; }
};

// Scores become weights, and tangents of scores the products with them, in place. Adds to the sums.
// Of pairs, two rows become one. Two keys at a time, the second beyond the last one with a weight
// of zero.
template <bool pairs, int vectors, bool moving>
void weigh(float* scores, float* t_scores, int64_t keys, float scale, const Block& block) {
    constexpr int kQueries = vectors * kRegister;
    for (int v = 0; v < vectors; ++v) {
        const int lane = v * kRegister;
        const Vector lse = both(load_register(block.lse + lane));
        Vector sum(0.0f), t_sum(0.0f);
        for (int64_t key = 0; key < keys; key += 2) {
            float *score = scores + key * kQueries + lane, *next = score + kQueries;
            float* to = scores + key / 2 * kQueries + lane;
            Vector weight = math::attention_weight(
                Vector(load_register(score), load_register(next)), scale, lse);
            if (key + 1 == keys) weight.high = Register{};
            sum += weight;
            if constexpr (pairs) {
                store_register(to, paired(weight));
            } else {
                store_register(score, weight.low);
                store_register(next, weight.high);
            }
            if constexpr (!moving) continue;
            float *t_score = t_scores + key * kQueries + lane, *t_next = t_score + kQueries;
            const Vector product = weight * Vector(load_register(t_score), load_register(t_next));
            if constexpr (pairs) {
                const Register words = paired(product);
                store_register(t_scores + key / 2 * kQueries + lane, words);
                // Of the rounded numbers: the tangent is a difference of sums over them.
                t_sum += Vector(even_halves(words), odd_halves(words));
            } else {
                store_register(t_score, product.low);
                store_register(t_next, product.high);
                t_sum += product;
            }
        }
        float *sums = block.sum + lane, *t_sums = block.t_sum + lane;
        store_register(sums, load_register(sums) + (sum.low + sum.high));
        store_register(t_sums, load_register(t_sums) + (t_sum.low + t_sum.high));
    }
}

// Lifts block.lse to the maximum that includes this tile, and scales what was summed before.
// The largest weight is then one, which bfloat16 holds exactly.
template <int vectors>
void rescale(const float* scores, int64_t keys, float scale, int64_t depth, bool first,
             const Block& block) {
    constexpr int kQueries = vectors * kRegister;
    Register top[vectors];
    for (Register& lanes : top) lanes = broadcast(-INFINITY);
    for (int64_t key = 0; key < keys; ++key)
        for (int v = 0; v < vectors; ++v)
            top[v] = larger(load_register(scores + key * kQueries + v * kRegister), top[v]);
    float tops[kQueries], factor[kQueries];
    for (int v = 0; v < vectors; ++v) store_register(tops + v * kRegister, scale * top[v]);
    int exceeded = 0;
#pragma omp simd reduction(| : exceeded)
    for (int i = 0; i < kQueries; ++i) exceeded |= tops[i] > block.lse[i];
    if (!exceeded) return;
#pragma omp simd
    for (int i = 0; i < kQueries; ++i) {
        const float lse = tops[i] > block.lse[i] ? tops[i] : block.lse[i];
        factor[i] = math::attention_weight(block.lse[i], 1.0f, lse);
        block.lse[i] = lse;
        block.sum[i] *= factor[i];
        block.t_sum[i] *= factor[i];
    }
    if (first) return;
    float* const outputs[] = {block.out, block.t_out};
    for (float* sums : outputs) {
        if (sums == nullptr) continue;
        for (int64_t d = 0; d < depth; ++d) {
            float* row = sums + d * kQueries;
#pragma omp simd
            for (int i = 0; i < kQueries; ++i) row[i] *= factor[i];
        }
    }
}

}  // namespace
}  // namespace tim::cpu::TIM_ISA
