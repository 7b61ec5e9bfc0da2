// Host versions of what csrc/cuda/tma.cuh wraps: barriers in shared memory, and copies of boxes
// that arrive at them.
//
// A copy arrives as late as it can: when no thread of the block can go on without it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <map>
#include <vector>

#include "cuda.h"

namespace tim::emulator {

struct Thread;

void mbarrier_init(void* barrier, int arrivals);
// Arrives, after adding to the bytes that the phase waits for.
void mbarrier_arrive(void* barrier, int bytes);
void mbarrier_wait(void* barrier, int parity);

void copy_box(void* to, const CUtensorMap& map, void* barrier, int c0, int c1, int c2, int c3);

// Offset in shared memory of what lies at `address` when rows of `span` bytes (128, 64 or 32, or 0)
// are permuted in units of 16.
uint32_t permuted(uint32_t address, int span);

// The barriers of the block that runs, and what is under way to them.
class Transfers {
  public:
    void begin_block() { barriers_.clear(); }

    void init(Thread& thread, void* barrier, int arrivals, const void* code);
    void arrive(Thread& thread, void* barrier, int bytes, const void* code);
    // Whether the last phase that has ended is one of this parity; if so `thread` knows what those
    // who arrived knew, else it will be woken when it ends.
    bool wait(Thread& thread, void* barrier, int parity, const void* code);
    void copy(Thread& thread, void* barrier, void* to, const CUtensorMap& map, const int (&at)[4],
              const void* code);
    // Lets some copies arrive for which threads wait; false when there are none.
    bool deliver();
    // Whether a copy has not arrived.
    bool under_way() const;

  private:
    struct Unit {  // of a box: 16 bytes
        char* to;
        const char* from;
        int bytes;  // the rest are zeros
    };
    struct Copy {
        std::vector<Unit> units;
        uint32_t clock;  // of the thread that started it
        int thread;
    };
    struct Barrier {
        int arrivals = 0, missing = 0;
        int64_t bytes = 0;                      // expected, but for those that are here
        uint32_t phases = 0;                    // ended
        std::vector<uint32_t> gathered, known;  // clocks, of this phase and of the one before
        std::vector<Copy> copies;
        std::vector<int> waiting;
    };

    Barrier& find(const Thread& thread, void* barrier, const char* what, const void* code);
    void end_phase(Barrier& barrier);

    std::map<void*, Barrier> barriers_;
};

}  // namespace tim::emulator
