// Kernels G and H: rows of a chunk from their positions in the batch, and to them. A block per row of D values.
#pragma once

#include "logit_row.cuh"

namespace cotbal {

constexpr int kRowThreads = 256;

// Kernel G: the hidden states of a chunk as one matrix, zeros in rows that are none: a NaN there would survive its
// gradient of 0 in the products. A Unit is what moves in one access. Reads and writes C D values.
template <typename Unit>
__global__ void __launch_bounds__(kRowThreads)
    gather_rows_kernel(const Unit* source, int64_t stride, Positions positions, int64_t units, Unit* out) {
    const int64_t position = positions.of_row(blockIdx.x);
    const Unit* const from = source + (position < 0 ? 0 : position) * stride;
    Unit* const to = out + blockIdx.x * units;
    for (int64_t i = threadIdx.x; i < units; i += kRowThreads) to[i] = position < 0 ? Unit() : from[i];
}

// Kernel H: dX of a chunk, in float32, to its positions: times `factor` where there is one, rounded once. Reads C D 4
// bytes, writes C D values.
template <typename Out, int kPer>
__global__ void __launch_bounds__(kRowThreads)
    scatter_rows_kernel(const float* source, const float* factor, Positions positions, int64_t width, Out* out) {
    const int64_t position = positions.of_row(blockIdx.x);
    if (position < 0) return;
    const float by = factor == nullptr ? 1.0f : *factor;
    const auto* const from = reinterpret_cast<const Pack<float, kPer>*>(source + blockIdx.x * width);
    auto* const to = reinterpret_cast<Pack<Out, kPer>*>(out + position * width);
    for (int64_t i = threadIdx.x; i < width / kPer; i += kRowThreads) {
        const Pack<float, kPer> wide = from[i];
        Pack<Out, kPer> result;
#pragma unroll
        for (int j = 0; j < kPer; ++j) result.at[j] = rounded<Out>(wide.at[j] * by);
        to[i] = result;
    }
}

}  // namespace cotbal
