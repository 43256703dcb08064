// Kernel D: out = grad * factor, the product in float32, rounded once to the format of out. One pass: reads n values,
// writes n values, n flop. In place with a factor of 1, as most often, it reads the factor and nothing else.
#pragma once

#include "numeric.cuh"

namespace cotbal {

constexpr int kScaleThreads = 256;
constexpr int kScaleLoads = 4;  // of 16 bytes, in flight before the first is used
// Enough to fill any device several times over, few enough to return at once where there is nothing to do.
constexpr int64_t kScaleMostBlocks = 4096;

template <typename In>
constexpr int64_t kScalePerBlock = static_cast<int64_t>(kScaleThreads) * kScaleLoads * kPerLoad<In>;

template <typename In, typename Out>
__global__ void __launch_bounds__(kScaleThreads, 4)
    scale_gradient_kernel(const In* grad, const float* factor, Out* out, int64_t count) {
    constexpr int kPer = kPerLoad<In>;
    const float by = *factor;
    if (by == 1.0f && static_cast<const void*>(grad) == static_cast<const void*>(out)) return;
    const bool whole = aligned_to(grad, 16) && aligned_to(out, static_cast<int>(sizeof(Out)) * kPer);
    const int64_t step = static_cast<int64_t>(gridDim.x) * kScalePerBlock<In>;
    for (int64_t start = static_cast<int64_t>(blockIdx.x) * kScalePerBlock<In>; start < count; start += step) {
        const int64_t end = start + kScalePerBlock<In> < count ? start + kScalePerBlock<In> : count;
        if (!whole) {
#pragma unroll 1
            for (int64_t i = start + threadIdx.x; i < end; i += kScaleThreads) {
                out[i] = rounded<Out>(widen(grad[i]) * by);
            }
            continue;
        }
        Pack<In, kPer> raw[kScaleLoads];
#pragma unroll
        for (int i = 0; i < kScaleLoads; ++i) {
            const int64_t at = start + (static_cast<int64_t>(i) * kScaleThreads + threadIdx.x) * kPer;
            if (at + kPer <= end) raw[i] = *reinterpret_cast<const Pack<In, kPer>*>(grad + at);
        }
#pragma unroll
        for (int i = 0; i < kScaleLoads; ++i) {
            const int64_t at = start + (static_cast<int64_t>(i) * kScaleThreads + threadIdx.x) * kPer;
            if (at + kPer <= end) {
                Pack<Out, kPer> result;
#pragma unroll
                for (int j = 0; j < kPer; ++j) result.at[j] = rounded<Out>(widen(raw[i].at[j]) * by);
                *reinterpret_cast<Pack<Out, kPer>*>(out + at) = result;
            } else {
#pragma unroll 1
                for (int64_t k = at; k < end; ++k) out[k] = rounded<Out>(widen(grad[k]) * by);
            }
        }
    }
}

}  // namespace cotbal
