#include "qk_norm_rope.cuh"

namespace tim::cuda {
namespace {

// The gradients of the weights and biases are sums over all tokens and heads. Tokens are cut into
// chunks, by their number alone so that the result does not depend on the GPU; every chunk has its
// own sums, and these are added in order. Until the last kernel writes dv, its place in dqkv holds
// the chunks' sums: 4 D float32 numbers each, for which 16 tokens have room.
constexpr int64_t kMinChunk = 16;
constexpr int64_t kMaxChunks = 512;

struct Chunks {
    int64_t count, tokens;  // the last one also takes the remainder
};

Chunks make_chunks(int64_t tokens) {
    const int64_t even = ceil_div(tokens, kMaxChunks);
    const int64_t chunk = even > kMinChunk ? even : kMinChunk;
    return {tokens > chunk ? tokens / chunk : 1, chunk};
}

struct ParameterGradients {
    float* q_weight;
    float* q_bias;
    float* k_weight;
    float* k_bias;
};

// Entry `index` of the 4 D gradients in the order of the struct.
TIM_DEVICE float* entry(ParameterGradients gradients, int index, int head_dim) {
    const int which = index / head_dim;
    float* const array = which == 0   ? gradients.q_weight
                         : which == 1 ? gradients.q_bias
                         : which == 2 ? gradients.k_weight
                                      : gradients.k_bias;
    return array + index % head_dim;
}

// Where entry `index` of the sums of the chunk that begins at `token` lies: one value of type
// float, or two halves in order, which the even row length keeps together.
template <class T>
TIM_DEVICE T* slot(T* dqkv, int64_t token, int index, int third) {
    const int element = index * int(sizeof(float) / sizeof(T));
    return dqkv + ((token + element / third) * 3 + 2) * third + element % third;
}

template <class T>
TIM_DEVICE void put(T* p, float value) {
    constexpr int kParts = sizeof(float) / sizeof(T);
    T parts[kParts];
    memcpy(parts, &value, sizeof(value));
#pragma unroll
    for (int i = 0; i < kParts; ++i) p[i] = parts[i];
}

template <class T>
TIM_DEVICE float get(const T* p) {
    constexpr int kParts = sizeof(float) / sizeof(T);
    T parts[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i) parts[i] = p[i];
    float value;
    memcpy(&value, parts, sizeof(value));
    return value;
}

template <class L>
TIM_DEVICE void rotate_transposed(Row<L>& g, const Row<L>& cos, const Row<L>& sin) {
#pragma unroll
    for (int i = 0; i < L::kPacks; ++i) {
#pragma unroll
        for (int j = 0; j < L::n; j += 2) {
            float* const pair = g.values[i] + j;
            math::rotate_transposed(pair[0], pair[1], cos.values[i] + j, sin.values[i] + j, pair,
                                    pair + 1);
        }
    }
}

// Blocks (chunk, 0) do q, blocks (chunk, 1) do k.
template <class L>
__global__ void __launch_bounds__(kHeadThreads, 4)
    backward(const typename L::T* gq, const typename L::T* gk, Packed<typename L::T> qkv,
             Tables tables, typename L::T* dqkv, ParameterGradients gradients, Chunks chunks,
             Size size) {
    constexpr int kWarps = kHeadThreads / kWarp;
    const Place at = make_place<L>(size.head_dim);
    const int which = blockIdx.y, warp = threadIdx.x / kWarp;
    const int third = size.heads * size.head_dim;
    const int64_t begin = blockIdx.x * chunks.tokens;
    const int64_t end =
        blockIdx.x + 1 < chunks.count ? begin + chunks.tokens : size.batch * size.tokens;
    const typename L::T* const gs = which == 0 ? gq : gk;
    const Row<L> weight = read_table<L>(which == 0 ? tables.q_weight : tables.k_weight, at);
    Row<L> dweight = {}, dbias = {};
    for (int64_t index = begin + warp; index < end; index += kWarps) {
        const int64_t sample = index / size.tokens, token = index - sample * size.tokens;
        const Row<L> cos = read_table<L>(tables.cos + token * size.head_dim, at);
        const Row<L> sin = read_table<L>(tables.sin + token * size.head_dim, at);
        const typename L::T* const in = token_of(qkv, sample, token) + which * third;
        for (int first = 0; first < size.heads; first += at.heads) {
            const int head = first + at.head;
            const bool active = at.head < at.heads && head < size.heads;
            const int row = active ? head * size.head_dim : 0;
            const Raw<L> raw_g = read_raw<L>(gs + index * third + row, at);
            const Raw<L> raw_x = read_raw<L>(in + row, at);
            Row<L> xhat = widen(raw_x), g = widen(raw_g);
            const float rstd = normalise(xhat, at, size.eps);
            rotate_transposed(g, cos, sin);
            for_each_value<L>(at, [&](int i, int j) {
                if (active) {
                    dweight.values[i][j] += g.values[i][j] * xhat.values[i][j];
                    dbias.values[i][j] += g.values[i][j];
                }
                g.values[i][j] *= weight.values[i][j];
            });
            apply_jacobian(g, xhat, rstd, at);
            if (active) write_row(dqkv + (index * 3 + which) * third + row, g, at);
        }
    }

    // Every head of every warp has its own sums; they are added in order.
    const int entries = 2 * size.head_dim;
    float* const sums = shared_memory();  // [warps, heads per warp, 2, D]
    if (at.head < at.heads) {
        for_each_pack<L>(at, [&](int i, int channel) {
            float* const own = sums + (warp * at.heads + at.head) * entries + channel;
#pragma unroll
            for (int j = 0; j < L::n; ++j) {
                own[j] = dweight.values[i][j];
                own[size.head_dim + j] = dbias.values[i][j];
            }
        });
    }
    barrier();
    for (int i = threadIdx.x; i < entries; i += kHeadThreads) {
        float sum = 0.0f;
        for (int part = 0; part < kWarps * at.heads; ++part) sum += sums[part * entries + i];
        const int index = which * entries + i;
        if (chunks.count == 1) {
            *entry(gradients, index, size.head_dim) = sum;
        } else {
            put(slot(dqkv, begin, index, third), sum);
        }
    }
}

constexpr int kAddWarps = 16;

// Adds the chunks' sums: a column of 32 entries per block, its chunks dealt to the warps.
template <class T>
__global__ void __launch_bounds__(kAddWarps* kWarp)
    add_chunks(T* dqkv, ParameterGradients gradients, Chunks chunks, Size size) {
    const int warp = threadIdx.x / kWarp, index = blockIdx.x * kWarp + lane();
    const int third = size.heads * size.head_dim;
    const bool active = index < 4 * size.head_dim;
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t chunk = warp; chunk < chunks.count; chunk += kAddWarps)
        if (active) sum += get(slot(dqkv, chunk * chunks.tokens, index, third));
    float* const sums = shared_memory();  // [warps, 32]
    sums[threadIdx.x] = sum;
    barrier();
    if (warp > 0 || !active) return;
    for (int w = 1; w < kAddWarps; ++w) sum += sums[w * kWarp + lane()];
    *entry(gradients, index, size.head_dim) = sum;
}

template <class T, int n>
__global__ void __launch_bounds__(kPieceThreads)
    copy_values(const T* gv, T* dqkv, int64_t tokens, int64_t packs) {
    for_each_piece(tokens, packs, [&](int64_t token, int64_t first) {
        Pack<T, n> raw[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int64_t pack = first + i * kWarp;
            if (pack < packs) raw[i] = read<n>(gv + (token * packs + pack) * n);
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int64_t pack = first + i * kWarp;
            if (pack < packs) write(dqkv + ((token * 3 + 2) * packs + pack) * n, raw[i]);
        }
    });
}

}  // namespace

void qk_norm_rope_backward(const void* gq, const void* gk, const void* gv, const void* qkv,
                           const float* q_weight, const float* k_weight, const float* cos,
                           const float* sin, void* dqkv, float* dq_weight, float* dq_bias,
                           float* dk_weight, float* dk_bias, int64_t batch, int64_t tokens,
                           int64_t heads, int64_t head_dim, int64_t stride_b, int64_t stride_n,
                           double eps, int dtype, int64_t where) {
    if (batch == 0 || tokens == 0 || heads == 0 || head_dim == 0) return;
    const Call call{"qk_norm_rope_backward",
                    {batch, tokens, heads, head_dim},
                    reinterpret_cast<cudaStream_t>(where)};
    const Tables tables{q_weight, nullptr, k_weight, nullptr, cos, sin};
    const ParameterGradients gradients{dq_weight, dq_bias, dk_weight, dk_bias};
    const Size size = make_size(call, batch, tokens, heads, head_dim, eps);
    const Chunks chunks = make_chunks(batch * tokens);
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        with_layout<T>(
            {gq, gk, qkv, q_weight, k_weight, cos, sin, dqkv}, {stride_b, stride_n}, head_dim,
            [&](auto layout) {
                using L = decltype(layout);
                const int heads = kWarp / lanes_per_head<L>(size.head_dim) * (kHeadThreads / kWarp);
                const size_t bytes = heads * 2 * head_dim * sizeof(float);
                launch(call, backward<L>, dim3(unsigned(chunks.count), 2), kHeadThreads, bytes,
                       array<T>(gq), array<T>(gk), Packed<T>{array<T>(qkv), stride_b, stride_n},
                       tables, array<T>(dqkv), gradients, chunks, size);
            });
        if (chunks.count > 1) {
            launch(call, add_chunks<T>, dim3(unsigned(ceil_div(4 * head_dim, kWarp))),
                   kAddWarps * kWarp, kAddWarps * kWarp * sizeof(float), array<T>(dqkv), gradients,
                   chunks, size);
        }
        with_width<T>({gv, dqkv}, {heads * head_dim}, [&](auto width) {
            constexpr int kWidth = decltype(width)::kValue;
            const int64_t packs = heads * head_dim / kWidth;
            launch(call, copy_values<T, kWidth>, piece_grid(call, batch * tokens, packs),
                   kPieceThreads, 0, array<T>(gv), array<T>(dqkv), batch * tokens, packs);
        });
    });
}

}  // namespace tim::cuda
