// y = x W^T (+ bias) (+ residual) over packed weights, and the packing itself.
//
// Packed weights are panels of 24 output columns, the last one padded with zeros:
//
//   [panel 0: k=0: W[0..24)[0] | k=1: W[0..24)[1] | ...][panel 1: W[24..48) ...]
//
// Each output is one lane that is summed over k in order, whatever the number of rows, threads or panels:
// this makes a row's result independent of the batch. Residual and bias come after the sum.
#include <algorithm>
#include <cstring>

#include "context.h"
#include "simd.h"

namespace kn {
namespace {

constexpr int kPanel = 24;                   // columns of a panel
constexpr int64_t kRowBlockBytes = 2 << 20;  // input and output rows that stay in L2 while all panels pass
constexpr int64_t kLeastBlockRows = 96;      // fewer would read the weights too often
constexpr int64_t kMostPartRows = 64;        // more rows than this take all of k at once
constexpr int kPrefetchStep = 4;             // k steps between prefetches: 4 * 96 bytes are 6 cache lines
constexpr int kLineBytes = 64;
constexpr int64_t kMostChunk = 8;  // strips; a thread that lost its core holds up the others with one chunk
constexpr int kLinesPerStep = kPrefetchStep * kPanel * 4 / kLineBytes;

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

// One tile's share of the weights that are needed next: some cache lines of every panel after every few k
// steps, so that memory is read while the tile computes from cache.
struct Prefetch {
    const char* from;  // in the first panel of the strip
    int lines_per_step;
};

// A part of the sum over k.
struct Part {
    int64_t k_begin;
    int64_t k_end;
};

}  // namespace

namespace avx2 {
namespace {

// Vector v of a strip's weights at some k: `weights` are those of its first panel.
KN_INLINE Vec load_weights(const float* weights, int64_t panel_floats, int v) {
    return load(weights + v * kLanes / kPanel * panel_floats + v * kLanes % kPanel);
}

#include "linear_tiles.inc"

}  // namespace
}  // namespace avx2

KN_BEGIN_AVX512
namespace avx512 {
namespace {

//   panel A  | 0..15 | 16..23 |
//   panel B           | 0..7 | 8..23 |      the middle one of three vectors has lanes of both
KN_INLINE Vec load_weights(const float* weights, int64_t panel_floats, int v) {
    const float* panel = weights + v * kLanes / kPanel * panel_floats;
    const int column = v * kLanes % kPanel;
    if (column + kLanes <= kPanel) return load(panel + column);
    const Vec low = _mm512_castps256_ps512(avx2::load(panel + column));
    return _mm512_insertf32x8(low, avx2::load(panel + panel_floats), 1);
}

#include "linear_tiles.inc"

}  // namespace
}  // namespace avx512
KN_END_AVX512

namespace {

// Tiles of one size: `compute` does 1 to `rows` rows of a strip of `panels` adjacent panels.
struct Tiling {
    int panels;
    int rows;
    void (*compute)(const Problem&, int64_t row, int64_t rows, int64_t panel, const Part&, float* sums,
                    Prefetch);
};

// The sums of a tile fill the registers. Adjacent panels are also streams of memory of their own, and more
// streams read faster, because the hardware fetches ahead in each of them (measured: 2 give +15 %, 4 some 20
// %). Many rows are bound by computing and do better with more rows and fewer columns: that takes fewer
// loads.
constexpr int kMostPanels = 4;
constexpr int64_t kFewRows = 32;
constexpr Tiling kAvx2One{1, 4, avx2::compute_rows<4, 1>};
constexpr Tiling kAvx2Two{2, 2, avx2::compute_rows<2, 2>};
constexpr Tiling kAvx512Two{2, 8, avx512::compute_rows<8, 2>};
constexpr Tiling kAvx512Four{4, 4, avx512::compute_rows<4, 4>};

const Tiling& tiling_for(Isa isa, int64_t rows) {
    if (isa == Isa::kAvx512) return rows <= kFewRows ? kAvx512Four : kAvx512Two;
    return rows <= kAvx2Two.rows ? kAvx2Two : kAvx2One;
}

// The part of k that all tiles go through before the next one. While they work on one part the next is
// fetched, which lets few rows overlap memory with computing; the more rows, the more it costs to put sums
// aside, and many rows are bound by computing anyway.
int64_t part_length(int64_t rows, int64_t k) { return rows <= 16 ? 32 : rows <= kMostPartRows ? 64 : k; }

// Rows [begin, end) of the panels of one strip, in tiles of almost equal height.
void compute_strip(const Problem& p, const Tiling& tiling, int64_t begin, int64_t end, int64_t panel,
                   bool prefetch_next) {
    const int64_t rows = end - begin;
    const int64_t tiles = (rows + tiling.rows - 1) / tiling.rows;
    const int64_t part_k = part_length(rows, p.k);
    const int lines = static_cast<int>((kLinesPerStep + tiles - 1) / tiles);
    alignas(kLineBytes) float sums[kMostPartRows * kMostPanels * kPanel];  // waiting for the next part of k
    for (int64_t k = 0; k < p.k; k += part_k) {
        const Part part{k, std::min(p.k, k + part_k)};
        const bool last = part.k_end == p.k;
        const int64_t next_k = last ? (panel + tiling.panels) * p.k : panel * p.k + part.k_end;
        const char* next = reinterpret_cast<const char*>(p.packed + next_k * kPanel);
        const int64_t part_bytes = (part.k_end - k) * kPanel * static_cast<int64_t>(sizeof(float));
        const int64_t tile_bytes = lines * kLineBytes * ((part.k_end - k) / kPrefetchStep);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t first = rows * tile / tiles;
            const bool fetch = (prefetch_next || !last) && tile * tile_bytes < part_bytes;
            float* waiting = part_k < p.k ? sums + first * tiling.panels * kPanel : nullptr;
            tiling.compute(p, begin + first, rows * (tile + 1) / tiles - first, panel, part, waiting,
                           {next + tile * tile_bytes, fetch ? lines : 0});
        }
    }
}

}  // namespace

void linear(KnContext& context, const float* x, int64_t m, const float* packed, int64_t n, int64_t k,
            const float* bias, const float* residual, float* y) {
    const Problem p{x, m, packed, n, k, bias, residual, y};
    const int64_t most_rows = std::max(kLeastBlockRows, kRowBlockBytes / ((k + n) * 4) / 8 * 8);
    const int64_t row_blocks = (m + most_rows - 1) / most_rows;
    const Tiling& tiling = tiling_for(context.isa, (m + row_blocks - 1) / std::max<int64_t>(row_blocks, 1));
    const int64_t panels = num_panels(n);
    const int64_t strips = (panels + tiling.panels - 1) / tiling.panels;
    // Items in order: all strips of row block 0, all strips of row block 1, ... Chunks are small enough to
    // balance and long enough that a thread mostly finds the next strip already fetched by itself.
    const int64_t chunk = std::clamp<int64_t>(strips / (context.pool.threads() * 4), 1, kMostChunk);
    context.pool.parallel_for(row_blocks * strips, chunk, [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t block = item / strips;
            const int64_t first_row = m * block / row_blocks;
            const int64_t last_row = m * (block + 1) / row_blocks;
            int64_t panel = item % strips * tiling.panels;
            if (panel + tiling.panels <= panels) {
                const bool whole_next = panel + 2 * tiling.panels <= panels;
                compute_strip(p, tiling, first_row, last_row, panel, item + 1 < end && whole_next);
            } else {
                for (; panel < panels; ++panel) compute_strip(p, kAvx2One, first_row, last_row, panel, false);
            }
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
        [&](int64_t row, int64_t k) {
            transpose_square(weight + row * k_size + k, k_size, panel + k * kPanel + row, kPanel);
        },
        [&](int64_t row, int64_t k) { panel[k * kPanel + row] = weight[row * k_size + k]; });
}

void unpack_panel(const float* panel, int64_t rows, int64_t k_size, float* weight) {
    for_each_part(
        rows, k_size,
        [&](int64_t row, int64_t k) {
            transpose_square(panel + k * kPanel + row, kPanel, weight + row * k_size + k, k_size);
        },
        [&](int64_t row, int64_t k) { weight[row * k_size + k] = panel[k * kPanel + row]; });
}

template <class PanelBody>
void for_each_panel(Pool& pool, int64_t n, const PanelBody& body) {
    pool.parallel_for(num_panels(n), 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t panel = begin; panel < end; ++panel) {
            body(panel, std::min<int64_t>(kPanel, n - panel * kPanel));
        }
    });
}

// Calls copy(id, out row) for every token; -1 if one lies outside the vocabulary, and then nothing is
// written.
template <class Copy>
int embed(Pool& pool, int64_t vocab, int64_t k, const int32_t* ids, int64_t num_ids, float* out,
          const Copy& copy) {
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
    kn::linear(*context, x, m, packed, n, k, bias, residual, y);
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
