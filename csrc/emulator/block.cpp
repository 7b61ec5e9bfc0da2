#include "block.h"

#include <algorithm>
#include <utility>

#include "symbols.h"

dim3 gridDim, blockDim;
uint3 blockIdx, threadIdx;

namespace tim::emulator {

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
    memory_.begin_block(index, shared_bytes);
    transfers_.begin_block();
    for (int i = 0; i < count_; ++i) {
        Thread& thread = *threads_[i];
        const unsigned number = unsigned(i);
        thread.number = i;
        thread.index = {number % threads.x, number / threads.x % threads.y,
                        number / (threads.x * threads.y)};
        thread.clock = 1;
        thread.seen.assign(size_t(count_), 0u);
        thread.copies.assign(1, {});
        thread.products = {};
        thread.fiber.start(thread_main);
        make_ready(thread);
    }
    choose_next();
    host_.switch_to(current_->fiber);
    current_ = nullptr;
    Inside::leave();
    return error_.empty();
}

void Block::thread_main() {
    Block& self = block();
    Inside::leave();
    self.kernel_(self.context_);
    const Inside inside;
    Thread& own = *self.current_;
    self.check_end(own);
    own.state = State::kGone;
    if (++self.gone_ == self.count_) {
        if (self.transfers_.under_way()) self.fail("ends before a copy of a box has arrived");
        own.fiber.leave_to(self.host_);
    }
    self.run_next();
}

void Block::check_end(const Thread& thread) {
    for (const auto& group : thread.copies)
        if (!group.empty()) fail("ends before a cp.async of its own that it has not awaited");
    for (const auto& group : thread.products.groups)
        if (!group.empty()) fail("ends before a wgmma that it has not awaited");
}

void Block::make_ready(Thread& thread) {
    thread.state = State::kReady;
    ready_[(first_ready_ + ready_count_++) % ready_.size()] = thread.number;
}

void Block::choose_next() {
    if (order_ != nullptr) {
        const size_t chosen = (first_ready_ + (*order_)() % ready_count_) % ready_.size();
        std::swap(ready_[first_ready_], ready_[chosen]);
    }
    current_ = threads_[size_t(ready_[first_ready_])].get();
    first_ready_ = (first_ready_ + 1) % ready_.size();
    --ready_count_;
    threadIdx = current_->index;
}

// Returns when the thread that called it is chosen again.
void Block::run_next() {
    while (ready_count_ == 0)
        if (!transfers_.deliver()) fail_deadlock();
    Thread& before = *current_;
    choose_next();
    if (current_ != &before) before.fiber.switch_to(current_->fiber);
}

void Block::sync_block(const void* code) {
    const Inside inside;
    current_->barrier = code;
    current_->state = State::kAtBarrier;
    if (++waiting_ == count_) {
        check_barrier();
        memory_.pass_barrier();
        waiting_ = 0;
        for (int i = 0; i < count_; ++i) make_ready(*threads_[i]);
    }
    run_next();
}

void Block::sleep(const void* code) {
    current_->barrier = code;
    current_->state = State::kAtMbarrier;
    run_next();
}

// Compilers copy a barrier's call, say into both branches before it: what counts is the line, with
// the lines that its functions were called from. Where those cannot be told all calls are equal.
void Block::check_barrier() {
    const Thread& first = *threads_[0];
    for (int i = 1; i < count_; ++i) {
        const Thread& other = *threads_[i];
        if (other.barrier == first.barrier) continue;
        const std::string here = describe(first.barrier), there = describe(other.barrier);
        if (here == there || here.empty() || there.empty()) continue;
        fail("waits at a barrier (" + there + ") other than that of thread " +
                 to_string(first.index) + " (" + here + ")",
             nullptr, &other);
    }
}

void Block::meet(const Collective& collective) {
    const Inside inside;
    const unsigned mask = collective.mask;
    const int lane = current_->number % kWarpLanes, first = current_->number - lane;
    const Warp warp{first, std::min(kWarpLanes, count_ - first)};
    if ((mask >> lane & 1u) == 0)
        fail("calls " + std::string(collective.name) +
                 " with a mask that lacks the lane that calls it",
             collective.code);
    current_->collective = collective;
    current_->state = State::kInWarp;
    bool complete = true;
    for (int i = 0; i < kWarpLanes; ++i) {
        if ((mask >> i & 1u) == 0) continue;
        if (i >= warp.count || warp.lane(i).state == State::kGone)
            fail("calls " + std::string(collective.name) + " with lane " + std::to_string(i) +
                     " in its mask, which " + (i < warp.count ? "has ended" : "does not exist"),
                 collective.code);
        const Thread& other = warp.lane(i);
        if (other.state != State::kInWarp) {
            complete = false;
            continue;
        }
        const Collective& theirs = other.collective;
        if (theirs.evaluate != collective.evaluate || theirs.mask != mask)
            fail("calls " + std::string(collective.name) + " meets " + theirs.name + " of lane " +
                     std::to_string(i) + (theirs.mask != mask ? ", which has another mask" : ""),
                 collective.code);
        if (theirs.width != collective.width)
            fail("calls " + std::string(collective.name) + " of width " +
                     std::to_string(collective.width) + " where lane " + std::to_string(i) +
                     " has width " + std::to_string(theirs.width),
                 collective.code);
    }
    if (complete) {
        collective.evaluate(warp, mask);
        for (int i = 0; i < kWarpLanes; ++i)
            if ((mask >> i & 1u) != 0) make_ready(warp.lane(i));
    }
    run_next();
}

void Block::fail_deadlock() {
    const auto where = [](const Thread& thread) -> std::string {
        if (thread.state == State::kGone) return "has ended";
        const bool warp = thread.state == State::kInWarp;
        const std::string line = describe(warp ? thread.collective.code : thread.barrier);
        const std::string place = warp ? std::string("in ") + thread.collective.name
                                  : thread.state == State::kAtBarrier ? "at a barrier"
                                                                      : "at an mbarrier";
        return "waits " + place + (line.empty() ? "" : " " + line);
    };
    const Thread* waits = nullptr;
    for (int i = 0; i < count_ && waits == nullptr; ++i)
        if (threads_[i]->state != State::kGone) waits = threads_[i].get();
    std::string what = where(*waits) + " for ever";
    for (int i = 0; i < count_; ++i) {
        const Thread& other = *threads_[i];
        // One that will not come: in another state, or of a warp whose other lanes wait elsewhere.
        if (other.state == waits->state) continue;
        what += ": thread " + to_string(other.index) + " " + where(other);
        break;
    }
    fail(what, nullptr, waits);
}

void Block::fail(const std::string& what, const void* code, const Thread* who) {
    const Inside inside;
    const std::string line = code == nullptr ? "" : describe(code);
    error_ = "block " + to_string(blockIdx) + ", thread " +
             to_string((who == nullptr ? current_ : who)->index) + " " + what +
             (line.empty() ? "" : ", " + line);
    current_->fiber.leave_to(host_);
}

}  // namespace tim::emulator
