// Matrices by few rows: y[m][n] = sum over k of x[m][k] w[n][k], the weights read once as they lie in memory.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace sluice {

constexpr int N_TILE = 4;                 // rows of the weights at a time
constexpr int M_TILE = W == 16 ? 6 : 3;   // rows of x: N_TILE * M_TILE sums stay in registers
constexpr int K_BLOCK = 2048;             // numbers that are summed before the sums are added: of x they stay in the
                                          // second-level cache, and a row's result depends on no other row

struct Range {
    int begin, end;
};

// x as `linear` over weights in B wants it: float32, each 2 W numbers in the order of Pair<B>.
template <class T, class B> inline void take_row(const T* from, int count, float* to) {
    for (int k = 0; k < count; k += 2 * W) {
        store(to + k, first_as<T, B>(from + k));
        store(to + k + W, second_as<T, B>(from + k));
    }
}

template <class B, int N, int M>
inline void tile(const B* w, int64_t w_stride, const float* x, int64_t x_stride, int num_k,
                 float (*out)[M_TILE]) {
    vfloat sums[N][M] = {};
    for (int k = 0; k < num_k; k += 2 * W) {
        vfloat rows[M];
        for (int m = 0; m < M; m++) rows[m] = load(x + m * x_stride + k);
        for (int n = 0; n < N; n++) {
            __builtin_prefetch(w + (n + N) * w_stride + k);  // the next tile
            vfloat weight = Pair<B>::first(w + n * w_stride + k);
            for (int m = 0; m < M; m++) sums[n][m] += weight * rows[m];
        }
        for (int m = 0; m < M; m++) rows[m] = load(x + m * x_stride + k + W);
        for (int n = 0; n < N; n++) {
            vfloat weight = Pair<B>::second(w + n * w_stride + k);
            for (int m = 0; m < M; m++) sums[n][m] += weight * rows[m];
        }
    }
    for (int n = 0; n < N; n++) {
        for (int m = 0; m < M; m++) out[n][m] = sum(sums[n][m]);
    }
}

template <class B, int N, int M = M_TILE>
inline void tile_of(int m, const B* w, int64_t ws, const float* x, int64_t xs, int num_k, float (*out)[M_TILE]) {
    if (m == M) return tile<B, N, M>(w, ws, x, xs, num_k, out);
    if constexpr (M > 1) tile_of<B, N, M - 1>(m, w, ws, x, xs, num_k, out);
}

// All of x's rows against N of the weights', from number k on; `put` as below.
template <class B, int N, class Put>
inline void strip(const B* w, int n, int num_k, int k, const float* x, int num_rows, float* sums, Put put) {
    int width = std::min(K_BLOCK, num_k - k), num_pieces = (num_rows + M_TILE - 1) / M_TILE;
    for (int piece = 0, m = 0; piece < num_pieces; piece++) {
        float found[N][M_TILE];
        int rows = (num_rows - m + num_pieces - piece - 1) / (num_pieces - piece);  // as equal as can be
        tile_of<B, N>(rows, w + int64_t(n) * num_k + k, num_k, x + int64_t(m) * num_k + k, num_k, width, found);
        for (int i = 0; i < N; i++) {
            for (int j = 0; j < rows; j++) {
                float* sum = sums + int64_t(i) * num_rows + m + j;
                float value = k ? *sum + found[i][j] : found[i][j];
                if (k + width == num_k) {
                    put(m + j, n + i, value);
                } else {
                    *sum = value;
                }
            }
        }
        m += rows;
    }
}

// Rows `part` of w [., num_k] times x [num_rows, num_k]; `put(m, n, value)` gets each result once. `sums` has room
// for num_rows * (part.end - part.begin) numbers, if num_k is above K_BLOCK. num_k is a multiple of 2 W.
template <class B, class Put>
void linear(const B* w, int num_k, Range part, const float* x, int num_rows, float* sums, Put put) {
    for (int k = 0; k < num_k; k += K_BLOCK) {
        int n = part.begin;
        auto strips = [&](auto height) {
            constexpr int N = decltype(height)::value;
            for (; n + N <= part.end; n += N) {
                strip<B, N>(w, n, num_k, k, x, num_rows, sums + int64_t(n - part.begin) * num_rows, put);
            }
        };
        strips(std::integral_constant<int, N_TILE>{});
        strips(std::integral_constant<int, 1>{});
    }
}

}  // namespace sluice
