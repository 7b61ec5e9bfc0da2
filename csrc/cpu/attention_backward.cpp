#include "attention.h"
#include "rows.h"

namespace tim::cpu::TIM_ISA {
namespace {

template <class T>
struct Gradient {
    Shape shape;
    Operand<T> q, k, v;
    const T *dout, *out;
    const float* lse;
    T *dq, *dk, *dv;
    float scale;
};

// What a block of queries keeps while the tiles of keys pass by.
struct Block {
    int64_t first, count, vectors;
    float *q, *dout;            // [words of D][queries]
    float *q_rows, *dout_rows;  // [queries or pairs of them][D]
    float* dq;                  // [D][queries]
    float *lse, *delta;

    int64_t queries() const { return vectors * kRegister; }
};

// One thread's memory and loops: one head of one sequence at a time, so that the gradients of its
// keys and values are summed in the same order whatever the number of threads.
template <class T>
class Worker {
  public:
    static constexpr bool kPairs = Words<T>::kPairs;
    static constexpr int64_t kBlocks = kGroupQueries / kBlockQueries;

    Worker(const Gradient<T>& gradient, float* memory)
        : g_(gradient), depths_(gradient.shape.head_dim), next_(memory) {
        keys_ = take(kTileKeys * depths_.depth);
        key_sums_ = kPairs ? take(kTileKeys * depths_.depth) : keys_;
        values_ = take(kTileKeys * depths_.depth);
        weights_ = take(kTileKeys * kBlockQueries);
        dscores_ = take(kTileKeys * kBlockQueries);
        weight_rows_ = kPairs ? take(kTileKeys * kBlockQueries) : weights_;
        dscore_rows_ = kPairs ? take(kTileKeys * kBlockQueries) : dscores_;
        staging_ = take(kBlockQueries * depths_.padded);
        for (Block& block : blocks_) {
            float** const parts[] = {&block.q, &block.dout, &block.q_rows, &block.dout_rows,
                                     &block.dq};
            for (float** part : parts) *part = take(kBlockQueries * depths_.padded);
            block.lse = take(kBlockQueries);
            block.delta = take(kBlockQueries);
        }
        dkeys_ = take(longest(gradient.shape) * depths_.padded);
        dvalues_ = take(longest(gradient.shape) * depths_.padded);
    }

    // Floats that a worker takes at most.
    static int64_t memory(const Shape& shape) {
        const Depths depths(shape.head_dim);
        return 3 * kTileKeys * depths.depth + 4 * kTileKeys * kBlockQueries +
               (1 + 5 * kBlocks) * kBlockQueries * depths.padded + 2 * kBlocks * kBlockQueries +
               2 * longest(shape) * depths.padded;
    }

    void run(const Task& task) {
        task_ = task;
        fill_zero(dkeys_, task.keys * depths_.padded);
        fill_zero(dvalues_, task.keys * depths_.padded);
        for (int64_t row = 0; row < task.rows; row += kGroupQueries) {
            start(row);
            for (int64_t key = 0; key < task.keys; key += kTileKeys) {
                pack_tile(key);
                for (int64_t i = 0; i < count_; ++i) {
                    with_vectors(blocks_[i].vectors, [&](auto vectors) {
                        add_tile<decltype(vectors)::value>(blocks_[i], key);
                    });
                }
            }
            for (int64_t i = 0; i < count_; ++i) finish(blocks_[i]);
        }
        for (int64_t key = 0; key < task.keys; ++key) {
            const int64_t row = (task.sample * g_.shape.m + task.key + key) * g_.shape.heads;
            const int64_t to = (row + task.head) * depths_.head_dim;
#pragma omp simd
            for (int64_t d = 0; d < depths_.head_dim; ++d) {
                store(g_.dk + to + d, g_.scale * dkeys_[key * depths_.padded + d]);
                store(g_.dv + to + d, dvalues_[key * depths_.padded + d]);
            }
        }
    }

  private:
    // Rows of the sums over queries; the last tile of keys is multiplied in whole register tiles.
    static int64_t longest(const Shape& shape) { return round_up(shape.m, kRegisterRows); }

    float* take(int64_t count) {
        float* taken = next_;
        next_ += count;
        return taken;
    }

    // Of row `row` of the task, in dout, out and dq.
    int64_t place(int64_t row) const {
        const int64_t token = task_.sample * g_.shape.n + task_.row + row;
        return (token * g_.shape.heads + task_.head) * depths_.head_dim;
    }

    void start(int64_t row) {
        const int64_t rows = task_.rows - row < kGroupQueries ? task_.rows - row : kGroupQueries;
        const int64_t vectors = ceil_div(rows, kRegister);
        count_ = ceil_div(vectors, kRegisterVectors);
        for (int64_t i = 0; i < count_; ++i) {
            Block& block = blocks_[i];
            const int64_t first = i * vectors / count_;
            block.vectors = (i + 1) * vectors / count_ - first;
            block.first = row + first * kRegister;
            const int64_t left = task_.rows - block.first;
            block.count = left < block.queries() ? left : block.queries();
            const T* q = first_query(g_.q, task_) + block.first * g_.q.strides.token;
            pack(block, q, g_.q.strides.token, block.q, block.q_rows);
            const int64_t stride = g_.shape.heads * depths_.head_dim;
            pack(block, g_.dout + place(block.first), stride, block.dout, block.dout_rows);
            fill_zero(block.dq, depths_.padded * block.queries());
            for (int64_t lane = 0; lane < block.queries(); ++lane) {
                // Idle lanes: their queries and gradients are zero.
                block.lse[lane] = block.delta[lane] = 0.0f;
                if (lane >= block.count) continue;
                const int64_t at = place(block.first + lane);
                const int64_t head = task_.sample * g_.shape.heads + task_.head;
                const int64_t token = task_.row + block.first + lane;
                block.lse[lane] = g_.lse[head * g_.shape.n + token];
                float delta = 0.0f;
#pragma omp simd reduction(+ : delta)
                for (int64_t d = 0; d < depths_.head_dim; ++d)
                    delta += load(g_.dout + at + d) * load(g_.out + at + d);
                block.delta[lane] = delta;
            }
        }
    }

    void pack(const Block& block, const T* x, int64_t stride, float* transposed, float* rows) {
        pack_transposed(x, stride, block.count, block.vectors, depths_, transposed, staging_);
        pack_sum(x, stride, block.count, depths_.head_dim, rows, depths_.padded);
    }

    void pack_tile(int64_t key) {
        const int64_t left = task_.keys - key;
        tile_ = left < kTileKeys ? left : kTileKeys;
        tile_rows_ = round_up(tile_, kRegisterRows);
        const T* k = first_key(g_.k, task_) + key * g_.k.strides.token;
        const T* v = first_key(g_.v, task_) + key * g_.v.strides.token;
        const int64_t columns = depths_.head_dim, length = words<T>(depths_.depth);
        pack_rows(k, g_.k.strides.token, tile_, tile_rows_, columns, keys_, length);
        pack_rows(v, g_.v.strides.token, tile_, tile_rows_, columns, values_, length);
        if (kPairs) pack_sum(k, g_.k.strides.token, tile_, columns, key_sums_, depths_.depth);
    }

    template <int vectors>
    void add_tile(const Block& block, int64_t key) {
        constexpr int64_t kQueries = vectors * kRegister;
        const int64_t length = words<T>(depths_.depth);
        multiply<kPairs, vectors, Into::kSet>({{{keys_, length, 1}, {block.q, kQueries}, length}},
                                              tile_rows_, 1.0f, weights_, kQueries);
        multiply<kPairs, vectors, Into::kSet>(
            {{{values_, length, 1}, {block.dout, kQueries}, length}}, tile_rows_, 1.0f, dscores_,
            kQueries);
        weigh<vectors>(block);
        multiply<kPairs, vectors, Into::kAdd>(
            {{{key_sums_, 1, depths_.depth}, {dscores_, kQueries}, numbers(tile_)}}, depths_.depth,
            1.0f, block.dq, kQueries);
        add_rows(weight_rows_, block, block.dout_rows, dvalues_ + key * depths_.padded);
        add_rows(dscore_rows_, block, block.q_rows, dkeys_ + key * depths_.padded);
    }

    static int64_t numbers(int64_t count) { return kPairs ? ceil_div(count, 2) : count; }

    // to[key][:] += sum over the block's queries of weights(key, query) rows[query][:].
    void add_rows(const float* weights, const Block& block, const float* rows, float* to) {
        const Left left{weights, words<T>(block.queries()), 1};
        const int64_t all = depths_.padded / kRegister, parts = ceil_div(all, kRegisterVectors);
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t first = part * all / parts, column = first * kRegister;
            with_vectors((part + 1) * all / parts - first, [&](auto vectors) {
                multiply<kPairs, decltype(vectors)::value, Into::kAdd>(
                    {{left, {rows + column, depths_.padded}, numbers(block.count)}}, tile_rows_,
                    1.0f, to + column, depths_.padded);
            });
        }
    }

    // Scores become weights and gradients of weights those of scores. Pairs of keys are for the sum
    // over keys, rows of queries for the sums over queries. Two keys at a time, the second beyond
    // the last one with a weight of zero.
    template <int vectors>
    void weigh(const Block& block) {
        constexpr int kQueries = vectors * kRegister;
        for (int v = 0; v < vectors; ++v) {
            const int lane = v * kRegister;
            const Vector lse = both(load_register(block.lse + lane));
            const Vector delta = both(load_register(block.delta + lane));
            for (int64_t key = 0; key < tile_; key += 2) {
                float *score = weights_ + key * kQueries + lane, *next = score + kQueries;
                float *dweight = dscores_ + key * kQueries + lane, *dnext = dweight + kQueries;
                Vector weight = math::attention_weight(
                    Vector(load_register(score), load_register(next)), g_.scale, lse);
                if (key + 1 == tile_) weight.high = Register{};
                const Vector dscore = math::attention_score_gradient(
                    weight, Vector(load_register(dweight), load_register(dnext)), delta);
                if constexpr (kPairs) {
                    store_row(row_of_pairs(weight_rows_, key, kQueries) + lane, weight.low);
                    store_row(row_of_pairs(weight_rows_, key + 1, kQueries) + lane, weight.high);
                    store_row(row_of_pairs(dscore_rows_, key, kQueries) + lane, dscore.low);
                    store_row(row_of_pairs(dscore_rows_, key + 1, kQueries) + lane, dscore.high);
                    store_register(dscores_ + key / 2 * kQueries + lane, paired(dscore));
                } else {
                    store_register(score, weight.low);
                    store_register(next, weight.high);
                    store_register(dweight, dscore.low);
                    store_register(dnext, dscore.high);
                }
            }
        }
    }

    static T* row_of_pairs(float* rows, int64_t row, int64_t queries) {
        return reinterpret_cast<T*>(rows) + row * queries;
    }

    void finish(const Block& block) {
        transpose(block.dq, block.queries(), depths_.padded, block.queries(), staging_,
                  depths_.padded);
        for (int64_t lane = 0; lane < block.count; ++lane) {
            const float* dq = staging_ + lane * depths_.padded;
            T* to = g_.dq + place(block.first + lane);
#pragma omp simd
            for (int64_t d = 0; d < depths_.head_dim; ++d) store(to + d, g_.scale * dq[d]);
        }
    }

    const Gradient<T>& g_;
    const Depths depths_;
    float* next_;
    float *keys_, *key_sums_, *values_, *weights_, *dscores_, *weight_rows_, *dscore_rows_;
    float *staging_, *dkeys_, *dvalues_;
    Block blocks_[kBlocks];
    Task task_{};
    int64_t count_ = 0, tile_ = 0, tile_rows_ = 0;
};

template <class T>
void run(const Gradient<T>& gradient, int64_t threads) {
    const Shape& shape = gradient.shape;
    const int64_t memory = Worker<T>::memory(shape);
    const Scratch scratch(threads * memory);
    const int64_t heads = shape.heads;
    parallel_for(shape.count() * heads, shape.n * shape.m * shape.head_dim, threads,
                 [&](int64_t begin, int64_t end, int64_t thread) {
                     Worker<T> worker(gradient, scratch.data + thread * memory);
                     for (int64_t i = begin; i < end; ++i) {
                         Task task = whole_sequence(shape, i / heads);
                         task.head = i % heads;
                         worker.run(task);
                     }
                 });
}

void attention_backward(const void* dout, const void* q, const void* k, const void* v,
                        const void* out, const float* lse, const int32_t* cu_seqlens_q,
                        const int32_t* cu_seqlens_k, float*, void* dq, void* dk, void* dv,
                        Strides q_strides, Strides k_strides, Strides v_strides, int64_t batch,
                        int64_t n, int64_t m, int64_t heads, int64_t head_dim, int64_t sequences,
                        int64_t, int64_t, double scale, int dtype, int64_t where) {
    with_dtype(dtype, where, [&](auto type) {
        using T = decltype(type);
        const Shape shape{batch, n, m, heads, head_dim, sequences, cu_seqlens_q, cu_seqlens_k};
        run<T>({shape, operand<T>(q, q_strides), operand<T>(k, k_strides), operand<T>(v, v_strides),
                static_cast<const T*>(dout), static_cast<const T*>(out), lse, static_cast<T*>(dq),
                static_cast<T*>(dk), static_cast<T*>(dv), float(scale)},
               where);
    });
}

}  // namespace

void add_attention_backward(Kernels& kernels) { kernels.attention_backward = attention_backward; }

}  // namespace tim::cpu::TIM_ISA
