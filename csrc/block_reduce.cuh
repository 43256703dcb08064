// Reductions over the threads of a block in a fixed order: bitwise reproducible, the same result in every thread.
//
// Order: within a warp a butterfly over lane distances 16, 8, 4, 2, 1; then the same butterfly over the results of
// the warps, the identity standing in for warps that do not exist.
#pragma once

#include <cuda_runtime.h>

namespace cotbal {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

struct Add {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};

struct Max {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Min {
    __device__ int operator()(int a, int b) const { return a < b ? a : b; }
};

template <typename T, typename Combine>
__device__ T warp_reduce(T value, Combine combine) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(kWholeWarp, value, distance));
    }
    return value;
}

// `blockDim.x` is a multiple of the warp size. The scratch is of T and Combine: between two calls with the same there is
// a barrier, as there is in one with others.
template <typename T, typename Combine>
__device__ T block_reduce(T value, Combine combine, T identity) {
    __shared__ T of_warps[kMaxWarps];
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    value = warp_reduce(value, combine);
    if (lane == 0) of_warps[warp] = value;
    __syncthreads();
    value = warp_reduce(lane < static_cast<int>(blockDim.x) / kWarp ? of_warps[lane] : identity, combine);
    return value;
}

}  // namespace cotbal
