// Attention of one query token over its context in the paged K/V, for the query heads that share a K/V head.
#pragma once

#include <algorithm>
#include <limits>

#include "vec.h"

namespace sluice {

// One layer's K/V, laid out as kv_cache.Layout.GATHER: [num_blocks, 2, num_kv_heads, block_size, head_dim].
template <class T> struct Cache {
    T* data;
    int num_kv_heads, block_size, head_dim;

    // Where the keys (kind 0) or values (1) of a head begin in a block.
    T* at(int64_t block, int kind, int head) const {
        return data + ((block * 2 + kind) * num_kv_heads + head) * block_size * head_dim;
    }
};

constexpr int MAX_HEAD_DIM = 256;

// scores[g][t] = q[g] . k[t] for the `count` tokens of a block.
template <class T, int G>
inline void dot_products(const float* q, const T* keys, int count, int dim, float* scores, int64_t stride) {
    for (int t = 0; t < count; t++) {
        vfloat sums[G] = {};
        for (int d = 0; d < dim; d += 2 * W) {
            vfloat first = Pair<T>::first(keys + t * dim + d), second = Pair<T>::second(keys + t * dim + d);
            for (int g = 0; g < G; g++) {
                sums[g] += first * load(q + g * dim + d) + second * load(q + g * dim + d + W);
            }
        }
        for (int g = 0; g < G; g++) scores[g * stride + t] = sum(sums[g]);
    }
}

// out[g] += sum over t of scores[g][t] v[t], in the order of Pair<T>.
template <class T, int G>
inline void weighted_sum(const float* scores, int64_t stride, const T* values, int count, int dim, float* out) {
    for (int d = 0; d < dim; d += 2 * W) {
        vfloat first[G], second[G];
        for (int g = 0; g < G; g++) first[g] = load(out + g * dim + d), second[g] = load(out + g * dim + d + W);
        for (int t = 0; t < count; t++) {
            vfloat a = Pair<T>::first(values + t * dim + d), b = Pair<T>::second(values + t * dim + d);
            for (int g = 0; g < G; g++) {
                vfloat weight = splat(scores[g * stride + t]);
                first[g] += weight * a;
                second[g] += weight * b;
            }
        }
        for (int g = 0; g < G; g++) store(out + g * dim + d, first[g]), store(out + g * dim + d + W, second[g]);
    }
}

// scores to weights that sum to 1; those past `count` are room for whole vectors.
inline void softmax(float* scores, int count) {
    float most = *std::max_element(scores, scores + count);
    for (int t = count; t % W; t++) scores[t] = -std::numeric_limits<float>::infinity();
    vfloat total = {};
    for (int t = 0; t < count; t += W) {
        vfloat weights = exp_of_negative(load(scores + t) - splat(most));
        store(scores + t, weights);
        total += weights;
    }
    vfloat share = splat(1.0f / sum(total));
    for (int t = 0; t < count; t += W) store(scores + t, load(scores + t) * share);
}

// G heads at once: q [G, dim] scaled and in the order of Pair<T>, out [G, dim] in that order; scores has room for
// G * stride, stride a multiple of W and no less than the context.
template <class T, int G>
void attend(const Cache<T>& cache, const int32_t* table, int head, int context, const float* q, float* scores,
            int64_t stride, float* out) {
    int size = cache.block_size, dim = cache.head_dim;
    for (int t = 0; t < context; t += size) {
        const T* keys = cache.at(table[t / size], 0, head);
        dot_products<T, G>(q, keys, std::min(size, context - t), dim, scores + t, stride);
    }
    for (int g = 0; g < G; g++) softmax(scores + g * stride, context);
    std::fill(out, out + G * dim, 0.0f);
    for (int t = 0; t < context; t += size) {
        const T* values = cache.at(table[t / size], 1, head);
        weighted_sum<T, G>(scores + t, stride, values, std::min(size, context - t), dim, out);
    }
}

}  // namespace sluice
