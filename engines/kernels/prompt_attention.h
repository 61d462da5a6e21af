// Attention of several tokens of a prompt at once: they share the keys and values that are taken from the paged K/V,
// and what is outer products for matrices is so here. The softmax goes along from tile to tile (FlashAttention).
#pragma once

#include <limits>

#include "attention.h"

namespace sluice {

constexpr int TILE_ROWS = 48;     // query heads times tokens, about: what they need stays in the second-level cache
constexpr int TILE_KEYS = PANEL;  // keys and values at a time

// What one thread needs: rows of numbers that are spread are WIDE_STRIDE apart, as outer_products has it.
struct TileRoom {
    alignas(64) float q[TILE_ROWS * WIDE_STRIDE], weights[TILE_ROWS * WIDE_STRIDE];
    alignas(64) float keys[TILE_KEYS * WIDE_STRIDE], key_panel[MAX_HEAD_DIM * TILE_KEYS];
    alignas(64) float values[MAX_HEAD_DIM * TILE_KEYS];     // [dim / PANEL, TILE_KEYS, PANEL]
    alignas(64) float scores[TILE_ROWS * TILE_KEYS];        // [rows, TILE_KEYS]
    alignas(64) float sums[MAX_HEAD_DIM * TILE_ROWS];       // [dim / PANEL, TILE_ROWS, PANEL]
    float largest[TILE_ROWS], totals[TILE_ROWS];
};

#if defined(__AVX512F__)
constexpr vint PLACES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
constexpr vint PLACES = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

struct NothingNext {
    void ask(int) const {}
};

// Keys and values of TILE_KEYS tokens from `begin` on, zeros from `end` on.
template <class T, class A>
void take_tile(const Cache<T>& cache, const int32_t* table, int head, int begin, int end, TileRoom& room) {
    int size = cache.block_size, dim = cache.head_dim, count = std::min(TILE_KEYS, end - begin);
    std::fill(room.keys + count * WIDE_STRIDE, room.keys + TILE_KEYS * WIDE_STRIDE, 0.0f);
    std::fill(room.values, room.values + dim * TILE_KEYS, 0.0f);
    for (int t = 0; t < count;) {
        int place = (begin + t) % size, n = std::min(size - place, count - t);
        int64_t block = table[(begin + t) / size];
        const T *keys = cache.at(block, 0, head) + place * dim, *values = cache.at(block, 1, head) + place * dim;
        widen<A>(keys, dim, n, dim, room.keys + t * WIDE_STRIDE);
        for (int i = 0; i < n; i++) {
            for (int d = 0; d < dim; d += W) {
                float* to = room.values + (d / PANEL * TILE_KEYS + t + i) * PANEL + d % PANEL;
                store(to, consecutive(values + i * dim + d));
            }
        }
        t += n;
    }
    pack_panel(room.keys, WIDE_STRIDE, dim / A::NUMBERS, room.key_panel);
}

// One row's scores for a tile to weights, of which the first `count` are its own; what it has summed up before is
// brought to the new largest score.
inline void weigh(TileRoom& room, int row, int count, float scale, int dim) {
    const float* scores = room.scores + row * TILE_KEYS;
    float* weights = room.weights + row * WIDE_STRIDE;
    vfloat all[TILE_KEYS / W], most_of = splat(room.largest[row]);
    for (int i = 0; i < TILE_KEYS / W; i++) {
        all[i] = load(scores + i * W) * scale;
        if (count < TILE_KEYS) {
            vint places = PLACES + i * W;
            all[i] = places < count ? all[i] : splat(-std::numeric_limits<float>::infinity());
        }
        most_of = larger(most_of, all[i]);
    }
    float most = largest(most_of);
    vfloat total = {};
    for (int i = 0; i < TILE_KEYS / W; i++) {
        vfloat weight = exp_of_negative(all[i] - most);
        store(weights + i * W, weight);
        total += weight;
    }
    float before = room.largest[row];
    if (most > before) {
        float factor = exp_of_negative(splat(before - most))[0];
        room.largest[row] = most;
        room.totals[row] *= factor;
        for (int d = 0; d < dim; d += W) {
            float* sums = room.sums + (d / PANEL * TILE_ROWS + row) * PANEL + d % PANEL;
            store(sums, load(sums) * factor);
        }
    }
    room.totals[row] += sum(total);
}

// `num_tokens` tokens from `position` on, their `group` query heads that share K/V head `head`: q and out of a token
// [group, dim], tokens apart by the strides.
template <class T, class A>
void attend_tile(const Cache<T>& cache, const int32_t* table, int head, int64_t position, int num_tokens, int group,
                 const T* q, int64_t q_stride, float scale, T* out, int64_t out_stride, TileRoom& room) {
    int dim = cache.head_dim, rows = num_tokens * group, context = int(position) + num_tokens;
    for (int t = 0; t < num_tokens; t++) {
        widen<A>(q + t * q_stride, dim, group, dim, room.q + t * group * WIDE_STRIDE);
    }
    std::fill(room.largest, room.largest + rows, -std::numeric_limits<float>::infinity());
    std::fill(room.totals, room.totals + rows, 0.0f);
    std::fill(room.sums, room.sums + dim * TILE_ROWS, 0.0f);
    for (int begin = 0; begin < context; begin += TILE_KEYS) {
        take_tile<T, A>(cache, table, head, begin, context, room);
        for (int n = 0; n < rows; n += STRIP) {
            outer_products_of<A, STRIP>(std::min(STRIP, rows - n), false, room.q + n * WIDE_STRIDE, room.key_panel,
                                        dim / A::NUMBERS, room.scores + n * TILE_KEYS, false, NothingNext{});
        }
        int first = std::max(0, begin - int(position)) * group;  // of the rows before it none sees the tile
        for (int row = first; row < rows; row++) {
            weigh(room, row, int(position) + row / group + 1 - begin, scale, dim);
        }
        for (int n = first; n < rows; n += STRIP) {
            for (int c = 0; c < dim / PANEL; c++) {
                outer_products_of<Floats<float>, STRIP>(
                    std::min(STRIP, rows - n), false, room.weights + n * WIDE_STRIDE,
                    room.values + c * TILE_KEYS * PANEL, TILE_KEYS, room.sums + (c * TILE_ROWS + n) * PANEL, true,
                    NothingNext{});
            }
        }
    }
    for (int row = 0; row < rows; row++) {
        T* to = out + row / group * out_stride + row % group * dim;
        for (int d = 0; d < dim; d += W) {
            const float* sums = room.sums + (d / PANEL * TILE_ROWS + row) * PANEL + d % PANEL;
            put_consecutive(to + d, load(sums) * (1.0f / room.totals[row]));
        }
    }
}

}  // namespace sluice
