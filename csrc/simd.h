// One vector of floats, as wide as the instruction set that the including file is compiled for.
//
// Everything has internal linkage: the same source is compiled once for each instruction set, and an inline
// function that the linker shared between them would run the wrong one.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__) && !defined(TERSE_SCALAR)
#include <immintrin.h>
#endif

namespace terse {
namespace {

#if defined(TERSE_SCALAR)
constexpr int kLanes = 1;
#elif defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// GCC's and Clang's vector extension: arithmetic operators work lane by lane, and a scalar operand is broadcast.
using Floats [[gnu::vector_size(4 * kLanes)]] = float;
using Ints [[gnu::vector_size(4 * kLanes)]] = std::int32_t;
using Bytes [[gnu::vector_size(kLanes)]] = std::int8_t;
using Halves [[gnu::vector_size(2 * kLanes)]] = std::uint16_t;

struct Bf16 {
    std::uint16_t bits;
};

inline Floats load(const float* p) {
    Floats v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

// GCC 12 widens vectors one lane at a time, so that x86 needs its intrinsics here and only here.
inline Ints widen(const std::int8_t* p) {
#if defined(TERSE_SCALAR) || !defined(__AVX2__)
    Bytes v;
    __builtin_memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, Ints);
#elif defined(__AVX512F__)
    return reinterpret_cast<Ints>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    return reinterpret_cast<Ints>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#endif
}

inline Ints widen(const Bf16* p) {
#if defined(TERSE_SCALAR) || !defined(__AVX2__)
    Halves v;
    __builtin_memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, Ints);
#elif defined(__AVX512F__)
    return reinterpret_cast<Ints>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
    return reinterpret_cast<Ints>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
}

inline Floats load(const Bf16* p) { return reinterpret_cast<Floats>(widen(p) << 16); }

inline Floats load(const std::int8_t* p) { return __builtin_convertvector(widen(p), Floats); }

// sums[lane] += x[0] w[lane][0] + .. + x[3] w[lane][3], exactly, of four 8-bit inputs x that `quantise` has made and the
// weights of kLanes outputs, four inputs of an output side by side.
#if defined(__AVX512F__) && !defined(TERSE_SCALAR)

constexpr int kInputOffset = 128;  // this instruction wants inputs without a sign

inline Ints dot4(Ints sums, std::int32_t x, const std::int8_t* w) {
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), _mm512_set1_epi32(x),
                                                      _mm512_loadu_si512(w)));
}

#elif defined(__AVX2__) && !defined(TERSE_SCALAR)

constexpr int kInputOffset = 0;

inline Ints dot4(Ints sums, std::int32_t x, const std::int8_t* w) {
    const __m256i inputs = _mm256_set1_epi32(x);
    const __m256i weights = _mm256_sign_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)), inputs);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(inputs), weights);  // 2 * 127 * 127 fits 16 bits
    return sums + reinterpret_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#else

constexpr int kInputOffset = 0;

inline Ints dot4(Ints sums, std::int32_t x, const std::int8_t* w) {
    std::int8_t inputs[4];
    __builtin_memcpy(inputs, &x, 4);
    for (int lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < 4; ++i) {
            sums[lane] += inputs[i] * w[4 * lane + i];
        }
    }
    return sums;
}

#endif

inline float to_float(float x) { return x; }
inline float to_float(std::int8_t x) { return x; }
inline float to_float(Bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

// The lowest byte of each.
inline void store_bytes(std::int8_t* p, Ints v) {
#if defined(__AVX512F__) && !defined(TERSE_SCALAR)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
#else
    for (int lane = 0; lane < kLanes; ++lane) {
        p[lane] = static_cast<std::int8_t>(v[lane]);
    }
#endif
}

inline Floats broadcast(float x) { return Floats{} + x; }

inline float sum(Floats v) {
    float total = 0;
    for (int i = 0; i < kLanes; ++i) {
        total += v[i];
    }
    return total;
}

// e^x within 2 units in the last place; inputs below -87 give nearly 0, NaN stays NaN.
inline Floats exp(Floats x) {
    const Floats low = broadcast(-87.0f);
    const Floats high = broadcast(88.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Floats scaled = x * 1.44269504f;
    const Ints n = __builtin_convertvector(scaled + (scaled < 0.0f ? broadcast(-0.5f) : broadcast(0.5f)), Ints);
    const Floats whole = __builtin_convertvector(n, Floats);
    const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * reinterpret_cast<Floats>((n + 127) << 23);
}

}  // namespace
}  // namespace terse
