// What the machine can do at most with the context's threads: kernels are judged against it.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "context.h"
#include "simd.h"

namespace kn {
namespace {

// Several streams read faster than one, and so does prefetching nearly a page ahead on some machines; both
// were the best of many variants (1 to 8 streams, 0.5 to 64 KiB ahead, all hints).
constexpr int kStreams = 4;
constexpr int64_t kStreamBytes = 56 << 10;
constexpr int64_t kPrefetchBytes = 3 << 10;
constexpr int64_t kChunkBytes = kStreams * kStreamBytes;

constexpr int64_t kFmaItems = 256;
constexpr int64_t kFmaRounds = 20000;  // per item, some 0.02 ms
constexpr int kFmaChains = 12;         // two units with a latency of four or five cycles

}  // namespace

namespace avx2 {
namespace {
#include "limits_loops.inc"
}  // namespace
}  // namespace avx2

KN_BEGIN_AVX512
namespace avx512 {
namespace {
#include "limits_loops.inc"
}  // namespace
}  // namespace avx512
KN_END_AVX512

namespace {

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

double read_seconds(Pool& pool, const char* memory, int64_t chunks, int passes, void (*read)(const char*)) {
    return best_seconds(passes, [&] {
        pool.parallel_for(chunks, 4, [&](int64_t begin, int64_t end, int) {
            for (int64_t chunk = begin; chunk < end; ++chunk) read(memory + chunk * kChunkBytes);
        });
    });
}

}  // namespace
}  // namespace kn

double kn_measure_read_gb_per_s(KnContext* context, int64_t bytes, int passes) {
    kn::Lock lock(context->busy);
    const int64_t chunks = std::max<int64_t>(1, bytes / kn::kChunkBytes);
    const int64_t used = chunks * kn::kChunkBytes;
    kn::Buffer buffer;
    char* memory = nullptr;
    if (kn::or_out_of_memory([&] {
            memory = reinterpret_cast<char*>(buffer.at_least((used + kn::kPrefetchBytes) / sizeof(float)));
        }) != 0) {
        return NAN;
    }
    std::memset(memory, 1, used);  // real pages: untouched ones all map to one page of zeros
    const bool wide = context->isa == kn::Isa::kAvx512;
    const auto seconds = [&](void (*read)(const char*)) {
        return kn::read_seconds(context->pool, memory, chunks, passes, read);
    };
    const double plain = seconds(wide ? kn::avx512::read_streams<false> : kn::avx2::read_streams<false>);
    const double ahead = seconds(wide ? kn::avx512::read_streams<true> : kn::avx2::read_streams<true>);
    return static_cast<double>(used) / std::min(plain, ahead) * 1e-9;
}

double kn_measure_fma_gflop_per_s(KnContext* context, int passes) {
    kn::Lock lock(context->busy);
    const bool wide = context->isa == kn::Isa::kAvx512;
    const auto multiply_add = wide ? kn::avx512::multiply_add : kn::avx2::multiply_add;
    const double seconds = kn::best_seconds(passes, [&] {
        context->pool.parallel_for(kn::kFmaItems, 1, [&](int64_t begin, int64_t end, int) {
            multiply_add((end - begin) * kn::kFmaRounds);
        });
    });
    const double lanes = wide ? kn::avx512::kLanes : kn::avx2::kLanes;
    return 2.0 * kn::kFmaItems * kn::kFmaRounds * kn::kFmaChains * lanes / seconds * 1e-9;
}
