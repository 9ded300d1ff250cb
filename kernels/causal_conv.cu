// causal_conv: u_t = silu(c_t), c_t = sum_j w_j x_{t - taps + 1 + j} per channel, over the tokens of t's sequence.
// backward: d_c = d_u sigma(c) (1 + c (1 - sigma(c))), d_x_t = sum_j w_j d_c_{t + taps - 1 - j}; c is computed again.
//
// x is a column of qkvz, which lies grouped by key head: see column_of. u, d_u [T, C], qkvz, d_qkvz [T, W] bf16; weight f32.
// grid (ceil(C / 1024), ceil(R / 32)), block 128: a thread has 8 channels and walks 32 tokens, with the tokens before
// (backward: the gradients of the tokens before that are not complete yet) in registers. R the capacity in tokens. No shared
// memory. Rows are loaded four at a time, before the first of them is worked on: enough bytes under way to fill the memory's
// pipe.
// Numerics: f32, sums in the order of the taps, rounded once: deterministic.
// Preconditions (the launcher checks): dk and dv multiples of 8, taps 2 to 8.
// Cost: 4 B per element forward (and 1/10 more at the borders of 32 tokens), 6 B backward; memory bound.
// Reference: src/backend/cpu/delta_inputs.rs.
#include "rt/bits.cuh"
#include "rt/vector.cuh"

#include "causal_conv.h"

namespace {

// Column of qkvz that channel `channel` reads; the 8 channels from a multiple of 8 on lie side by side.
DEVICE unsigned column_of(const CausalConvParams& p, unsigned channel) {
    const unsigned dk = p.key_head_dim, key_dim = p.num_key_heads * dk;
    const unsigned values = p.num_value_heads / p.num_key_heads * p.value_head_dim, group = 2 * (dk + values);
    if (channel < key_dim) return channel / dk * group + channel % dk;
    if (channel < 2 * key_dim) return (channel - key_dim) / dk * group + dk + (channel - key_dim) % dk;
    const unsigned v = channel - 2 * key_dim;
    return v / values * group + 2 * dk + v % values;
}

// What a thread works on: 8 channels, their taps (right-aligned in kTaps: the last is the current token's) and the columns.
template <unsigned kTaps>
struct Channels {
    unsigned first, column;
    size_t width, qkvz_width;
    float weight[kTaps][kVector];

    METHOD Channels(const CausalConvParams& p, unsigned channel) : first(channel), column(column_of(p, channel)) {
        const unsigned values = p.num_value_heads * p.value_head_dim;
        width = 2 * p.num_key_heads * p.key_head_dim + values;
        qkvz_width = width + values;
        UNROLL for (unsigned tap = 0; tap < kTaps; ++tap) {
            UNROLL for (unsigned i = 0; i < kVector; ++i) {
                const unsigned missing = kTaps - p.taps;
                weight[tap][i] = tap < missing ? 0.0f : p.weight[static_cast<size_t>(first + i) * p.taps + tap - missing];
            }
        }
    }
};

// The tokens before the next one, oldest first; zero where they are not of its sequence.
template <unsigned kTaps>
struct Window {
    float x[kTaps - 1][kVector];

    // Those before `row`.
    METHOD Window(const CausalConvParams& p, const Channels<kTaps>& channels, unsigned row, unsigned start) {
        UNROLL for (unsigned back = 1; back < kTaps; ++back) {
            float(&token)[kVector] = x[kTaps - 1 - back];
            if (row >= start + back) {
                load8(token, p.qkvz + (row - back) * channels.qkvz_width + channels.column);
            } else {
                UNROLL for (unsigned i = 0; i < kVector; ++i) token[i] = 0.0f;
            }
        }
    }

    // c at the next token, whose values are `current`.
    METHOD void convolve(float (&c)[kVector], const float (&current)[kVector],
                                             const Channels<kTaps>& channels, bool starts) {
        UNROLL for (unsigned i = 0; i < kVector; ++i) {
            float sum = 0.0f;
            UNROLL for (unsigned tap = 0; tap + 1 < kTaps; ++tap) {
                if (starts) x[tap][i] = 0.0f;
                sum += channels.weight[tap][i] * x[tap][i];
            }
            c[i] = sum + channels.weight[kTaps - 1][i] * current[i];
            UNROLL for (unsigned tap = 0; tap + 2 < kTaps; ++tap) x[tap][i] = x[tap + 1][i];
            x[kTaps - 2][i] = current[i];
        }
    }
};

// Sums of d_x of this token and of those before it, which later tokens still add to; d_x[b] belongs to the token b before.
template <unsigned kTaps>
struct Pending {
    float d_x[kTaps][kVector] = {};

    METHOD void advance() {
        UNROLL for (unsigned back = kTaps - 1; back > 0; --back) {
            UNROLL for (unsigned i = 0; i < kVector; ++i) d_x[back][i] = d_x[back - 1][i];
        }
        UNROLL for (unsigned i = 0; i < kVector; ++i) d_x[0][i] = 0.0f;
    }
    // What d_c gives to the tokens of its sequence, `reach` of which are before it.
    METHOD void add(const float (&d_c)[kVector], const Channels<kTaps>& channels, unsigned reach) {
        UNROLL for (unsigned back = 0; back < kTaps; ++back) {
            UNROLL for (unsigned i = 0; i < kVector; ++i) {
                if (back <= reach) d_x[back][i] += channels.weight[kTaps - 1 - back][i] * d_c[i];
            }
        }
    }
};

// Rows loaded together: with 8 taps there are no registers left for more than one.
template <unsigned kTaps>
constexpr unsigned kBatchRows = kTaps > 4 ? 1 : 4;

// kBatch rows of a thread's 8 columns. Rows from `last` on are not read.
template <unsigned kBatch>
struct Batch {
    Packed8 rows[kBatch];

    METHOD Batch(const bf16* column, size_t width, unsigned first, unsigned last) {
        UNROLL for (unsigned i = 0; i < kBatch; ++i) {
            if (first + i < last) rows[i] = *reinterpret_cast<const Packed8*>(column + (first + i) * width);
        }
    }
    METHOD void get(float (&out)[kVector], unsigned row) const {
        UNROLL for (unsigned i = 0; i < kVector; ++i) out[i] = to_f32(rows[row].value[i]);
    }
};

// Fast intrinsics: the result is rounded to bf16. 0 where e^-x overflows.
DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// False where the thread has no channels or the block no tokens.
DEVICE bool find_place(const CausalConvParams& p, unsigned& channel, unsigned& first) {
    channel = (blockIdx.x * CAUSAL_CONV_THREADS + threadIdx.x) * kVector;
    first = blockIdx.y * CAUSAL_CONV_TOKENS;
    const unsigned channels = 2 * p.num_key_heads * p.key_head_dim + p.num_value_heads * p.value_head_dim;
    return channel < channels && first < p.step->num_tokens;
}

template <unsigned kTaps>
DEVICE void forward(const CausalConvParams& p) {
    unsigned channel, first;
    if (!find_place(p, channel, first)) return;
    const Channels<kTaps> channels(p, channel);
    const unsigned num_tokens = p.step->num_tokens, end = first + CAUSAL_CONV_TOKENS;
    const unsigned last = end < num_tokens ? end : num_tokens;
    Window<kTaps> window(p, channels, first, p.step->sequence_start[first]);
    constexpr unsigned kBatch = kBatchRows<kTaps>;
    for (unsigned top = first; top < last; top += kBatch) {
        const Batch<kBatch> batch(p.qkvz + channels.column, channels.qkvz_width, top, last);
        UNROLL for (unsigned i = 0; i < kBatch; ++i) {
            const unsigned row = top + i;
            if (row >= last) break;
            float current[kVector], c[kVector];
            batch.get(current, i);
            window.convolve(c, current, channels, p.step->sequence_start[row] == row);
            UNROLL for (unsigned k = 0; k < kVector; ++k) c[k] *= sigmoid(c[k]);
            store8(p.u + row * channels.width + channels.first, c);
        }
    }
}

template <unsigned kTaps>
DEVICE void backward(const CausalConvParams& p) {
    unsigned channel, first;
    if (!find_place(p, channel, first)) return;
    const Channels<kTaps> channels(p, channel);
    const unsigned num_tokens = p.step->num_tokens, end = first + CAUSAL_CONV_TOKENS;
    const unsigned last = end < num_tokens ? end : num_tokens;
    Window<kTaps> window(p, channels, first, p.step->sequence_start[first]);
    Pending<kTaps> pending;
    const unsigned stop = last + kTaps - 1, stop_reading = stop < num_tokens ? stop : num_tokens;
    constexpr unsigned kBatch = kBatchRows<kTaps>;
    for (unsigned top = first; top < stop; top += kBatch) {
        const Batch<kBatch> x(p.qkvz + channels.column, channels.qkvz_width, top, stop_reading);
        const Batch<kBatch> d_u(p.d_u + channels.first, channels.width, top, stop_reading);
        UNROLL for (unsigned i = 0; i < kBatch; ++i) {
            const unsigned row = top + i;
            if (row >= stop) break;
            pending.advance();
            if (row < num_tokens) {
                const unsigned start = p.step->sequence_start[row];
                float current[kVector], c[kVector], d_c[kVector];
                x.get(current, i);
                d_u.get(d_c, i);
                window.convolve(c, current, channels, start == row);
                UNROLL for (unsigned k = 0; k < kVector; ++k) {
                    const float gate = sigmoid(c[k]);
                    d_c[k] *= gate * (1.0f + c[k] * (1.0f - gate));
                }
                pending.add(d_c, channels, row - start);
            }
            if (row >= first + kTaps - 1) {
                store8(p.d_qkvz + (row - (kTaps - 1)) * channels.qkvz_width + channels.column, pending.d_x[kTaps - 1]);
            }
        }
    }
}

}  // namespace

// For up to 4 taps, and up to 8.
KERNEL(causal_conv_forward_4, CausalConvParams, p, CAUSAL_CONV_THREADS) { forward<4>(p); }
KERNEL(causal_conv_forward_8, CausalConvParams, p, CAUSAL_CONV_THREADS) { forward<8>(p); }
KERNEL(causal_conv_backward_4, CausalConvParams, p, CAUSAL_CONV_THREADS) { backward<4>(p); }
KERNEL(causal_conv_backward_8, CausalConvParams, p, CAUSAL_CONV_THREADS) { backward<8>(p); }
