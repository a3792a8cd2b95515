// y = x W^T (+ bias) (+ residual) over packed weights, and the packing itself.
//
// Packed weights are panels of 24 output columns, the last one padded with zeros:
//
//   [panel 0: k=0: W[0..24)[0] | k=1: W[0..24)[1] | ...][panel 1: W[24..48) ...]
//
// Each output is one lane that is summed over k in order, whatever the number of rows, threads or panels: this makes a
// row's result independent of the batch. Residual and bias come after the sum.
#include <algorithm>
#include <cstring>

#include "context.h"
#include "simd.h"

namespace kn {
namespace {

constexpr int kPanel = 24;  // columns of a panel: three vectors
constexpr int kVectors = kPanel / kLanes;
constexpr int kTileRows = 4;                 // 4 x 3 sums + 3 weights + 1 input fill the 16 registers
constexpr int64_t kRowBlockBytes = 1 << 20;  // input rows that stay in L2 while all panels pass
constexpr int64_t kMostPartRows = 64;        // more rows than this take all of k at once
constexpr int kPrefetchStep = 4;             // k steps between prefetches: 4 * 96 bytes are 6 cache lines
constexpr int kLinesPerStep = kPrefetchStep * kPanel * 4 / 64;

int64_t num_panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

struct Problem {
    const float* x;
    int64_t m;
    const float* packed;
    int64_t n;
    int64_t k;
    const float* bias;
    const float* residual;
    float* y;
};

// One tile's share of the weights that are needed next: some cache lines after every few k steps, so that memory is read
// while the tile computes from cache.
struct Prefetch {
    const char* from;
    int lines_per_step;
};

// A part of the sum over k.
struct Part {
    int64_t k_begin;
    int64_t k_end;
};

template <int R>
void store_tile(const Problem& p, __m256 (&sum)[R][kVectors], int64_t row, int64_t column) {
    const int64_t columns = std::min<int64_t>(kPanel, p.n - column);
    KN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
        // Full vectors take the plain path: masked stores are slow on some CPUs.
        const int64_t lanes = columns - v * kLanes;
        if (lanes <= 0) return;
        const bool full = lanes >= kLanes;
        const __m256i mask = first_lanes(lanes);
        const auto load = [&](const float* from) {
            return full ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, mask);
        };
        const int64_t first = column + v * kLanes;
        const __m256 bias = p.bias ? load(p.bias + first) : _mm256_setzero_ps();
        KN_UNROLL
        for (int r = 0; r < R; ++r) {
            const int64_t at = (row + r) * p.n + first;
            __m256 value = sum[r][v];
            if (p.bias) value = _mm256_add_ps(value, bias);
            if (p.residual) value = _mm256_add_ps(value, load(p.residual + at));
            if (full) {
                _mm256_storeu_ps(p.y + at, value);
            } else {
                _mm256_maskstore_ps(p.y + at, mask, value);
            }
        }
    }
}

template <int R>
inline __attribute__((always_inline)) void add_products(__m256 (&sum)[R][kVectors], const float* weights,
                                                        const float* x, int64_t k) {
    __m256 w[kVectors];
    KN_UNROLL
    for (int v = 0; v < kVectors; ++v) w[v] = _mm256_loadu_ps(weights + v * kLanes);
    KN_UNROLL
    for (int r = 0; r < R; ++r) {
        const __m256 in = _mm256_broadcast_ss(x + r * k);
        KN_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm256_fmadd_ps(in, w[v], sum[r][v]);
    }
}

template <int R>
void compute_tile(const Problem& p, int64_t row, int64_t panel, const Part& part, float* sums, Prefetch next) {
    const float* weights = p.packed + panel * p.k * kPanel;
    const float* x = p.x + row * p.k;
    __m256 sum[R][kVectors];
    KN_UNROLL
    for (int r = 0; r < R; ++r) {
        KN_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            sum[r][v] = part.k_begin == 0 ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + r * kPanel + v * kLanes);
        }
    }
    int64_t k = part.k_begin;
    for (; k + kPrefetchStep <= part.k_end; k += kPrefetchStep) {
        for (int line = 0; line < next.lines_per_step; ++line) {
            _mm_prefetch(next.from, _MM_HINT_T1);
            next.from += 64;
        }
        KN_UNROLL
        for (int i = 0; i < kPrefetchStep; ++i) add_products<R>(sum, weights + (k + i) * kPanel, x + k + i, p.k);
    }
    for (; k < part.k_end; ++k) add_products<R>(sum, weights + k * kPanel, x + k, p.k);
    if (part.k_end == p.k) {
        store_tile<R>(p, sum, row, panel * kPanel);
        return;
    }
    KN_UNROLL
    for (int r = 0; r < R; ++r) {
        KN_UNROLL
        for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(sums + r * kPanel + v * kLanes, sum[r][v]);
    }
}

void compute_rows(const Problem& p, int64_t row, int64_t rows, int64_t panel, const Part& part, float* sums,
                  Prefetch next) {
    switch (rows) {
        case 1: return compute_tile<1>(p, row, panel, part, sums, next);
        case 2: return compute_tile<2>(p, row, panel, part, sums, next);
        case 3: return compute_tile<3>(p, row, panel, part, sums, next);
        default: return compute_tile<4>(p, row, panel, part, sums, next);
    }
}

// The part of k that all tiles go through before the next one. While they work on one part the next is fetched, which
// lets few rows overlap memory with computing (measured: +10 to 25 % from 2 to 32 rows); the more rows, the more it
// costs to put sums aside, and many rows are bound by computing anyway.
int64_t part_length(int64_t rows, int64_t k) { return rows <= 16 ? 32 : rows <= kMostPartRows ? 96 : k; }

// Rows [begin, end) of one panel, in tiles of almost equal height. Panels are contiguous: behind the last part of one
// lies the first part of the next.
void compute_panel(const Problem& p, int64_t begin, int64_t end, int64_t panel, bool prefetch_next) {
    const int64_t rows = end - begin;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const int64_t part_k = part_length(rows, p.k);
    const int lines = static_cast<int>((kLinesPerStep + tiles - 1) / tiles);
    float sums[kMostPartRows * kPanel];  // they wait here for the next part of k
    for (int64_t k = 0; k < p.k; k += part_k) {
        const Part part{k, std::min(p.k, k + part_k)};
        const int64_t part_bytes = (part.k_end - k) * kPanel * static_cast<int64_t>(sizeof(float));
        const char* next = reinterpret_cast<const char*>(p.packed + (panel * p.k + part.k_end) * kPanel);
        const int64_t tile_bytes = lines * 64 * ((part.k_end - k) / kPrefetchStep);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t first = rows * tile / tiles;
            const bool fetch = (prefetch_next || part.k_end < p.k) && tile * tile_bytes < part_bytes;
            float* waiting = part_k < p.k ? sums + first * kPanel : nullptr;
            compute_rows(p, begin + first, rows * (tile + 1) / tiles - first, panel, part, waiting,
                         {next + tile * tile_bytes, fetch ? lines : 0});
        }
    }
}

}  // namespace

void linear(Pool& pool, const float* x, int64_t m, const float* packed, int64_t n, int64_t k, const float* bias,
            const float* residual, float* y) {
    const Problem p{x, m, packed, n, k, bias, residual, y};
    const int64_t panels = num_panels(n);
    const int64_t most_rows = std::max<int64_t>(64, kRowBlockBytes / (k * 4) / kTileRows * kTileRows);
    const int64_t row_blocks = (m + most_rows - 1) / most_rows;
    // Items in order: all panels of row block 0, all panels of row block 1, ... Chunks are small enough to balance and
    // long enough that a thread mostly finds the next panel already fetched by itself.
    const int64_t chunk = std::max<int64_t>(1, panels / (pool.threads() * 4));
    pool.parallel_for(row_blocks * panels, chunk, [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t block = item / panels;
            const int64_t panel = item % panels;
            compute_panel(p, m * block / row_blocks, m * (block + 1) / row_blocks, panel,
                          item + 1 < end && panel + 1 < panels);
        }
    });
}

namespace {

void transpose8(__m256 (&v)[8]) {
    __m256 t[8], u[8];
    KN_UNROLL
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    }
    KN_UNROLL
    for (int i = 0; i < 2; ++i) {
        u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
        u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
    }
    KN_UNROLL
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

// Copies an 8 x 8 square and transposes it; strides in floats.
void transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    __m256 v[8];
    KN_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = _mm256_loadu_ps(from + i * from_stride);
    transpose8(v);
    KN_UNROLL
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + i * to_stride, v[i]);
}

// Calls square(row, k) for each whole 8 x 8 square of a panel's weights and single(row, k) for the rest.
template <class Square, class Single>
void for_each_part(int64_t rows, int64_t k_size, const Square& square, const Single& single) {
    const int64_t whole_rows = rows / 8 * 8;
    const int64_t whole_k = k_size / 8 * 8;
    for (int64_t k = 0; k < whole_k; k += 8) {
        for (int64_t row = 0; row < whole_rows; row += 8) square(row, k);
    }
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t k = row < whole_rows ? whole_k : 0; k < k_size; ++k) single(row, k);
    }
}

void pack_panel(const float* weight, int64_t rows, int64_t k_size, float* panel) {
    if (rows < kPanel) std::memset(panel, 0, sizeof(float) * k_size * kPanel);
    for_each_part(
        rows, k_size,
        [&](int64_t row, int64_t k) { transpose_square(weight + row * k_size + k, k_size, panel + k * kPanel + row, kPanel); },
        [&](int64_t row, int64_t k) { panel[k * kPanel + row] = weight[row * k_size + k]; });
}

void unpack_panel(const float* panel, int64_t rows, int64_t k_size, float* weight) {
    for_each_part(
        rows, k_size,
        [&](int64_t row, int64_t k) { transpose_square(panel + k * kPanel + row, kPanel, weight + row * k_size + k, k_size); },
        [&](int64_t row, int64_t k) { weight[row * k_size + k] = panel[k * kPanel + row]; });
}

template <class PanelBody>
void for_each_panel(Pool& pool, int64_t n, const PanelBody& body) {
    pool.parallel_for(num_panels(n), 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t panel = begin; panel < end; ++panel) body(panel, std::min<int64_t>(kPanel, n - panel * kPanel));
    });
}

// Calls copy(id, out row) for every token; -1 if one lies outside the vocabulary, and then nothing is written.
template <class Copy>
int embed(Pool& pool, int64_t vocab, int64_t k, const int32_t* ids, int64_t num_ids, float* out, const Copy& copy) {
    if (!std::all_of(ids, ids + num_ids, [vocab](int32_t id) { return id >= 0 && id < vocab; })) return -1;
    pool.parallel_for(num_ids, 4, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) copy(int64_t{ids[i]}, out + i * k);
    });
    return 0;
}

}  // namespace
}  // namespace kn

void kn_linear(KnContext* context, const float* x, int64_t m, const float* packed, int64_t n, int64_t k,
               const float* bias, const float* residual, float* y) {
    kn::Lock lock(context->busy);
    kn::linear(context->pool, x, m, packed, n, k, bias, residual, y);
}

void kn_pack_linear(KnContext* context, const float* weight, int64_t n, int64_t k, float* packed) {
    kn::Lock lock(context->busy);
    kn::for_each_panel(context->pool, n, [=](int64_t panel, int64_t rows) {
        kn::pack_panel(weight + panel * kn::kPanel * k, rows, k, packed + panel * kn::kPanel * k);
    });
}

void kn_unpack_linear(KnContext* context, const float* packed, int64_t n, int64_t k, float* weight) {
    kn::Lock lock(context->busy);
    kn::for_each_panel(context->pool, n, [=](int64_t panel, int64_t rows) {
        kn::unpack_panel(packed + panel * kn::kPanel * k, rows, k, weight + panel * kn::kPanel * k);
    });
}

int kn_embed_packed(KnContext* context, const float* packed, int64_t vocab, int64_t k, const int32_t* ids,
                    int64_t num_ids, float* out) {
    kn::Lock lock(context->busy);
    return kn::embed(context->pool, vocab, k, ids, num_ids, out, [=](int64_t id, float* row) {
        const float* lane = packed + id / kn::kPanel * kn::kPanel * k + id % kn::kPanel;
        for (int64_t i = 0; i < k; ++i) row[i] = lane[i * kn::kPanel];
    });
}

int kn_embed_rows(KnContext* context, const float* table, int64_t vocab, int64_t k, const int32_t* ids,
                  int64_t num_ids, float* out) {
    kn::Lock lock(context->busy);
    return kn::embed(context->pool, vocab, k, ids, num_ids, out,
                     [=](int64_t id, float* row) { std::memcpy(row, table + id * k, sizeof(float) * k); });
}
