// Vectors of float32 as wide as the processor's, by GCC's and Clang's vector extension, and bfloat16 in memory.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace sluice {

#if defined(__AVX512F__)
constexpr int W = 16;
#else
constexpr int W = 8;
#endif

typedef float vfloat __attribute__((vector_size(4 * W)));
typedef int32_t vint __attribute__((vector_size(4 * W)));
typedef uint32_t vuint __attribute__((vector_size(4 * W)));
typedef int16_t vshort __attribute__((vector_size(4 * W)));
typedef int8_t vbyte __attribute__((vector_size(4 * W)));
// The same at any address.
typedef float vfloat_at __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t vuint_at __attribute__((vector_size(4 * W), aligned(2), may_alias));
typedef uint16_t vhalf_at __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef int16_t vnarrow_at __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef int16_t vshort_at __attribute__((vector_size(4 * W), aligned(2), may_alias));
typedef int8_t vbyte_at __attribute__((vector_size(4 * W), aligned(1), may_alias));
typedef int8_t vquarter_at __attribute__((vector_size(W), aligned(1), may_alias));

struct bfloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <class T> T from_float(float x);

template <> inline float from_float<float>(float x) { return x; }

// To the nearest, ties to even, as torch rounds.
template <> inline bfloat16 from_float<bfloat16>(float x) {
    if (std::isnan(x)) return {0x7fc0};
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// What is left of x once it has been stored as a T.
template <class T> inline float rounded(float x) { return to_float(from_float<T>(x)); }

inline vfloat splat(float x) { return x - vfloat{}; }

// What is left of x once it has been stored as a T.
template <class T> vfloat rounded(vfloat x);

template <> inline vfloat rounded<float>(vfloat x) { return x; }

template <> inline vfloat rounded<bfloat16>(vfloat x) {
    vuint bits = vuint(x);
    vuint nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return vfloat(x != x ? bits | 0x400000u : nearest);
}

inline vfloat load(const float* p) { return *reinterpret_cast<const vfloat_at*>(p); }

inline void store(float* p, vfloat x) { *reinterpret_cast<vfloat_at*>(p) = x; }

typedef float vfloat8 __attribute__((vector_size(32)));
typedef float vfloat4 __attribute__((vector_size(16)));
typedef float vfloat4_at __attribute__((vector_size(16), aligned(4), may_alias));

inline void store(float* p, vfloat4 x) { *reinterpret_cast<vfloat4_at*>(p) = x; }

inline float sum(vfloat4 x) { return (x[0] + x[2]) + (x[1] + x[3]); }

inline float sum(vfloat8 x) {
    return sum(__builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7));
}

#if defined(__AVX512F__)
inline vfloat8 folded(vfloat x) {
    return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
}

inline float sum(vfloat x) { return sum(folded(x)); }
#endif

// The sum of each, in order.
inline vfloat4 four_sums(vfloat8 a, vfloat8 b, vfloat8 c, vfloat8 d) {
    auto halves = [](vfloat8 x, vfloat8 y) {  // x's and y's sums of two, in turn
        return __builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13) +
               __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15);
    };
    vfloat8 ab = halves(a, b), cd = halves(c, d);
    vfloat8 four = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                   __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(four, four, 0, 1, 2, 3) + __builtin_shufflevector(four, four, 4, 5, 6, 7);
}

#if defined(__AVX512F__)
inline vfloat4 four_sums(vfloat a, vfloat b, vfloat c, vfloat d) {
    return four_sums(folded(a), folded(b), folded(c), folded(d));
}
#endif

// The first halves of two in turn, and the second ones.
#if defined(__AVX512F__)
inline vfloat low_in_turn(vfloat a, vfloat b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

inline vfloat high_in_turn(vfloat a, vfloat b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#else
inline vfloat low_in_turn(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }

inline vfloat high_in_turn(vfloat a, vfloat b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#endif

// W rows of W numbers to the columns of `to`.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    vfloat rows[W], turned[W];
    for (int i = 0; i < W; i++) rows[i] = load(from + i * from_stride);
    for (int done = 1; done < W; done *= 2) {
        for (int i = 0; i < W / 2; i++) {
            turned[2 * i] = low_in_turn(rows[i], rows[i + W / 2]);
            turned[2 * i + 1] = high_in_turn(rows[i], rows[i + W / 2]);
        }
        std::copy(turned, turned + W, rows);
    }
    for (int i = 0; i < W; i++) store(to + i * to_stride, rows[i]);
}

inline vfloat larger(vfloat a, vfloat b) { return a > b ? a : b; }

inline float largest(vfloat8 x) {
    vfloat4 low = __builtin_shufflevector(x, x, 0, 1, 2, 3), high = __builtin_shufflevector(x, x, 4, 5, 6, 7);
    vfloat4 four = low > high ? low : high, turned = __builtin_shufflevector(four, four, 2, 3, 0, 1);
    four = four > turned ? four : turned;
    return std::max(four[0], four[1]);
}

#if defined(__AVX512F__)
inline float largest(vfloat x) {
    vfloat8 low = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
    vfloat8 high = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    return largest(low > high ? low : high);
}
#endif

// e to the x for x <= 0: to 2 units in the last place, 0 below -87. 2 to the n times a polynomial of the rest
// (Cephes' expf).
inline vfloat exp_of_negative(vfloat x) {
    vint is_tiny = x < splat(-87.0f);
    x = is_tiny ? splat(-87.0f) : x;
    vfloat shifted = x * splat(1.44269504f) + splat(12582912.0f);  // 1.5 * 2^23: rounds to a whole number
    vfloat n = shifted - splat(12582912.0f);
    vfloat r = x - n * splat(0.693359375f) + n * splat(2.12194440e-4f);
    vfloat p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    vint exponent = (__builtin_convertvector(n, vint) + 127) << 23;
    return is_tiny ? splat(0.0f) : p * vfloat(exponent);
}

// A pair of vectors holds 2 W consecutive numbers in the order in which they are taken apart: as they lie for
// float32 and int8; for bfloat16 those at even places, then those at odd ones, which takes a shift and a mask.
template <class T> struct Pair;

template <> struct Pair<float> {
    static vfloat first(const float* p) { return load(p); }
    static vfloat second(const float* p) { return load(p + W); }
    static void put(float* p, vfloat first, vfloat second) { store(p, first), store(p + W, second); }
};

template <> struct Pair<bfloat16> {
    static vuint raw(const bfloat16* p) { return *reinterpret_cast<const vuint_at*>(p); }
    static vfloat first(const bfloat16* p) { return vfloat(raw(p) << 16); }
    static vfloat second(const bfloat16* p) { return vfloat(raw(p) & 0xffff0000u); }
    static void put(bfloat16* p, vfloat first, vfloat second) {
        vuint low = vuint(rounded<bfloat16>(first)) >> 16, high = vuint(rounded<bfloat16>(second)) & 0xffff0000u;
        *reinterpret_cast<vuint_at*>(p) = low | high;
    }
};

// GCC does not find the instructions for the following.
template <> struct Pair<int8_t> {
    static vfloat first(const int8_t* p) {
#if defined(__AVX512F__)
        return vfloat(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#else
        return vfloat(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#endif
    }
    static vfloat second(const int8_t* p) { return first(p + W); }
};

// 2 W numbers in 16 bits each.
inline vshort widened(const int8_t* p) {
#if defined(__AVX512F__)
    return vshort(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
    return vshort(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
}

// sums and each two products of a and b.
inline vint add_products(vint sums, vshort a, vshort b) {
#if defined(__AVX512VNNI__)
    return vint(_mm512_dpwssd_epi32(__m512i(sums), __m512i(a), __m512i(b)));
#elif defined(__AVX512F__)
    return sums + vint(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#else
    return sums + vint(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#endif
}

#if defined(__AVX512VNNI__)
// sums and each four products of a, taken as unsigned, and b.
inline vint add_products(vint sums, vbyte a, vbyte b) {
    return vint(_mm512_dpbusd_epi32(__m512i(sums), __m512i(a), __m512i(b)));
}
#endif

#if defined(__AVX512BF16__)
// 2 W bfloat16 numbers, of which the processor multiplies each two at once.
inline vshort halves(const bfloat16* p) { return vshort(*reinterpret_cast<const vshort_at*>(p)); }

inline vshort halves(const int8_t* p) {
    return vshort(_mm512_cvtne2ps_pbh(__m512(Pair<int8_t>::second(p)), __m512(Pair<int8_t>::first(p))));
}

// The numbers of two in turn, those of the first halves and those of the second ones.
inline vshort low_in_turn(vshort a, vshort b) {
    return __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                                   11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
}

inline vshort high_in_turn(vshort a, vshort b) {
    return __builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57,
                                   26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
}

inline vfloat add_products(vfloat sums, vshort a, vshort b) {
    return vfloat(_mm512_dpbf16_ps(__m512(sums), __m512bh(a), __m512bh(b)));
}
#endif

// W consecutive numbers, as they lie.
inline vfloat consecutive(const float* p) { return load(p); }

inline vfloat consecutive(const bfloat16* p) {
    return vfloat(__builtin_convertvector(*reinterpret_cast<const vhalf_at*>(p), vuint) << 16);
}

inline void put_consecutive(float* p, vfloat x) { store(p, x); }

inline void put_consecutive(bfloat16* p, vfloat x) {
    *reinterpret_cast<vhalf_at*>(p) = __builtin_convertvector(vuint(rounded<bfloat16>(x)) >> 16, vhalf_at);
}

// 2 W numbers in T, in the order in which Pair<B> takes its own apart.
template <class T, class B> inline vfloat first_as(const T* p) {
    if constexpr (std::is_same_v<B, bfloat16>) return Pair<T>::first(p);
    return consecutive(p);
}

template <class T, class B> inline vfloat second_as(const T* p) {
    if constexpr (std::is_same_v<B, bfloat16>) return Pair<T>::second(p);
    return consecutive(p + W);
}

}  // namespace sluice
