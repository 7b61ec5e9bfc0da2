// Who has touched a piece of memory, and whether the next access is in order with that.
//
// An access is in order with an earlier one when it is of the same thread, or when a barrier of the
// block, a __syncwarp of both lanes, a phase of an mbarrier or the end of a launch lies between
// them. Blocks of a launch have no order among them. What is not in order is a race.
#pragma once

#include <stdint.h>

#include <vector>

#include "cuda_runtime.h"

namespace tim::emulator {

struct Thread;

// When something was done, and by whom. Epochs are numbered through all launches: each block
// starts one, as does each of its barriers. Within an epoch, the threads count their __syncwarps
// and their arrivals at mbarriers.
struct Moment {
    uint32_t epoch, clock, thread;
};

// The time of the block that runs.
class Time {
  public:
    void begin_launch();
    void begin_block(uint3 index);
    void pass_barrier() { ++epoch_; }

    Moment now(const Thread& thread) const;
    // Whether this was in the block, or the launch, that runs.
    bool in_block(uint32_t epoch) const { return epoch >= block_; }
    bool in_launch(uint32_t epoch) const { return epoch >= launch_; }
    uint32_t block() const { return block_; }
    uint3 block_of(uint32_t epoch) const;
    // For a moment in this launch: whether what `thread` does now is in order with it.
    bool before(const Moment& moment, const Thread& thread) const;

  private:
    uint32_t epoch_ = 0, block_ = 0, launch_ = 0;
    struct Block {
        uint32_t first_epoch;
        uint3 index;
    };
    std::vector<Block> blocks_;
};

// The last accesses to some bytes. Zeros: none.
class History {
  public:
    // The moment that a read or a write by `thread` now would race with, or null. Shared memory
    // forgets what was done before the block.
    const Moment* race_of_read(const Time& time, const Thread& thread, bool shared) const;
    const Moment* race_of_write(const Time& time, const Thread& thread, bool shared);
    void read(const Time& time, const Thread& thread, bool shared);
    void write(const Time& time, const Thread& thread);
    // A copy that the thread started at this clock has arrived.
    void arrive(const Time& time, const Thread& thread, uint32_t clock);

    bool written_in_block(const Time& time) const { return time.in_block(write_.epoch); }
    bool written_in_launch(const Time& time) const { return time.in_launch(write_.epoch); }

    // Reads through the read-only path of global memory.
    void read_constant(const Time& time) { constant_epoch_ = time.block(); }
    bool constant_in_launch(const Time& time) const { return time.in_launch(constant_epoch_); }

    // An asynchronous copy to here is on its way.
    void begin_copy(const Time& time, uint32_t thread);
    void end_copy() { copy_block_ = 0; }
    bool awaits_copy(const Time& time) const { return copy_block_ == time.block(); }
    uint32_t copier() const { return copier_; }

  private:
    // Lanes of one warp that have read in the same epoch.
    struct Readers {
        uint32_t epoch, clock, warp, lanes;
    };
    Moment write_;
    Readers readers_[2];
    Moment reader_;  // where race_of_write keeps its result
    uint32_t constant_epoch_, copy_block_, copier_;
};

}  // namespace tim::emulator
