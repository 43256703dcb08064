// Stands in for the CUDA runtime header, so that a host compiler builds csrc/ unchanged and a CPU runs the kernels.
//
// Blocks run one after another; the threads of a block are fibers of one OS thread that run until their next barrier
// or shuffle. The order in which fibers get their turn can be chosen (cotbal_cpu_schedule): a kernel that misses a
// barrier gives other results under another order. Threads that wait for a barrier that can never complete end the
// launch with an error.
//
// It says nothing about speed, memory coherence, or the last bits of device functions such as expf.
//
// With COTBAL_HOST_ONLY the kernels of this build are never run: a launch is handed to whoever has set
// cotbal_launch_elsewhere, by the name that the kernel has in nvcc's PTX, with the bytes of its arguments.
#pragma once

#ifdef COTBAL_HOST_ONLY
#include <dlfcn.h>
#endif

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#ifdef COTBAL_HOST_ONLY
#define __global__ [[gnu::used]]  // with a name to look up
#else
#define __global__ [[maybe_unused]] static
#endif
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719
};
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        default: return "unspecified launch failure";
    }
}

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

namespace cuda_on_cpu {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Barrier {
    unsigned expected = 0, arrived = 0, generation = 0;
};

// Entered once through ucontext, which is portable; then it changes places with the scheduler by jumps, which unlike
// swapcontext make no system call. It serves one thread after another.
struct Fiber {
    ucontext_t context;
    jmp_buf place;
    std::vector<char> stack;
    bool entered = false, done = false;
};

struct Warp {
    Barrier barrier;
    unsigned turn[kWarpSize] = {};
    unsigned char slots[2][kWarpSize][8];  // two, so that one barrier per shuffle is enough
};

enum Order : int { kAscending = 0, kDescending = 1, kShuffled = 2 };

inline int order = kAscending;
inline uint64_t random_state = 1;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline ucontext_t home;
inline jmp_buf scheduler;
inline unsigned current = 0;
inline bool progress = false;
inline const std::function<void()>* body = nullptr;

inline unsigned random_below(unsigned limit) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<unsigned>((random_state >> 33) % limit);
}

inline void yield() {
    if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        progress = true;
        return;
    }
    while (barrier.generation == generation) yield();
}

inline void leave(Barrier& barrier) {  // threads that have returned are not waited for
    if (--barrier.expected > 0 && barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
}

inline void run_fiber() {
    for (;;) {
        (*body)();
        fibers[current].done = progress = true;
        leave(block_barrier);
        leave(warps[current / kWarpSize].barrier);
        yield();
    }
}

inline void resume(Fiber& fiber) {
    if (_setjmp(scheduler) != 0) return;  // the fiber has yielded
    if (fiber.entered) _longjmp(fiber.place, 1);
    fiber.entered = true;
    fiber.stack.resize(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    swapcontext(&home, &fiber.context);
}

inline cudaError_t run_block(unsigned threads) {
    if (fibers.size() < threads) fibers.resize(threads);
    warps.assign((threads + kWarpSize - 1) / kWarpSize, Warp());
    block_barrier = Barrier();
    block_barrier.expected = threads;
    for (unsigned thread = 0; thread < threads; ++thread) {
        ++warps[thread / kWarpSize].barrier.expected;
        fibers[thread].done = false;
    }
    std::vector<unsigned> turns(threads);
    for (unsigned i = 0; i < threads; ++i) turns[i] = order == kDescending ? threads - 1 - i : i;
    for (unsigned running = threads; running > 0;) {
        progress = false;
        running = 0;
        if (order == kShuffled) {
            for (unsigned i = threads - 1; i > 0; --i) std::swap(turns[i], turns[random_below(i + 1)]);
        }
        for (const unsigned thread : turns) {
            if (fibers[thread].done) continue;
            current = thread;
            threadIdx = {thread, 0, 0};
            resume(fibers[thread]);
            running += !fibers[thread].done;
        }
        if (running > 0 && !progress) {
            std::fprintf(stderr, "cuda_on_cpu: %u threads wait for a barrier that others never reach\n", running);
            for (Fiber& fiber : fibers) fiber.entered = false;  // never to be continued where they are
            return cudaErrorLaunchFailure;
        }
    }
    return cudaSuccess;
}

inline unsigned lane() { return current % kWarpSize; }

template <typename T>
T shuffle(T value, unsigned from) {
    static_assert(sizeof(T) <= 8);
    Warp& warp = warps[current / kWarpSize];
    auto& slots = warp.slots[warp.turn[lane()]++ % 2];
    std::memcpy(slots[lane()], &value, sizeof(T));
    wait(warp.barrier);
    T result;
    std::memcpy(&result, slots[from], sizeof(T));
    return result;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::block_barrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
    return cuda_on_cpu::shuffle(value, cuda_on_cpu::lane() ^ static_cast<unsigned>(distance));
}

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
    return cuda_on_cpu::shuffle(value, static_cast<unsigned>(from));
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
    const unsigned lane = cuda_on_cpu::lane(), by = static_cast<unsigned>(distance);
    return cuda_on_cpu::shuffle(value, lane < by ? lane : lane - by);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
    unsigned votes = static_cast<unsigned>(vote) << cuda_on_cpu::lane();
    for (int distance = 16; distance > 0; distance /= 2) votes |= __shfl_xor_sync(~0u, votes, distance);
    return votes;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }

inline void atomicAdd(unsigned long long* address, unsigned long long value) { *address += value; }

inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

#ifdef COTBAL_HOST_ONLY

using Elsewhere = int (*)(const char* kernel, unsigned blocks, unsigned threads, const void* const* arguments,
                          const size_t* sizes, int count);
inline Elsewhere elsewhere = nullptr;

extern "C" inline __attribute__((used, visibility("default"))) void cotbal_launch_elsewhere(Elsewhere function) {
    elsewhere = function;
}

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
    Dl_info found;
    if (elsewhere == nullptr || dladdr(reinterpret_cast<void*>(kernel), &found) == 0 || found.dli_sname == nullptr) {
        return cudaErrorLaunchFailure;
    }
    const void* const addresses[] = {&arguments...};
    const size_t sizes[] = {sizeof(arguments)...};
    const int count = static_cast<int>(sizeof...(arguments));
    return static_cast<cudaError_t>(
        elsewhere(found.dli_sname, config->gridDim.x, config->blockDim.x, addresses, sizes, count));
}

#else

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
    const std::function<void()> thread = [&] { kernel(arguments...); };
    cuda_on_cpu::body = &thread;
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    for (unsigned block = 0; block < gridDim.x; ++block) {
        blockIdx = {block, 0, 0};
        const cudaError_t error = cuda_on_cpu::run_block(blockDim.x);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

#endif

// How fibers take turns: 0 ascending, 1 descending, 2 shuffled anew at every turn.
extern "C" inline __attribute__((used, visibility("default"))) void cotbal_cpu_schedule(int order, uint64_t seed) {
    cuda_on_cpu::order = order;
    cuda_on_cpu::random_state = seed;
}
