// How the attention kernels divide their work.
//
// A block owns up to 128 rows of one head of one sequence (queries, except for the gradients of
// keys and values) and sweeps over the tokens of the other side, tile by tile through shared
// memory. A warp keeps 16 or 32 of the rows in registers. Where a device has room for more blocks
// than there are, blocks own fewer rows, and the warps share out the tokens of each tile; their
// sums are added up at the end, in a fixed order. Where half of the multiprocessors would still be
// idle, several blocks have the same rows: each computes all of their weights, but multiplies them
// with some columns of the values only.
#pragma once

#include <stdexcept>
#include <string>

#include "../math/attention.h"
#include "common.cuh"

namespace tim::cuda {
namespace {

constexpr int kBandRows = 16;     // of a matrix instruction
constexpr int kChunkTokens = 16;  // that a warp takes at a time
constexpr int kMaxTile = 64;      // tokens
constexpr int kMaxStages = 4;
constexpr int kReservedBytes = 1024;  // of shared memory, for the system, per block
constexpr int64_t kMaxGridX = 0x7fffffff;

// Blocks for heads of width D whose warps own `bands` bands of rows each, and of the results one of
// `parts` equal groups of columns.
template <int D, int bands, int parts = 1>
struct Geometry {
    static_assert(D % (8 * parts) == 0 && (bands == 1 || bands == 2));
    static constexpr int kBands = bands;
    static constexpr int kParts = parts, kColumns = D / parts;
    static constexpr int kWarps = parts > 1 ? 4 : 8 / bands;
    static constexpr int kThreads = kWarps * kWarp;
    static constexpr int kWarpRows = bands * kBandRows;
    static constexpr int kMaxRows = kWarps * kWarpRows;
    static constexpr int kResident = 256 / kThreads;  // blocks on a multiprocessor, by registers
    // Values from one row of a tile to the next: an odd number of units of 16 bytes, so that the
    // same unit of eight rows lies in eight different groups of banks.
    static constexpr int kPitch = (D / 8 | 1) * 8;
};

// The tokens of one side. Packed sequences start at `offsets`, and are `longest` at most.
struct Side {
    const int32_t* offsets;
    int64_t tokens, longest;
};

// Where heads of width D are split.
template <int D>
constexpr int kColumnParts = D % 32 == 0 ? 4 : 3;

struct Problem {
    Side rows, swept;
    int64_t sequences;  // or samples
    int heads;
    float scale;
    bool aligned;  // all addresses and all strides are multiples of 16 bytes
};

struct Plan {
    int rows;         // of a block
    int tile;         // tokens
    int stages;       // tiles in shared memory
    unsigned blocks;  // of each head of each sequence, or
    unsigned slots;   // of each head of all sequences, where the blocks look theirs up
    int64_t all_blocks;
    size_t shared_bytes;
};

struct Span {
    int first, count;
};

struct Task {
    int sample, head;
    Span rows, swept;  // tokens of the sequence
    int row;           // first of the block, counted from the sequence's; may lie behind its last
    int part;          // of the columns
};

// Index of a row of the block's sequence in an array [batch, heads, tokens].
TIM_DEVICE int64_t scalar_index(const Problem& problem, const Task& task, int row) {
    const int64_t head = int64_t(task.sample) * problem.heads + task.head;
    return head * problem.rows.tokens + task.rows.first + row;
}

// Index of its first value in a contiguous array [batch, tokens, heads, D].
template <int D>
TIM_DEVICE int64_t vector_index(const Problem& problem, const Task& task, int row) {
    const int64_t token = task.sample * problem.rows.tokens + task.rows.first + row;
    return (token * problem.heads + task.head) * D;
}

// Sequence s has the slots from offsets[s] / rows + s to the first of the next one: never fewer
// than the blocks it needs, and one too many at most.
TIM_DEVICE int first_slot(const int32_t* offsets, int sequence, int rows) {
    return load_global(offsets + sequence) / rows + sequence;
}

// The sequence that a slot belongs to. The lanes probe 32 places at a time.
TIM_DEVICE int find_sequence(const int32_t* offsets, int sequences, int rows, int slot) {
    int first = 0, count = sequences;
    while (count > 1) {
        const int step = (count + kWarp - 1) / kWarp, probe = lane() * step;
        const bool passed = probe < count && first_slot(offsets, first + probe, rows) <= slot;
        const int skipped = (count_lanes(passed) - 1) * step;
        first += skipped;
        count = count - skipped < step ? count - skipped : step;
    }
    return first;
}

TIM_DEVICE Span sequence_of(const Side& side, int sequence) {
    if (side.offsets == nullptr) return {0, int(side.tokens)};
    const int first = load_global(side.offsets + sequence);
    return {first, load_global(side.offsets + sequence + 1) - first};
}

template <int parts = 1>
TIM_DEVICE Task find_task(const Problem& problem, const Plan& plan) {
    const unsigned block_of_grid = block_index(), index = block_of_grid / parts;
    int sequence, block;
    Task task;
    task.part = int(block_of_grid % parts);
    if (plan.slots == 0) {
        const unsigned head = index / plan.blocks;
        block = int(index % plan.blocks);
        sequence = int(head / unsigned(problem.heads));
        task.head = int(head % unsigned(problem.heads));
    } else {
        const int32_t* const offsets = problem.rows.offsets;
        const int slot = int(index % plan.slots);
        task.head = int(index / plan.slots);
        sequence = find_sequence(offsets, int(problem.sequences), plan.rows, slot);
        block = slot - first_slot(offsets, sequence, plan.rows);
    }
    task.sample = problem.rows.offsets == nullptr ? sequence : 0;
    task.rows = sequence_of(problem.rows, sequence);
    task.swept = sequence_of(problem.swept, sequence);
    task.row = block * plan.rows;
    return task;
}

// The warps of a block: those of a group share out its rows, and the groups the tokens of a tile.
struct WarpPlace {
    int position, positions;
    int group, groups;
};

template <class G>
TIM_DEVICE WarpPlace warp_place(const Plan& plan) {
    const int warp = threadIdx.x / kWarp, positions = plan.rows / G::kWarpRows;
    return {warp % positions, positions, warp / positions, G::kWarps / positions};
}

// Blocks that a plan launches per head, of all sequences together.
inline void count_blocks(const Problem& problem, int parts, Plan* plan) {
    const Side& side = problem.rows;
    const int64_t each = ceil_div(side.longest, plan->rows);
    const int64_t slots = side.tokens / plan->rows + problem.sequences;
    const bool look_up = side.offsets != nullptr && slots < each * problem.sequences;
    plan->blocks = unsigned(each);
    plan->slots = look_up ? unsigned(slots) : 0;
    plan->all_blocks = parts * problem.heads * (look_up ? slots : each * problem.sequences);
}

// `operands` tiles of the swept side are in shared memory at a time; groups of warps add up
// `sums` numbers per thread.
template <class G>
Plan make_plan(const Call& call, const Problem& problem, int operands, int sums) {
    const int64_t device_blocks = int64_t(multiprocessors(call)) * G::kResident;
    const int most = device_attribute(call, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const int64_t longest = problem.rows.longest;
    Plan plan{};
    const auto adding = [&](int rows) {
        const int groups = G::kMaxRows / rows;
        return int64_t(groups - 1) * sums * G::kThreads / groups * int64_t(sizeof(float));
    };
    // Fewer rows where all of those blocks fit onto the device at once, or where warps without rows
    // would be more than a fifth. A tile has chunks for four groups of warps: more groups only help
    // by spreading over multiprocessors that are idle.
    for (plan.rows = G::kMaxRows;; plan.rows /= 2) {
        count_blocks(problem, G::kParts, &plan);
        const bool full = 2 * plan.all_blocks > device_blocks;
        const int least = full ? 2 * kBandRows : G::kWarpRows;
        if (plan.rows <= least || adding(plan.rows / 2) > most) break;
        const int64_t missing = ceil_div(longest, plan.rows) * plan.rows - longest;
        const int64_t idle = missing / G::kWarpRows * G::kWarpRows;
        if (full && 4 * idle <= longest) break;
    }
    const bool alone = plan.all_blocks <= device_blocks / G::kResident;
    const int all = device_attribute(call, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    const int share = all / (alone ? 1 : G::kResident) - kReservedBytes;
    const int budget = share < most ? share : most;
    const auto stage_bytes = [&] { return operands * plan.tile * G::kPitch * 2; };
    plan.tile = kMaxTile;
    while (plan.tile > kChunkTokens && 2 * stage_bytes() > budget) plan.tile /= 2;
    const int fitting = budget / stage_bytes();
    plan.stages = fitting < 2 ? 2 : fitting > kMaxStages ? kMaxStages : fitting;
    const int64_t staging = int64_t(plan.stages) * stage_bytes();
    plan.shared_bytes = size_t(adding(plan.rows) > staging ? adding(plan.rows) : staging);
    return plan;
}

// Whether a plan's blocks are so few that it is better to split columns: weights are computed
// several times then.
inline bool leaves_half_idle(const Call& call, const Plan& plan) {
    return 2 * plan.all_blocks <= multiprocessors(call);
}

template <class G, class... Parameters, class... Arguments>
void launch_plan(const Call& call, void (*kernel)(Parameters...), const Plan& plan,
                 Arguments... arguments) {
    if (plan.all_blocks > kMaxGridX) fail(call, cudaErrorInvalidConfiguration);
    allow_shared_memory(call, kernel, plan.shared_bytes);
    launch(call, kernel, dim3(unsigned(plan.all_blocks)), dim3(G::kThreads), plan.shared_bytes,
           arguments...);
}

inline Call make_call(const char* op, int64_t batch, int64_t n, int64_t heads, int64_t head_dim,
                      int64_t where) {
    return {op, {batch, n, heads, head_dim}, reinterpret_cast<cudaStream_t>(where)};
}

// What the arguments of all entries say; `aligned` is left to the caller.
inline Problem make_problem(const Call& call, const Side& rows, const Side& swept, int64_t batch,
                            int64_t heads, int64_t sequences, double scale) {
    if (rows.tokens > kMaxGridX || swept.tokens > kMaxGridX || heads > kMaxGridX)
        fail(call, cudaErrorInvalidValue);
    return {rows, swept, sequences > 0 ? sequences : batch, int(heads), float(scale), false};
}

inline void check_tangents(const Call& call, const void* t_q, const void* t_k, const void* t_v) {
    if (t_q == nullptr && t_k == nullptr && t_v == nullptr)
        throw std::invalid_argument(std::string(call.op) +
                                    ": at least one of t_q, t_k, t_v must be the address of an "
                                    "array");
}

// Calls body(T{}, Constant<D>{}).
template <class Body>
void with_type_and_width(const char* op, int dtype, int64_t head_dim, const Body& body) {
    const auto with_width = [&](auto type) {
        if (head_dim == 64) {
            body(type, Constant<64>{});
        } else if (head_dim == 72) {
            body(type, Constant<72>{});
        } else if (head_dim == 96) {
            body(type, Constant<96>{});
        } else if (head_dim == 128) {
            body(type, Constant<128>{});
        } else {
            throw std::invalid_argument(std::string(op) +
                                        ": head_dim must be 64, 72, 96 or 128 on a GPU, got " +
                                        std::to_string(head_dim));
        }
    };
    if (dtype == kBFloat16) {
        with_width(BFloat16{});
    } else if (dtype == kFloat16) {
        with_width(Float16{});
    } else {
        throw std::invalid_argument(std::string(op) +
                                    ": dtype must be 1 (bfloat16) or 2 (float16) on a GPU, got " +
                                    std::to_string(dtype));
    }
}

inline bool are_aligned(std::initializer_list<const void*> pointers) {
    for (const void* p : pointers)
        if (reinterpret_cast<uintptr_t>(p) % kAccessBytes != 0) return false;
    return true;
}

// Strides of absent operands may be anything.
inline bool is_aligned(const void* p, const Strides& strides) {
    constexpr int kUnit = kAccessBytes / 2;
    return p == nullptr || (are_aligned({p}) && strides.batch % kUnit == 0 &&
                            strides.token % kUnit == 0 && strides.head % kUnit == 0);
}

}  // namespace
}  // namespace tim::cuda
