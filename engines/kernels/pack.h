// bfloat16 weights in 12 bits each, and nothing lost: the exponents of a row's numbers are nearly all among 16 that
// follow each other. So four bits say which, the row has a scale, and the few numbers outside have patches.
#pragma once

#include "vec.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#define SLUICE_PACKS 1
#else
#define SLUICE_PACKS 0
#endif

namespace sluice {

// What is to be added to a row of packed weights: `values`, in its scale, at `columns`. Row n's are starts[n] up to
// starts[n + 1].
struct Patches {
    const int64_t* starts;
    const int32_t* columns;
    const float* values;
};

// That packed numbers have in their row's scale: they are 2 to the -15 up to 2.
constexpr int LOWEST_EXPONENT = 112, EXPONENTS = 16;

struct ByPlace {
    alignas(64) int16_t exponents[32] = {};

    constexpr ByPlace() {
        for (int i = 0; i < 32; i++) exponents[i] = int16_t((LOWEST_EXPONENT + i % EXPONENTS) << 7);
    }
};

inline constexpr ByPlace BY_PLACE;

struct alignas(32) Group {
    static constexpr int NUMBERS = 64;

    uint8_t exponents[32];  // over the lowest: of number i in the low half of byte i, of number 32 + i in the high one
    uint8_t rest[NUMBERS];  // sign in the last bit, above it the fraction

#if SLUICE_PACKS
    // Numbers 0 to 31, or the others, as bfloat16.
    vshort half(int number) const {
        __m512i places = _mm512_cvtepu8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(exponents)));
        if (number) places = _mm512_srli_epi16(places, 4);
        __m512i others = _mm512_cvtepu8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(rest + 32 * number)));
        __m512i turned = _mm512_shrdi_epi16(others, others, 1);  // the sign to the front
        __m512i table = _mm512_load_si512(BY_PLACE.exponents);  // looked up by five bits, one of them not its own
        return vshort(_mm512_or_si512(turned, _mm512_permutexvar_epi16(places, table)));
    }
#endif
};

#if SLUICE_PACKS
inline __m512i exponents_of(const bfloat16* p) {
    return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(p), 7), _mm512_set1_epi16(0xff));
}

// The exponents of a row's numbers, but for patches. Not `is_packable`: there are numbers that are not finite.
struct Exponents {
    int most = EXPONENTS;  // so the least is not 0, which has another meaning, and zeros have patches
    bool is_packable;

    Exponents(const bfloat16* row, int num_k) {
        __m512i largest = _mm512_setzero_si512();
        for (int k = 0; k < num_k; k += 2 * W) largest = _mm512_max_epu16(largest, exponents_of(row + k));
        uint16_t found[2 * W];
        std::memcpy(found, &largest, sizeof(found));
        most = std::max<int>(most, *std::max_element(found, found + 2 * W));
        is_packable = most < 255;
    }

    __m512i least() const { return _mm512_set1_epi16(int16_t(most - EXPONENTS + 1)); }

    int count_patches(const bfloat16* row, int num_k) const {
        int count = 0;
        for (int k = 0; k < num_k; k += 2 * W) {
            count += __builtin_popcount(_mm512_cmplt_epu16_mask(exponents_of(row + k), least()));
        }
        return count;
    }
};

// A row of num_k, a multiple of Group::NUMBERS, with its patches. Returns its scale.
inline float pack_row(const bfloat16* row, int num_k, Exponents exponents, Group* to, int32_t* columns,
                      float* values) {
    float scale = std::ldexp(1.0f, exponents.most - 127), lowest = std::ldexp(1.0f, LOWEST_EXPONENT - 127);
    __m512i least = exponents.least();
    for (int k = 0; k < num_k; k += Group::NUMBERS, to++) {
        __m256i places[2];
        for (int half = 0; half < 2; half++) {
            const bfloat16* from = row + k + 2 * W * half;
            __m512i found = exponents_of(from), bits = _mm512_loadu_si512(from);
            __mmask32 is_low = _mm512_cmplt_epu16_mask(found, least);
            places[half] = _mm512_cvtepi16_epi8(_mm512_maskz_sub_epi16(~is_low, found, least));
            __m512i rest = _mm512_maskz_shldi_epi16(~is_low, bits, bits, 1);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to->rest + 2 * W * half), _mm512_cvtepi16_epi8(rest));
            for (; is_low; is_low &= is_low - 1) {
                int i = __builtin_ctz(is_low);
                *columns++ = k + 2 * W * half + i, *values++ = to_float(from[i]) / scale - lowest;
            }
        }
        __m256i both = _mm256_or_si256(places[0], _mm256_slli_epi16(places[1], 4));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to->exponents), both);
    }
    return scale;
}

// In all rows; -1 if they are more than `most_patches`, or something is not finite. starts: [num_rows + 1].
inline int64_t find_patches(const bfloat16* w, int num_rows, int num_k, int64_t most_patches, int num_threads,
                            int64_t* starts) {
    int64_t total = 0;
#pragma omp parallel for num_threads(num_threads) reduction(+ : total)
    for (int n = 0; n < num_rows; n++) {
        const bfloat16* row = w + int64_t(n) * num_k;
        Exponents exponents(row, num_k);
        starts[n + 1] = exponents.count_patches(row, num_k);
        total += exponents.is_packable ? starts[n + 1] : most_patches + 1;
    }
    if (total > most_patches) return -1;
    starts[0] = 0;
    for (int n = 0; n < num_rows; n++) starts[n + 1] += starts[n];
    return total;
}

// After find_patches: `columns` and `values` have room for as many as it found.
inline void pack(const bfloat16* w, int num_rows, int num_k, int num_threads, const int64_t* starts, Group* to,
                 float* scales, int32_t* columns, float* values) {
#pragma omp parallel for num_threads(num_threads)
    for (int n = 0; n < num_rows; n++) {
        const bfloat16* row = w + int64_t(n) * num_k;
        scales[n] = pack_row(row, num_k, {row, num_k}, to + int64_t(n) * num_k / Group::NUMBERS, columns + starts[n],
                             values + starts[n]);
    }
}
#endif

}  // namespace sluice
