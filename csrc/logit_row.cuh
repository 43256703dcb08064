// One row of logits: how it is cut into 16-byte loads, what an element means, and how its gradient is written.
#pragma once

#include <cfloat>

#include "numeric.cuh"

namespace cotbal {

// The loss of a token, as TokenLoss in cotbal_kernels/interface.py.
struct TokenLoss {
    float softcap;    // z becomes softcap * tanh(z / softcap); 0 is none
    float smoothing;  // share of the target spread evenly over the vocabulary
    float z_loss;     // coefficient of lse^2
    float scale;      // z becomes scale * z, bias included, before the softcap
    float even;       // smoothing / size of the whole vocabulary, of which these columns may be a part
};

// C rows of V logits. The row stride counts elements, and row offsets are 64 bits wide: C * V passes 2^31.
template <typename In>
struct Logits {
    const In* data;
    int64_t stride;
    const float* bias;  // [V] or null
    int vocab;

    __device__ const In* row(int64_t index) const { return data + index * stride; }
};

template <typename Out>
struct Gradients {
    Out* data;  // null: not wanted
    int64_t stride;

    __device__ Out* row(int64_t index) const { return data + index * stride; }
};

// Which position of the batch a row of the chunk belongs to.
struct Positions {
    const int64_t* rows;      // [N] positions, M where there is none; null: row r is position start + r
    const int64_t* num_rows;  // [1]: how many of `rows` are positions
    // [M]; with statistics that are known, any that is none of the columns: the target is not among them. For the losses
    // that is -1. Without `rows`, -1 is a position that is not computed.
    const int64_t* targets;
    int64_t start;            // of the chunk in `rows`

    // -1 for a row that is none: it costs a row of zeros.
    __device__ int64_t of_row(int64_t row) const {
        const int64_t index = start + row;
        if (rows == nullptr) return targets[index] < 0 ? -1 : index;
        return index < *num_rows ? rows[index] : -1;
    }
};

// d loss / d loss of a row: scale_K[task] if there are tasks, else a value per position.
struct RowScale {
    const float* values;   // [K] or [M]
    const int64_t* tasks;  // [M] or null

    __device__ float at(int64_t position) const { return values[tasks == nullptr ? position : tasks[position]]; }
};

// A row as scalars up to the first 16-byte boundary, 16-byte loads, and scalars behind the last one. Tiles are what
// the block loads at once: every thread kLoads loads, all in flight before the first is used.
template <typename In>
struct RowTiles {
    static constexpr int kPer = kPerLoad<In>;
    static constexpr int kLoads = 16 / kPer;  // 16 elements of a thread in registers

    const In* first;  // of the 16-byte loads
    int head, loads, vocab;

    __device__ RowTiles(const In* row, int vocab_) : vocab(vocab_) {
        const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16) / static_cast<int>(sizeof(In));
        head = misaligned == 0 ? 0 : kPer - misaligned;
        if (head > vocab) head = vocab;
        loads = (vocab - head) / kPer;
        first = row + head;
    }

    __device__ int tiles() const {
        const int per_tile = static_cast<int>(blockDim.x) * kLoads;
        return (loads + per_tile - 1) / per_tile;
    }

    // Which load of the row is load `i` of this thread in tile `t`; past the end where >= loads.
    __device__ int load_index(int t, int i) const {
        return (t * kLoads + i) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    }

    __device__ int column(int load) const { return head + load * kPer; }

    __device__ Pack<In, kPer> load(int index) const {
        return reinterpret_cast<const Pack<In, kPer>*>(first)[index];
    }

    // The one scalar column of this thread, or -1: heads and tails are fewer than the threads of a warp.
    __device__ int scalar_column() const {
        const int thread = static_cast<int>(threadIdx.x);
        if (thread < head) return thread;
        const int behind = head + loads * kPer + (thread - head);
        return behind < vocab ? behind : -1;
    }
};

// What was read, to logits; `column_of(i)` is asked for the first `valid`. kGeneral: there is a bias, a scale or a
// softcap. Each is asked for once for all N, so that what does the work has no branches.
template <bool kGeneral, int N, typename ColumnOf>
__device__ void to_logits(float (&z)[N], ColumnOf column_of, int valid, const float* bias, const TokenLoss& spec) {
    if constexpr (kGeneral) {
        if (bias != nullptr) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (i < valid) z[i] += bias[column_of(i)];
            }
        }
#pragma unroll
        for (int i = 0; i < N; ++i) z[i] *= spec.scale;
        if (spec.softcap > 0) {
            const float inward = 1 / spec.softcap;
#pragma unroll
            for (int i = 0; i < N; ++i) z[i] = spec.softcap * tanh_of(z[i] * inward);
        }
    }
}

template <bool kGeneral, typename In>
__device__ float logit_of(In raw, int column, const float* bias, const TokenLoss& spec) {
    float z[1] = {widen(raw)};
    to_logits<kGeneral>(z, [&](int) { return column; }, 1, bias, spec);
    return z[0];
}

// What the gradient of a row needs to know about it.
struct RowGradient {
    float max;          // of the logits
    float inverse_sum;  // 1 / sum of exp(z - max)
    float scale;        // d total loss / d loss of the row, times the scale of the logits
    float factor;       // 1 + 2 z_loss lse
    float even;
    float right;         // 1 - smoothing
    float coefficient;   // of exp(z - max), all in one: factor / sum * scale
    float minus_offset;  // - even * scale
    int target;          // -1: none in this row

    __device__ RowGradient(float max_, float log_sum, float inverse_sum_, float scale_, int target_,
                           const TokenLoss& spec)
        : max(max_),
          inverse_sum(inverse_sum_),
          scale(scale_ * spec.scale),
          factor(1 + 2 * spec.z_loss * (max_ + log_sum)),
          even(spec.even),
          right(1 - spec.smoothing),
          coefficient(factor * inverse_sum * scale),
          minus_offset(even == 0 ? 0.0f : -even * scale),  // of an infinite scale too
          target(target_) {}

    // Logits of any column but the target's to their gradients.
    template <bool kGeneral, int N>
    __device__ void elsewhere(float (&z)[N], const TokenLoss& spec) const {
        const float inward = inward_of(spec);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float gradient = fmaf(exp_nonpositive(z[i] - max), coefficient, minus_offset);
            z[i] = kGeneral ? gradient * slope(z[i], inward) : gradient;
        }
    }

    // p - 1 is formed in float32, before the scale and before any rounding to 16 bits.
    template <bool kGeneral>
    __device__ float at_target(float z, const TokenLoss& spec) const {
        const float probability = factor * (exp_nonpositive(z - max) * inverse_sum);
        const float gradient = (probability - even - right) * scale;
        return kGeneral ? gradient * slope(z, inward_of(spec)) : gradient;
    }

   private:
    __device__ static float inward_of(const TokenLoss& spec) { return spec.softcap > 0 ? 1 / spec.softcap : 0.0f; }

    // Of the softcap: 1 where there is none, at -inf too, which times 0 would be NaN.
    __device__ static float slope(float z, float inward) {
        const float capped = fmaxf(z, -FLT_MAX) * inward;
        return fmaf(-capped, capped, 1);
    }
};

// Whether a barrier must come before the stores of tile t.
//
// `out` may be the memory that the logits are in. With elements of the same size every thread overwrites what it
// alone has read, and needs none. With float32 logits and 16-bit gradients at the front of the row, the stores of tile t
// land on the floats of tiles up to t / 2 (rounded down), which other threads may not have read yet. A barrier between
// the loads and the stores of tile b makes sure that tiles 0 ... b have been read by all, so that the stores of tiles up
// to 2 b + 1 are safe. So barriers are due at tiles 0, 2, 6, 14, ...: where t + 2 is a power of two.
__device__ inline bool barrier_before_stores(int t) { return ((t + 2) & (t + 1)) == 0; }

// Read the row once more, write its gradient. All threads of the block call this, behind a barrier if they have read
// columns of other threads. In place where `out` is the row or its first half, see above.
template <typename In, typename Out, bool kGeneral>
__device__ void write_gradient(const In* row, Out* out, int vocab, const float* bias, const RowGradient& gradient,
                               const TokenLoss& spec) {
    using Tiles = RowTiles<In>;
    constexpr int kPer = Tiles::kPer;
    const Tiles tiles(row, vocab);
    constexpr bool kOthers = sizeof(Out) != sizeof(In);  // in place, stores reach what other threads read
    const bool packed = aligned_to(out + tiles.head, static_cast<int>(sizeof(Out)) * kPer);
    const int lone = tiles.scalar_column();
    float lone_gradient = 0;
    if (lone >= 0) {
        const float z = logit_of<kGeneral>(row[lone], lone, bias, spec);
        float other[1] = {z};
        gradient.template elsewhere<kGeneral>(other, spec);
        lone_gradient = lone == gradient.target ? gradient.template at_target<kGeneral>(z, spec) : other[0];
    }
    const int num_tiles = tiles.tiles();
    for (int t = 0; t < num_tiles; ++t) {
        Pack<In, kPer> raw[Tiles::kLoads];
#pragma unroll
        for (int i = 0; i < Tiles::kLoads; ++i) {
            const int load = tiles.load_index(t, i);
            if (load < tiles.loads) raw[i] = tiles.load(load);
        }
        if (kOthers && barrier_before_stores(t)) __syncthreads();
#pragma unroll
        for (int i = 0; i < Tiles::kLoads; ++i) {
            const int load = tiles.load_index(t, i);
            if (load >= tiles.loads) break;
            const int column = tiles.column(load);
            float z[kPer];
#pragma unroll
            for (int j = 0; j < kPer; ++j) z[j] = widen(raw[i].at[j]);
            to_logits<kGeneral>(z, [&](int j) { return column + j; }, kPer, bias, spec);
            gradient.template elsewhere<kGeneral>(z, spec);
            Pack<Out, kPer> result;
#pragma unroll
            for (int j = 0; j < kPer; ++j) result.at[j] = rounded<Out>(z[j]);
            if (packed) {
                *reinterpret_cast<Pack<Out, kPer>*>(out + column) = result;
            } else {
#pragma unroll
                for (int j = 0; j < kPer; ++j) out[column + j] = result.at[j];
            }
            const int at = gradient.target - column;  // one load of the row has it
            if (static_cast<unsigned>(at) < static_cast<unsigned>(kPer)) {
                In of_target = raw[i].at[0];
#pragma unroll
                for (int j = 1; j < kPer; ++j) {
                    if (j == at) of_target = raw[i].at[j];
                }
                const float logit = logit_of<kGeneral>(of_target, gradient.target, bias, spec);
                out[gradient.target] = rounded<Out>(gradient.template at_target<kGeneral>(logit, spec));
            }
        }
    }
    // The scalars were read before any store. Where the tiles are 2, 6, 14, ... and whole, those behind them land on the
    // first tile that no barrier came after.
    if (kOthers) __syncthreads();
    if (lone >= 0) out[lone] = rounded<Out>(lone_gradient);
}

// Zeros for a row that is none, whatever its logits are (NaN times 0 would be NaN).
template <typename Out>
__device__ void write_zeros(Out* out, int vocab) {
    constexpr int kPer = kPerLoad<Out>;
    const RowTiles<Out> tiles(out, vocab);
    Pack<Out, kPer> zeros;
#pragma unroll
    for (int j = 0; j < kPer; ++j) zeros.at[j] = rounded<Out>(0.0f);
    for (int load = static_cast<int>(threadIdx.x); load < tiles.loads; load += static_cast<int>(blockDim.x)) {
        *reinterpret_cast<Pack<Out, kPer>*>(out + tiles.column(load)) = zeros;
    }
    const int lone = tiles.scalar_column();
    if (lone >= 0) out[lone] = rounded<Out>(0.0f);
}

}  // namespace cotbal
