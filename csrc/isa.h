// The instruction sets that the kernels can use. Which one a context uses is decided at run time; all give
// the same bits, because every output is one lane that goes through the same operations in the same order.
#pragma once

#include "kernels.h"

// Everything between the two may use AVX-512; the rest of the library runs on CPUs without it. Standard
// headers stay outside, lest their functions be compiled for AVX-512 and shared with the rest.
#if defined(__clang__)
#define KN_BEGIN_AVX512 \
    _Pragma("clang attribute push(__attribute__((target(\"avx512dq,avx512vl\"))), apply_to = function)")
#define KN_END_AVX512 _Pragma("clang attribute pop")
#else
#define KN_BEGIN_AVX512 _Pragma("GCC push_options") _Pragma("GCC target(\"avx512dq,avx512vl\")")
#define KN_END_AVX512 _Pragma("GCC pop_options")
#endif

namespace kn {

enum class Isa : int { kAvx2 = KN_ISA_AVX2, kAvx512 = KN_ISA_AVX512 };

}  // namespace kn
