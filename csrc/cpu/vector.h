// Vectors of floats in registers: arithmetic that the formulas of csrc/math are instantiated with,
// loads and stores of both storage types, loops over rows.
//
// Compilers vectorise plain loops too, but into sums with a single accumulator, which waits for the
// latency of each addition, conversions of bfloat16 that cost more than the arithmetic between
// them, and scalar ends of rows.
#pragma once

#include <type_traits>

#include "kernel.h"
#include "register.h"

namespace tim::cpu::TIM_ISA {
namespace {

// kLanes consecutive elements of a row. Floats lie in the order of memory. Of bfloat16, `low` holds
// the elements with even index and `high` those with odd index, because a shift and a mask split
// words into halves at once; arithmetic between vectors does not care. `load_split` reads floats in
// that order too. Rows of scratch memory are written and read by vectors alone, in either order;
// their length is a multiple of kLanes (see `padded`).
struct Vector {
    Register low, high;

    Vector() = default;
    Vector(Register a, Register b) : low(a), high(b) {}
    Vector(float x) : low(broadcast(x)), high(low) {}

    friend Vector operator+(Vector a, Vector b) { return {a.low + b.low, a.high + b.high}; }
    friend Vector operator-(Vector a, Vector b) { return {a.low - b.low, a.high - b.high}; }
    friend Vector operator*(Vector a, Vector b) { return {a.low * b.low, a.high * b.high}; }
    friend Vector operator/(Vector a, Vector b) { return {a.low / b.low, a.high / b.high}; }
    friend Vector operator-(Vector a) { return {-a.low, -a.high}; }
    Vector& operator+=(Vector b) { return *this = *this + b; }
};

constexpr int kLanes = 2 * kRegister;

// The functions that the formulas need beside arithmetic, see csrc/math/common.h.
inline Vector not_below(Vector x, float low) {
    return {at_least(x.low, low), at_least(x.high, low)};
}
inline Vector not_above(Vector x, float high) {
    return {at_most(x.low, high), at_most(x.high, high)};
}
inline Vector square_root(Vector x) { return {root(x.low), root(x.high)}; }
inline Vector to_exponent(Vector x) { return {to_exponent(x.low), to_exponent(x.high)}; }
inline Vector fused_multiply_add(Vector a, Vector b, Vector c) {
    return {fused(a.low, b.low, c.low), fused(a.high, b.high, c.high)};
}

// How many elements of a vector belong to a row: all of them, or the first ones at the row's end.
// Elements beyond a Part load as zero and are not stored.
struct Whole {
    static constexpr int count = kLanes;
};
struct Part {
    int count;

    int low() const { return count < kRegister ? count : kRegister; }
    int high() const { return count - low(); }
    int even() const { return (count + 1) / 2; }
    int odd() const { return count / 2; }
};

inline Vector load(const float* p, Whole) {
    return {load_register(p), load_register(p + kRegister)};
}
inline Vector load(const float* p, Part part) {
    return {load_first(p, part.low()), load_first(p + part.low(), part.high())};
}
inline void store(float* p, Vector x, Whole) {
    store_register(p, x.low);
    store_register(p + kRegister, x.high);
}
inline void store(float* p, Vector x, Part part) {
    store_first(p, x.low, part.low());
    store_first(p + part.low(), x.high, part.high());
}

inline Vector load(const BFloat16* p, Whole) {
    const Register words = load_register(reinterpret_cast<const float*>(p));
    return {even_halves(words), odd_halves(words)};
}
inline Vector load(const BFloat16* p, Part part) {
    const Register words = load_halves(p, part.count);
    return {even_halves(words), odd_halves(words)};
}
inline void store(BFloat16* p, Vector x, Whole) {
    store_register(reinterpret_cast<float*>(p), rounded_halves(x.low, x.high));
}
inline void store(BFloat16* p, Vector x, Part part) {
    store_halves(p, rounded_halves(x.low, x.high), part.count);
}

// Stores and returns what a load would give back.
template <class Extent>
Vector store_rounded(float* p, Vector x, Extent extent) {
    store(p, x, extent);
    return x;
}
inline Vector store_rounded(BFloat16* p, Vector x, Whole) {
    const Register words = rounded_halves(x.low, x.high);
    store_register(reinterpret_cast<float*>(p), words);
    return {even_halves(words), odd_halves(words)};
}
inline Vector store_rounded(BFloat16* p, Vector x, Part part) {
    const Register words = rounded_halves(x.low, x.high);
    store_halves(p, words, part.count);
    return {even_halves(words), odd_halves(words)};
}

template <class Extent>
Vector load_split(const float* p, Extent extent) {
    const Vector x = load(p, extent);
    return {pick<Even>(x.low, x.high), pick<Odd>(x.low, x.high)};
}
template <class Extent>
Vector load_split(const BFloat16* p, Extent extent) {
    return load(p, extent);
}
template <class Extent>
void store_split(float* p, Vector x, Extent extent) {
    store(p, Vector(pick<LowTurns>(x.low, x.high), pick<HighTurns>(x.low, x.high)), extent);
}
template <class Extent>
void store_split(BFloat16* p, Vector x, Extent extent) {
    store(p, x, extent);
}

// Zero beyond the row's end, for vectors in the order of elements of type T, or split.
template <class T>
Vector keep(Vector x, Whole) {
    return x;
}
template <class T>
Vector keep(Vector x, Part part) {
    if (std::is_same_v<T, float>)
        return {keep_first(x.low, part.low()), keep_first(x.high, part.high())};
    return {keep_first(x.low, part.even()), keep_first(x.high, part.odd())};
}

inline float sum(Vector x) { return total(x.low + x.high); }

// Calls body(i, extent) for the vectors at 0, kLanes, ... of a row of n elements.
template <class Body>
void sweep(int64_t n, const Body& body) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
    if (i < n) body(i, Part{int(n - i)});
}

// A row of scratch memory in the order of T's vectors as n elements of type T.
template <class T>
void write_row(T* out, const float* x, int64_t n) {
    sweep(n, [=](int64_t i, auto extent) { store(out + i, load(x + i, Whole{}), extent); });
}

constexpr int64_t padded(int64_t n) { return round_up(n, kLanes); }

}  // namespace
}  // namespace tim::cpu::TIM_ISA
