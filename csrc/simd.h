// Vectors of 8 (AVX2) and 16 lanes (AVX-512) under the same names: kn::avx2::Vec and kn::avx512::Vec. Code
// that is compiled for both includes itself once per namespace, see linear_tiles.inc. Every sum has one fixed
// order, so that a row gives the same bits wherever and with whatever instructions it is computed.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <limits>

#include "isa.h"

// GCC keeps small arrays of vectors in registers only if every loop over them is unrolled by pragma.
#define KN_UNROLL _Pragma("GCC unroll 32")
#define KN_INLINE inline __attribute__((always_inline))

namespace kn {

KN_INLINE void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }

// What e^x is made of: relative error below 2e-7 (polynomial of Cephes expf). e^-inf = 0; below kLowest the
// result is 0 and above kHighest infinity, a little before float32 ends, which saves the handling of
// denormals; NaN stays NaN.
namespace expf_parts {
constexpr float kLowest = -87.33654f;
constexpr float kHighest = 88.37626f;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2High = 0.693359375f;
constexpr float kLn2Low = -2.12194440e-4f;
constexpr float kPolynomial[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
}  // namespace expf_parts

namespace avx2 {

using Vec = __m256;
constexpr int kLanes = 8;

KN_INLINE Vec zero() { return _mm256_setzero_ps(); }
KN_INLINE Vec all(float value) { return _mm256_set1_ps(value); }
KN_INLINE Vec broadcast(const float* from) { return _mm256_broadcast_ss(from); }
KN_INLINE Vec load(const float* from) { return _mm256_loadu_ps(from); }
KN_INLINE void store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
KN_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
KN_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
KN_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
KN_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
KN_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }    // a * b + c
KN_INLINE Vec fnmadd(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b

// Mask of the first `count` lanes; count <= 0 gives none, count >= kLanes all.
KN_INLINE __m256i first_lanes(int64_t count) {
    const int capped = count < 0 ? 0 : count > kLanes ? kLanes : static_cast<int>(count);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(capped), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
KN_INLINE Vec load_first(const float* from, int64_t count) {
    return _mm256_maskload_ps(from, first_lanes(count));
}
KN_INLINE void store_first(float* to, int64_t count, Vec v) {
    _mm256_maskstore_ps(to, first_lanes(count), v);
}

KN_INLINE Vec round(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2^n of whole numbers.
KN_INLINE Vec power_of_two(Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
// v, but `instead` where x < limit, or x > limit.
KN_INLINE Vec replace_below(Vec v, Vec x, float limit, float instead) {
    return _mm256_blendv_ps(v, all(instead), _mm256_cmp_ps(x, all(limit), _CMP_LT_OQ));
}
KN_INLINE Vec replace_above(Vec v, Vec x, float limit, float instead) {
    return _mm256_blendv_ps(v, all(instead), _mm256_cmp_ps(x, all(limit), _CMP_GT_OQ));
}

KN_INLINE float horizontal_sum(Vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

KN_INLINE float horizontal_max(Vec v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

#include "exp.inc"

// One value through the vector function, so that scalar callers get its bits.
inline float exp1(float x) { return _mm256_cvtss_f32(exp(all(x))); }

}  // namespace avx2

KN_BEGIN_AVX512
namespace avx512 {

using Vec = __m512;
constexpr int kLanes = 16;

KN_INLINE Vec zero() { return _mm512_setzero_ps(); }
KN_INLINE Vec all(float value) { return _mm512_set1_ps(value); }
KN_INLINE Vec broadcast(const float* from) { return _mm512_set1_ps(*from); }
KN_INLINE Vec load(const float* from) { return _mm512_loadu_ps(from); }
KN_INLINE void store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
KN_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
KN_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
KN_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
KN_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
KN_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
KN_INLINE Vec fnmadd(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }

KN_INLINE __mmask16 first_lanes(int64_t count) {
    const int capped = count < 0 ? 0 : count > kLanes ? kLanes : static_cast<int>(count);
    return static_cast<__mmask16>((1u << capped) - 1);
}
KN_INLINE Vec load_first(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), from);
}
KN_INLINE void store_first(float* to, int64_t count, Vec v) {
    _mm512_mask_storeu_ps(to, first_lanes(count), v);
}

KN_INLINE Vec round(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
KN_INLINE Vec power_of_two(Vec n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}
KN_INLINE Vec replace_below(Vec v, Vec x, float limit, float instead) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, all(limit), _CMP_LT_OQ), v, all(instead));
}
KN_INLINE Vec replace_above(Vec v, Vec x, float limit, float instead) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, all(limit), _CMP_GT_OQ), v, all(instead));
}

KN_INLINE __m256 low_half(Vec v) { return _mm512_castps512_ps256(v); }
KN_INLINE __m256 high_half(Vec v) { return _mm512_extractf32x8_ps(v, 1); }

// A sum of 16 lanes is the sum of the two vectors of 8 lanes that AVX2 has in its place.
KN_INLINE float horizontal_sum(Vec v) { return avx2::horizontal_sum(avx2::add(low_half(v), high_half(v))); }
KN_INLINE float horizontal_max(Vec v) { return avx2::horizontal_max(avx2::max(low_half(v), high_half(v))); }

#include "exp.inc"

}  // namespace avx512
KN_END_AVX512

}  // namespace kn
