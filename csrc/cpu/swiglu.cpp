#include "../math/swiglu.h"

#include "kernel.h"
#include "rows.h"
#include "vector.h"

namespace tim::cpu::TIM_ISA {
namespace {

template <class T>
void forward(Rows<T> gates, Rows<T> ups, T* outs, int64_t rows, int64_t cols, int64_t threads) {
    parallel_pieces(rows, cols, threads, [=](int64_t row, int64_t begin, int64_t end) {
        const T* gate = row_of(gates, row) + begin;
        const T* up = row_of(ups, row) + begin;
        T* out = outs + row * cols + begin;
        sweep(end - begin, [=](int64_t i, auto lanes) {
            store(out + i, math::swiglu(load(gate + i, lanes), load(up + i, lanes)), lanes);
        });
    });
}

template <class T>
void backward(const T* grads, Rows<T> gates, Rows<T> ups, T* dgates, T* dups, int64_t rows,
              int64_t cols, int64_t threads) {
    parallel_pieces(rows, cols, threads, [=](int64_t row, int64_t begin, int64_t end) {
        const T* gate = row_of(gates, row) + begin;
        const T* up = row_of(ups, row) + begin;
        const T* grad = grads + row * cols + begin;
        T* dgate = dgates + row * cols + begin;
        T* dup = dups + row * cols + begin;
        sweep(end - begin, [=](int64_t i, auto lanes) {
            Vector a, b;
            math::swiglu_backward(load(grad + i, lanes), load(gate + i, lanes), load(up + i, lanes),
                                  &a, &b);
            store(dgate + i, a, lanes);
            store(dup + i, b, lanes);
        });
    });
}

// An absent tangent reads as zero.
template <class T, class Extent>
Vector load_or_zero(const T* p, int64_t i, Extent lanes) {
    return p == nullptr ? Vector(0.0f) : load(p + i, lanes);
}

template <class T>
void tangent(Rows<T> gates, Rows<T> ups, Rows<T> tgates, Rows<T> tups, T* outs, T* touts,
             int64_t rows, int64_t cols, int64_t threads) {
    parallel_pieces(rows, cols, threads, [=](int64_t row, int64_t begin, int64_t end) {
        const T* gate = row_of(gates, row) + begin;
        const T* up = row_of(ups, row) + begin;
        const T* tgate = tgates.data == nullptr ? nullptr : row_of(tgates, row) + begin;
        const T* tup = tups.data == nullptr ? nullptr : row_of(tups, row) + begin;
        T* out = outs + row * cols + begin;
        T* tout = touts + row * cols + begin;
        sweep(end - begin, [=](int64_t i, auto lanes) {
            Vector a, b;
            math::swiglu_tangent(load(gate + i, lanes), load(up + i, lanes),
                                 load_or_zero(tgate, i, lanes), load_or_zero(tup, i, lanes), &a,
                                 &b);
            store(out + i, a, lanes);
            store(tout + i, b, lanes);
        });
    });
}

void swiglu(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* out,
            int64_t rows, int64_t cols, int dtype, int64_t where) {
    with_dtype(dtype, where, [&](auto type) {
        using T = decltype(type);
        forward<T>(make_rows<T>(gate, gate_stride), make_rows<T>(up, up_stride),
                   static_cast<T*>(out), rows, cols, where);
    });
}

void swiglu_backward(const void* grad, const void* gate, int64_t gate_stride, const void* up,
                     int64_t up_stride, void* dgate, void* dup, int64_t rows, int64_t cols,
                     int dtype, int64_t where) {
    with_dtype(dtype, where, [&](auto type) {
        using T = decltype(type);
        backward<T>(static_cast<const T*>(grad), make_rows<T>(gate, gate_stride),
                    make_rows<T>(up, up_stride), static_cast<T*>(dgate), static_cast<T*>(dup), rows,
                    cols, where);
    });
}

void swiglu_tangent(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride,
                    const void* tgate, int64_t tgate_stride, const void* tup, int64_t tup_stride,
                    void* out, void* tout, int64_t rows, int64_t cols, int dtype, int64_t where) {
    with_dtype(dtype, where, [&](auto type) {
        using T = decltype(type);
        tangent<T>(make_rows<T>(gate, gate_stride), make_rows<T>(up, up_stride),
                   make_rows<T>(tgate, tgate_stride), make_rows<T>(tup, tup_stride),
                   static_cast<T*>(out), static_cast<T*>(tout), rows, cols, where);
    });
}

}  // namespace

void add_swiglu(Kernels& kernels) {
    kernels.swiglu = swiglu;
    kernels.swiglu_backward = swiglu_backward;
    kernels.swiglu_tangent = swiglu_tangent;
}

}  // namespace tim::cpu::TIM_ISA
