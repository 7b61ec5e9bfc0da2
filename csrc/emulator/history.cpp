#include "history.h"

#include <algorithm>

#include "block.h"

namespace tim::emulator {

void Time::begin_launch() {
    launch_ = ++epoch_;
    blocks_.clear();
}

void Time::begin_block(uint3 index) {
    block_ = ++epoch_;
    blocks_.push_back({block_, index});
}

Moment Time::now(const Thread& thread) const {
    return {epoch_, thread.clock, uint32_t(thread.number)};
}

uint3 Time::block_of(uint32_t epoch) const {
    const auto next = std::upper_bound(
        blocks_.begin(), blocks_.end(), epoch,
        [](uint32_t value, const Block& block) { return value < block.first_epoch; });
    return std::prev(next)->index;
}

bool Time::before(const Moment& moment, const Thread& thread) const {
    if (!in_block(moment.epoch)) return false;
    const uint32_t own = uint32_t(thread.number);
    if (moment.epoch < epoch_ || moment.thread == own) return true;
    return thread.seen[moment.thread] >= moment.clock;
}

const Moment* History::race_of_read(const Time& time, const Thread& thread, bool shared) const {
    const bool matters = shared ? time.in_block(write_.epoch) : time.in_launch(write_.epoch);
    return matters && !time.before(write_, thread) ? &write_ : nullptr;
}

const Moment* History::race_of_write(const Time& time, const Thread& thread, bool shared) {
    if (const Moment* const race = race_of_read(time, thread, shared)) return race;
    for (const Readers& readers : readers_) {
        if (!(shared ? time.in_block(readers.epoch) : time.in_launch(readers.epoch))) continue;
        for (uint32_t lanes = readers.lanes; lanes != 0; lanes &= lanes - 1) {
            reader_ = {readers.epoch, readers.clock,
                       readers.warp * kWarpLanes + uint32_t(__builtin_ctz(lanes))};
            if (!time.before(reader_, thread)) return &reader_;
        }
    }
    return nullptr;
}

void History::write(const Time& time, const Thread& thread) {
    write_ = time.now(thread);
    // A later access that is in order with this one is in order with them, too.
    readers_[0].lanes = readers_[1].lanes = 0;
}

void History::arrive(const Time& time, const Thread& thread, uint32_t clock) {
    write(time, thread);
    write_.clock = clock;
}

// Keeps two groups of readers, chosen so that a later write which is in order with both is in order
// with all others: of two blocks if there are such, else of two warps in one epoch.
void History::read(const Time& time, const Thread& thread, bool shared) {
    const Moment now = time.now(thread);
    const Readers own = {now.epoch, now.clock, now.thread / kWarpLanes,
                         1u << now.thread % kWarpLanes};
    bool of_this_block = false;
    for (Readers& readers : readers_) {
        const bool matters = readers.lanes != 0 && (shared ? time.in_block(readers.epoch)
                                                           : time.in_launch(readers.epoch));
        const bool here = time.in_block(readers.epoch);
        if (!matters || (here && readers.epoch < now.epoch)) {
            readers = own;
            return;
        }
        if (here && readers.warp == own.warp) {
            bool all_before = true;
            for (uint32_t lanes = readers.lanes; lanes != 0; lanes &= lanes - 1) {
                const uint32_t reader = own.warp * kWarpLanes + uint32_t(__builtin_ctz(lanes));
                all_before =
                    all_before && time.before({readers.epoch, readers.clock, reader}, thread);
            }
            if (all_before) {
                readers = own;
            } else {
                readers.lanes |= own.lanes;
                readers.clock = std::min(readers.clock, own.clock);
            }
            return;
        }
        of_this_block = of_this_block || here;
    }
    if (!of_this_block) readers_[1] = own;
}

void History::begin_copy(const Time& time, uint32_t thread) {
    copy_block_ = time.block();
    copier_ = thread;
}

}  // namespace tim::emulator
