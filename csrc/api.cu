// The C API: plain functions over device pointers, no torch headers, so that one library serves every torch.
//
// Every function enqueues on `stream` of the current device, never synchronises, allocates nothing (CUDA graphs may
// capture it) and returns a cudaError_t. Sizes and strides are in elements. Null pointers are allowed where said.
// cotbal_kernels/cuda_kernels/library.py declares the same signatures and checks the arguments.
#include <climits>
#include <initializer_list>
#include <type_traits>

#include "chunk_gradient.cuh"
#include "chunk_rows.cuh"
#include "compact.cuh"
#include "scale_gradient.cuh"
#include "task_scales.cuh"
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

// Every pointer and size is a multiple of what one access moves.
bool whole_accesses(int bytes, std::initializer_list<const void*> pointers, std::initializer_list<int64_t> sizes) {
    for (const void* pointer : pointers) {
        if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) != 0) return false;
    }
    for (const int64_t size : sizes) {
        if (size % bytes != 0) return false;
    }
    return true;
}

template <typename Out>
cudaError_t scatter_to(const float* source, const float* factor, const Positions& positions, int64_t chunk_rows,
                       int64_t width, void* out, cudaStream_t stream) {
    constexpr int kPer = 4;
    const bool whole = width % kPer == 0 && whole_accesses(kPer * sizeof(float), {source}, {}) &&
                       whole_accesses(kPer * sizeof(Out), {out}, {});
    return launch(whole ? scatter_rows_kernel<Out, kPer> : scatter_rows_kernel<Out, 1>, chunk_rows, kRowThreads, stream,
                  source, factor, positions, width, static_cast<Out*>(out));
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

// Kernel E. `labels` and `task_ids` [M], `weights` [K] to `targets`, `tasks` [M], `tokens` [K], `poison` [1],
// `rows` [capacity] and `num_rows` [1].
int cotbal_compact(const int64_t* labels, const int64_t* task_ids, const float* weights, int64_t positions,
                   int64_t num_tasks, int64_t vocab, int64_t ignore_index, int skip_zero, int64_t* targets,
                   int64_t* tasks, int64_t* tokens, float* poison, int64_t* rows, int64_t* num_rows, int64_t capacity,
                   cudaStream_t stream) {
    return launch(compact_kernel, 1, kCompactThreads, stream,
                  Supervision{labels, task_ids, weights, positions, num_tasks, vocab, ignore_index, skip_zero},
                  Targets{targets, tasks, tokens, poison, rows, num_rows, capacity});
}

// Kernel F. `normalizer` null: that of `tokens`; else [1], or [K] where `per_task`. `scale` and `denominator` [K].
int cotbal_task_scales(const float* weights, const int64_t* tokens, const float* poison, const float* normalizer,
                       int per_task, int64_t num_tasks, float* scale, float* denominator, cudaStream_t stream) {
    return launch(task_scales_kernel, 1, kTaskScaleThreads, stream, weights, poison,
                  Normalizer{normalizer, tokens, per_task}, num_tasks, scale, denominator);
}

// Kernel G. `source` has positions as rows, `stride` bytes apart, `out` the rows of the chunk, `row_bytes` each, without
// gaps. Values of two bytes or more.
int cotbal_gather_rows(const void* source, int64_t stride, const int64_t* rows, const int64_t* num_rows, int64_t start,
                       int64_t chunk_rows, int64_t row_bytes, void* out, cudaStream_t stream) {
    const Positions positions{rows, num_rows, nullptr, start};
    const auto by = [&](auto unit) {
        using Unit = decltype(unit);
        return launch(gather_rows_kernel<Unit>, chunk_rows, kRowThreads, stream, static_cast<const Unit*>(source),
                      stride / static_cast<int64_t>(sizeof(Unit)), positions,
                      row_bytes / static_cast<int64_t>(sizeof(Unit)), static_cast<Unit*>(out));
    };
    using Whole = Pack<uint32_t, 4>;
    return whole_accesses(sizeof(Whole), {source, out}, {stride, row_bytes}) ? by(Whole()) : by(uint16_t());
}

// Kernel H. `source` is [chunk_rows, width] float32, `out` [M, width]; `factor` is one float32 or null.
int cotbal_scatter_rows(const float* source, const float* factor, const int64_t* rows, const int64_t* num_rows,
                        int64_t start, int64_t chunk_rows, int64_t width, void* out, int out_dtype,
                        cudaStream_t stream) {
    const Positions positions{rows, num_rows, nullptr, start};
    if (out_dtype == kFloat32) return scatter_to<float>(source, factor, positions, chunk_rows, width, out, stream);
    if (out_dtype == kBFloat16) return scatter_to<bf16>(source, factor, positions, chunk_rows, width, out, stream);
    if (out_dtype == kFloat16) return scatter_to<fp16>(source, factor, positions, chunk_rows, width, out, stream);
    return cudaErrorInvalidValue;
}

// What the library was compiled from (cotbal_kernels/cuda_kernels/build.py), so that a stale one is noticed.
#ifndef COTBAL_SOURCE
#define COTBAL_SOURCE "unknown"
#endif
const char* cotbal_source() { return COTBAL_SOURCE; }

const char* cotbal_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"
