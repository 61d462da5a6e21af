// Attention of one query token over its context in the paged K/V.
#pragma once

#include <algorithm>
#include <limits>

#include "linear.h"

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

// What a token attends to: so many tokens of a sequence, whose blocks `table` has, in these K/V heads.
struct Context {
    const int32_t* table;
    int num_tokens;
    Range heads;

    int num_blocks(int block_size) const { return (num_tokens + block_size - 1) / block_size; }
};

constexpr int MAX_HEAD_DIM = 256;
constexpr int AHEAD_BYTES = 16 << 10, MOST_AHEAD = 8;  // blocks: too short for the processor to see what comes next

// Has memory bring `size` bytes.
inline void prefetch(const void* from, int64_t size) {
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// scores[g][t] = q[g] . k[t] for G heads and N tokens, 1 or 4: their sums stay in registers. q as A has its rows.
template <class A, int G, int N>
inline void dot_products_of(const float* q, const typename A::Weight* keys, int dim, float* scores, int64_t stride) {
    typename A::Sum sums[G][N] = {};
    int d = 0;
    do {  // at least once, or the compiler has the sums in memory
        for (int word = 0; word < 2 * W / A::NUMBERS; word += W) {
            for (int n = 0; n < N; n++) {
                auto key = A::weight(keys + n * dim + d, word);
                for (int g = 0; g < G; g++) {
                    sums[g][n] = A::add_product(sums[g][n], key, A::load(q + (g * dim + d) / A::NUMBERS + word));
                }
            }
        }
        d += 2 * W;
    } while (d < dim);
    for (int g = 0; g < G; g++) {
        if constexpr (N == 4) {
            store(scores + g * stride, four_sums(sums[g][0], sums[g][1], sums[g][2], sums[g][3]));
        } else {
            scores[g * stride] = sum(sums[g][0]);
        }
    }
}

// The same for the `count` tokens of a block. Of `next` a bit is brought with each: memory takes few requests at once.
template <class A, int G>
inline void dot_products(const float* q, const typename A::Weight* keys, int count, int dim, float* scores,
                         int64_t stride, const typename A::Weight* next) {
    constexpr int AT_ONCE = W == 8 && G == 4 ? 2 : G;  // heads: times 4 tokens, no more sums than there are registers
    for (int g = 0; g < G; g += AT_ONCE) {
        int t = 0;
        const float* heads = q + g * dim / A::NUMBERS;
        for (; t + 4 <= count; t += 4) {
            if (g == 0) prefetch(next + t * dim, int64_t(sizeof(*next)) * 4 * dim);
            dot_products_of<A, AT_ONCE, 4>(heads, keys + t * dim, dim, scores + g * stride + t, stride);
        }
        for (; t < count; t++) {
            dot_products_of<A, AT_ONCE, 1>(heads, keys + t * dim, dim, scores + g * stride + t, stride);
        }
    }
}

// out[g] += sum over t of scores[g][t] v[t], P pairs of vectors of each from number d on, in the order of Pair<T>.
template <class T, int G, int P>
inline void weighted_sum_of(const float* scores, int64_t stride, const T* values, int count, int dim, float* out,
                            const T* next) {
    vfloat sums[G][2 * P];
    for (int g = 0; g < G; g++) {
        for (int i = 0; i < 2 * P; i++) sums[g][i] = load(out + g * dim + i * W);
    }
    for (int t = 0; t < count; t++) {
        prefetch(next + t * dim, int64_t(sizeof(T)) * P * 2 * W);
        vfloat parts[2 * P];
        for (int i = 0; i < P; i++) {
            parts[2 * i] = Pair<T>::first(values + t * dim + i * 2 * W);
            parts[2 * i + 1] = Pair<T>::second(values + t * dim + i * 2 * W);
        }
        for (int g = 0; g < G; g++) {
            vfloat weight = splat(scores[g * stride + t]);
            for (int i = 0; i < 2 * P; i++) sums[g][i] += weight * parts[i];
        }
    }
    for (int g = 0; g < G; g++) {
        for (int i = 0; i < 2 * P; i++) store(out + g * dim + i * W, sums[g][i]);
    }
}

// The same for all of v.
template <class T, int G>
inline void weighted_sum(const float* scores, int64_t stride, const T* values, int count, int dim, float* out,
                         const T* next) {
    constexpr int PAIRS = G == 1 ? 4 : G == 4 ? 1 : 2;  // 8 sums or more, for an addition takes 4 cycles, two at a time
    int d = 0;
    for (; d + PAIRS * 2 * W <= dim; d += PAIRS * 2 * W) {
        weighted_sum_of<T, G, PAIRS>(scores, stride, values + d, count, dim, out + d, next + d);
    }
    for (; d < dim; d += 2 * W) weighted_sum_of<T, G, 1>(scores, stride, values + d, count, dim, out + d, next + d);
}

// `scale` times scores to weights that sum to 1; those past `count` are room for whole vectors.
inline void softmax(float* scores, int count, float scale) {
    for (int t = count; t % W; t++) scores[t] = -std::numeric_limits<float>::infinity();
    vfloat most_of = load(scores), total = {};
    for (int t = W; t < count; t += W) most_of = larger(most_of, load(scores + t));
    float most = largest(most_of);
    for (int t = 0; t < count; t += W) {
        vfloat weights = exp_of_negative((load(scores + t) - most) * scale);
        store(scores + t, weights);
        total += weights;
    }
    vfloat share = splat(1.0f / sum(total));
    for (int t = 0; t < count; t += W) store(scores + t, load(scores + t) * share);
}

// `work` on 4 of `count` at a time, then on the rest: their number as a constant, and the first.
template <class F> inline void in_fours(int count, F work) {
    int first = 0;
    for (; first + 4 <= count; first += 4) work(std::integral_constant<int, 4>{}, first);
    if (count - first == 3) work(std::integral_constant<int, 3>{}, first);
    if (count - first == 2) work(std::integral_constant<int, 2>{}, first);
    if (count - first == 1) work(std::integral_constant<int, 1>{}, first);
}

// The `group` query heads of each of own.heads: q [heads, group, dim] as A has its rows, out the same in the order of
// Pair<T>; scores has room for heads * group * stride, stride a multiple of W and no less than the context. All heads
// of a block after each other, as they lie there, all keys before all values; memory is asked for these, and for the
// keys of `next`, which is to come after it, in the same order.
template <class T, class A>
void attend(const Cache<T>& cache, const Context& own, const Context& next, int group, const float* q, float scale,
            float* scores, int64_t stride, float* out) {
    int size = cache.block_size, dim = cache.head_dim, num_heads = own.heads.size(), num_blocks = own.num_blocks(size);
    int ahead = std::clamp(AHEAD_BYTES / int(num_heads * size * dim * sizeof(T)), 1, MOST_AHEAD);
    auto later = [&](int block, int kind, int head) {
        if (block >= num_blocks) block -= num_blocks, kind++;
        const Context& context = kind < 2 ? own : next;
        head = std::min(context.heads.begin + head, context.heads.end - 1);
        return cache.at(context.table[std::min(block, context.num_blocks(size) - 1)], kind % 2, head);
    };
    auto on_each = [&](int kind, auto work) {
        for (int b = 0; b < num_blocks; b++) {
            int begin = b * size, count = std::min(size, own.num_tokens - begin);
            for (int head = 0; head < num_heads; head++) {
                const T* from = cache.at(own.table[b], kind, own.heads.begin + head);
                const T* wanted = later(b + ahead, kind, head);
                in_fours(group, [&](auto rows, int g) {
                    work(rows, head * group + g, begin, count, from, g ? from : wanted);
                });
            }
        }
    };
    on_each(0, [&](auto rows, int row, int begin, int count, const T* keys, const T* wanted) {
        const float* heads = q + row * dim / A::NUMBERS;
        dot_products<A, rows()>(heads, keys, count, dim, scores + row * stride + begin, stride, wanted);
    });
    for (int row = 0; row < num_heads * group; row++) softmax(scores + row * stride, own.num_tokens, scale);
    std::fill(out, out + num_heads * group * dim, 0.0f);
    on_each(1, [&](auto rows, int row, int begin, int count, const T* values, const T* wanted) {
        const float* weights = scores + row * stride + begin;
        weighted_sum<T, rows()>(weights, stride, values, count, dim, out + row * dim, wanted);
    });
}

}  // namespace sluice
