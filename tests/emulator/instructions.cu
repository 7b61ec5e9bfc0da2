// Products and loads of tiles by the instructions of csrc/cuda/mma.cuh, for the tests of their host
// versions.
#include "kernels.h"

namespace tim::cuda {
namespace {

// The product of A [16, depth steps] and B [depth steps, 8], or its transpose, through tiles in
// shared memory.
template <class T, bool transposed, int depth>
__global__ void multiply_tiles(const T* a, const T* b, float* out, int steps) {
    T* const as = reinterpret_cast<T*>(shared_memory());  // [16, depth]
    T* const bs = as + 16 * depth;                        // [depth, 8] or [8, depth]
    const int columns = steps * depth;
    float d[4] = {};
    for (int step = 0; step < steps; ++step) {
        for (int i = lane(); i < 2 * depth; i += kWarp) {
            const int row = i / (depth / 8), column = i % (depth / 8) * 8;
            copy_async(as + row * depth + column, a + row * columns + step * depth + column);
        }
        for (int i = lane(); i < depth; i += kWarp) {
            const int row = transposed ? i / (depth / 8) : i;
            const int column = transposed ? i % (depth / 8) * 8 : 0;
            copy_async(bs + row * (transposed ? depth : 8) + column,
                       transposed ? b + row * columns + step * depth + column
                                  : b + (step * depth + row) * 8);
        }
        commit_copies();
        wait_for_copies<0>();
        barrier();
        uint32_t a_tiles[depth / 4], b_tiles[depth / 8];
        const int row = lane() % 8, tile = lane() / 8;
        load_tiles(a_tiles, as + (row + tile % 2 * 8) * depth + (depth == 16 ? tile / 2 * 8 : 0));
        if (transposed) {
            load_tiles(b_tiles, bs + row * depth + (depth == 16 ? tile % 2 * 8 : 0));
        } else {
            load_tiles_transposed(b_tiles, bs + lane() % depth * 8);
        }
        if constexpr (depth == 16) {
            mma_m16n8k16<T>(d, a_tiles, b_tiles);
        } else {
            mma_m16n8k8<T>(d, a_tiles, b_tiles);
        }
        barrier();  // the tiles are written again
    }
    for (int i = 0; i < 4; ++i) out[(lane() / 4 + i / 2 * 8) * 8 + lane() % 4 * 2 + i % 2] = d[i];
}

// What the lanes' registers hold after one product of the registers a [32, depth / 4] and
// b [32, depth / 8].
template <class T, int depth>
__global__ void multiply_registers(const uint32_t* a, const uint32_t* b, float* out) {
    uint32_t a_tiles[depth / 4], b_tiles[depth / 8];
    for (int i = 0; i < depth / 4; ++i) a_tiles[i] = a[lane() * (depth / 4) + i];
    for (int i = 0; i < depth / 8; ++i) b_tiles[i] = b[lane() * (depth / 8) + i];
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = out[4 * lane() + i];
    if constexpr (depth == 16) {
        mma_m16n8k16<T>(d, a_tiles, b_tiles);
    } else {
        mma_m16n8k8<T>(d, a_tiles, b_tiles);
    }
    for (int i = 0; i < 4; ++i) out[4 * lane() + i] = d[i];
}

// What they hold after a load of tiles [tiles, 8, 8], one below the other.
template <int tiles, bool transposed>
__global__ void load_registers(const uint16_t* in, uint32_t* out) {
    uint16_t* const rows = reinterpret_cast<uint16_t*>(shared_memory());
    for (int i = lane(); i < tiles * 64; i += kWarp) rows[i] = in[i];
    __syncwarp();
    uint32_t registers[tiles];
    uint16_t* const row = rows + lane() % (8 * tiles) * 8;
    if (transposed) {
        load_tiles_transposed(registers, row);
    } else {
        load_tiles(registers, row);
    }
    for (int i = 0; i < tiles; ++i) out[lane() * tiles + i] = registers[i];
}

template <class T, int depth>
void launch_products(const void* a, const void* b, float* out, int steps, bool transposed) {
    const Call call{"multiply", {}, nullptr};
    if (steps > 0) {
        launch(call, transposed ? multiply_tiles<T, true, depth> : multiply_tiles<T, false, depth>,
               dim3(1), kWarp, 24 * depth * sizeof(T), array<T>(a), array<T>(b), out, steps);
    } else {
        launch(call, multiply_registers<T, depth>, dim3(1), kWarp, 0, array<uint32_t>(a),
               array<uint32_t>(b), out);
    }
}

template <int tiles>
void launch_load(const void* in, void* out, bool transposed) {
    launch(Call{"load", {}, nullptr},
           transposed ? load_registers<tiles, true> : load_registers<tiles, false>, dim3(1), kWarp,
           tiles * 64 * sizeof(uint16_t), array<uint16_t>(in), array<uint32_t>(out));
}

}  // namespace

void multiply(const void* a, const void* b, float* out, int steps, int depth, int dtype,
              bool transposed) {
    const bool deep = depth == 16;
    const auto run = dtype == kBFloat16
                         ? (deep ? launch_products<BFloat16, 16> : launch_products<BFloat16, 8>)
                         : (deep ? launch_products<Float16, 16> : launch_products<Float16, 8>);
    run(a, b, out, steps, transposed);
}

void load(const void* in, void* out, int tiles, bool transposed) {
    const auto run = tiles == 1 ? launch_load<1> : tiles == 2 ? launch_load<2> : launch_load<4>;
    run(in, out, transposed);
}

}  // namespace tim::cuda
