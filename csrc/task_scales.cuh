// Kernel F: lambda over the normalizer of every task, and that normalizer. One block; K is nothing beside a product.
//
//     Eq. 2    scale_k = lambda_k / sum_j lambda_j T_j
//     TLA      scale_k = lambda_k / (T_k sum of lambda over the tasks that are present)
//
// or over a normalizer that is given. The scale is 0 where the normalizer is 0, NaN where it is not a number that a sum
// of weights can be.
#pragma once

#include <cmath>

#include "block_reduce.cuh"

namespace cotbal {

constexpr int kTaskScaleThreads = 256;

// What lambda is divided by.
struct Normalizer {
    const float* given;     // [1], or [K] with per_task; null: that of `tokens`
    const int64_t* tokens;  // [K]
    int per_task;           // TLA
};

__global__ void __launch_bounds__(kTaskScaleThreads)
    task_scales_kernel(const float* weights, const float* poison, Normalizer normalizer, int64_t num_tasks, float* scale,
                       float* denominator) {
    const float poisoned = *poison;
    float total = 0;
    if (normalizer.given == nullptr) {
        for (int64_t task = threadIdx.x; task < num_tasks; task += kTaskScaleThreads) {
            const float tokens = static_cast<float>(normalizer.tokens[task]);
            const float share = normalizer.per_task ? (tokens > 0 ? 1.0f : 0.0f) : tokens;
            if (share > 0) total += weights[task] * share;
        }
        total = block_reduce(total, Add(), 0.0f) + poisoned;
    }
    for (int64_t task = threadIdx.x; task < num_tasks; task += kTaskScaleThreads) {
        float below = total;
        if (normalizer.given != nullptr) {
            below = normalizer.given[normalizer.per_task ? task : 0];
        } else if (normalizer.per_task) {
            below *= static_cast<float>(normalizer.tokens[task]);
        }
        if (!(below >= 0 && below < INFINITY)) below = NAN;
        scale[task] = below == 0 ? 0.0f : (weights[task] + poisoned) / below;
        denominator[task] = below;
    }
}

}  // namespace cotbal
