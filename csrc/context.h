// What one context owns: the pool, and memory that calls reuse instead of allocating.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

#include "isa.h"
#include "kernels.h"
#include "pool.h"

namespace kn {

// A growing buffer of floats, aligned to cache lines; growing discards the contents.
class Buffer {
  public:
    float* at_least(int64_t floats) {
        if (floats > capacity_) {
            const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) & ~size_t{63};
            memory_.reset();
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
            if (!memory_) throw std::bad_alloc();
            capacity_ = floats;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory_;
    int64_t capacity_ = 0;
};

}  // namespace kn

struct KnContext {
    KnContext(int threads, kn::Isa isa_) : isa(isa_), pool(threads) {}

    const kn::Isa isa;
    std::mutex busy;  // calls on one context run one after the other
    kn::Pool pool;
    kn::Buffer layer_memory;      // activations of kn_layer_forward
    kn::Buffer attention_memory;  // scratch of every worker and partial results
};

namespace kn {

using Lock = std::lock_guard<std::mutex>;

// 0 when the work is done, -1 when memory ran out: no exception may cross the C interface.
template <class Work>
int or_out_of_memory(const Work& work) {
    try {
        work();
        return 0;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

// The steps of a layer, for callers that hold the context's lock.
void linear(KnContext&, const float* x, int64_t m, const float* packed, int64_t n, int64_t k,
            const float* bias, const float* residual, float* y);
void rms_norm(Pool&, const float* x, const float* weight, int64_t rows, int64_t size, float eps, float* out);
void silu_mul(Pool&, const float* gate_up, int64_t rows, int64_t size, float* out);
void rope_write_kv(Pool&, const KnLayer&, const KnBatch&, float* qkv);
void attention(KnContext&, const KnLayer&, const KnBatch&, const float* q, int64_t q_stride, float* out);

}  // namespace kn
