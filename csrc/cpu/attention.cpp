#include "attention_block.h"
#include "kernel.h"

namespace tim::cpu::TIM_ISA {
namespace {

template <class T>
struct Arguments {
    Shape shape;
    Operand<T> q, k, v, t_q, t_k, t_v;
    T* out;
    float* lse;
    T* t_out;
    float* t_lse;
    float scale;
    bool given;  // out and lse are operands

    bool scores_move() const { return bool(t_q) || bool(t_k); }
};

// One thread's memory and loops.
template <class T>
class Worker {
  public:
    static constexpr bool kPairs = Words<T>::kPairs;
    static constexpr int64_t kBlocks = kGroupQueries / kBlockQueries;

    Worker(const Arguments<T>& arguments, float* memory)
        : a_(arguments), depths_(arguments.shape.head_dim), next_(memory) {
        keys_ = take(kTileKeys * depths_.depth);
        values_ = take(kTileKeys * depths_.depth);
        t_keys_ = a_.t_k ? take(kTileKeys * depths_.depth) : nullptr;
        t_values_ = a_.t_v ? take(kTileKeys * depths_.depth) : nullptr;
        scores_ = take(kTileKeys * kBlockQueries);
        t_scores_ = take(kTileKeys * kBlockQueries);
        staging_ = take(kBlockQueries * depths_.padded);
        t_staging_ = take(kBlockQueries * depths_.padded);
        for (Block& block : blocks_) {
            block.q = take(kBlockQueries * depths_.padded);
            block.t_q = a_.t_q ? take(kBlockQueries * depths_.padded) : nullptr;
            block.out = a_.given ? nullptr : take(kBlockQueries * depths_.padded);
            block.t_out = a_.t_out ? take(kBlockQueries * depths_.padded) : nullptr;
            block.lse = take(kBlockQueries);
            block.keep = take(kBlockQueries);
            block.sum = take(kBlockQueries);
            block.t_sum = take(kBlockQueries);
        }
    }

    // Floats that a worker takes at most.
    static int64_t memory(const Shape& shape) {
        const int64_t padded = Depths(shape.head_dim).padded;
        return 4 * kTileKeys * padded + 2 * kTileKeys * kBlockQueries +
               (2 + 4 * kBlocks) * kBlockQueries * padded + 4 * kBlocks * kBlockQueries;
    }

    void run(const Task& task) {
        task_ = task;
        if (task.keys == 0) return without_keys();
        start();
        for (int64_t key = 0; key < task.keys; key += kTileKeys) {
            pack_tile(key);
            for (int64_t i = 0; i < count_; ++i) {
                const Block& block = blocks_[i];
                with_vectors(block.vectors, [&](auto vectors) {
                    add_tile<decltype(vectors)::value>(block, key == 0);
                });
            }
        }
        for (int64_t i = 0; i < count_; ++i) finish(blocks_[i]);
    }

  private:
    float* take(int64_t count) {
        float* taken = next_;
        next_ += count;
        return taken;
    }

    // Index into lse and, times D, into outputs.
    int64_t row_of_lse(int64_t row) const {
        return (task_.sample * a_.shape.heads + task_.head) * a_.shape.n + row;
    }
    int64_t row_of_out(int64_t row) const {
        return ((task_.sample * a_.shape.n + row) * a_.shape.heads + task_.head) * depths_.head_dim;
    }

    void start() {
        const int64_t vectors = ceil_div(task_.rows, kRegister);
        count_ = ceil_div(vectors, kRegisterVectors);
        for (int64_t i = 0; i < count_; ++i) {
            Block& block = blocks_[i];
            block.first = i * vectors / count_ * kRegister;
            block.vectors = (i + 1) * vectors / count_ - i * vectors / count_;
            const int64_t left = task_.rows - block.first;
            block.count = left < block.queries() ? left : block.queries();
            pack_queries(block, a_.q, block.q);
            if (a_.t_q) pack_queries(block, a_.t_q, block.t_q);
            for (int64_t lane = 0; lane < block.queries(); ++lane) {
                block.sum[lane] = block.t_sum[lane] = 0.0f;
                block.lse[lane] = -INFINITY;
                block.keep[lane] = 1.0f;
                if (a_.given)
                    block.lse[lane] = lane < block.count
                                          ? a_.lse[row_of_lse(task_.row + block.first + lane)]
                                          : 0.0f;
            }
        }
    }

    void pack_queries(const Block& block, Operand<T> x, float* to) {
        const T* rows = first_query(x, task_) + block.first * x.strides.token;
        pack_transposed(rows, x.strides.token, block.count, block.vectors, depths_, to, staging_);
    }

    void pack_tile(int64_t key) {
        const int64_t left = task_.keys - key;
        tile_ = left < kTileKeys ? left : kTileKeys;
        pack_keys(a_.k, key, keys_);
        if (a_.t_k) pack_keys(a_.t_k, key, t_keys_);
        if (!a_.given || a_.scores_move()) pack_values(a_.v, key, values_);
        if (a_.t_v) pack_values(a_.t_v, key, t_values_);
    }

    void pack_keys(Operand<T> x, int64_t key, float* to) {
        pack_rows(first_key(x, task_) + key * x.strides.token, x.strides.token, tile_,
                  round_up(tile_, kRegisterRows), depths_.head_dim, to, words<T>(depths_.depth));
    }

    void pack_values(Operand<T> x, int64_t key, float* to) {
        sum_length_ = pack_sum(first_key(x, task_) + key * x.strides.token, x.strides.token, tile_,
                               depths_.head_dim, to, depths_.depth);
    }

    template <int vectors>
    void add_tile(const Block& block, bool first) {
        constexpr int64_t kQueries = vectors * kRegister;
        const bool moving = a_.scores_move();
        // The sign goes into the products, so that the largest of them has the largest score.
        const float scale = fabsf(a_.scale);
        multiply<kPairs, vectors, Into::kSet>({scores<vectors>(keys_, block.q)}, rows(),
                                              a_.scale < 0.0f ? -1.0f : 1.0f, scores_, kQueries);
        const Product by_queries = scores<vectors>(keys_, block.t_q);
        const Product by_keys = scores<vectors>(t_keys_, block.q);
        if (a_.t_k && a_.t_q) {
            multiply<kPairs, vectors, Into::kSet>({by_queries, by_keys}, rows(), a_.scale,
                                                  t_scores_, kQueries);
        } else if (moving) {
            multiply<kPairs, vectors, Into::kSet>({a_.t_q ? by_queries : by_keys}, rows(), a_.scale,
                                                  t_scores_, kQueries);
        }
        if (!a_.given) lift<vectors>(scores_, tile_, scale, block);
        if (moving) {
            weigh<kPairs, vectors, true>(scores_, t_scores_, tile_, scale, block);
        } else {
            weigh<kPairs, vectors, false>(scores_, t_scores_, tile_, scale, block);
        }
        const Product by_scores = sums<vectors>(values_, t_scores_);
        const Product by_values = sums<vectors>(t_values_, scores_);
        if (!a_.given) add<vectors>({sums<vectors>(values_, scores_)}, block, block.out, first);
        if (moving && a_.t_v) {
            add<vectors>({by_scores, by_values}, block, block.t_out, first);
        } else if (block.t_out != nullptr) {
            add<vectors>({moving ? by_scores : by_values}, block, block.t_out, first);
        }
    }

    int64_t rows() const { return round_up(tile_, kRegisterRows); }

    template <int vectors>
    Product scores(const float* keys, const float* queries) const {
        const int64_t length = words<T>(depths_.depth);
        return {{keys, length, 1}, {queries, vectors * kRegister}, length};
    }

    template <int vectors>
    Product sums(const float* values, const float* weights) const {
        return {{values, 1, depths_.depth}, {weights, vectors * kRegister}, sum_length_};
    }

    template <int vectors, int terms>
    void add(const Product (&products)[terms], const Block& block, float* to, bool first) const {
        constexpr int64_t kQueries = vectors * kRegister;
        if (first) {
            multiply<kPairs, vectors, Into::kSet>(products, depths_.depth, 1.0f, to, kQueries);
        } else {
            multiply<kPairs, vectors, Into::kKeep>(products, depths_.depth, 1.0f, to, kQueries,
                                                   block.keep);
        }
    }

    void finish(const Block& block) {
        const int64_t queries = block.queries();
        if (block.out != nullptr)
            transpose(block.out, queries, depths_.padded, queries, staging_, depths_.padded);
        if (block.t_out != nullptr)
            transpose(block.t_out, queries, depths_.padded, queries, t_staging_, depths_.padded);
        for (int64_t lane = 0; lane < block.count; ++lane) {
            const int64_t row = task_.row + block.first + lane;
            // Also where lse is given, which in float32 leaves the sum of the weights a little off
            // one: by more than anything else if it is large.
            const float factor = 1.0f / block.sum[lane];
            const float t_lse = block.t_sum[lane] * factor;
            const int64_t place = row_of_out(row);
            const float* sums = staging_ + lane * depths_.padded;
            const float* t_sums = t_staging_ + lane * depths_.padded;
            if (!a_.given) a_.lse[row_of_lse(row)] = block.lse[lane] + logf(block.sum[lane]);
            sweep(depths_.head_dim, [&](int64_t d, auto extent) {
                Vector value;
                if (a_.given) {
                    value = load(a_.out + place + d, extent);
                } else {
                    value = factor * load_as<T>(sums + d, extent);
                    store(a_.out + place + d, value, extent);
                }
                if (block.t_out == nullptr) return;
                const Vector t_sum = factor * load_as<T>(t_sums + d, extent);
                store(a_.t_out + place + d, math::attention_tangent(t_sum, Vector(t_lse), value),
                      extent);
            });
            if (block.t_out == nullptr) continue;
            if (a_.t_lse != nullptr) a_.t_lse[row_of_lse(row)] = t_lse;
        }
    }

    void without_keys() {
        for (int64_t row = task_.row; row < task_.row + task_.rows; ++row) {
            for (int64_t d = 0; d < depths_.head_dim; ++d) {
                if (!a_.given) store(a_.out + row_of_out(row) + d, 0.0f);
                if (a_.t_out != nullptr) store(a_.t_out + row_of_out(row) + d, 0.0f);
            }
            if (!a_.given) a_.lse[row_of_lse(row)] = -INFINITY;
            if (a_.t_lse != nullptr) a_.t_lse[row_of_lse(row)] = 0.0f;
        }
    }

    const Arguments<T>& a_;
    const Depths depths_;
    float* next_;
    float *keys_, *values_, *t_keys_, *t_values_, *scores_, *t_scores_, *staging_, *t_staging_;
    Block blocks_[kBlocks];
    Task task_{};
    int64_t count_ = 0, tile_ = 0, sum_length_ = 0;
};

template <class T>
void run(const Arguments<T>& arguments, int64_t threads) {
    const Shape& shape = arguments.shape;
    const int64_t group = group_size(shape, threads);
    const int64_t tasks = count_tasks(shape, group);
    const int64_t memory = Worker<T>::memory(shape);
    const Scratch scratch(threads * memory);
    const int64_t cost = group * shape.m * shape.head_dim;
    parallel_for(tasks, cost, threads, [&](int64_t begin, int64_t end, int64_t thread) {
        Worker<T> worker(arguments, scratch.data + thread * memory);
        for_tasks(shape, group, begin, end, [&](const Task& task) { worker.run(task); });
    });
}

void attention(const void* q, const void* k, const void* v, const int32_t* cu_seqlens_q,
               const int32_t* cu_seqlens_k, void* out, float* lse, Strides q_strides,
               Strides k_strides, Strides v_strides, int64_t batch, int64_t n, int64_t m,
               int64_t heads, int64_t head_dim, int64_t sequences, int64_t, int64_t, double scale,
               int dtype, int64_t where) {
    with_dtype(dtype, where, [&](auto type) {
        using T = decltype(type);
        const Shape shape{batch, n, m, heads, head_dim, sequences, cu_seqlens_q, cu_seqlens_k};
        const Operand<T> none{};
        run<T>({shape, operand<T>(q, q_strides), operand<T>(k, k_strides), operand<T>(v, v_strides),
                none, none, none, static_cast<T*>(out), lse, nullptr, nullptr, float(scale), false},
               where);
    });
}

// attention_dual, or attention_tangent with `out` and `lse` given.
template <bool given>
void with_tangents(const void* q, const void* k, const void* v, const void* t_q, const void* t_k,
                   const void* t_v, const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k,
                   void* out, float* lse, void* t_out, float* t_lse, Strides q_strides,
                   Strides k_strides, Strides v_strides, Strides t_q_strides, Strides t_k_strides,
                   Strides t_v_strides, int64_t batch, int64_t n, int64_t m, int64_t heads,
                   int64_t head_dim, int64_t sequences, int64_t, int64_t, double scale, int dtype,
                   int64_t where) {
    if (t_q == nullptr && t_k == nullptr && t_v == nullptr)
        refuse("attention: at least one of t_q, t_k, t_v must be the address of an array");
    with_dtype(dtype, where, [&](auto type) {
        using T = decltype(type);
        const Shape shape{batch, n, m, heads, head_dim, sequences, cu_seqlens_q, cu_seqlens_k};
        run<T>({shape, operand<T>(q, q_strides), operand<T>(k, k_strides), operand<T>(v, v_strides),
                operand<T>(t_q, t_q_strides), operand<T>(t_k, t_k_strides),
                operand<T>(t_v, t_v_strides), static_cast<T*>(out), lse, static_cast<T*>(t_out),
                t_lse, float(scale), given},
               where);
    });
}

void attention_tangent(const void* q, const void* k, const void* v, const void* out,
                       const float* lse, const void* t_q, const void* t_k, const void* t_v,
                       const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k, void* t_out,
                       float* t_lse, Strides q_strides, Strides k_strides, Strides v_strides,
                       Strides t_q_strides, Strides t_k_strides, Strides t_v_strides, int64_t batch,
                       int64_t n, int64_t m, int64_t heads, int64_t head_dim, int64_t sequences,
                       int64_t, int64_t, double scale, int dtype, int64_t where) {
    with_tangents<true>(q, k, v, t_q, t_k, t_v, cu_seqlens_q, cu_seqlens_k, const_cast<void*>(out),
                        const_cast<float*>(lse), t_out, t_lse, q_strides, k_strides, v_strides,
                        t_q_strides, t_k_strides, t_v_strides, batch, n, m, heads, head_dim,
                        sequences, 0, 0, scale, dtype, where);
}

}  // namespace

void add_attention(Kernels& kernels) {
    kernels.attention = attention;
    kernels.attention_tangent = attention_tangent;
    kernels.attention_dual = with_tangents<false>;
}

}  // namespace tim::cpu::TIM_ISA
