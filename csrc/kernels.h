// The plain C interface of the CPU kernels; kunserve/device/kernels/cpu.py mirrors the structs with ctypes.
// All tensors are float32 and row-major unless a comment draws another layout.
#pragma once

#include <cstdint>

#define KN_EXPORT extern "C" __attribute__((visibility("default")))

struct KnContext;

// One decoder layer. The addresses stay valid as long as the struct is used.
struct KnLayer {
    int32_t hidden_size;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t intermediate_size;
    int32_t block_size;
    int32_t max_positions;  // rows of the rope tables
    float rms_norm_eps;
    const float* input_norm;  // [hidden]
    const float* qkv;         // packed, N = (heads + 2 * kv_heads) * head_dim, K = hidden
    const float* qkv_bias;    // [N] or null
    const float* o;           // packed, N = hidden, K = heads * head_dim
    const float* post_norm;   // [hidden]
    const float* gate_up;     // packed, N = 2 * intermediate (all gate rows, then all up rows), K = hidden
    const float* down;        // packed, N = hidden, K = intermediate
    char* kv_base;            // KV cache of this layer, see kv_cache.h
    const float* rope_cos;    // [max_positions][head_dim / 2]
    const float* rope_sin;    // [max_positions][head_dim / 2]
};

// A mixed batch of prefill chunks and decodes. Rows of sequence s: query_starts[s] .. query_starts[s + 1];
// its row i stands at absolute position context_lens[s] + i.
struct KnBatch {
    int32_t num_seqs;
    int32_t num_rows;
    const int32_t* query_starts;  // [num_seqs + 1]
    const int32_t* context_lens;  // [num_seqs], tokens whose KV is already there
    const int64_t* block_tables;  // [num_seqs][block_table_stride]
    int64_t block_table_stride;
};

// Instruction sets. AVX2 includes FMA; AVX-512 means its parts F, DQ and VL.
#define KN_ISA_AVX2 1
#define KN_ISA_AVX512 2

// The widest instruction set that this CPU and its operating system offer, 0 if not even AVX2.
KN_EXPORT int kn_widest_isa();
// Null when the threads cannot be started.
KN_EXPORT KnContext* kn_create(int threads, int isa);
KN_EXPORT void kn_destroy(KnContext*);

KN_EXPORT void kn_pack_linear(KnContext*, const float* weight, int64_t n, int64_t k, float* packed);
KN_EXPORT void kn_unpack_linear(KnContext*, const float* packed, int64_t n, int64_t k, float* weight);
KN_EXPORT void kn_linear(KnContext*, const float* x, int64_t m, const float* packed, int64_t n, int64_t k,
                         const float* bias, const float* residual, float* y);
// Both return 0, or -1 when a token id lies outside [0, vocab).
KN_EXPORT int kn_embed_packed(KnContext*, const float* packed, int64_t vocab, int64_t k, const int32_t* ids,
                              int64_t num_ids, float* out);
KN_EXPORT int kn_embed_rows(KnContext*, const float* table, int64_t vocab, int64_t k, const int32_t* ids,
                            int64_t num_ids, float* out);

KN_EXPORT void kn_rms_norm(KnContext*, const float* x, const float* weight, int64_t rows, int64_t size,
                           float eps, float* out);
KN_EXPORT void kn_silu_mul(KnContext*, const float* gate_up, int64_t rows, int64_t size, float* out);
KN_EXPORT void kn_exp(const float* x, int64_t count, float* out);

// Rotates q and k of every row of qkv [rows][(heads + 2 * kv_heads) * head_dim] in place and writes k and v
// to the cache.
KN_EXPORT void kn_rope_write_kv(KnContext*, const KnLayer*, const KnBatch*, float* qkv);
// out [rows][heads * head_dim]; the rows of q lie q_stride floats apart.
// Like kn_layer_forward it returns 0, or -1 when there is no memory for its workspace.
KN_EXPORT int kn_attention(KnContext*, const KnLayer*, const KnBatch*, const float* q, int64_t q_stride,
                           float* out);
// hidden [rows][hidden_size], updated in place.
KN_EXPORT int kn_layer_forward(KnContext*, const KnLayer*, const KnBatch*, float* hidden);

// Machine limits, measured on the context's own threads. Both return the best of `passes`; NaN if memory ran
// out.
KN_EXPORT double kn_measure_read_gb_per_s(KnContext*, int64_t bytes, int passes);
KN_EXPORT double kn_measure_fma_gflop_per_s(KnContext*, int passes);
