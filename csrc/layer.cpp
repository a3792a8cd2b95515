// The small steps between the linears, and one decoder layer as a single call.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "context.h"
#include "kv_cache.h"
#include "simd.h"

namespace kn {
namespace {

using namespace avx2;  // these steps are too short to gain from wider vectors

// Fewer rows than this are done by the caller alone: handing them out costs more.
constexpr int64_t kRowsPerChunk = 4;

// Calls body(vector offset, lanes) over `size` floats; the last vector may have fewer than 8 lanes.
template <class Body>
inline void for_each_vector(int64_t size, const Body& body) {
    for (int64_t i = 0; i < size; i += kLanes) body(i, std::min<int64_t>(kLanes, size - i));
}

inline Vec load(const float* from, int64_t lanes) {
    return lanes == kLanes ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, first_lanes(lanes));
}

inline void store(float* to, int64_t lanes, __m256 value) {
    if (lanes == kLanes) {
        _mm256_storeu_ps(to, value);
    } else {
        _mm256_maskstore_ps(to, first_lanes(lanes), value);
    }
}

void rms_norm_row(const float* x, const float* weight, int64_t size, float eps, float* out) {
    __m256 squares = _mm256_setzero_ps();
    for_each_vector(size, [&](int64_t i, int64_t lanes) {
        const __m256 v = load(x + i, lanes);
        squares = _mm256_fmadd_ps(v, v, squares);
    });
    const float mean = horizontal_sum(squares) / static_cast<float>(size);
    const __m256 scale = _mm256_set1_ps(1.0f / std::sqrt(mean + eps));
    for_each_vector(size, [&](int64_t i, int64_t lanes) {
        const __m256 normed = _mm256_mul_ps(load(x + i, lanes), scale);
        store(out + i, lanes, _mm256_mul_ps(normed, load(weight + i, lanes)));
    });
}

void silu_mul_row(const float* gate, const float* up, int64_t size, float* out) {
    const __m256 one = _mm256_set1_ps(1.0f);
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for_each_vector(size, [&](int64_t i, int64_t lanes) {
        const __m256 g = load(gate + i, lanes);
        const __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, exp(_mm256_xor_ps(g, sign))));
        store(out + i, lanes, _mm256_mul_ps(silu, load(up + i, lanes)));
    });
}

// Rotate-half (the convention of Hugging Face): dimensions i and i + head_dim / 2 form a pair.
void rotate_head(float* head, const float* cosine, const float* sine, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float low = head[i];
        const float high = head[i + half];
        head[i] = low * cosine[i] - high * sine[i];
        head[i + half] = high * cosine[i] + low * sine[i];
    }
}

// qkv row:  | q heads | k heads | v heads |
void rope_write_row(const KnLayer& layer, const KvCache& cache, int64_t position, int64_t block, float* row) {
    const int64_t head_dim = layer.head_dim;
    const int64_t half = head_dim / 2;
    const float* cosine = layer.rope_cos + position * half;
    const float* sine = layer.rope_sin + position * half;
    for (int64_t head = 0; head < layer.num_heads + layer.num_kv_heads; ++head) {
        rotate_head(row + head * head_dim, cosine, sine, half);
    }
    const float* keys = row + layer.num_heads * head_dim;
    const float* values = keys + layer.num_kv_heads * head_dim;
    const int64_t slot = position % layer.block_size;
    for (int64_t head = 0; head < layer.num_kv_heads; ++head) {
        float* key = cache.key(block, head, slot);
        for (int64_t d = 0; d < head_dim; ++d) key[d * layer.block_size] = keys[head * head_dim + d];
        std::memcpy(cache.value(block, head, slot), values + head * head_dim, sizeof(float) * head_dim);
    }
}

}  // namespace

void rms_norm(Pool& pool, const float* x, const float* weight, int64_t rows, int64_t size, float eps,
              float* out) {
    pool.parallel_for(rows, kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            rms_norm_row(x + row * size, weight, size, eps, out + row * size);
        }
    });
}

void silu_mul(Pool& pool, const float* gate_up, int64_t rows, int64_t size, float* out) {
    pool.parallel_for(rows, kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            const float* gate = gate_up + row * 2 * size;
            silu_mul_row(gate, gate + size, size, out + row * size);
        }
    });
}

void rope_write_kv(Pool& pool, const KnLayer& layer, const KnBatch& batch, float* qkv) {
    const KvCache cache(layer);
    const int64_t row_size = int64_t{layer.num_heads + 2 * layer.num_kv_heads} * layer.head_dim;
    pool.parallel_for(batch.num_rows, kRowsPerChunk, [&](int64_t begin, int64_t end, int) {
        const int32_t* starts = batch.query_starts;
        int64_t seq = std::upper_bound(starts, starts + batch.num_seqs + 1, begin) - starts - 1;
        for (int64_t row = begin; row < end; ++row) {
            while (row >= starts[seq + 1]) ++seq;
            const int64_t position = int64_t{batch.context_lens[seq]} + row - starts[seq];
            const int64_t* table = batch.block_tables + seq * batch.block_table_stride;
            rope_write_row(layer, cache, position, table[position / layer.block_size], qkv + row * row_size);
        }
    });
}

namespace {

void layer_forward(KnContext& context, const KnLayer& layer, const KnBatch& batch, float* hidden) {
    Pool& pool = context.pool;
    const int64_t rows = batch.num_rows;
    const int64_t hidden_size = layer.hidden_size;
    const int64_t q_size = int64_t{layer.num_heads} * layer.head_dim;
    const int64_t qkv_size = q_size + int64_t{2} * layer.num_kv_heads * layer.head_dim;
    const int64_t inter = layer.intermediate_size;

    // | normed [hidden] | attended [q] | qkv [q + 2 kv]          |   first half of the layer
    // | normed [hidden] |  gate_up [2 * inter] | activated [inter] |   second half; qkv and attended are dead
    const int64_t tail = std::max(q_size + qkv_size, 3 * inter);
    float* normed = context.layer_memory.at_least(rows * (hidden_size + tail));
    float* attended = normed + rows * hidden_size;
    float* qkv = attended + rows * q_size;
    float* gate_up = normed + rows * hidden_size;
    float* activated = gate_up + rows * 2 * inter;

    rms_norm(pool, hidden, layer.input_norm, rows, hidden_size, layer.rms_norm_eps, normed);
    linear(context, normed, rows, layer.qkv, qkv_size, hidden_size, layer.qkv_bias, nullptr, qkv);
    rope_write_kv(pool, layer, batch, qkv);
    attention(context, layer, batch, qkv, qkv_size, attended);
    linear(context, attended, rows, layer.o, hidden_size, q_size, nullptr, hidden, hidden);

    rms_norm(pool, hidden, layer.post_norm, rows, hidden_size, layer.rms_norm_eps, normed);
    linear(context, normed, rows, layer.gate_up, 2 * inter, hidden_size, nullptr, nullptr, gate_up);
    silu_mul(pool, gate_up, rows, inter, activated);
    linear(context, activated, rows, layer.down, hidden_size, inter, nullptr, hidden, hidden);
}

}  // namespace
}  // namespace kn

// Compiled for any x86-64, so that it can be asked before anything else of this library runs.
__attribute__((target("arch=x86-64"))) int kn_widest_isa() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    return avx512 ? KN_ISA_AVX512 : KN_ISA_AVX2;
}

KnContext* kn_create(int threads, int isa) {
    try {
        return new KnContext(threads, static_cast<kn::Isa>(isa));
    } catch (...) {  // no exception may cross the C interface; the caller reports a null context
        return nullptr;
    }
}

void kn_destroy(KnContext* context) { delete context; }

void kn_rms_norm(KnContext* context, const float* x, const float* weight, int64_t rows, int64_t size,
                 float eps, float* out) {
    kn::Lock lock(context->busy);
    kn::rms_norm(context->pool, x, weight, rows, size, eps, out);
}

void kn_silu_mul(KnContext* context, const float* gate_up, int64_t rows, int64_t size, float* out) {
    kn::Lock lock(context->busy);
    kn::silu_mul(context->pool, gate_up, rows, size, out);
}

void kn_exp(const float* x, int64_t count, float* out) {
    kn::for_each_vector(count, [=](int64_t i, int64_t lanes) {
        kn::store(out + i, lanes, kn::exp(kn::load(x + i, lanes)));
    });
}

void kn_rope_write_kv(KnContext* context, const KnLayer* layer, const KnBatch* batch, float* qkv) {
    kn::Lock lock(context->busy);
    kn::rope_write_kv(context->pool, *layer, *batch, qkv);
}

int kn_layer_forward(KnContext* context, const KnLayer* layer, const KnBatch* batch, float* hidden) {
    kn::Lock lock(context->busy);
    return kn::or_out_of_memory([&] { kn::layer_forward(*context, *layer, *batch, hidden); });
}
