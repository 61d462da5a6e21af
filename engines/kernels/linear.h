// Matrices: y[m][n] = sum over k of x[m][k] w[n][k], the weights read as they lie in memory. In one way for few rows
// of x, which is as fast as memory for one, in another for many. Either leaves a part's columns in float32.
#pragma once

#include <algorithm>
#include <type_traits>

#include "pack.h"

namespace sluice {

// x as both ways want it for weights in B: float32, each 2 W numbers in the order of Pair<B>.
template <class T, class B> inline void take_row(const T* from, int count, float* to) {
    for (int k = 0; k < count; k += 2 * W) {
        store(to + k, first_as<T, B>(from + k));
        store(to + k + W, second_as<T, B>(from + k));
    }
}

// What take_row made of a row of T's own, back again.
template <class T> inline void put_row(const float* from, int count, T* to) {
    for (int i = 0; i < count; i += 2 * W) Pair<T>::put(to + i, load(from + i), load(from + i + W));
}

// The nearest whole numbers, in the last 16 bits of each.
inline vint in_last_bits(vfloat x) { return vint(x + 12582912.0f); }  // 1.5 * 2^23

// The size of the largest number of a row; NaN if one is not finite.
inline float largest_size(const float* from, int count) {
    vfloat sizes = {}, zero = {};
    for (int k = 0; k < count; k += W) {
        vfloat x = load(from + k);
        sizes = larger(sizes, larger(x, -x));
        zero += x * 0.0f;
    }
    return largest(sizes) + sum(zero);
}

// ---- In which numbers it is done. A word of x, the room of a float32, holds NUMBERS of them. Weights are taken STEP
// at a time, which are STEP_BYTES in memory.

// `numbers` further in a row, a multiple of STEP.
template <class A> inline const typename A::Weight* further(const typename A::Weight* w, uint64_t numbers) {
    return reinterpret_cast<const typename A::Weight*>(reinterpret_cast<const char*>(w) +
                                                       numbers / A::STEP * A::STEP_BYTES);
}

template <class B> struct Floats {
    typedef B Weight, Order;
    typedef vfloat Sum;
    static constexpr int NUMBERS = 1, STEP = 2 * W, STEP_BYTES = STEP * sizeof(B);
    static constexpr bool HAS_SCALES = false;        // of rows of x
    static constexpr bool HAS_BLOCK_SCALES = false;  // of DEPTH numbers of one

    static vfloat load(const float* x) { return sluice::load(x); }
    static vfloat weight(const B* w, int word) { return word ? Pair<B>::second(w) : Pair<B>::first(w); }
    static vfloat spread(const float* wide) { return splat(*wide); }
    static vfloat add_product(vfloat sum, vfloat weight, vfloat x) { return sum + weight * x; }
    static vfloat to_float(vfloat sum) { return sum; }
    static void store(float* to, vfloat weight) { sluice::store(to, weight); }
    static void put(float* to, int i, vfloat numbers) { sluice::store(to + i, numbers); }

    // PANEL numbers of a row, each a word.
    static void put_in_words(const B* const* rows, int from, float* to) {
        sluice::store(to, consecutive(rows[0] + from));
        sluice::store(to + W, consecutive(rows[0] + from + W));
    }
};

// A word is two numbers of 16 bits.
struct Pairs {
    static constexpr int NUMBERS = 2, STEP = 2 * W;

    static vshort load(const float* x) { return vshort(*reinterpret_cast<const vshort_at*>(x)); }
    static vshort spread(const float* wide) {
        uint32_t pair;
        std::memcpy(&pair, wide, 4);
        return vshort(pair + vuint{});
    }
    static void store(float* to, vshort weight) { *reinterpret_cast<vshort_at*>(to) = weight; }
};

#if defined(__AVX512BF16__)
// Rows of bfloat16, by processors that multiply it: twice what they do of float32.
template <class B> struct Halves : Pairs {
    typedef B Weight;
    typedef bfloat16 Order;
    typedef vfloat Sum;
    static constexpr int STEP_BYTES = STEP * sizeof(B);
    static constexpr bool HAS_SCALES = false, HAS_BLOCK_SCALES = false;

    static vshort weight(const B* w, int) { return halves(w); }
    static vfloat add_product(vfloat sum, vshort weight, vshort x) { return add_products(sum, weight, x); }
    static vfloat to_float(vfloat sum) { return sum; }

    static void put(float* to, int i, vfloat numbers) {
        put_consecutive(reinterpret_cast<bfloat16*>(to) + i, numbers);
    }

    // PANEL numbers of two rows, each two a word.
    static void put_in_words(const B* const* rows, int from, float* to) {
        vshort first = halves(rows[0] + from), second = halves(rows[1] + from);
        store(to, low_in_turn(first, second));
        store(to + W, high_in_turn(first, second));
    }

    // A row of float32 that are bfloat16's.
    static void take(const float* from, int count, float* to) { put_row(from, count, reinterpret_cast<bfloat16*>(to)); }
};
#endif

#if SLUICE_PACKS
// The same of weights that pack.h has made shorter, and in its scale for each of their rows.
struct Packed : Halves<bfloat16> {
    typedef Group Weight;
    static constexpr int STEP = Group::NUMBERS, STEP_BYTES = sizeof(Group);

    static vshort weight(const Group* w, int word) { return w->half(word / W); }
};
#endif

// Weights of 8 bits by a row of 16, which has a scale of its own: of the row's largest number one part in 65,534 is
// lost, and nothing after that, for K_BLOCK / W of the products fit into 32 bits. Half the work of Floats.
struct Ints : Pairs {
    typedef int8_t Weight, Order;
    typedef vint Sum;
    static constexpr int STEP_BYTES = STEP;
    static constexpr bool HAS_SCALES = true, HAS_BLOCK_SCALES = false;

    static vshort weight(const int8_t* w, int) { return widened(w); }
    static vint add_product(vint sum, vshort weight, vshort x) { return add_products(sum, weight, x); }
    static vfloat to_float(vint sum) { return __builtin_convertvector(sum, vfloat); }

    // A row of float32 into one of 16 bits. Returns its scale.
    static float take(const float* from, int count, float* to) {
        float most = largest_size(from, count);
        float factor = most > 0.0f ? 32767.0f / most : 0.0f;
        auto* numbers = reinterpret_cast<vnarrow_at*>(to);
        for (int k = 0; k < count; k += W) {
            numbers[k / W] = __builtin_convertvector(in_last_bits(sluice::load(from + k) * factor), vnarrow_at);
        }
        return most / 32767.0f;
    }
};

constexpr int DEPTH = 256;  // numbers that outer products sum at a time: of a panel they stay in the first-level cache

#if defined(__AVX512VNNI__)
// Weights of 8 bits by a row of 8, each DEPTH numbers of which have a scale of their own. Twice the work of Halves in
// the same time, exact but for the row's rounding: to a 127th part of the largest of DEPTH, half of it at most. The
// processor wants one side unsigned, so weights come with 128 added, which is taken off again by where sums begin.
struct Bytes {
    typedef int8_t Weight;
    typedef bfloat16 Order;
    typedef vint Sum;
    static constexpr int NUMBERS = 4, STEP = 4 * W, STEP_BYTES = STEP;
    static constexpr bool HAS_SCALES = false, HAS_BLOCK_SCALES = true;

    static vbyte load(const float* x) { return vbyte(*reinterpret_cast<const vbyte_at*>(x)); }
    static vbyte weight(const int8_t* w, int) { return vbyte(*reinterpret_cast<const vbyte_at*>(w)) ^ int8_t(-128); }
    static vbyte spread(const float* wide) {
        uint32_t four;
        std::memcpy(&four, wide, 4);
        return vbyte(four + vuint{});
    }
    static vint add_product(vint sum, vbyte weight, vbyte x) { return add_products(sum, weight, x); }
    static vfloat to_float(vint sum) { return __builtin_convertvector(sum, vfloat); }
    static void store(float* to, vbyte weight) { *reinterpret_cast<vbyte_at*>(to) = weight; }

    // DEPTH numbers, or the last ones, of a row in float32: to 8 bits, with a scale, and where a sum of them begins.
    static void take(const float* from, int count, float* to, float* scale, float* start) {
        float most = largest_size(from, count);
        float factor = most > 0.0f ? 127.0f / most : 0.0f;
        auto* numbers = reinterpret_cast<vquarter_at*>(to);
        vint total = {};
        for (int k = 0; k < count; k += 2 * W) {
            vfloat first = sluice::load(from + k) * factor, second = sluice::load(from + k + W) * factor;
            vint low = in_last_bits(low_in_turn(first, second)), high = in_last_bits(high_in_turn(first, second));
            numbers[k / W] = __builtin_convertvector(low, vquarter_at);
            numbers[k / W + 1] = __builtin_convertvector(high, vquarter_at);
            total += (low << 24 >> 24) + (high << 24 >> 24);
        }
        *scale = most / 127.0f;
        int32_t begin = 0;
        for (int i = 0; i < W; i++) begin -= 128 * total[i];
        std::memcpy(start, &begin, 4);
    }
};
#endif

// ---- Few rows: dot products, each row's result the same whatever others there are.

// N rows of the weights at a time, each of another part of as many: memory is read in so many streams, each in order,
// 1.3 to 1.8 times as fast as in one. M rows of x at most: N * M sums stay in registers.
template <int N_, int M_> struct Tiling {
    static constexpr int N = N_, M = M_;
};

typedef Tiling<4, W == 16 ? 6 : 3> Squarish;
typedef Tiling<3, 8> Tall;  // with 32 registers: up to eight rows meet every weight as it comes from memory

constexpr int K_BLOCK = 2048;  // numbers that are summed before the sums are added: of x they stay in the second-level
                               // cache

// Where the weights are that are wanted next: of as many streams, one piece of x's rows after the other asks for its
// share. Memory takes few requests at once.
struct Ahead {
    const char* from;
    int num_pieces;
};

// sums[m][n * spacing] of N rows of weights and M of x, added to what is there if `goes_on`. Not inline, or GCC keeps
// some of the sums in memory.
template <class A, int N, int M>
__attribute__((noinline)) void tile(const typename A::Weight* w, int64_t w_stride, const float* x, int64_t x_stride,
                                    int num_k, float* out, int stride, int spacing, bool goes_on, Ahead ahead) {
    typename A::Sum sums[N][M] = {};
    constexpr int WORDS = A::STEP / A::NUMBERS, LINES = (A::STEP_BYTES + 63) / 64;
    int64_t ahead_step = A::STEP_BYTES / ahead.num_pieces, stream = w_stride / A::STEP * A::STEP_BYTES;
    auto from = reinterpret_cast<const char*>(w);
    int k = 0;
    auto step = [&] {
        for (int word = 0; word < WORDS; word += W) {
            decltype(A::load(x)) weights[N], rows[M];
            auto take_weight = [&](int n) {
                if (word / W < LINES) __builtin_prefetch(ahead.from + n * stream + word / W * 64);
                weights[n] = A::weight(reinterpret_cast<const typename A::Weight*>(from + n * stream), word);
            };
            auto take_row = [&](int m) { rows[m] = A::load(x + m * x_stride + word); };
            // what there are fewer of stays in registers
            for (int i = 0; i < (M < N ? M : N); i++) M < N ? take_row(i) : take_weight(i);
            for (int i = 0; i < (M < N ? N : M); i++) {
                M < N ? take_weight(i) : take_row(i);
                for (int j = 0; j < (M < N ? M : N); j++) {
                    int n = M < N ? i : j, m = M < N ? j : i;
                    sums[n][m] = A::add_product(sums[n][m], weights[n], rows[m]);
                }
            }
        }
        k += A::STEP, x += WORDS, from += A::STEP_BYTES, ahead.from += ahead_step;
    };
    // The same loop: of the first GCC has a sum in memory with AVX2's sixteen registers, of the second it clears and
    // adds up all of them there.
    if constexpr (W == 16) {
        do step();
        while (k < num_k);
    } else {
        while (k < num_k) step();
    }
    auto sums_of = [&](int n, int m) { return n < N ? A::to_float(sums[n < N ? n : 0][m]) : vfloat{}; };
    for (int m = 0; m < M; m++, out += stride) {  // added up in one order, whatever N is
        vfloat4 four = four_sums(sums_of(0, m), sums_of(1, m), sums_of(2, m), sums_of(3, m));
        for (int n = 0; n < N; n++) out[n * spacing] = four[n] + (goes_on ? out[n * spacing] : 0.0f);
    }
}

template <class A, int N, int M, class... Rest> inline void tile_of(int m, Rest... rest) {
    if (m == M) return tile<A, N, M>(rest...);
    if constexpr (M > 1) tile_of<A, N, M - 1>(m, rest...);
}

// All of x's rows against N of the weights', `spacing` apart, which stay in the first-level cache.
template <class A, int N, int M>
inline void strip(const typename A::Weight* w, int num_k, int spacing, int width, const float* x, int num_rows,
                  float* out, int stride, bool goes_on) {
    int num_pieces = (num_rows + M - 1) / M;
    for (int piece = 0, m = 0; piece < num_pieces; piece++) {
        int rows = (num_rows - m + num_pieces - piece - 1) / (num_pieces - piece);  // as equal as can be
        int64_t x_stride = num_k / A::NUMBERS;
        Ahead ahead{reinterpret_cast<const char*>(further<A>(w, num_k)), num_pieces};
        ahead.from += int64_t(piece) * width / A::STEP * A::STEP_BYTES / num_pieces;
        tile_of<A, N, M>(rows, w, int64_t(spacing) * num_k, x + m * x_stride, x_stride, width, out + m * stride,
                         stride, spacing, goes_on, ahead);
        m += rows;
    }
}

// The last rows of the weights, fewer than there are streams.
template <class A, int N, int M, class... Rest> inline void last_strip(int n, Rest... rest) {
    if (n == N) return strip<A, N, M>(rest...);
    if constexpr (N > 1) last_strip<A, N - 1, M>(n, rest...);
}

template <class A, class Tiles>
void few_rows_by(const typename A::Weight* w, int num_k, Range part, const float* x, int num_rows, float* sums,
                 int stride) {
    constexpr int N = Tiles::N, M = Tiles::M;
    int spacing = part.size() / N, done = N * spacing;
    for (int k = 0; k < num_k; k += K_BLOCK) {
        const auto* from = further<A>(w, int64_t(part.begin) * num_k + k);
        const float* x_from = x + k / A::NUMBERS;
        int width = std::min(K_BLOCK, num_k - k);
        for (int n = 0; n < spacing; n++) {
            strip<A, N, M>(further<A>(from, int64_t(n) * num_k), num_k, spacing, width, x_from, num_rows, sums + n,
                           stride, k > 0);
        }
        last_strip<A, N - 1, M>(part.size() - done, further<A>(from, int64_t(done) * num_k), num_k, 1, width, x_from,
                                num_rows, sums + done, stride, k > 0);
    }
}

// Adds what packed weights lack to sums [num_rows, stride] of the columns of `part`; rows of x are bfloat16.
inline void add_patches(const Patches& patches, Range part, const bfloat16* x, int num_k, int num_rows, float* sums,
                        int stride) {
    for (int n = part.begin; n < part.end; n++) {
        for (int64_t i = patches.starts[n]; i < patches.starts[n + 1]; i++) {
            const bfloat16* from = x + patches.columns[i];
            for (int m = 0; m < num_rows; m++) {
                sums[m * stride + n - part.begin] += patches.values[i] * to_float(from[int64_t(m) * num_k]);
            }
        }
    }
}

// sums [num_rows, stride] = x [num_rows, num_k] times rows `part` of w [., num_k]. num_k is a multiple of A::STEP.
template <class A>
void few_rows(const typename A::Weight* w, int num_k, Range part, const float* x, const Patches& patches, int num_rows,
              float* sums, int stride) {
    constexpr bool HAS_TALL = W == 16;
    if (HAS_TALL && num_rows <= Tall::M) {
        if constexpr (HAS_TALL) few_rows_by<A, Tall>(w, num_k, part, x, num_rows, sums, stride);
    } else {
        few_rows_by<A, Squarish>(w, num_k, part, x, num_rows, sums, stride);
    }
    if (patches.starts) {
        add_patches(patches, part, reinterpret_cast<const bfloat16*>(x), num_k, num_rows, sums, stride);
    }
}

// ---- Many rows: outer products, with x in panels and every weight widened once for all of them.

constexpr int PANEL = 2 * W;             // rows of x, beside each other: [words, PANEL]
constexpr int STRIP = W == 16 ? 12 : 6;  // rows of the weights: STRIP * 2 vectors of sums stay in registers
constexpr int WIDE_STRIDE = DEPTH + W;   // words between rows of widened weights: not a power of two

inline int num_panels(int num_rows) { return (num_rows + PANEL - 1) / PANEL; }
inline int num_blocks(int num_k) { return (num_k + DEPTH - 1) / DEPTH; }

// W rows x, `stride` apart, of `size` words, to the half of a panel that begins at `half`.
inline void pack_half(const float* x, int64_t stride, int size, float* half) {
    for (int i = 0; i < size; i += W) transpose(x + i, stride, half + i * PANEL, PANEL);
}

// What outer_products does beside each of its steps.
struct NothingBeside {
    void step(unsigned) const {}
};

// The next DEPTH numbers of STRIP rows of weights, widened a vector at a time, and memory asked for those after them:
// so neither waits for the other.
template <class A> struct NextWide {
    const typename A::Weight *next, *after;
    int64_t stride;
    float* wide;

    __attribute__((always_inline)) void step(unsigned i) const {
        constexpr unsigned WORDS = DEPTH / A::NUMBERS, VECTORS = WORDS / W, STEP_WORDS = A::STEP / A::NUMBERS;
        constexpr unsigned BYTES = DEPTH / A::STEP * A::STEP_BYTES;
        constexpr unsigned LINES = BYTES == 6 * 64 ? 8 : BYTES / 64;  // a power of two
        static_assert(STRIP * VECTORS <= WORDS && STRIP * LINES <= WORDS);
        __builtin_prefetch(reinterpret_cast<const char*>(further<A>(after, i / LINES * stride)) + i % LINES * 64);
        if (i >= STRIP * VECTORS || i % (STEP_WORDS / W)) return;
        unsigned row = i / VECTORS, word = i % VECTORS * W;
        const auto* weights = further<A>(next, row * stride + word * A::NUMBERS);
        for (unsigned part = 0; part < STEP_WORDS; part += W) {
            A::store(wide + row * WIDE_STRIDE + word + part, A::weight(weights, part));
        }
    }
};

// Of a panel's rows in one block of DEPTH: what its sums are to be multiplied by, and where they begin.
struct Block {
    float scales[PANEL], starts[PANEL];
};

// out[n][m] of N rows of widened weights and M vectors of a panel's rows, added to what is there if `goes_on`.
template <class A, int N, int M, class Beside>
inline void outer_products(const float* wide, const float* panel, const Block* block, int size, float* out,
                           bool goes_on, Beside beside) {
    typename A::Sum sums[N][M] = {};
    if constexpr (A::HAS_BLOCK_SCALES) {
        for (int n = 0; n < N; n++) {
            for (int m = 0; m < M; m++) sums[n][m] = typename A::Sum(load(block->starts + m * W));
        }
    }
    int i = 0;
    do {  // at least once, or the compiler has the sums in memory
        beside.step(i);
        decltype(A::load(panel)) rows[M];
        for (int m = 0; m < M; m++) rows[m] = A::load(panel + i * PANEL + m * W);
        for (int n = 0; n < N; n++) {
            auto weight = A::spread(wide + n * WIDE_STRIDE + i);
            for (int m = 0; m < M; m++) sums[n][m] = A::add_product(sums[n][m], weight, rows[m]);
        }
    } while (++i < size);
    for (int n = 0; n < N; n++) {
        for (int m = 0; m < M; m++) {
            float* to = out + n * PANEL + m * W;
            vfloat found = A::to_float(sums[n][m]);
            if constexpr (A::HAS_BLOCK_SCALES) found *= load(block->scales + m * W);
            store(to, goes_on ? load(to) + found : found);
        }
    }
}

template <class A, int N, class... Rest> inline void outer_products_of(int n, bool is_half, Rest... rest) {
    if (n == N) return is_half ? outer_products<A, N, 1>(rest...) : outer_products<A, N, 2>(rest...);
    if constexpr (N > 1) outer_products_of<A, N - 1>(n, is_half, rest...);
}

// `height` rows of weights, `depth` numbers of each.
template <class A>
inline void widen(const typename A::Weight* from, int64_t stride, int height, int depth, float* wide) {
    for (int i = 0; i < height; i++) {
        for (int k = 0; k < depth; k += A::STEP) {
            const auto* weights = further<A>(from, i * stride + k);
            for (int word = 0; word < A::STEP / A::NUMBERS; word += W) {
                A::store(wide + i * WIDE_STRIDE + k / A::NUMBERS + word, A::weight(weights, word));
            }
        }
    }
}

// Adds what packed weights lack to turned [num_panels, columns, PANEL] of the columns of `part`; panels are of pairs of
// bfloat16.
inline void add_patches_to_turned(const Patches& patches, Range part, const float* panels, int num_k,
                                  int num_rows, float* turned, int columns) {
    for (int n = part.begin; n < part.end; n++) {
        for (int64_t i = patches.starts[n]; i < patches.starts[n + 1]; i++) {
            int k = patches.columns[i];
            for (int m = 0; m < num_rows; m += W) {
                int64_t panel = m / PANEL, word = (panel * num_k + k) / 2 * PANEL + m % PANEL;
                auto pairs = *reinterpret_cast<const vuint_at*>(panels + word);
                float* to = turned + (panel * columns + n - part.begin) * PANEL + m % PANEL;
                store(to, load(to) + vfloat(k % 2 ? pairs & 0xffff0000u : pairs << 16) * patches.values[i]);
            }
        }
    }
}

// What few_rows does, to the rounding, but turned: [num_panels, columns, PANEL], of which `columns`, a multiple of W,
// are part.size() or some more. panels: [num_panels, words, PANEL], blocks, if A has them: [num_panels, num_blocks].
template <class A>
void many_rows(const typename A::Weight* w, int num_k, Range part, const float* panels, const Block* blocks,
               const Patches& patches, int num_rows, float* turned, int columns) {
    float both[2][STRIP * WIDE_STRIDE];
    float *wide = both[0], *next_wide = both[1];
    int count = num_panels(num_rows);
    bool is_wide = false;
    for (int n = 0; n < part.size(); n += STRIP) {
        const auto* from = further<A>(w, int64_t(part.begin + n) * num_k);
        const auto* next_strip = further<A>(from, int64_t(STRIP) * num_k);
        int height = std::min(STRIP, part.size() - n), next_height = std::min(STRIP, part.size() - n - STRIP);
        for (int k = 0; k < num_k; k += DEPTH) {
            int depth = std::min(DEPTH, num_k - k);
            if (!is_wide) widen<A>(further<A>(from, k), num_k, height, depth, wide);
            auto at = [&](int later) {
                return later < num_k ? further<A>(from, later) : further<A>(next_strip, later - num_k);
            };
            NextWide<A> next{at(k + DEPTH), at(k + 2 * DEPTH), num_k, next_wide};
            is_wide = k + 2 * DEPTH <= num_k ? height == STRIP : k + DEPTH == num_k && next_height == STRIP;
            for (int p = 0; p < count; p++) {
                bool is_half = num_rows - p * PANEL <= W;
                const float* panel = panels + (int64_t(p) * num_k + k) / A::NUMBERS * PANEL;
                const Block* block = blocks + p * num_blocks(num_k) + k / DEPTH;
                float* out = turned + (int64_t(p) * columns + n) * PANEL;
                int size = depth / A::NUMBERS;
                if (is_wide && p == 0) {
                    outer_products_of<A, STRIP>(height, is_half, wide, panel, block, size, out, k > 0, next);
                } else {
                    outer_products_of<A, STRIP>(height, is_half, wide, panel, block, size, out, k > 0,
                                                NothingBeside{});
                }
            }
            if (is_wide) std::swap(wide, next_wide);
        }
    }
    if (patches.starts) add_patches_to_turned(patches, part, panels, num_k, num_rows, turned, columns);
}

// sums [W, columns] of the rows from `row` on, a multiple of W.
inline void turn_back(const float* turned, int row, int columns, float* sums) {
    const float* from = turned + int64_t(row / PANEL) * columns * PANEL + row % PANEL;
    for (int n = 0; n < columns; n += W) transpose(from + n * PANEL, PANEL, sums + n, columns);
}

}  // namespace sluice
