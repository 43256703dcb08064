// The C API: plain functions over device pointers, no torch headers, so that one library serves every torch.
//
// Every function enqueues on `stream` of the current device, never synchronises, allocates nothing (CUDA graphs may
// capture it) and returns a cudaError_t. Sizes and strides are in elements. Null pointers are allowed where said.
// cotbal_kernels/cuda_kernels.py declares the same signatures and checks the arguments.
#include <climits>
#include <type_traits>

#include "chunk_gradient.cuh"
#include "scale_gradient.cuh"
#include "task_sums.cuh"

namespace cotbal {
namespace {

// More threads for longer rows: a tile is 16 columns per thread, and a row should be several tiles. From 1024 threads
// on, the register file holds one block per multiprocessor, and one row per multiprocessor is what L2 may hold.
unsigned threads_per_row(int64_t vocab) {
    if (vocab <= 4096) return 128;
    if (vocab <= 65536) return 512;
    return 1024;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, unsigned threads, cudaStream_t stream,
                   Arguments... arguments) {
    if (blocks == 0) return cudaSuccess;
    if (blocks < 0 || blocks > INT_MAX) return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename In>
Logits<In> logits_of(const void* data, int64_t stride, const float* bias, int64_t vocab) {
    return {static_cast<const In*>(data), stride, bias, static_cast<int>(vocab)};
}

template <typename Out>
Gradients<Out> gradients_of(void* data, int64_t stride) {
    return {static_cast<Out*>(data), stride};
}

// Call `run` with a null pointer of the element types of logits and gradient. 16-bit logits have a gradient of their
// own type, float32 ones of any.
template <typename Run>
cudaError_t with_types(int logits, int gradient, Run run) {
    float* const wide = nullptr;
    bf16* const brain = nullptr;
    fp16* const half = nullptr;
    if (logits == kFloat32 && gradient == kFloat32) return run(wide, wide);
    if (logits == kFloat32 && gradient == kBFloat16) return run(wide, brain);
    if (logits == kFloat32 && gradient == kFloat16) return run(wide, half);
    if (logits == kBFloat16 && gradient == kBFloat16) return run(brain, brain);
    if (logits == kFloat16 && gradient == kFloat16) return run(half, half);
    return cudaErrorInvalidValue;
}

template <typename In>
cudaError_t scale_to(const void* grad, const float* factor, void* out, int out_dtype, int64_t count,
                     cudaStream_t stream) {
    const In* const from = static_cast<const In*>(grad);
    const int64_t needed = (count + kScalePerBlock<In> - 1) / kScalePerBlock<In>;
    const int64_t blocks = needed < kScaleMostBlocks ? needed : kScaleMostBlocks;
    const auto to = [&](auto* typed) {
        using Out = std::remove_pointer_t<decltype(typed)>;
        return launch(scale_gradient_kernel<In, Out>, blocks, kScaleThreads, stream, from, factor, typed, count);
    };
    if (out_dtype == kFloat32) return to(static_cast<float*>(out));
    if (out_dtype == kBFloat16) return to(static_cast<bf16*>(out));
    if (out_dtype == kFloat16) return to(static_cast<fp16*>(out));
    return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace cotbal

using namespace cotbal;

extern "C" {

// Kernel A. `out` null: losses only. `rows` and `num_rows` null: row r is position start + r. `tasks` null: `scale` is
// a value per position, else per task. `out` may be `logits` (see logit_row.cuh).
int cotbal_chunk_gradient(const void* logits, int logits_dtype, int64_t logits_stride, void* out, int out_dtype,
                          int64_t out_stride, const float* bias, int64_t chunk_rows, int64_t vocab, const int64_t* rows,
                          const int64_t* num_rows, int64_t start, const int64_t* targets, const int64_t* tasks,
                          const float* scale, float softcap, float smoothing, float z_loss, float logit_scale, float even,
                          float* loss, float* max, float* log_sum, int64_t* hit, cudaStream_t stream) {
    if (vocab < 1 || vocab > INT_MAX / 2) return cudaErrorInvalidValue;
    return with_types(logits_dtype, out_dtype, [&](auto* in_type, auto* out_type) {
        using In = std::remove_pointer_t<decltype(in_type)>;
        using Out = std::remove_pointer_t<decltype(out_type)>;
        const bool general = bias != nullptr || softcap > 0 || logit_scale != 1;
        return launch(general ? chunk_gradient_kernel<In, Out, true> : chunk_gradient_kernel<In, Out, false>,
                      chunk_rows, threads_per_row(vocab), stream, logits_of<In>(logits, logits_stride, bias, vocab),
                      gradients_of<Out>(out, out_stride), Positions{rows, num_rows, targets, start},
                      RowScale{scale, tasks}, RowResults{loss, max, log_sum, hit},
                      TokenLoss{softcap, smoothing, z_loss, logit_scale, even});
    });
}

// Kernel C: as above from known statistics, each [M]; `out` must not be null.
int cotbal_saved_gradient(const void* logits, int logits_dtype, int64_t logits_stride, void* out, int out_dtype,
                          int64_t out_stride, const float* bias, int64_t chunk_rows, int64_t vocab, const int64_t* rows,
                          const int64_t* num_rows, int64_t start, const int64_t* targets, const int64_t* tasks,
                          const float* scale, float softcap, float smoothing, float z_loss, float logit_scale, float even,
                          const float* max, const float* log_sum, cudaStream_t stream) {
    if (vocab < 1 || vocab > INT_MAX / 2 || (out == nullptr && chunk_rows > 0)) return cudaErrorInvalidValue;
    return with_types(logits_dtype, out_dtype, [&](auto* in_type, auto* out_type) {
        using In = std::remove_pointer_t<decltype(in_type)>;
        using Out = std::remove_pointer_t<decltype(out_type)>;
        const bool general = bias != nullptr || softcap > 0 || logit_scale != 1;
        return launch(general ? saved_gradient_kernel<In, Out, true> : saved_gradient_kernel<In, Out, false>,
                      chunk_rows, threads_per_row(vocab), stream, logits_of<In>(logits, logits_stride, bias, vocab),
                      gradients_of<Out>(out, out_stride), Positions{rows, num_rows, targets, start},
                      RowScale{scale, tasks}, max, log_sum, TokenLoss{softcap, smoothing, z_loss, logit_scale, even});
    });
}

// Kernel B. `loss` [M], `hit` [M], `tasks` [M] to `loss_sums` [K], `hit_sums` [K].
int cotbal_task_sums(const float* loss, const int64_t* hit, const int64_t* tasks, int64_t positions, int64_t num_tasks,
                     float* loss_sums, int64_t* hit_sums, cudaStream_t stream) {
    return launch(task_sums_kernel, num_tasks, kTaskSumThreads, stream, loss, hit, tasks, positions, loss_sums,
                  hit_sums);
}

// Kernel D. `grad` and `out` have `count` elements each and are the same or do not overlap; `factor` is one float32.
int cotbal_scale_gradient(const void* grad, int grad_dtype, const float* factor, void* out, int out_dtype,
                          int64_t count, cudaStream_t stream) {
    if (grad_dtype == kFloat32) return scale_to<float>(grad, factor, out, out_dtype, count, stream);
    if (grad_dtype == kBFloat16) return scale_to<bf16>(grad, factor, out, out_dtype, count, stream);
    if (grad_dtype == kFloat16) return scale_to<fp16>(grad, factor, out, out_dtype, count, stream);
    return cudaErrorInvalidValue;
}

// What the library was compiled from (cotbal_kernels/cuda_build.py), so that a stale one is noticed.
#ifndef COTBAL_SOURCE
#define COTBAL_SOURCE "unknown"
#endif
const char* cotbal_source() { return COTBAL_SOURCE; }

const char* cotbal_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"
