#include "../math/transition_loss.h"

#include <stdexcept>
#include <string>

#include "common.cuh"

namespace tim::cuda {
namespace {

// A thread handles packs of neighbouring positions, so that accesses coalesce and the cosine's sums
// over channels stay in its registers. threadIdx.x counts packs; the channels are dealt to the
// groups threadIdx.y, whose sums meet in shared memory.
constexpr int kMaxThreads = 512;
// The kernels count channels in ints, past the last one by at most a block's threads.
constexpr int kMaxChannels = 1 << 30;
constexpr int kMaxBlocks = INT32_MAX;

// T: dtype of the network's outputs, D: of the data.
template <class T, class D>
struct Inputs {
    const T* F;
    const D* x;
    const D* z;
    const T* d;  // of the samples from `first` on, as d_minus
    const T* d_minus;
    const T* cond;
    const T* null;
    const float* coefficients;  // [B, 5]
    float spacing;              // 2 epsilon
    int64_t first;
};

// Per position of a pack, over channels: F . target, F . F and target . target.
template <int n>
struct CosineSums {
    float dot[n] = {}, F_squares[n] = {}, target_squares[n] = {};
};

template <class T, class D, int n>
TIM_DEVICE void add(CosineSums<n>& sums, const Pack<T, n>& Fs, const Pack<D, n>& targets) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
        const float F = load(Fs, i), target = load(targets, i);
        sums.dot[i] += F * target;
        sums.F_squares[i] += F * F;
        sums.target_squares[i] += target * target;
    }
}

// Gives every group the sums over all groups, added in the order of the groups.
template <int n>
TIM_DEVICE void share(CosineSums<n>& sums) {
    const int stride = blockDim.x, groups = blockDim.y;
    if (groups == 1) return;
    float* const slots = shared_memory() + threadIdx.x;
    barrier();  // earlier sums have been read
    float* const mine = slots + threadIdx.y * 3 * n * stride;
#pragma unroll
    for (int i = 0; i < n; ++i) {
        mine[3 * i * stride] = sums.dot[i];
        mine[(3 * i + 1) * stride] = sums.F_squares[i];
        mine[(3 * i + 2) * stride] = sums.target_squares[i];
    }
    barrier();
    sums = {};
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
        const float* p = slots + group * 3 * n * stride;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            sums.dot[i] += p[3 * i * stride];
            sums.F_squares[i] += p[(3 * i + 1) * stride];
            sums.target_squares[i] += p[(3 * i + 2) * stride];
        }
    }
}

size_t shared_bytes(dim3 block, int n) {
    const size_t block_sum = kWarp, share = block.y > 1 ? size_t(3 * n) * block.x * block.y : 0;
    return sizeof(float) * (share > block_sum ? share : block_sum);
}

// Sum over the block, of whole warps, for thread 0.
TIM_DEVICE float block_sum(float value) {
    float* const slots = shared_memory();
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const int warps = blockDim.x * blockDim.y / kWarp;
    value = warp_sum(value);
    barrier();  // earlier sums have been read
    if (thread % kWarp == 0) slots[thread / kWarp] = value;
    barrier();
    return thread < kWarp ? warp_sum(thread < warps ? slots[thread] : 0.0f) : value;
}

template <int n, class T>
TIM_DEVICE Pack<T, n> read_or_zero(const T* p, int64_t at) {
    return p == nullptr ? Pack<T, n>{} : read<n>(p + at);
}

template <class T, class D, int n>
struct Terms {
    Pack<T, n> F, d, d_minus, cond, null;
    Pack<D, n> x, z;
};

struct Results {
    float* loss;
    float* denoising;
    float* weight;
    const float* time_weight;
    int64_t channels, positions;
};

// From sums over all positions of the sample.
TIM_DEVICE void finish(const Results& to, int64_t sample, float squares, float distance) {
    const float error =
        squares / float(to.channels * to.positions) + distance / float(to.positions);
    const float factor = math::adaptive_weight(load_global(to.time_weight + sample), error);
    to.denoising[sample] = error;
    to.weight[sample] = factor;
    to.loss[sample] = factor * error;
}

// A block takes the positions of one of the parts of a sample; [batch, parts, 2] sums of several
// parts wait for add_parts.
template <class T, class D, int n>
__global__ void __launch_bounds__(kMaxThreads, 1)
    forward(Inputs<T, D> in, D* targets, Results to, float* part_sums, int parts, int channels,
            int64_t positions, bool cosine) {
    constexpr int kChannels = n == 8 ? 1 : 2;  // at a time, as registers allow
    const int64_t sample = blockIdx.x / parts, numel = channels * positions;
    const int64_t part = blockIdx.x % parts, packs = positions / n;
    const int64_t begin = packs * part / parts * n, end = packs * (part + 1) / parts * n;
    const bool moving = sample >= in.first;
    const T* const d = moving && in.d != nullptr ? in.d - in.first * numel : nullptr;
    const T* const d_minus =
        moving && in.d_minus != nullptr ? in.d_minus - in.first * numel : nullptr;
    const float* const c = in.coefficients + 5 * sample;
    const float c_x = load_global(c), c_z = load_global(c + 1);
    // An absent term counts nothing, whatever its coefficient.
    float c_d = d != nullptr ? load_global(c + 2) : 0.0f;
    if (d_minus != nullptr) c_d /= in.spacing;
    const float c_cond = in.cond != nullptr ? load_global(c + 3) : 0.0f;
    const float c_null = in.null != nullptr ? load_global(c + 4) : 0.0f;

    float squares = 0.0f, distance = 0.0f;
    for (int64_t start = begin; start < end; start += int64_t(blockDim.x) * n) {
        const int64_t position = start + int64_t(threadIdx.x) * n;
        const bool active = position < end;
        const int64_t base = sample * numel + position;
        CosineSums<n> sums;
        for (int first = threadIdx.y; active && first < channels; first += kChannels * blockDim.y) {
            Terms<T, D, n> terms[kChannels];
#pragma unroll
            for (int i = 0; i < kChannels; ++i) {
                const int channel = first + i * blockDim.y;
                if (channel >= channels) continue;
                const int64_t at = base + channel * positions;
                terms[i].F = read<n>(in.F + at);
                terms[i].x = read<n>(in.x + at);
                terms[i].z = read<n>(in.z + at);
                terms[i].d = read_or_zero<n>(d, at);
                terms[i].d_minus = read_or_zero<n>(d_minus, at);
                terms[i].cond = read_or_zero<n>(in.cond, at);
                terms[i].null = read_or_zero<n>(in.null, at);
            }
#pragma unroll
            for (int i = 0; i < kChannels; ++i) {
                const int channel = first + i * blockDim.y;
                if (channel >= channels) continue;
                const Terms<T, D, n>& term = terms[i];
                float exact[n];
#pragma unroll
                for (int j = 0; j < n; ++j) {
                    exact[j] = c_x * load(term.x, j) + c_z * load(term.z, j);
                    exact[j] +=
                        math::weighted_difference(c_d, load(term.d, j), load(term.d_minus, j));
                    exact[j] += c_cond * load(term.cond, j);
                    exact[j] += c_null * load(term.null, j);
                }
                // The loss sees the stored target, rounded to its dtype, as the backward pass will.
                const Pack<D, n> target = narrow<D>(exact);
                write(targets + base + channel * positions, target);
#pragma unroll
                for (int j = 0; j < n; ++j)
                    squares += math::squared_error(load(term.F, j), load(target, j));
                if (cosine) add(sums, term.F, target);
            }
        }
        if (!cosine) continue;
        share(sums);
        if (!active || threadIdx.y > 0) continue;
#pragma unroll
        for (int j = 0; j < n; ++j)
            distance += 1.0f - math::cosine(sums.dot[j], math::clamped_norm(sums.F_squares[j]),
                                            math::clamped_norm(sums.target_squares[j]));
    }
    squares = block_sum(squares);
    distance = block_sum(distance);
    if (threadIdx.x > 0 || threadIdx.y > 0) return;
    if (parts == 1) {
        finish(to, sample, squares, distance);
    } else {
        part_sums[2 * blockIdx.x] = squares;
        part_sums[2 * blockIdx.x + 1] = distance;
    }
}

// One warp per sample, whose lanes add up every 32nd part.
__global__ void __launch_bounds__(kWarp) add_parts(const float* part_sums, int parts, Results to) {
    const float* const sums = part_sums + int64_t(blockIdx.x) * parts * 2;
    float squares = 0.0f, distance = 0.0f;
    for (int part = lane(); part < parts; part += kWarp) {
        squares += load_global(sums + 2 * part);
        distance += load_global(sums + 2 * part + 1);
    }
    squares = warp_sum(squares);
    distance = warp_sum(distance);
    if (lane() == 0) finish(to, blockIdx.x, squares, distance);
}

// So many channels of F and target stay in a thread's registers between the two passes over them;
// what does not fit, from the 65th channel on, is read again.
constexpr int kHeldChannels = 4;
constexpr int kMaxGroups = 16;

template <class T, class D, int n>
__global__ void __launch_bounds__(kMaxThreads, 1)
    backward(const float* scales, const T* Fs, const D* targets, T* dFs, int64_t batch,
             int channels, int64_t positions, bool cosine) {
    const int64_t position = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * n;
    const int group = threadIdx.y, groups = blockDim.y;
    // A thread beyond the last position has no channels, and waits with the others.
    const int own_channels = position < positions ? channels : 0;
    for (int64_t sample = blockIdx.y; sample < batch; sample += gridDim.y) {
        const int64_t base = sample * channels * positions + position;
        Pack<T, n> F[kHeldChannels];
        Pack<D, n> target[kHeldChannels];
#pragma unroll
        for (int i = 0; i < kHeldChannels; ++i) {
            const int channel = group + i * groups;
            if (channel >= own_channels) continue;
            F[i] = read<n>(Fs + base + channel * positions);
            target[i] = read<n>(targets + base + channel * positions);
        }
        const float scale = load_global(scales + sample);
        const float squares = 2.0f * scale / float(channels * positions);
        const float cosines = scale / float(positions);
        float cosine_of[n];
        math::Divisor<float> F_norm[n], target_norm[n];
        if (cosine) {
            CosineSums<n> sums;
#pragma unroll
            for (int i = 0; i < kHeldChannels; ++i)
                if (group + i * groups < own_channels) add(sums, F[i], target[i]);
            for (int channel = group + kHeldChannels * groups; channel < own_channels;
                 channel += groups)
                add(sums, read<n>(Fs + base + channel * positions),
                    read<n>(targets + base + channel * positions));
            share(sums);
#pragma unroll
            for (int j = 0; j < n; ++j) {
                F_norm[j] = math::make_divisor(math::clamped_norm(sums.F_squares[j]));
                target_norm[j] = math::make_divisor(math::clamped_norm(sums.target_squares[j]));
                cosine_of[j] = math::cosine(sums.dot[j], F_norm[j].value, target_norm[j].value);
            }
        }
        const auto finish = [&](int channel, const Pack<T, n>& F, const Pack<D, n>& target) {
            float dF[n];
#pragma unroll
            for (int j = 0; j < n; ++j) {
                const float F_j = load(F, j), target_j = load(target, j);
                dF[j] = cosine ? math::loss_gradient(F_j, target_j, squares, cosines, cosine_of[j],
                                                     F_norm[j], target_norm[j])
                               : squares * (F_j - target_j);
            }
            write(dFs + base + channel * positions, narrow<T>(dF));
        };
#pragma unroll
        for (int i = 0; i < kHeldChannels; ++i)
            if (group + i * groups < own_channels) finish(group + i * groups, F[i], target[i]);
        for (int channel = group + kHeldChannels * groups; channel < own_channels;
             channel += groups)
            finish(channel, read<n>(Fs + base + channel * positions),
                   read<n>(targets + base + channel * positions));
    }
}

int round_up_to_warps(int64_t threads) {
    return threads < kMaxThreads ? int(ceil_div(threads, kWarp)) * kWarp : kMaxThreads;
}

// As many packs as a sample has, and the rest of the threads for its channels.
dim3 forward_block(int64_t channels, int64_t packs) {
    const int x = round_up_to_warps(packs);
    const int64_t groups = kMaxThreads / x;
    return dim3(x, unsigned(channels < groups ? channels : groups));
}

// Groups enough to hold all channels, and no more packs than make a block of four warps, as all
// threads of a block wait for each other.
dim3 backward_block(int64_t channels, int64_t packs) {
    const int64_t needed = ceil_div(channels, kHeldChannels);
    const int groups = int(needed < kMaxGroups ? needed : kMaxGroups);
    const int x = groups < 4 ? 4 / groups * kWarp : kWarp;
    const int all = round_up_to_warps(packs);
    return dim3(x < all ? x : all, groups);
}

// Calls body with one value of each storage type; the data may be wider than the network's outputs.
template <class Body>
void with_dtypes(int dtype, int data_dtype, const Body& body) {
    if (dtype == data_dtype) {
        with_dtype(dtype, [&](auto type) { body(type, type); });
    } else if (dtype == kBFloat16 && data_dtype == kFloat32) {
        body(BFloat16{}, float{});
    } else if (dtype == kFloat16 && data_dtype == kFloat32) {
        body(Float16{}, float{});
    } else {
        throw std::invalid_argument(
            "transition_loss: data_dtype must be dtype, or 0 (float32) beside dtype 1 or 2");
    }
}

Call make_call(const char* op, int64_t batch, int64_t channels, int64_t positions, int64_t where) {
    return {op, {batch, channels, positions}, reinterpret_cast<cudaStream_t>(where)};
}

void transition_loss(const void* F, const void* x, const void* z, const void* d,
                     const void* d_minus, const void* cond, const void* null,
                     const float* coefficients, double epsilon, const float* time_weight,
                     int64_t first, void* target, float* loss, float* denoising, float* weight,
                     float* sums, int64_t batch, int64_t channels, int64_t positions, int64_t parts,
                     bool cosine, int dtype, int data_dtype, int64_t where) {
    if (batch == 0 || channels == 0 || positions == 0) return;
    const Call call = make_call("transition_loss", batch, channels, positions, where);
    const int channel_count = counted(call, "channels", channels, kMaxChannels);
    const int blocks = counted(call, "batch x parts", batch * parts, kMaxBlocks);
    if (parts < 1 || parts > positions || (parts > 1 && sums == nullptr)) {
        throw std::invalid_argument(
            "transition_loss: parts must be 1 to " + std::to_string(positions) +
            " (positions), with memory for their sums if several, got " + std::to_string(parts));
    }
    const Results to{loss, denoising, weight, time_weight, channels, positions};
    with_dtypes(dtype, data_dtype, [&](auto type, auto data_type) {
        using T = decltype(type);
        using D = decltype(data_type);
        const Inputs<T, D> in{array<T>(F),        array<D>(x),    array<D>(z),    array<T>(d),
                              array<T>(d_minus),  array<T>(cond), array<T>(null), coefficients,
                              float(2 * epsilon), first};
        with_width<D>({F, x, z, d, d_minus, cond, null, target}, {positions}, [&](auto width) {
            constexpr int kWidth = decltype(width)::kValue;
            const dim3 block = forward_block(channels, ceil_div(positions / kWidth, parts));
            launch(call, forward<T, D, kWidth>, dim3(unsigned(blocks)), block,
                   shared_bytes(block, kWidth), in, array<D>(target), to, sums, int(parts),
                   channel_count, positions, cosine);
        });
        if (parts > 1)
            launch(call, add_parts, dim3(unsigned(batch)), kWarp, 0, sums, int(parts), to);
    });
}

void transition_loss_backward(const float* scale, const void* F, const void* target, void* dF,
                              int64_t batch, int64_t channels, int64_t positions, bool cosine,
                              int dtype, int data_dtype, int64_t where) {
    if (batch == 0 || channels == 0 || positions == 0) return;
    const Call call = make_call("transition_loss_backward", batch, channels, positions, where);
    const int channel_count = counted(call, "channels", channels, kMaxChannels);
    with_dtypes(dtype, data_dtype, [&](auto type, auto data_type) {
        using T = decltype(type);
        using D = decltype(data_type);
        with_width<D>({F, target, dF}, {positions}, [&](auto width) {
            constexpr int kWidth = decltype(width)::kValue;
            const int64_t packs = positions / kWidth;
            const dim3 block = backward_block(channels, packs);
            const dim3 grid(unsigned(ceil_div(packs, block.x)), grid_rows(call, batch));
            launch(call, backward<T, D, kWidth>, grid, block, shared_bytes(block, kWidth), scale,
                   array<T>(F), array<D>(target), array<T>(dF), batch, channel_count, positions,
                   cosine);
        });
    });
}

}  // namespace

void add_transition_loss(Kernels& kernels) {
    kernels.transition_loss = transition_loss;
    kernels.transition_loss_backward = transition_loss_backward;
}

}  // namespace tim::cuda
