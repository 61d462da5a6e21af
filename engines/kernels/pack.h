// bfloat16 weights in 12 bits each, and nothing lost: the exponents of a row's numbers are nearly all among 16 that
// follow each other. So four bits say which, but for its last bit, and the sign; the row has a scale, and the few
// numbers outside have patches.
#pragma once

#include "team.h"
#include "vec.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
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

// Of packed numbers in their row's scale, which is such that they are 2 to the -15 up to 2.
constexpr int LOWEST_EXPONENT = 112, EXPONENTS = 16;

// The second bytes of bfloat16, sign and exponent but for its last bit: by codes of four bits, looked up by six.
struct SecondBytes {
    alignas(64) uint8_t of[64] = {};

    constexpr SecondBytes() {
        for (int i = 0; i < 64; i++) of[i] = uint8_t((i & 8) << 4 | (LOWEST_EXPONENT / 2 + (i & 7)));
    }
};

inline constexpr SecondBytes SECOND_BYTES;

// Byte 16 L + i of `firsts` is of number 8 L + i, byte 16 L + 8 + i of number 32 + 8 L + i: so half a lane each comes
// to lie beside its second bytes. Half i of word q of the codes is of bytes 32 i + 8 q to 32 i + 8 q + 7.
struct alignas(32) Group {
    static constexpr int NUMBERS = 64;

    uint64_t codes[4];
    uint8_t firsts[NUMBERS];

#if SLUICE_PACKS
    // Numbers 0 to 31, or the others, as bfloat16.
    vshort half(int number) const {
        const __m512i shifts = _mm512_set_epi64(0x3c3834302c282420, 0x3c3834302c282420, 0x3c3834302c282420,
                                                0x3c3834302c282420, 0x1c1814100c080400, 0x1c1814100c080400,
                                                0x1c1814100c080400, 0x1c1814100c080400);
        __m512i twice = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(codes)));
        __m512i places = _mm512_multishift_epi64_epi8(shifts, twice);
        __m512i second = _mm512_permutexvar_epi8(places, _mm512_load_si512(SECOND_BYTES.of));
        __m512i first = _mm512_loadu_si512(firsts);
        return vshort(number ? _mm512_unpackhi_epi8(first, second) : _mm512_unpacklo_epi8(first, second));
    }

    // Of 64 numbers, each 32 one vector: their bytes, and codes in the same places.
    void put(__m512i first, __m512i places) {
        _mm512_storeu_si512(firsts, first);
        uint64_t eight[8];
        std::memcpy(eight, &places, sizeof(eight));
        for (int q = 0; q < 4; q++) {
            codes[q] = _pext_u64(eight[q], 0x0f0f0f0f0f0f0f0f) | _pext_u64(eight[q + 4], 0x0f0f0f0f0f0f0f0f) << 32;
        }
    }
#endif
};

#if SLUICE_PACKS
inline __m512i sizes_of(const bfloat16* p) {
    return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi16(0x7fff));
}

inline __m512i exponents_of(const bfloat16* p) { return _mm512_srli_epi16(sizes_of(p), 7); }

// The exponents of a row's numbers, but for patches. Not `is_packable`: there are numbers that are not finite.
struct Exponents {
    int most;
    bool is_zero, is_packable;  // is_zero: all of the row, as of a vocabulary that was filled up

    Exponents(const bfloat16* row, int num_k) {
        __m512i largest = _mm512_setzero_si512();
        for (int k = 0; k < num_k; k += 2 * W) largest = _mm512_max_epu16(largest, sizes_of(row + k));
        uint16_t found[2 * W];
        std::memcpy(found, &largest, sizeof(found));
        int size = *std::max_element(found, found + 2 * W);
        most = std::max(EXPONENTS, size >> 7);  // so the least is not 0, which has another meaning: zeros have patches
        is_zero = size == 0;
        is_packable = most < 255;
    }

    int least() const { return most / 2 * 2 - EXPONENTS + 2; }  // even: the last bit is not in the code

    int count_patches(const bfloat16* row, int num_k) const {
        int count = 0;
        if (is_zero) return count;
        for (int k = 0; k < num_k; k += 2 * W) {
            __mmask32 is_low = _mm512_cmplt_epu16_mask(exponents_of(row + k), _mm512_set1_epi16(int16_t(least())));
            count += __builtin_popcount(is_low);
        }
        return count;
    }
};

// A row of num_k, a multiple of Group::NUMBERS, with its patches. Returns its scale.
inline float pack_row(const bfloat16* row, int num_k, Exponents exponents, Group* to, int32_t* columns,
                      float* values) {
    if (exponents.is_zero) {
        std::fill(to, to + num_k / Group::NUMBERS, Group{});
        return 0.0f;
    }
    float scale = std::ldexp(1.0f, exponents.least() - LOWEST_EXPONENT);
    float lowest = std::ldexp(1.0f, LOWEST_EXPONENT - 127);
    __m512i least = _mm512_set1_epi16(int16_t(exponents.least())), first_byte = _mm512_set1_epi16(0xff);
    for (int k = 0; k < num_k; k += Group::NUMBERS, to++) {
        __m512i firsts[2], codes[2];
        for (int half = 0; half < 2; half++) {
            const bfloat16* from = row + k + 2 * W * half;
            __m512i found = exponents_of(from), bits = _mm512_loadu_si512(from);
            __mmask32 is_low = _mm512_cmplt_epu16_mask(found, least);
            firsts[half] = _mm512_maskz_mov_epi16(~is_low, _mm512_and_si512(bits, first_byte));
            __m512i sign = _mm512_slli_epi16(_mm512_srli_epi16(bits, 15), 3);
            __m512i place = _mm512_srli_epi16(_mm512_sub_epi16(found, least), 1);
            codes[half] = _mm512_maskz_mov_epi16(~is_low, _mm512_or_si512(sign, place));
            for (; is_low; is_low &= is_low - 1) {
                int i = __builtin_ctz(is_low);
                *columns++ = k + 2 * W * half + i, *values++ = to_float(from[i]) / scale - lowest;
            }
        }
        to->put(_mm512_packus_epi16(firsts[0], firsts[1]), _mm512_packus_epi16(codes[0], codes[1]));
    }
    return scale;
}

constexpr int ROWS_OF_A_PART = 16;

// In all rows; -1 if they are more than `most_patches`, or something is not finite. starts: [num_rows + 1].
inline int64_t find_patches(const bfloat16* w, int num_rows, int num_k, int64_t most_patches, int num_threads,
                            int64_t* starts) {
    std::atomic<int64_t> total = 0;
    share_out(num_rows, ROWS_OF_A_PART, num_threads, [&](Range part) {
        for (int n = part.begin; n < part.end; n++) {
            const bfloat16* row = w + int64_t(n) * num_k;
            Exponents exponents(row, num_k);
            starts[n + 1] = exponents.count_patches(row, num_k);
            total += exponents.is_packable ? starts[n + 1] : most_patches + 1;
        }
    });
    if (total > most_patches) return -1;
    starts[0] = 0;
    for (int n = 0; n < num_rows; n++) starts[n + 1] += starts[n];
    return total;
}

// After find_patches: `columns` and `values` have room for as many as it found.
inline void pack(const bfloat16* w, int num_rows, int num_k, int num_threads, const int64_t* starts, Group* to,
                 float* scales, int32_t* columns, float* values) {
    share_out(num_rows, ROWS_OF_A_PART, num_threads, [&](Range part) {
        for (int n = part.begin; n < part.end; n++) {
            const bfloat16* row = w + int64_t(n) * num_k;
            scales[n] = pack_row(row, num_k, {row, num_k}, to + int64_t(n) * num_k / Group::NUMBERS,
                                 columns + starts[n], values + starts[n]);
        }
    });
}
#endif

}  // namespace sluice
