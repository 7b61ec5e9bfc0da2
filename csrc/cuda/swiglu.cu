#include "../math/swiglu.h"

#include "common.cuh"

namespace tim::cuda {
namespace {

// Equally spaced rows; a null pointer stands for zeros.
template <class T>
struct Rows {
    const T* data;
    int64_t stride;
};

template <int n, class T>
TIM_DEVICE void read_row(Pack<T, n> (&raw)[kUnroll], Rows<T> rows, int64_t row, int64_t first,
                         int64_t packs) {
    const T* p = rows.data + row * rows.stride;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
        const int64_t pack = first + i * kWarp;
        if (pack < packs) raw[i] = read<n>(p + pack * n);
    }
}

template <class T, int n>
__global__ void __launch_bounds__(kPieceThreads)
    forward(Rows<T> gates, Rows<T> ups, T* outs, int64_t rows, int64_t packs) {
    for_each_piece(rows, packs, [&](int64_t row, int64_t first) {
        Pack<T, n> gate[kUnroll], up[kUnroll];
        read_row(gate, gates, row, first, packs);
        read_row(up, ups, row, first, packs);
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int64_t pack = first + i * kWarp;
            if (pack >= packs) continue;
            float out[n];
#pragma unroll
            for (int j = 0; j < n; ++j) out[j] = math::swiglu(load(gate[i], j), load(up[i], j));
            write(outs + (row * packs + pack) * n, narrow<T>(out));
        }
    });
}

template <class T, int n>
__global__ void __launch_bounds__(kPieceThreads)
    backward(const T* grads, Rows<T> gates, Rows<T> ups, T* dgates, T* dups, int64_t rows,
             int64_t packs) {
    for_each_piece(rows, packs, [&](int64_t row, int64_t first) {
        Pack<T, n> grad[kUnroll], gate[kUnroll], up[kUnroll];
        read_row(grad, {grads, packs * n}, row, first, packs);
        read_row(gate, gates, row, first, packs);
        read_row(up, ups, row, first, packs);
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int64_t pack = first + i * kWarp;
            if (pack >= packs) continue;
            float dgate[n], dup[n];
#pragma unroll
            for (int j = 0; j < n; ++j)
                math::swiglu_backward(load(grad[i], j), load(gate[i], j), load(up[i], j), dgate + j,
                                      dup + j);
            write(dgates + (row * packs + pack) * n, narrow<T>(dgate));
            write(dups + (row * packs + pack) * n, narrow<T>(dup));
        }
    });
}

template <class T, int n>
__global__ void __launch_bounds__(kPieceThreads)
    tangent(Rows<T> gates, Rows<T> ups, Rows<T> tgates, Rows<T> tups, T* outs, T* touts,
            int64_t rows, int64_t packs) {
    for_each_piece(rows, packs, [&](int64_t row, int64_t first) {
        Pack<T, n> gate[kUnroll], up[kUnroll];
        Pack<T, n> tgate[kUnroll] = {}, tup[kUnroll] = {};
        read_row(gate, gates, row, first, packs);
        read_row(up, ups, row, first, packs);
        if (tgates.data != nullptr) read_row(tgate, tgates, row, first, packs);
        if (tups.data != nullptr) read_row(tup, tups, row, first, packs);
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int64_t pack = first + i * kWarp;
            if (pack >= packs) continue;
            float out[n], tout[n];
#pragma unroll
            for (int j = 0; j < n; ++j)
                math::swiglu_tangent(load(gate[i], j), load(up[i], j), load(tgate[i], j),
                                     load(tup[i], j), out + j, tout + j);
            write(outs + (row * packs + pack) * n, narrow<T>(out));
            write(touts + (row * packs + pack) * n, narrow<T>(tout));
        }
    });
}

template <class T>
Rows<T> make_rows(const void* data, int64_t stride) {
    return {array<T>(data), stride};
}

Call make_call(const char* op, int64_t rows, int64_t cols, int64_t where) {
    return {op, {rows, cols}, reinterpret_cast<cudaStream_t>(where)};
}

void swiglu(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* out,
            int64_t rows, int64_t cols, int dtype, int64_t where) {
    if (rows == 0 || cols == 0) return;
    const Call call = make_call("swiglu", rows, cols, where);
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        with_width<T>({gate, up, out}, {gate_stride, up_stride, cols}, [&](auto width) {
            constexpr int kWidth = decltype(width)::kValue;
            const int64_t packs = cols / kWidth;
            launch(call, forward<T, kWidth>, piece_grid(call, rows, packs), kPieceThreads, 0,
                   make_rows<T>(gate, gate_stride), make_rows<T>(up, up_stride), array<T>(out),
                   rows, packs);
        });
    });
}

void swiglu_backward(const void* grad, const void* gate, int64_t gate_stride, const void* up,
                     int64_t up_stride, void* dgate, void* dup, int64_t rows, int64_t cols,
                     int dtype, int64_t where) {
    if (rows == 0 || cols == 0) return;
    const Call call = make_call("swiglu_backward", rows, cols, where);
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        with_width<T>(
            {grad, gate, up, dgate, dup}, {gate_stride, up_stride, cols}, [&](auto width) {
                constexpr int kWidth = decltype(width)::kValue;
                const int64_t packs = cols / kWidth;
                launch(call, backward<T, kWidth>, piece_grid(call, rows, packs), kPieceThreads, 0,
                       array<T>(grad), make_rows<T>(gate, gate_stride), make_rows<T>(up, up_stride),
                       array<T>(dgate), array<T>(dup), rows, packs);
            });
    });
}

void swiglu_tangent(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride,
                    const void* tgate, int64_t tgate_stride, const void* tup, int64_t tup_stride,
                    void* out, void* tout, int64_t rows, int64_t cols, int dtype, int64_t where) {
    if (rows == 0 || cols == 0) return;
    const Call call = make_call("swiglu_tangent", rows, cols, where);
    with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        with_width<T>({gate, up, tgate, tup, out, tout},
                      {gate_stride, up_stride, tgate_stride, tup_stride, cols}, [&](auto width) {
                          constexpr int kWidth = decltype(width)::kValue;
                          const int64_t packs = cols / kWidth;
                          launch(call, tangent<T, kWidth>, piece_grid(call, rows, packs),
                                 kPieceThreads, 0, make_rows<T>(gate, gate_stride),
                                 make_rows<T>(up, up_stride), make_rows<T>(tgate, tgate_stride),
                                 make_rows<T>(tup, tup_stride), array<T>(out), array<T>(tout), rows,
                                 packs);
                      });
    });
}

}  // namespace

void add_swiglu(Kernels& kernels) {
    kernels.swiglu = swiglu;
    kernels.swiglu_backward = swiglu_backward;
    kernels.swiglu_tangent = swiglu_tangent;
}

}  // namespace tim::cuda
