// Kernel E: labels and task ids to the rows that are computed, in order, with counts per task and validation.
//
// The place of a row is a running count, so one block walks over the positions, 4096 at a time: a ballot per warp and
// 1024 of them, whose counts every warp adds up for itself behind one barrier. Integers alone: exact in any order.
// Reads 16 M bytes and the weights, writes 16 M + 8 N; bound by latency.
#pragma once

#include <cmath>

#include "block_reduce.cuh"

namespace cotbal {

constexpr int kCompactThreads = 1024;
constexpr int kCompactTurns = 4;  // of 1024 positions; their counts, 1024 at most, share one word of 64 bits
constexpr int kCountBits = 16;

// What a loss is asked of, as in prepare_targets of cotbal_kernels/interface.py.
struct Supervision {
    const int64_t* labels;    // [M]
    const int64_t* task_ids;  // [M]
    const float* weights;     // [K]
    int64_t positions;        // M
    int64_t num_tasks;        // K
    int64_t vocab;
    int64_t ignore_index;
    int skip_zero;           // tasks of weight 0 are not computed
};

// What it is computed of, as Targets there.
struct Targets {
    int64_t* targets;   // [M], -1 where a position is not computed
    int64_t* tasks;     // [M], in range
    int64_t* tokens;    // [K]
    float* poison;      // 0, or NaN
    int64_t* rows;      // [capacity]
    int64_t* num_rows;  // [1]
    int64_t capacity;
};

__device__ inline int64_t clamped(int64_t value, int64_t limit) {
    return value < 0 ? 0 : value < limit ? value : limit - 1;
}

// Adds one for each lane with `counts`, an atomic per task that the warp has. Neighbours are mostly of one task.
__device__ inline void count_tasks(int64_t* tokens, bool counts, int64_t task) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (unsigned left = __ballot_sync(kWholeWarp, counts); left != 0;) {
        const int leader = kWarp - 1 - __clz(static_cast<int>(left));
        const int64_t common = __shfl_sync(kWholeWarp, task, leader);
        const unsigned same = __ballot_sync(kWholeWarp, counts && task == common);
        if (lane == leader) {
            atomicAdd(reinterpret_cast<unsigned long long*>(tokens + common),
                      static_cast<unsigned long long>(__popc(same)));
        }
        left &= ~same;
    }
}

__global__ void __launch_bounds__(kCompactThreads, 1) compact_kernel(Supervision in, Targets out) {
    __shared__ unsigned long long of_warps[2][kMaxWarps];  // in turns: one barrier is enough
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    int wrong = 0;
    for (int64_t task = threadIdx.x; task < in.num_tasks; task += kCompactThreads) {
        out.tokens[task] = 0;
        if (!(in.weights[task] >= 0 && in.weights[task] < INFINITY)) wrong = 1;
    }
    __syncthreads();  // no count before the zeros
    int64_t found = 0;
    int turn = 0;
    for (int64_t start = 0; start < in.positions; start += kCompactThreads * kCompactTurns) {
        int64_t labels[kCompactTurns], task_ids[kCompactTurns];
#pragma unroll
        for (int i = 0; i < kCompactTurns; ++i) {  // all in flight before the first vote
            const int64_t at = start + i * kCompactThreads + threadIdx.x;
            labels[i] = at < in.positions ? in.labels[at] : in.ignore_index;
            task_ids[i] = at < in.positions ? in.task_ids[at] : 0;
        }
        bool wanted[kCompactTurns];
#pragma unroll
        for (int i = 0; i < kCompactTurns; ++i) {
            const int64_t task = clamped(task_ids[i], in.num_tasks);
            wanted[i] = labels[i] != in.ignore_index && !(in.skip_zero && in.weights[task] == 0);
        }
        unsigned computed[kCompactTurns];
        unsigned long long counts = 0;
#pragma unroll
        for (int i = 0; i < kCompactTurns; ++i) {
            const int64_t at = start + i * kCompactThreads + threadIdx.x;
            const int64_t label = clamped(labels[i], in.vocab), task = clamped(task_ids[i], in.num_tasks);
            const bool supervised = labels[i] != in.ignore_index;
            if (supervised && (label != labels[i] || task != task_ids[i])) wrong = 1;
            if (at < in.positions) {
                out.targets[at] = wanted[i] ? label : -1;
                out.tasks[at] = task;
            }
            count_tasks(out.tokens, supervised, task);
            computed[i] = __ballot_sync(kWholeWarp, wanted[i]);
            counts |= static_cast<unsigned long long>(__popc(computed[i])) << (i * kCountBits);
        }
        if (lane == 0) of_warps[turn][warp] = counts;
        __syncthreads();
        unsigned long long up_to = of_warps[turn][lane];  // here a lane stands for a warp
#pragma unroll
        for (int distance = 1; distance < kWarp; distance *= 2) {
            const unsigned long long before = __shfl_up_sync(kWholeWarp, up_to, distance);
            if (lane >= distance) up_to += before;
        }
        const unsigned long long of_block = __shfl_sync(kWholeWarp, up_to, kWarp - 1);
        const unsigned long long before_warp = __shfl_sync(kWholeWarp, up_to, warp) - counts;
#pragma unroll
        for (int i = 0; i < kCompactTurns; ++i) {
            const auto counted = [i](unsigned long long word) {
                return static_cast<int64_t>(word >> (i * kCountBits) & ((1 << kCountBits) - 1));
            };
            const int64_t place = found + counted(before_warp) + __popc(computed[i] & ((1u << lane) - 1));
            if ((computed[i] >> lane & 1) != 0 && place < out.capacity) {
                out.rows[place] = start + i * kCompactThreads + threadIdx.x;
            }
            found += counted(of_block);
        }
        turn ^= 1;
    }
    for (int64_t at = found + threadIdx.x; at < out.capacity; at += kCompactThreads) out.rows[at] = in.positions;
    wrong = block_reduce(wrong, Add(), 0);
    if (threadIdx.x != 0) return;
    *out.num_rows = found;
    *out.poison = wrong != 0 || found > out.capacity ? NAN : 0.0f;
}

}  // namespace cotbal
