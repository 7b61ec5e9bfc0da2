// The operations in which the lanes of a warp meet: shuffles, votes, __syncwarp.
#include <algorithm>
#include <string>

#include "block.h"

namespace tim::emulator {
namespace {

struct ShuffleOperands {
    Shuffle kind;
    uint64_t value;
    int argument;
    uint64_t result;
};

constexpr const char* kShuffleNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                         "__shfl_xor_sync"};

int source_lane(Shuffle kind, int lane, int argument, int width) {
    const int first = lane & ~(width - 1), last = first + width - 1;
    int source = lane;
    switch (kind) {
        case Shuffle::kIndex:
            return first | (argument & (width - 1));
        case Shuffle::kUp:
            source = lane - argument;
            return source < first ? lane : source;
        case Shuffle::kDown:
            source = lane + argument;
            return source > last ? lane : source;
        case Shuffle::kXor:
            source = lane ^ argument;
            return source > last ? lane : source;
    }
    return lane;
}

template <Shuffle kind>
void evaluate_shuffle(const Warp& warp, unsigned mask) {
    for (int i = 0; i < kWarpLanes; ++i) {
        if ((mask >> i & 1u) == 0) continue;
        auto& own = *static_cast<ShuffleOperands*>(warp.lane(i).collective.operands);
        const int source = source_lane(kind, i, own.argument, warp.lane(i).collective.width);
        if ((mask >> source & 1u) == 0) {
            block().fail("calls " + std::string(kShuffleNames[int(kind)]) + ": lane " +
                             std::to_string(i) + " reads lane " + std::to_string(source) +
                             ", which does not take part in it",
                         warp.lane(i).collective.code, &warp.lane(i));
        }
        own.result = static_cast<ShuffleOperands*>(warp.lane(source).collective.operands)->value;
    }
}

constexpr void (*kEvaluateShuffle[])(const Warp&, unsigned) = {
    evaluate_shuffle<Shuffle::kIndex>, evaluate_shuffle<Shuffle::kUp>,
    evaluate_shuffle<Shuffle::kDown>, evaluate_shuffle<Shuffle::kXor>};

struct VoteOperands {
    bool predicate;
    unsigned result;
};

template <Vote kind>
void evaluate_vote(const Warp& warp, unsigned mask) {
    unsigned ballot = 0;
    for (int i = 0; i < kWarpLanes; ++i)
        if ((mask >> i & 1u) != 0 &&
            static_cast<VoteOperands*>(warp.lane(i).collective.operands)->predicate)
            ballot |= 1u << i;
    const unsigned result = kind == Vote::kBallot ? ballot
                            : kind == Vote::kAll  ? unsigned(ballot == mask)
                                                  : unsigned(ballot != 0);
    for (int i = 0; i < kWarpLanes; ++i)
        if ((mask >> i & 1u) != 0)
            static_cast<VoteOperands*>(warp.lane(i).collective.operands)->result = result;
}

// All lanes learn what each of them knew, and what comes after is later than what they know.
void evaluate_sync(const Warp& warp, unsigned mask) {
    std::vector<uint32_t> seen(warp.lane(0).seen.size());
    for (int i = 0; i < kWarpLanes; ++i) {
        if ((mask >> i & 1u) == 0) continue;
        Thread& thread = warp.lane(i);
        thread.seen[size_t(thread.number)] = thread.clock++;
        for (size_t j = 0; j < seen.size(); ++j) seen[j] = std::max(seen[j], thread.seen[j]);
    }
    for (int i = 0; i < kWarpLanes; ++i)
        if ((mask >> i & 1u) != 0) warp.lane(i).seen = seen;
}

}  // namespace

void sync_warp(unsigned mask) {
    const Inside inside;
    block().meet(
        {"__syncwarp", mask, warpSize, nullptr, evaluate_sync, __builtin_return_address(0)});
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int argument, int width) {
    const Inside inside;
    const char* const name = kShuffleNames[int(kind)];
    if (width < 1 || width > kWarpLanes || (width & (width - 1)) != 0)
        block().fail("calls " + std::string(name) +
                         ": width must be a power of two up to 32, got " + std::to_string(width),
                     __builtin_return_address(0));
    if (kind != Shuffle::kIndex && (argument < 0 || argument >= kWarpLanes))
        block().fail("calls " + std::string(name) + ": the distance must be from 0 to 31, got " +
                         std::to_string(argument),
                     __builtin_return_address(0));
    ShuffleOperands operands{kind, value, argument, 0};
    block().meet(
        {name, mask, width, &operands, kEvaluateShuffle[int(kind)], __builtin_return_address(0)});
    return operands.result;
}

unsigned vote(Vote kind, unsigned mask, bool predicate) {
    VoteOperands operands{predicate, 0};
    constexpr const char* kNames[] = {"__ballot_sync", "__all_sync", "__any_sync"};
    constexpr void (*kEvaluate[])(const Warp&, unsigned) = {
        evaluate_vote<Vote::kBallot>, evaluate_vote<Vote::kAll>, evaluate_vote<Vote::kAny>};
    block().meet({kNames[int(kind)], mask, warpSize, &operands, kEvaluate[int(kind)],
                  __builtin_return_address(0)});
    return operands.result;
}

}  // namespace tim::emulator
