// Kernels A and C: a chunk of logits to losses and to the gradient of the logits.
//
//     loss = log l - (1 - eps) (z_t - m) - even sum(z - m) + z_loss (m + log l)^2
//     dz   = scale ((1 + 2 z_loss (m + log l)) p - (1 - eps) [j = t] - even) * slope of scale and softcap
//
// with m the largest logit of the row, l the sum of exp(z - m), p = exp(z - m) / l. All in float32, from logits of any
// format; the loss never goes through m + log l, which at an offset of 1e4 has no digits left for it.
//
// One block per row. Cost of a row of V logits of b bytes, gradients of g bytes:
//   chunk_gradient   reads V b, then V b again (from L2 while the rows in flight, one per multiprocessor from
//                    65537 columns on, fit it), writes V g; 2 V exponentials and about 9 V flop
//   saved_gradient   reads V b, writes V g; V exponentials and about 4 V flop
// At V = 128256, float32 to bf16, that is 1.3 MB a row, beside 3.2 GFLOP of matrix products at D = 4096.
#pragma once

#include <climits>
#include <cmath>

#include "block_reduce.cuh"
#include "logit_row.cuh"

namespace cotbal {

// Where the results of a position go, each [M].
struct RowResults {
    float* loss;
    float* max;
    float* log_sum;
    int64_t* hit;
};

// The statistics of the elements that one thread, then the block, has seen.
struct RowStatistics {
    float max = -INFINITY;
    float sum = 0;          // of exp(z - max)
    float distance = 0;     // sum of z - max, for smoothing: the sum of z would lose digits to a common offset
    float count = 0;        // elements in `distance`
    int argmax = INT_MAX;   // the first one

    // N more elements, of which the first `valid` are there and the others are -inf; `column_of(i)` is asked only where
    // there is a new maximum, hardly ever behind the first tiles.
    template <int N, typename ColumnOf>
    __device__ void add(const float (&z)[N], ColumnOf column_of, int valid, bool smooth) {
        float largest = max;
#pragma unroll
        for (int i = 0; i < N; ++i) largest = fmaxf(largest, z[i]);  // a NaN shows in the sum
        if (largest > max) {
#pragma unroll
            for (int i = N - 1; i >= 0; --i) {
                if (z[i] == largest) argmax = column_of(i);
            }
            sum *= expf(max - largest);
            if (smooth && count > 0) distance += count * (max - largest);
            max = largest;
        }
        const float base = max == -INFINITY ? 0.0f : max;  // -inf - -inf is NaN
#pragma unroll
        for (int i = 0; i < N; ++i) sum += exp_nonpositive(z[i] - base);
        if (smooth) {
#pragma unroll
            for (int i = 0; i < N; ++i) distance += i < valid ? z[i] - base : 0.0f;
            count += static_cast<float>(valid);
        }
    }

    __device__ void over_block(bool smooth) {
        const float of_all = block_reduce(max, Max(), -INFINITY);
        // A thread whose elements are all -inf has a sum of 0, or NaN if it saw one.
        sum = block_reduce(max == -INFINITY ? sum : sum * expf(max - of_all), Add(), 0.0f);
        argmax = block_reduce(max == of_all ? argmax : INT_MAX, Min(), INT_MAX);
        if (smooth) distance = block_reduce(count > 0 ? distance + count * (max - of_all) : 0.0f, Add(), 0.0f);
        max = of_all;
    }
};

template <typename In, bool kGeneral>
__device__ RowStatistics row_statistics(const In* row, int vocab, const float* bias, const TokenLoss& spec) {
    using Tiles = RowTiles<In>;
    constexpr int kPer = Tiles::kPer;
    constexpr int kElements = kPer * Tiles::kLoads;
    const Tiles tiles(row, vocab);
    const bool smooth = spec.smoothing > 0;
    RowStatistics statistics;
    const int num_tiles = tiles.tiles();
    for (int t = 0; t < num_tiles; ++t) {
        Pack<In, kPer> raw[Tiles::kLoads];
        int valid = 0;
#pragma unroll
        for (int i = 0; i < Tiles::kLoads; ++i) {
            const int load = tiles.load_index(t, i);
            if (load < tiles.loads) {
                raw[i] = tiles.load(load);
                valid = (i + 1) * kPer;
            } else {
#pragma unroll
                for (int j = 0; j < kPer; ++j) raw[i].at[j] = rounded<In>(-INFINITY);
            }
        }
        const auto column_of = [&](int i) { return tiles.column(tiles.load_index(t, i / kPer)) + i % kPer; };
        float z[kElements];
#pragma unroll
        for (int i = 0; i < kElements; ++i) z[i] = widen(raw[i / kPer].at[i % kPer]);
        to_logits<kGeneral>(z, column_of, valid, bias, spec);
        if constexpr (kGeneral) {  // what a softcap makes of -inf is not -inf
#pragma unroll
            for (int i = 0; i < kElements; ++i) {
                if (i >= valid) z[i] = -INFINITY;
            }
        }
        statistics.add(z, column_of, valid, smooth);
    }
    const int lone = tiles.scalar_column();
    if (lone >= 0) {
        const float z[1] = {logit_of<kGeneral>(row[lone], lone, bias, spec)};
        // The head comes before what this thread has seen: at equal logits the first one wins.
        if (z[0] == statistics.max && lone < statistics.argmax) statistics.argmax = lone;
        statistics.add(z, [&](int) { return lone; }, 1, smooth);
    }
    statistics.over_block(smooth);
    return statistics;
}

// Kernel A. The second sweep runs only where gradients are wanted.
template <typename In, typename Out, bool kGeneral>
__global__ void __launch_bounds__(1024, 1)
    chunk_gradient_kernel(Logits<In> logits, Gradients<Out> gradients, Positions positions, RowScale scale,
                          RowResults results, TokenLoss spec) {
    const int64_t row = blockIdx.x;
    const int64_t position = positions.of_row(row);
    if (position < 0) {
        if (gradients.data != nullptr) write_zeros(gradients.row(row), logits.vocab);
        return;
    }
    const In* const source = logits.row(row);
    const int target = static_cast<int>(positions.targets[position]);
    const float z_target = target < 0 ? 0 : logit_of<kGeneral>(source[target], target, logits.bias, spec);
    const RowStatistics found = row_statistics<In, kGeneral>(source, logits.vocab, logits.bias, spec);
    const float log_sum = logf(found.sum);
    if (threadIdx.x == 0) {
        float loss = log_sum;
        if (target >= 0) loss -= (1 - spec.smoothing) * (z_target - found.max);
        if (spec.smoothing > 0) loss -= spec.even * found.distance;
        const float lse = found.max + log_sum;
        results.loss[position] = loss + spec.z_loss * lse * lse;
        results.max[position] = found.max;
        results.log_sum[position] = log_sum;
        results.hit[position] = found.argmax == target ? 1 : 0;
    }
    if (gradients.data == nullptr) return;
    const RowGradient gradient(found.max, log_sum, 1 / found.sum, scale.at(position), target, spec);
    write_gradient<In, Out, kGeneral>(source, gradients.row(row), logits.vocab, logits.bias, gradient, spec);
}

// Kernel C: the same gradient from statistics that are known.
template <typename In, typename Out, bool kGeneral>
__global__ void __launch_bounds__(1024, 1)
    saved_gradient_kernel(Logits<In> logits, Gradients<Out> gradients, Positions positions, RowScale scale,
                          const float* max, const float* log_sum, TokenLoss spec) {
    const int64_t row = blockIdx.x;
    const int64_t position = positions.of_row(row);
    if (position < 0) {
        write_zeros(gradients.row(row), logits.vocab);
        return;
    }
    const RowGradient gradient(max[position], log_sum[position], expf(-log_sum[position]), scale.at(position),
                               static_cast<int>(positions.targets[position]), spec);
    write_gradient<In, Out, kGeneral>(logits.row(row), gradients.row(row), logits.vocab, logits.bias, gradient, spec);
}

}  // namespace cotbal
