// Matrices: y[m][n] = sum over k of x[m][k] w[n][k], the weights read as they lie in memory. In one way for few rows
// of x, which is as fast as memory for one, in another for many. Either leaves a part's columns in float32.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace sluice {

struct Range {
    int begin, end;
    int size() const { return end - begin; }
};

// x as both ways want it: float32, each 2 W numbers in the order of Pair<B>.
template <class T, class B> inline void take_row(const T* from, int count, float* to) {
    for (int k = 0; k < count; k += 2 * W) {
        store(to + k, first_as<T, B>(from + k));
        store(to + k + W, second_as<T, B>(from + k));
    }
}

// ---- Few rows: dot products, each row's result the same whatever others there are.

constexpr int N_TILE = 4;                // rows of the weights at a time, each of another quarter of a part: memory is
                                         // read in so many streams, each in order, 1.3 to 1.8 times as fast as in one
constexpr int AHEAD_BYTES = 512;         // of each stream
constexpr int M_TILE = W == 16 ? 6 : 3;  // rows of x: N_TILE * M_TILE sums stay in registers
constexpr int K_BLOCK = 2048;            // numbers that are summed before the sums are added: of x they stay in the
                                         // second-level cache

// sums[m][n * spacing] of N rows of weights and M of x, added to what is there if `goes_on`.
template <class B, int N, int M>
__attribute__((noinline)) void tile(const B* w, int64_t w_stride, const float* x, int64_t x_stride, int num_k, float* out, int stride,
                 int spacing, bool goes_on) {
    vfloat sums[N][M] = {};
    for (int k = 0; k < num_k; k += 2 * W) {
        vfloat rows[M];
        for (int m = 0; m < M; m++) rows[m] = load(x + m * x_stride + k);
        for (int n = 0; n < N; n++) {
            __builtin_prefetch(reinterpret_cast<const char*>(w + n * w_stride + k) + AHEAD_BYTES);
            vfloat weight = Pair<B>::first(w + n * w_stride + k);
            for (int m = 0; m < M; m++) sums[n][m] += weight * rows[m];
        }
        for (int m = 0; m < M; m++) rows[m] = load(x + m * x_stride + k + W);
        for (int n = 0; n < N; n++) {
            vfloat weight = Pair<B>::second(w + n * w_stride + k);
            for (int m = 0; m < M; m++) sums[n][m] += weight * rows[m];
        }
    }
    for (int m = 0; m < M; m++, out += stride) {
        if constexpr (N == 4) {
            vfloat4 four = four_sums(sums[0][m], sums[1][m], sums[2][m], sums[3][m]);
            for (int n = 0; n < N; n++) out[n * spacing] = four[n] + (goes_on ? out[n * spacing] : 0.0f);
        } else {
            for (int n = 0; n < N; n++) out[n] = sum(sums[n][m]) + (goes_on ? out[n] : 0.0f);
        }
    }
}

template <class B, int N, int M = M_TILE, class... Rest> inline void tile_of(int m, Rest... rest) {
    if (m == M) return tile<B, N, M>(rest...);
    if constexpr (M > 1) tile_of<B, N, M - 1>(m, rest...);
}

// All of x's rows against N of the weights', `spacing` apart, which stay in the first-level cache.
template <class B, int N>
inline void strip(const B* w, int num_k, int spacing, int width, const float* x, int num_rows, float* out, int stride,
                  bool goes_on) {
    int num_pieces = (num_rows + M_TILE - 1) / M_TILE;
    for (int piece = 0, m = 0; piece < num_pieces; piece++) {
        int rows = (num_rows - m + num_pieces - piece - 1) / (num_pieces - piece);  // as equal as can be
        tile_of<B, N>(rows, w, int64_t(spacing) * num_k, x + int64_t(m) * num_k, int64_t(num_k), width,
                      out + m * stride, stride, spacing, goes_on);
        m += rows;
    }
}

// sums [num_rows, stride] = x [num_rows, num_k] times rows `part` of w [., num_k]. num_k is a multiple of 2 W.
template <class B>
void few_rows(const B* w, int num_k, Range part, const float* x, int num_rows, float* sums, int stride) {
    int spacing = part.size() / N_TILE;
    for (int k = 0; k < num_k; k += K_BLOCK) {
        const B* from = w + int64_t(part.begin) * num_k + k;
        int width = std::min(K_BLOCK, num_k - k);
        for (int n = 0; n < spacing; n++) {
            strip<B, N_TILE>(from + int64_t(n) * num_k, num_k, spacing, width, x + k, num_rows, sums + n, stride, k > 0);
        }
        for (int n = N_TILE * spacing; n < part.size(); n++) {
            strip<B, 1>(from + int64_t(n) * num_k, num_k, 0, width, x + k, num_rows, sums + n, stride, k > 0);
        }
    }
}

// ---- Many rows: outer products, with x in panels and every weight made float32 once for all of them.

constexpr int PANEL = 2 * W;               // rows of x, beside each other: [num_k, PANEL]
constexpr int STRIP = W == 16 ? 12 : 6;    // rows of the weights: STRIP * 2 vectors of sums stay in registers
constexpr int DEPTH = 256;                 // numbers at a time: of a panel they stay in the first-level cache
constexpr int WIDE_STRIDE = DEPTH + W;     // between rows of weights made float32: not a power of two

inline int num_panels(int num_rows) { return (num_rows + PANEL - 1) / PANEL; }

// A panel of PANEL rows x [PANEL, num_k].
inline void pack_panel(const float* x, int num_k, float* panel) {
    for (int k = 0; k < num_k; k += W) {
        for (int m = 0; m < PANEL; m += W) transpose(x + int64_t(m) * num_k + k, num_k, panel + k * PANEL + m, PANEL);
    }
}

// out[n][m] of N rows of weights and M vectors of a panel's rows, added to what is there if `goes_on`.
template <int N, int M>
inline void outer_products(const float* w, const float* panel, int num_k, float* out, bool goes_on) {
    vfloat sums[N][M] = {};
    int k = 0;
    do {  // at least once, or the compiler has the sums in memory
        vfloat rows[M];
        for (int m = 0; m < M; m++) rows[m] = load(panel + k * PANEL + m * W);
        for (int n = 0; n < N; n++) {
            vfloat weight = splat(w[n * WIDE_STRIDE + k]);
            for (int m = 0; m < M; m++) sums[n][m] += weight * rows[m];
        }
    } while (++k < num_k);
    for (int n = 0; n < N; n++) {
        for (int m = 0; m < M; m++) {
            float* to = out + n * PANEL + m * W;
            store(to, goes_on ? load(to) + sums[n][m] : sums[n][m]);
        }
    }
}

template <int N, class... Rest> inline void outer_products_of(int n, bool is_half, Rest... rest) {
    if (n == N) return is_half ? outer_products<N, 1>(rest...) : outer_products<N, 2>(rest...);
    if constexpr (N > 1) outer_products_of<N - 1>(n, is_half, rest...);
}

// What few_rows does, to the rounding. panels: [num_panels, num_k, PANEL]. turned has room for
// num_panels * (part.size() up to a multiple of W) * PANEL numbers, stride is no less than that multiple.
template <class B>
void many_rows(const B* w, int num_k, Range part, const float* panels, int num_rows, float* turned, float* sums,
               int stride) {
    float wide[STRIP * WIDE_STRIDE];
    int count = num_panels(num_rows), columns = (part.size() + W - 1) / W * W;
    for (int k = 0; k < num_k; k += DEPTH) {
        int depth = std::min(DEPTH, num_k - k);
        for (int n = 0; n < part.size(); n += STRIP) {
            int height = std::min(STRIP, part.size() - n);
            const B* from = w + int64_t(part.begin + n) * num_k + k;
            for (int i = 0; i < height; i++) {
                for (int j = 0; j < depth; j += 2 * W) {
                    __builtin_prefetch(from + int64_t(i + STRIP) * num_k + j);  // the next strip
                    store(wide + i * WIDE_STRIDE + j, Pair<B>::first(from + int64_t(i) * num_k + j));
                    store(wide + i * WIDE_STRIDE + j + W, Pair<B>::second(from + int64_t(i) * num_k + j));
                }
            }
            for (int p = 0; p < count; p++) {
                bool is_half = num_rows - p * PANEL <= W;
                const float* panel = panels + (int64_t(p) * num_k + k) * PANEL;
                outer_products_of<STRIP>(height, is_half, wide, panel, depth, turned + (int64_t(p) * columns + n) * PANEL,
                                         k > 0);
            }
        }
    }
    for (int m = 0; m < num_rows; m += W) {
        const float* from = turned + int64_t(m / PANEL) * columns * PANEL + m % PANEL;
        for (int n = 0; n < columns; n += W) transpose(from + n * PANEL, PANEL, sums + int64_t(m) * stride + n, stride);
    }
}

}  // namespace sluice
