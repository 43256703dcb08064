// Kernel B: S_k, the sum of the losses of every task, and its hits. No atomics: bitwise reproducible.
//
// One block of 512 threads per task. Thread i adds the positions i, i + 512, i + 1024, ... of its task in this order,
// in float64; then the butterflies of block_reduce.cuh; one rounding to float32 at the end. Reads K M (8 + 4 + 8)
// bytes at most, from L2 but for the first task; K M additions.
#pragma once

#include "block_reduce.cuh"

namespace cotbal {

constexpr int kTaskSumThreads = 512;

__global__ void __launch_bounds__(kTaskSumThreads)
    task_sums_kernel(const float* loss, const int64_t* hit, const int64_t* tasks, int64_t positions, float* loss_sums,
                     int64_t* hit_sums) {
    const int64_t task = blockIdx.x;
    double sum = 0;
    long long hits = 0;
    for (int64_t position = threadIdx.x; position < positions; position += kTaskSumThreads) {
        if (tasks[position] != task) continue;
        sum += static_cast<double>(loss[position]);
        hits += hit[position];
    }
    sum = block_reduce(sum, Add(), 0.0);
    hits = block_reduce(hits, Add(), 0LL);
    if (threadIdx.x != 0) return;
    loss_sums[task] = static_cast<float>(sum);
    hit_sums[task] = hits;
}

}  // namespace cotbal
