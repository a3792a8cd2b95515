// What the machine can do at most with the context's threads: kernels are judged against it.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "context.h"
#include "simd.h"

namespace kn {
namespace {

constexpr int64_t kReadChunkBytes = 1 << 20;
constexpr int64_t kFmaItems = 256;
constexpr int64_t kFmaRounds = 20000;  // per item, some 0.02 ms
constexpr int kFmaChains = 12;         // two units with a latency of four or five cycles

// Keeps a result that nothing reads.
inline void keep(__m256 value) { asm volatile("" : : "x"(value)); }

template <class Work>
double best_seconds(int passes, const Work& work) {
    double best = INFINITY;
    for (int pass = 0; pass < passes; ++pass) {
        const auto start = std::chrono::steady_clock::now();
        work();
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        best = std::min(best, took.count());
    }
    return best;
}

void read_bytes(const char* from, int64_t bytes) {
    __m256 sum[8];
    KN_UNROLL
    for (int i = 0; i < 8; ++i) sum[i] = _mm256_setzero_ps();
    for (int64_t at = 0; at < bytes; at += sizeof sum) {
        KN_UNROLL
        for (int i = 0; i < 8; ++i) {
            sum[i] = _mm256_or_ps(sum[i], _mm256_load_ps(reinterpret_cast<const float*>(from + at) + i * kLanes));
        }
    }
    KN_UNROLL
    for (int i = 0; i < 8; ++i) keep(sum[i]);
}

void multiply_add(int64_t rounds) {
    const __m256 factor = _mm256_set1_ps(0.999f);
    __m256 sum[kFmaChains];
    KN_UNROLL
    for (int i = 0; i < kFmaChains; ++i) sum[i] = _mm256_set1_ps(static_cast<float>(i));
    for (int64_t round = 0; round < rounds; ++round) {
        KN_UNROLL
        for (int i = 0; i < kFmaChains; ++i) sum[i] = _mm256_fmadd_ps(sum[i], factor, factor);
    }
    KN_UNROLL
    for (int i = 0; i < kFmaChains; ++i) keep(sum[i]);
}

}  // namespace
}  // namespace kn

double kn_measure_read_gb_per_s(KnContext* context, int64_t bytes, int passes) {
    kn::Lock lock(context->busy);
    const int64_t chunks = std::max<int64_t>(1, bytes / kn::kReadChunkBytes);
    kn::Buffer buffer;
    char* memory = nullptr;
    if (kn::or_out_of_memory([&] {
            memory = reinterpret_cast<char*>(buffer.at_least(chunks * kn::kReadChunkBytes / sizeof(float)));
        }) != 0) {
        return NAN;
    }
    std::memset(memory, 1, chunks * kn::kReadChunkBytes);  // real pages: untouched ones all map to one page of zeros
    const double seconds = kn::best_seconds(passes, [&] {
        context->pool.parallel_for(chunks, 1, [&](int64_t begin, int64_t end, int) {
            kn::read_bytes(memory + begin * kn::kReadChunkBytes, (end - begin) * kn::kReadChunkBytes);
        });
    });
    return static_cast<double>(chunks * kn::kReadChunkBytes) / seconds * 1e-9;
}

double kn_measure_fma_gflop_per_s(KnContext* context, int passes) {
    kn::Lock lock(context->busy);
    const double seconds = kn::best_seconds(passes, [&] {
        context->pool.parallel_for(kn::kFmaItems, 1, [](int64_t begin, int64_t end, int) {
            kn::multiply_add((end - begin) * kn::kFmaRounds);
        });
    });
    const double flops = 2.0 * kn::kFmaItems * kn::kFmaRounds * kn::kFmaChains * kn::kLanes;
    return flops / seconds * 1e-9;
}
