// Where K and V of a position lie. One block of one layer, chosen so that 16 positions of K fill two vectors:
//
//   block_id * block_bytes
//   |  K [kv_head][head_dim][block_size]  |  V [kv_head][block_size][head_dim]  |
//                            lanes = positions               lanes = dimensions
//
// Block ids are permanent and may be huge (terabytes of reserved range), so all arithmetic is 64-bit.
#pragma once

#include "kernels.h"

namespace kn {

struct KvCache {
    explicit KvCache(const KnLayer& layer)
        : base(layer.kv_base),
          block_size(layer.block_size),
          head_dim(layer.head_dim),
          half_block(int64_t{layer.num_kv_heads} * layer.head_dim * layer.block_size) {}

    // K of dimension 0; dimension d lies d * block_size floats on.
    float* key(int64_t block, int64_t kv_head, int64_t slot) const {
        return block_at(block) + kv_head * head_dim * block_size + slot;
    }

    // V of dimension 0; the other dimensions follow.
    float* value(int64_t block, int64_t kv_head, int64_t slot) const {
        return block_at(block) + half_block + (kv_head * block_size + slot) * head_dim;
    }

    char* const base;
    const int64_t block_size;
    const int64_t head_dim;
    const int64_t half_block;  // floats of K, and of V, in one block

  private:
    float* block_at(int64_t block) const {
        const int64_t block_bytes = 2 * half_block * static_cast<int64_t>(sizeof(float));
        return reinterpret_cast<float*>(base + block * block_bytes);
    }
};

}  // namespace kn
