#include "block.h"

#include <algorithm>

dim3 gridDim, blockDim;
uint3 blockIdx, threadIdx;

namespace tim::emulator {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = size_t(1) << 20;
#else
constexpr size_t kStackBytes = size_t(1) << 17;
#endif

std::string plural(int count, const char* what) {
    return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
}

}  // namespace

Block& block() {
    static Block block;
    return block;
}

std::string to_string(uint3 index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
           std::to_string(index.z) + ")";
}

Thread& Warp::lane(int i) const { return block().thread(first + i); }

bool Block::run(uint3 index, dim3 threads, size_t shared_bytes, std::mt19937* order,
                void (*kernel)(void* context), void* context) {
    blockIdx = index;
    blockDim = threads;
    count_ = int(threads.x * threads.y * threads.z);
    while (int(threads_.size()) < count_) threads_.push_back(std::make_unique<Thread>(kStackBytes));
    ready_.resize(kMaxThreads);
    first_ready_ = ready_count_ = 0;
    waiting_ = gone_ = 0;
    order_ = order;
    kernel_ = kernel;
    context_ = context;
    error_.clear();
    memory_.begin_block(shared_bytes);
    for (int i = 0; i < count_; ++i) {
        Thread& thread = *threads_[i];
        thread.number = i;
        thread.index = {i % threads.x, i / threads.x % threads.y, i / (threads.x * threads.y)};
        thread.copies.assign(1, {});
        thread.fiber.start(thread_main);
        make_ready(thread);
    }
    take_next();
    host_.switch_to(current_->fiber);
    current_ = nullptr;
    memory_.end_block();
    return error_.empty();
}

void Block::thread_main() {
    Block& self = block();
    self.kernel_(self.context_);
    self.current_->state = State::kGone;
    ++self.gone_;
    if (self.gone_ == self.count_) self.leave_block();
    self.run_next();
}

void Block::make_ready(Thread& thread) {
    thread.state = State::kReady;
    ready_[(first_ready_ + ready_count_++) % ready_.size()] = thread.number;
}

void Block::leave_block() { current_->fiber.leave_to(host_); }

void Block::take_next() {
    if (order_ != nullptr) {
        const size_t chosen = (first_ready_ + (*order_)() % ready_count_) % ready_.size();
        std::swap(ready_[first_ready_], ready_[chosen]);
    }
    current_ = threads_[ready_[first_ready_]].get();
    first_ready_ = (first_ready_ + 1) % ready_.size();
    --ready_count_;
    threadIdx = current_->index;
}

// Returns when the thread that called it is chosen again.
void Block::run_next() {
    if (ready_count_ == 0) fail(describe_deadlock());
    Thread& before = *current_;
    take_next();
    if (current_ != &before) before.fiber.switch_to(current_->fiber);
}

void Block::sync_block(const void* code) {
    current_->barrier = code;
    current_->state = State::kAtBarrier;
    if (++waiting_ == count_) {
        check_barrier();
        waiting_ = 0;
        for (int i = 0; i < count_; ++i) make_ready(*threads_[i]);
    }
    run_next();
}

void Block::check_barrier() {}

void Block::meet(const Collective& collective) {
    const unsigned mask = collective.mask;
    const Warp warp{current_->number / kWarpLanes * kWarpLanes,
                    std::min(kWarpLanes, count_ - current_->number / kWarpLanes * kWarpLanes)};
    if ((mask >> lane() & 1u) == 0)
        fail(std::string(collective.name) + " with a mask that lacks the lane that calls it");
    current_->collective = collective;
    current_->state = State::kInWarp;
    bool complete = true;
    for (int i = 0; i < kWarpLanes; ++i) {
        if ((mask >> i & 1u) == 0) continue;
        if (i >= warp.count || warp.lane(i).state == State::kGone)
            fail(std::string(collective.name) + " names lane " + std::to_string(i) +
                 " in its mask, which " + (i >= warp.count ? "does not exist" : "has ended"));
        const Thread& other = warp.lane(i);
        if (other.state != State::kInWarp) {
            complete = false;
        } else if (other.collective.mask != mask ||
                   other.collective.evaluate != collective.evaluate ||
                   other.collective.width != collective.width) {
            fail(std::string(collective.name) + ", width " + std::to_string(collective.width) +
                 ", meets " + other.collective.name + ", width " +
                 std::to_string(other.collective.width) + ", in lane " + std::to_string(i));
        }
    }
    if (complete) {
        Warp here = warp;
        collective.evaluate(here, mask);
        for (int i = 0; i < kWarpLanes; ++i)
            if ((mask >> i & 1u) != 0) make_ready(warp.lane(i));
    }
    run_next();
}

std::string Block::describe_deadlock() const {
    const Thread* waits = nullptr;
    for (int i = 0; i < count_ && waits == nullptr; ++i)
        if (threads_[i]->state != State::kGone) waits = threads_[i].get();
    std::string what = "thread " + to_string(waits->index) + " waits for ever ";
    if (waits->state == State::kAtBarrier) {
        what += "at a barrier, with " + plural(waiting_ - 1, "other thread") + " of " +
                std::to_string(count_ - 1);
    } else {
        what += std::string("in ") + waits->collective.name;
    }
    for (int i = 0; i < count_; ++i) {
        const Thread& other = *threads_[i];
        if (other.state == waits->state) continue;
        what += "; thread " + to_string(other.index);
        what += other.state == State::kGone ? " has ended"
                : other.state == State::kAtBarrier
                    ? " waits at a barrier"
                    : std::string(" waits in ") + other.collective.name;
        break;
    }
    return what;
}

void Block::fail(const std::string& what, const void*) {
    error_ =
        "block " + to_string(blockIdx) + ", thread " + to_string(current_->index) + ": " + what;
    leave_block();
}

}  // namespace tim::emulator
