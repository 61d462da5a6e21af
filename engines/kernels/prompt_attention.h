// Attention of several tokens of a prompt at once: they share the keys and values that are taken from the paged K/V,
// and what is outer products for matrices is so here. The softmax goes along from tile to tile (FlashAttention).
#pragma once

#include <limits>

#include "attention.h"

namespace sluice {

constexpr int TILE_ROWS = 96;         // query heads times tokens, about: what they need stays in the second-level cache
constexpr int TILE_KEYS = 4 * PANEL;  // keys and values at a time

// What one thread needs: rows of numbers that are spread are WIDE_STRIDE apart, as outer_products has it.
struct TileRoom {
    alignas(64) float q[TILE_ROWS * WIDE_STRIDE], weights[TILE_ROWS * WIDE_STRIDE];
    alignas(64) float keys[PANEL * WIDE_STRIDE];
    alignas(64) float key_panels[MAX_HEAD_DIM * TILE_KEYS];  // [panels, words, PANEL]
    alignas(64) float values[MAX_HEAD_DIM * TILE_KEYS];      // [dim / PANEL, words, PANEL]
    alignas(64) float scores[TILE_ROWS * TILE_KEYS];         // [panels, TILE_ROWS, PANEL]
    alignas(64) float sums[MAX_HEAD_DIM * TILE_ROWS];        // [dim / PANEL, TILE_ROWS, PANEL]
    float largest[TILE_ROWS], totals[TILE_ROWS];

    float* scores_of(int row, int key) { return scores + (key / PANEL * TILE_ROWS + row) * PANEL + key % PANEL; }
    float* sums_of(int row, int d) { return sums + (d / PANEL * TILE_ROWS + row) * PANEL + d % PANEL; }
};

#if defined(__AVX512F__)
constexpr vint PLACES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
constexpr vint PLACES = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

// Keys and values of a sequence's tokens from `begin` on: `count` of them, up to a whole panel zeros.
template <class T, class A>
void take_tile(const Cache<T>& cache, const int32_t* table, int head, int begin, int count, TileRoom& room) {
    static const T zeros[MAX_HEAD_DIM] = {};
    int size = cache.block_size, dim = cache.head_dim;
    auto row_of = [&](int token, int kind) -> const T* {
        if (token >= count) return zeros;
        token += begin;
        return cache.at(table[token / size], kind, head) + token % size * dim;
    };
    for (int first = 0; first < count; first += PANEL) {
        for (int t = 0; t < PANEL; t++) widen<A>(row_of(first + t, 0), 0, 1, dim, room.keys + t * WIDE_STRIDE);
        for (int t = 0; t < PANEL; t += W) {
            float* half = room.key_panels + first * dim / A::NUMBERS + t;
            pack_half(room.keys + t * WIDE_STRIDE, WIDE_STRIDE, dim / A::NUMBERS, half);
        }
        for (int t = first; t < first + PANEL; t += A::NUMBERS) {
            const T* rows[] = {row_of(t, 1), row_of(t + 1, 1)};
            for (int d = 0; d < dim; d += PANEL) {
                A::put_in_words(rows, d, room.values + (d / PANEL * TILE_KEYS + t) / A::NUMBERS * PANEL);
            }
        }
    }
}

// One row's scores for a tile to weights, of which the first `count` are its own, in `num_panels` panels; what it has
// summed up before is brought to the new largest score.
template <class A> void weigh(TileRoom& room, int row, int count, int num_panels, float scale, int dim) {
    float before = room.largest[row];
    vfloat most_of = splat(before);
    for (int i = 0; i < num_panels * PANEL; i += W) {
        vfloat scores = load(room.scores_of(row, i)) * scale;
        if (count < i + W) {
            vint places = PLACES + i;
            scores = places < count ? scores : splat(-std::numeric_limits<float>::infinity());
        }
        store(room.scores_of(row, i), scores);
        most_of = larger(most_of, scores);
    }
    float most = largest(most_of);
    vfloat total = {};
    for (int i = 0; i < num_panels * PANEL; i += W) {
        vfloat weights = exp_of_negative(load(room.scores_of(row, i)) - most);
        A::put(room.weights + row * WIDE_STRIDE, i, weights);
        total += weights;
    }
    if (most > before) {
        float factor = exp_of_negative(splat(before - most))[0];
        room.largest[row] = most;
        room.totals[row] *= factor;
        for (int d = 0; d < dim; d += W) store(room.sums_of(row, d), load(room.sums_of(row, d)) * factor);
    }
    room.totals[row] += sum(total);
}

// out[n][m] of rows first .. rows by a panel, as outer_products has it.
template <class A>
void by_panel(const float* spread, int first, int rows, const float* panel, int size, float* out, bool goes_on) {
    for (int n = first; n < rows; n += STRIP) {
        outer_products_of<A, STRIP>(std::min(STRIP, rows - n), false, spread + n * WIDE_STRIDE, panel, nullptr, size,
                                    out + n * PANEL, goes_on, NothingBeside{});
    }
}

// `num_tokens` tokens from `position` on, their `group` query heads that share K/V head `head`: q and out of a token
// [group, dim], tokens apart by the strides.
template <class T, class A>
void attend_tile(const Cache<T>& cache, const int32_t* table, int head, int position, int num_tokens, int group,
                 const T* q, int64_t q_stride, float scale, T* out, int64_t out_stride, TileRoom& room) {
    int dim = cache.head_dim, words = dim / A::NUMBERS, rows = num_tokens * group, context = position + num_tokens;
    for (int t = 0; t < num_tokens; t++) {
        widen<A>(q + t * q_stride, dim, group, dim, room.q + t * group * WIDE_STRIDE);
    }
    std::fill(room.largest, room.largest + rows, -std::numeric_limits<float>::infinity());
    std::fill(room.totals, room.totals + rows, 0.0f);
    std::fill(room.sums, room.sums + dim * TILE_ROWS, 0.0f);
    for (int begin = 0; begin < context; begin += TILE_KEYS) {
        int count = std::min(TILE_KEYS, context - begin), num_panels = (count + PANEL - 1) / PANEL;
        int first = std::max(0, begin - position) * group;  // of the rows before it none sees the tile
        take_tile<T, A>(cache, table, head, begin, count, room);
        for (int p = 0; p < num_panels; p++) {
            by_panel<A>(room.q, first, rows, room.key_panels + p * words * PANEL, words, room.scores_of(0, p * PANEL),
                        false);
        }
        for (int row = first; row < rows; row++) {
            weigh<A>(room, row, position + row / group + 1 - begin, num_panels, scale, dim);
        }
        for (int d = 0; d < dim; d += PANEL) {
            by_panel<A>(room.weights, first, rows, room.values + d / PANEL * (TILE_KEYS / A::NUMBERS) * PANEL,
                        num_panels * PANEL / A::NUMBERS, room.sums_of(0, d), true);
        }
    }
    for (int row = 0; row < rows; row++) {
        T* to = out + row / group * out_stride + row % group * dim;
        float share = 1.0f / room.totals[row];
        for (int d = 0; d < dim; d += W) put_consecutive(to + d, load(room.sums_of(row, d)) * share);
    }
}

}  // namespace sluice
