// A block of an emulated launch: its threads, each on a stack of its own, and where they meet.
//
// A thread runs until it has to wait for others: at a barrier, or in an operation of its warp.
// Which one runs next is a matter of order, which a seed can shuffle. Whoever waits for a thread
// that never comes is found when no thread can run any more.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"
#include "memory.h"
#include "products.h"
#include "transfers.h"

namespace tim::emulator {

constexpr int kWarpLanes = 32;
constexpr int kMaxThreads = 1024;

struct Warp;

// What a lane brings to an operation of its warp. When all lanes of the mask are there, the last
// one calls `evaluate`, which leaves their results behind their `operands`.
struct Collective {
    const char* name;
    unsigned mask;
    int width;  // lanes must agree on it
    void* operands;
    void (*evaluate)(const Warp& warp, unsigned mask);
    const void* code;
};

// A 16-byte copy from global to shared memory that has been issued and has not arrived.
struct AsyncCopy {
    char* to;
    const char* from;
    int bytes;  // the rest are zeros
};

enum class State { kReady, kAtBarrier, kAtMbarrier, kInWarp, kGone };

struct Thread {
    explicit Thread(size_t stack_bytes) : fiber(stack_bytes) {}

    Fiber fiber;
    uint3 index = {};
    int number = 0;
    State state = State::kGone;
    Collective collective = {};
    const void* barrier = nullptr;  // the code that waits there, or at an mbarrier
    // Grows with each __syncwarp and each arrival at an mbarrier; with what this thread knows of
    // the clocks of the others, having met them there.
    uint32_t clock = 0;
    std::vector<uint32_t> seen;
    std::vector<std::vector<AsyncCopy>> copies;  // committed groups, oldest first; one that grows
    Products products;                           // of the warp, for its first lane
};

struct Warp {
    int first, count;  // threads
    Thread& lane(int i) const;
};

// Lives while the emulator itself works, on whichever thread. What it does to memory is not
// checked.
class Inside {
  public:
    Inside() : before_(now_) { now_ = true; }
    ~Inside() { now_ = before_; }
    Inside(const Inside&) = delete;
    Inside& operator=(const Inside&) = delete;
    static bool now() { return now_; }
    static void leave() { now_ = false; }

  private:
    static inline bool now_ = false;
    bool before_;
};

class Block {
  public:
#ifdef __SANITIZE_ADDRESS__
    static constexpr size_t kStackBytes = size_t(1) << 20;
#else
    static constexpr size_t kStackBytes = size_t(1) << 17;
#endif

    // Runs the threads of one block; false when a check failed. Without `order` threads take turns.
    bool run(uint3 index, dim3 threads, size_t shared_bytes, std::mt19937* order,
             void (*kernel)(void* context), void* context);
    const std::string& error() const { return error_; }
    Memory& memory() { return memory_; }
    Transfers& transfers() { return transfers_; }

    // For the threads, while they run.
    bool running() const { return current_ != nullptr; }
    Thread& current() { return *current_; }
    Thread& thread(int number) { return *threads_[size_t(number)]; }
    void sync_block(const void* code);
    void meet(const Collective& collective);
    // Until another thread wakes the current one.
    void sleep(const void* code);
    void wake(Thread& thread) { make_ready(thread); }
    // Ends the launch with an error that names the thread, the current one by default, and the
    // code it was executing.
    [[noreturn]] void fail(const std::string& what, const void* code = nullptr,
                           const Thread* who = nullptr);

  private:
    static void thread_main();
    void check_end(const Thread& thread);
    void make_ready(Thread& thread);
    void choose_next();
    void run_next();
    void check_barrier();
    [[noreturn]] void fail_deadlock();

    std::vector<std::unique_ptr<Thread>> threads_;
    std::vector<int> ready_;  // a ring
    size_t first_ready_ = 0, ready_count_ = 0;
    int count_ = 0, waiting_ = 0, gone_ = 0;
    Thread* current_ = nullptr;
    Fiber host_;
    std::mt19937* order_ = nullptr;
    void (*kernel_)(void*) = nullptr;
    void* context_ = nullptr;
    std::string error_;
    Memory memory_;
    Transfers transfers_;
};

Block& block();

// "(1, 0, 0)"
std::string to_string(uint3 index);

}  // namespace tim::emulator
