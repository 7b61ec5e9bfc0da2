#include "products.h"

#include <string.h>

#include <algorithm>
#include <string>

#include "block.h"
#include "elements.h"
#include "transfers.h"

namespace tim::emulator {
namespace {

constexpr unsigned kAllLanes = ~0u;
constexpr int kDepth = 16;
constexpr uint32_t kUnit = 16;  // bytes

struct Descriptor {
    uint32_t start, leading, stride;
    int span;  // bytes within which units are permuted, or 0
};

Descriptor decoded(uint64_t bits) {
    constexpr int kSpans[] = {0, 128, 64, 32};
    const auto field = [&](int shift) { return uint32_t(bits >> shift & 0x3fff) << 4; };
    return {field(0), field(16), field(32), kSpans[bits >> 62]};
}

// Where element (k, column) of B lies. In units of 16 bytes, with rows of W units, the canonical
// layouts are ((8, n), 2) : ((W, stride), 1), or ((8, n), 2) : ((1, stride), leading) without a
// permutation, if columns are rows there; transposed ((W, n), (8, 2)) : ((1, leading), (W,
// stride)), or ((1, n), (8, 2)) : ((-, stride), (1, leading)).
uint32_t address_of(const Descriptor& b, bool transposed, int k, int column) {
    const uint32_t row = b.span == 0 ? kUnit : uint32_t(b.span);
    uint32_t offset;
    if (!transposed) {
        const uint32_t unit = uint32_t(k) / 8;
        offset = uint32_t(column) / 8 * b.stride + uint32_t(column) % 8 * row +
                 unit * (b.span == 0 ? b.leading : kUnit) + uint32_t(k) % 8 * 2;
    } else {
        const uint32_t wide = row / 2, group = uint32_t(k) / 8, block = uint32_t(column) / wide;
        offset = block * (b.span == 0 ? b.stride : b.leading) + uint32_t(column) % wide * 2 +
                 group * (b.span == 0 ? b.leading : b.stride) + uint32_t(k) % 8 * row;
    }
    return permuted(b.start + offset, b.span);
}

template <class Body>
void for_each_unit(const Product& product, const Body& body) {
    const Descriptor b = decoded(product.b);
    const int rows = product.transposed ? kDepth : product.columns;
    const int units = (product.transposed ? product.columns : kDepth) / 8;
    for (int row = 0; row < rows; ++row)
        for (int unit = 0; unit < units; ++unit)
            body(product.transposed ? address_of(b, true, row, unit * 8)
                                    : address_of(b, false, unit * 8, row));
}

template <Half type>
void evaluate(const Product& product) {
    const Descriptor descriptor = decoded(product.b);
    SharedMemory& shared = block().memory().shared();
    float a[16][kDepth];
    std::vector<float> b(size_t(kDepth * product.columns));
    for (int lane = 0; lane < kWarpLanes; ++lane)
        for (int i = 0; i < 8; ++i)
            a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] =
                element<type>(product.a[size_t(lane)][size_t(i / 2)], i % 2);
    for (int k = 0; k < kDepth; ++k)
        for (int column = 0; column < product.columns; ++column) {
            uint16_t bits;
            memcpy(&bits, shared.at(address_of(descriptor, product.transposed, k, column)),
                   sizeof(bits));
            b[size_t(k * product.columns + column)] = element<type>(bits, 0);
        }
    for (int lane = 0; lane < kWarpLanes; ++lane)
        for (int i = 0; i < product.columns / 2; ++i) {
            const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            float& d = product.d[size_t(lane)][i];
            double sum = product.adds[size_t(lane)] ? d : 0.0;
            for (int k = 0; k < kDepth; ++k)
                sum += double(a[row][k]) * double(b[size_t(k * product.columns + column)]);
            d = float(sum);
        }
}

struct ProductOperands {
    Half type;
    bool transposed, adds;
    float* d;
    const uint32_t* a;
    uint64_t b;
};

void check_descriptor(uint64_t bits, const void* code) {
    const Descriptor b = decoded(bits);
    // The permutation goes by bits of the address: rows of a group begin where these are zero.
    if (b.span != 0 && b.start % (8u * uint32_t(b.span)) >= uint32_t(b.span))
        block().fail("calls wgmma with rows that do not begin at a multiple of " +
                         std::to_string(8 * b.span),
                     code);
}

template <int columns>
void issue(const Warp& warp, unsigned) {
    const auto operands = [&](int lane) -> const ProductOperands& {
        return *static_cast<const ProductOperands*>(warp.lane(lane).collective.operands);
    };
    Thread& first = warp.lane(0);
    const void* const code = first.collective.code;
    Product product{operands(0).type, columns, operands(0).transposed, {}, {}, {},
                    operands(0).b,    code};
    for (int lane = 0; lane < kWarpLanes; ++lane) {
        const ProductOperands& own = operands(lane);
        if (own.b != product.b || own.transposed != product.transposed || own.type != product.type)
            block().fail("calls wgmma with operands other than those of lane 0", code,
                         &warp.lane(lane));
        product.adds[size_t(lane)] = own.adds;
        product.d[size_t(lane)] = own.d;
        std::copy_n(own.a, 4, product.a[size_t(lane)].begin());
    }
    check_descriptor(product.b, code);
    if (!first.products.fenced)
        block().fail("calls wgmma without a wgmma.fence since its registers were last free", code);
    Memory& memory = block().memory();
    for_each_unit(product, [&](uint32_t address) {
        memory.check_product_read(first, memory.shared().at(address), code);
        memory.product_reads().begin(address, first);
    });
    ++first.products.issued;
    first.products.groups.back().push_back(std::move(product));
}

void fence(const Warp& warp, unsigned) { warp.lane(0).products.fenced = true; }

void commit(const Warp& warp, unsigned) { warp.lane(0).products.groups.emplace_back(); }

void wait(const Warp& warp, unsigned) {
    Thread& first = warp.lane(0);
    const size_t left = *static_cast<const size_t*>(first.collective.operands);
    auto& groups = first.products.groups;
    // The last group is the one that has not been committed.
    while (groups.size() > left + 1) {
        for (const Product& product : groups.front()) {
            if (product.type == Half::kBFloat16)
                evaluate<Half::kBFloat16>(product);
            else
                evaluate<Half::kFloat16>(product);
            for_each_unit(product, [&](uint32_t address) {
                block().memory().product_reads().end(address, first);
            });
        }
        groups.erase(groups.begin());
    }
    first.products.fenced = false;
}

}  // namespace

void ProductReads::begin(uint32_t address, const Thread& thread) {
    const size_t i = address / kUnit;
    if (units_.size() <= i) units_.resize(i + 1);
    Unit& unit = units_[i];
    if (unit.block != block_) {
        unit = Unit();
        unit.block = block_;
    }
    ++unit.under_way;
    unit.last = thread.number;
}

void ProductReads::end(uint32_t address, const Thread& thread) {
    Unit& unit = units_[address / kUnit];
    --unit.under_way;
    unit.clocks[size_t(thread.number / kWarpLanes)] = thread.clock;
}

bool ProductReads::race(uint32_t address, const Thread& thread, int* who) const {
    const size_t i = address / kUnit;
    if (i >= units_.size() || units_[i].block != block_) return false;
    const Unit& unit = units_[i];
    *who = unit.last;
    if (unit.under_way > 0) return true;
    for (size_t warp = 0; warp < unit.clocks.size(); ++warp) {
        const size_t first = warp * kWarpLanes;
        const bool own = size_t(thread.number) / kWarpLanes == warp;
        if (unit.clocks[warp] == 0 || own || thread.seen[first] >= unit.clocks[warp]) continue;
        *who = int(first);
        return true;
    }
    return false;
}

void wgmma(Half type, int columns, bool transposed, bool adds, float* d, const uint32_t* a,
           uint64_t b) {
    ProductOperands operands{type, transposed, adds, d, a, b};
    const auto evaluate = columns == 8 ? issue<8> : columns == 32 ? issue<32> : issue<64>;
    block().meet(
        {"wgmma", kAllLanes, kWarpLanes, &operands, evaluate, __builtin_return_address(0)});
}

void wgmma_fence() {
    block().meet(
        {"wgmma.fence", kAllLanes, kWarpLanes, nullptr, fence, __builtin_return_address(0)});
}

void wgmma_commit() {
    block().meet({"wgmma.commit_group", kAllLanes, kWarpLanes, nullptr, commit,
                  __builtin_return_address(0)});
}

void wgmma_wait(int groups_left) {
    size_t left = size_t(groups_left);
    block().meet(
        {"wgmma.wait_group", kAllLanes, kWarpLanes, &left, wait, __builtin_return_address(0)});
}

}  // namespace tim::emulator
