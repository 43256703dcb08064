// The three float formats of logits and gradients, their conversions, and packs of 16 bytes.
//
// The types hold raw bits, so that a host compiler without the CUDA headers compiles the same kernels: the tests run
// them on a CPU (tests/cotbal_kernels/cuda_on_cpu). Only the conversions and two functions below differ between them.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace cotbal {

struct bf16 {
    uint16_t bits;
};

struct fp16 {
    uint16_t bits;
};

// Codes of the C API; cotbal_kernels/cuda_kernels/library.py has the same.
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

__device__ inline float widen(float value) { return value; }

__device__ inline float widen(bf16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

template <typename T>
__device__ T rounded(float value);  // to nearest, ties to even

template <>
__device__ inline float rounded<float>(float value) {
    return value;
}

#ifdef __CUDACC__

__device__ inline float widen(fp16 value) { return __half2float(__ushort_as_half(value.bits)); }

template <>
__device__ inline bf16 rounded<bf16>(float value) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

template <>
__device__ inline fp16 rounded<fp16>(float value) {
    return {__half_as_ushort(__float2half_rn(value))};
}

#else

__device__ inline float widen(fp16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude < 0x400u) {  // subnormal: a multiple of 2^-24
        const float value_of = static_cast<float>(magnitude) * 0x1p-24f;
        return sign ? -value_of : value_of;
    }
    return __uint_as_float(sign | ((magnitude << 13) + (112u << 23)));
}

template <>
__device__ inline bf16 rounded<bf16>(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (value != value) return {0x7fffu};
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
__device__ inline fp16 rounded<fp16>(float value) {
    const uint32_t bits = __float_as_uint(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const float magnitude = __uint_as_float(bits & 0x7fffffffu);
    if (value != value) return {0x7fffu};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
    if (magnitude < 0x1p-14f) {  // adding 2^-1 leaves a multiple of 2^-24, rounded to nearest even, in the low bits
        return {static_cast<uint16_t>(sign | (__float_as_uint(magnitude + 0.5f) - __float_as_uint(0.5f)))};
    }
    const uint32_t half = __float_as_uint(magnitude) - (112u << 23);
    return {static_cast<uint16_t>(sign | (half + 0xfffu + (half >> 13 & 1u)) >> 13)};
}

#endif

constexpr float kLog2E = 1.44269504f;

// 2^x by the hardware, off by at most two units in the last place.
__device__ inline float power_of_two(float x) {
#ifdef __CUDACC__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);
#endif
}

// exp(x) for x <= 0 in two instructions instead of eight. The product is off by less than |x| 2^-23 of the result;
// as |x| exp(x) is at most 1 / e, no probability is off by more than 3e-7.
__device__ inline float exp_nonpositive(float x) { return power_of_two(x * kLog2E); }

// 1 / x, off by one unit in the last place.
__device__ inline float reciprocal(float x) {
#ifdef __CUDACC__
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return 1 / x;
#endif
}

// tanh within three units in the last place and without a branch. Below 0.6 a polynomial (relative error 5e-9 before
// rounding), above it 1 - 2 / (exp(2 |x|) + 1), which would lose the digits of a small x.
__device__ inline float tanh_of(float x) {
    const float square = x * x;
    float slope = -0.00589515f;
    slope = fmaf(slope, square, 0.020795964f);
    slope = fmaf(slope, square, -0.053783827f);
    slope = fmaf(slope, square, 0.13331924f);
    slope = fmaf(slope, square, -0.333333f);
    const float small = fmaf(slope * square, x, x);
    const float magnitude = fabsf(x);
    const float large = fmaf(-2, reciprocal(1 + power_of_two(magnitude * (2 * kLog2E))), 1);
    return magnitude < 0.6f ? small : copysignf(large, x);
}

// N neighbouring values that move in one access.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

// Values in one 16-byte load.
template <typename T>
constexpr int kPerLoad = 16 / static_cast<int>(sizeof(T));

__device__ inline bool aligned_to(const void* address, int bytes) {
    return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace cotbal
