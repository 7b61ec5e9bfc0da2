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
    float* keep;         // what the latest tile leaves of the sums before it
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

// Lifts block.lse to the maximum that includes this tile: the largest weight is then one, which
// bfloat16 holds exactly. The outputs are scaled as the tile's products are added to them.
template <int vectors>
void lift(const float* scores, int64_t keys, float scale, const Block& block) {
    constexpr int kQueries = vectors * kRegister;
    Register top[vectors];
    for (Register& lanes : top) lanes = broadcast(-INFINITY);
    for (int64_t key = 0; key < keys; ++key)
        for (int v = 0; v < vectors; ++v)
            top[v] = larger(load_register(scores + key * kQueries + v * kRegister), top[v]);
    float tops[kQueries];
    for (int v = 0; v < vectors; ++v) store_register(tops + v * kRegister, scale * top[v]);
#pragma omp simd
    for (int i = 0; i < kQueries; ++i) {
        const bool exceeded = tops[i] > block.lse[i];
        const float lse = exceeded ? tops[i] : block.lse[i];
        const float keep = math::attention_weight(block.lse[i], 1.0f, lse);
        block.keep[i] = exceeded ? keep : 1.0f;
        block.lse[i] = lse;
        block.sum[i] *= block.keep[i];
        block.t_sum[i] *= block.keep[i];
    }
}

// What one loads of a row of sums, in the order of T's vectors.
template <class T, class Extent>
Vector load_as(const float* sums, Extent extent) {
    if constexpr (std::is_same_v<T, float>) {
        return load(sums, extent);
    } else {
        return load_split(sums, extent);
    }
}

}  // namespace
}  // namespace tim::cpu::TIM_ISA
