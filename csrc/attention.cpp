// Causal attention over blocks of KV, one algorithm for prefill and decode.
//
// The positions of a sequence are cut into partitions of 256, a function of the position alone:
//
//   positions   0 ......... 255 | 256 ....... 511 | 512 ... p     one query row at position p attends to 0..p
//               partition 0       partition 1       partition 2
//   each gives  (max, sum, weighted values) of its own; merged in order of position, then divided
//
// Inside a partition the scores of up to 6 rows are computed in steps of 16 positions, then the maximum
// (exact in any order), the exponentials, their sum in a fixed order of lanes, and the weighted values
// position after position. What a row goes through is thus the same whether it is computed alone or in a
// tile, by one thread or by many.
//
// Beyond a row's own position scores are replaced by -inf, so weights are exactly 0. K lanes of a partly
// filled block may hold anything, NaN too: they stay in their own lanes until replaced. V is read only up to
// the tile's last position.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "context.h"
#include "kv_cache.h"
#include "simd.h"

namespace kn {
namespace {

constexpr int kStep = 16;  // positions, whose scores are two vectors of AVX2 or one of AVX-512
constexpr int kPartition = 256;
constexpr int kSteps = kPartition / kStep;
constexpr int kLineFloats = 64 / sizeof(float);  // of a cache line
constexpr int kTileRows = 6;   // rows computed together: 6 x 2 sums leave registers for operands
constexpr int kMostStepsTogether = 2;
constexpr int kItemRows = 48;  // rows (queries x heads of a group) of a work item; they share K and V
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The result of some positions for one row:   | max | sum | 6 unused | weighted values [head_dim] |
struct Partial {
    static constexpr int64_t kHeader = 8;
    static int64_t floats(int64_t head_dim) { return kHeader + head_dim; }

    float& max() const { return at[0]; }
    float& sum() const { return at[1]; }
    float* values() const { return at + kHeader; }

    float* at;
};

// Consecutive queries of one sequence.
struct Queries {
    const int64_t* block_table;
    int64_t row;       // of the first one, in the batch
    int64_t count;
    int64_t position;  // of the first one, in the sequence

    int64_t last_position() const { return position + count - 1; }
    int64_t partitions() const { return last_position() / kPartition + 1; }
};

// Scratch of one worker, cut from one buffer.
struct Scratch {
    Scratch(float* memory, int64_t head_dim)
        : queries(memory),
          scores(queries + kItemRows * head_dim),
          partials(scores + kTileRows * kPartition),
          states(partials + kTileRows * Partial::floats(head_dim)) {}

    static int64_t floats(int64_t head_dim) {
        const int64_t used = kItemRows * head_dim + kTileRows * kPartition +
                             (kTileRows + kItemRows) * Partial::floats(head_dim);
        return (used + 31) / 32 * 32;
    }

    float* queries;   // per tile [head_dim][tile rows], scaled
    float* scores;    // [kTileRows][kPartition], later the weights
    float* partials;  // [kTileRows] of the partition at hand
    float* states;    // [kItemRows] merged so far
};

// Where one partition's K and V of one head lie, step by step. Behind the last step stands what is read next,
// so that every step can fetch its successor: blocks are scattered and no hardware prefetcher knows the next
// one.
//
//   keys    step 0 | step 1 | ... | values of step 0 | values of step 1 | ...
//   values  step 0 | step 1 | ... | keys of the next partition's step 0
struct PartitionView {
    const float* keys[kSteps + kMostStepsTogether];
    const float* values[kSteps + 1];
    int64_t steps;
    int64_t positions;  // that any row of the item attends to
    int64_t key_stride;
    int64_t head_dim;
};

}  // namespace

namespace avx2 {
namespace {
#include "attention_tiles.inc"
}  // namespace
}  // namespace avx2

KN_BEGIN_AVX512
namespace avx512 {
namespace {
#include "attention_tiles.inc"
}  // namespace
}  // namespace avx512
KN_END_AVX512

namespace {

using namespace avx2;  // what follows is too little work to gain from wider vectors

using AttendTile = void (*)(int64_t rows, const PartitionView&, const float* queries, const int64_t* valid,
                            float* scores, const Partial* partials);

struct Attention {
    Attention(Isa isa, const KnLayer& layer, const float* q_, int64_t q_stride_, float* out_)
        : attend_tile(isa == Isa::kAvx512 ? avx512::attend_tile : avx2::attend_tile),
          cache(layer),
          head_dim(layer.head_dim),
          num_heads(layer.num_heads),
          num_kv_heads(layer.num_kv_heads),
          group(layer.num_heads / layer.num_kv_heads),
          scale(1.0f / std::sqrt(static_cast<float>(layer.head_dim))),
          q(q_),
          q_stride(q_stride_),
          out(out_) {}

    const AttendTile attend_tile;
    const KvCache cache;
    const int64_t head_dim;
    const int64_t num_heads;
    const int64_t num_kv_heads;
    const int64_t group;  // query heads that share one KV head
    const float scale;
    const float* const q;
    const int64_t q_stride;
    float* const out;
};

PartitionView view_partition(const Attention& a, const Queries& queries, int64_t kv_head, int64_t partition) {
    PartitionView view;
    const int64_t first = partition * kPartition;
    view.positions = std::min<int64_t>(kPartition, queries.last_position() + 1 - first);
    view.steps = (view.positions + kStep - 1) / kStep;
    view.key_stride = a.cache.block_size;
    view.head_dim = a.head_dim;
    for (int64_t step = 0; step < view.steps; ++step) {
        const int64_t position = first + step * kStep;
        const int64_t block = queries.block_table[position / a.cache.block_size];
        view.keys[step] = a.cache.key(block, kv_head, position % a.cache.block_size);
        view.values[step] = a.cache.value(block, kv_head, position % a.cache.block_size);
    }
    for (int64_t i = 0; i < kMostStepsTogether; ++i) {
        view.keys[view.steps + i] = view.values[std::min(i, view.steps - 1)];
    }
    const int64_t after = first + kPartition;
    view.values[view.steps] = view.values[view.steps - 1];
    if (after <= queries.last_position()) {
        view.values[view.steps] =
            a.cache.key(queries.block_table[after / a.cache.block_size], kv_head, after % a.cache.block_size);
    }
    return view;
}

// state := state and the partial that follows it.
void merge(Partial state, Partial partial, int64_t head_dim) {
    const float max = std::max(state.max(), partial.max());
    const float old_scale = exp1(state.max() - max);
    const float new_scale = exp1(partial.max() - max);
    state.max() = max;
    state.sum() = state.sum() * old_scale + partial.sum() * new_scale;
    const __m256 olds = _mm256_set1_ps(old_scale);
    const __m256 news = _mm256_set1_ps(new_scale);
    for (int64_t d = 0; d < head_dim; d += kLanes) {
        const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(state.values() + d), olds);
        const __m256 added = _mm256_loadu_ps(partial.values() + d);
        _mm256_storeu_ps(state.values() + d, _mm256_fmadd_ps(added, news, scaled));
    }
}

// The rows of one work item: row r is head r % group of the KV head's group, query r / group. They are cut
// into tiles of almost equal height:   | tile 0: rows [0, 6) | tile 1: rows [6, 12) | ... |
class Item {
  public:
    Item(const Attention& attention, const Queries& queries, int64_t kv_head)
        : a(attention), queries_(queries), kv_head_(kv_head), rows_(queries.count * attention.group),
          tiles_((rows_ + kTileRows - 1) / kTileRows) {}

    int64_t rows() const { return rows_; }
    int64_t query_of(int64_t row) const { return row / a.group; }
    int64_t head_of(int64_t row) const { return kv_head_ * a.group + row % a.group; }
    int64_t partitions_of(int64_t row) const { return (queries_.position + query_of(row)) / kPartition + 1; }

    // Scaled and transposed, so that the inner loop reads them in order.
    void load_queries(float* to) const {
        for_each_tile([&](int64_t first, int64_t height) {
            for (int64_t r = 0; r < height; ++r) {
                const float* from = a.q + (queries_.row + query_of(first + r)) * a.q_stride +
                                    head_of(first + r) * a.head_dim;
                float* tile = to + first * a.head_dim + r;
                for (int64_t d = 0; d < a.head_dim; ++d) tile[d * height] = from[d] * a.scale;
            }
        });
    }

    // done(row, partial) for every row that reaches into the partition; partial_at(row in tile, row) says
    // where it goes.
    template <class PartialAt, class Done>
    void attend(int64_t partition, const Scratch& scratch, const PartialAt& partial_at,
                const Done& done) const {
        const PartitionView view = view_partition(a, queries_, kv_head_, partition);
        for_each_tile([&](int64_t first, int64_t height) {
            int64_t valid[kTileRows];
            Partial partials[kTileRows];
            for (int64_t r = 0; r < height; ++r) {
                const int64_t position = queries_.position + query_of(first + r);
                valid[r] = std::clamp<int64_t>(position + 1 - partition * kPartition, 0, kPartition);
                partials[r] = partial_at(r, first + r);
            }
            const float* tile = scratch.queries + first * a.head_dim;
            a.attend_tile(height, view, tile, valid, scratch.scores, partials);
            for (int64_t r = 0; r < height; ++r) {
                if (valid[r] > 0) done(first + r, partials[r]);
            }
        });
    }

    void write(int64_t row, Partial state) const {
        float* to = a.out + ((queries_.row + query_of(row)) * a.num_heads + head_of(row)) * a.head_dim;
        const __m256 scale = _mm256_set1_ps(1.0f / state.sum());
        for (int64_t d = 0; d < a.head_dim; d += kLanes) {
            _mm256_storeu_ps(to + d, _mm256_mul_ps(_mm256_loadu_ps(state.values() + d), scale));
        }
    }

  private:
    template <class Body>
    void for_each_tile(const Body& body) const {
        for (int64_t tile = 0; tile < tiles_; ++tile) {
            const int64_t first = rows_ * tile / tiles_;
            body(first, rows_ * (tile + 1) / tiles_ - first);
        }
    }

    const Attention& a;
    const Queries& queries_;
    const int64_t kv_head_;
    const int64_t rows_;
    const int64_t tiles_;
};

// All partitions of one item by one thread, merged as they come.
void attend_whole(const Item& item, int64_t partitions, int64_t head_dim, const Scratch& scratch) {
    const int64_t floats = Partial::floats(head_dim);
    const auto state = [&](int64_t row) { return Partial{scratch.states + row * floats}; };
    item.load_queries(scratch.queries);
    for (int64_t partition = 0; partition < partitions; ++partition) {
        // Partition 0 goes straight into the states: every row has it.
        const auto partial_at = [&](int64_t r, int64_t row) {
            return partition == 0 ? state(row) : Partial{scratch.partials + r * floats};
        };
        item.attend(partition, scratch, partial_at, [&](int64_t row, Partial partial) {
            if (partition > 0) merge(state(row), partial, head_dim);
        });
    }
    for (int64_t row = 0; row < item.rows(); ++row) item.write(row, state(row));
}

std::vector<Queries> cut_queries(const KnBatch& batch, int64_t group) {
    const int64_t most = std::max<int64_t>(1, kItemRows / group);
    std::vector<Queries> cut;
    for (int64_t seq = 0; seq < batch.num_seqs; ++seq) {
        const int64_t begin = batch.query_starts[seq];
        const int64_t end = batch.query_starts[seq + 1];
        const int64_t* table = batch.block_tables + seq * batch.block_table_stride;
        for (int64_t row = begin; row < end; row += most) {
            cut.push_back({table, row, std::min(most, end - row), batch.context_lens[seq] + row - begin});
        }
    }
    // The longest first: a long item at the end would leave the other threads idle.
    std::stable_sort(cut.begin(), cut.end(), [](const Queries& a, const Queries& b) {
        return a.count * a.last_position() > b.count * b.last_position();
    });
    return cut;
}

// Few items with long contexts: every (item, partition) is handed out by itself, then each item is merged in
// order.
void attend_split(KnContext& context, const Attention& a, const std::vector<Queries>& cut,
                  int64_t partitions) {
    const int64_t floats = Partial::floats(a.head_dim);
    const int64_t scratch_floats = Scratch::floats(a.head_dim);
    const int64_t items = static_cast<int64_t>(cut.size()) * a.num_kv_heads;
    const int64_t item_partials = partitions * kItemRows;
    float* memory = context.attention_memory.at_least(context.pool.threads() * scratch_floats +
                                                      items * item_partials * floats);
    float* partials = memory + context.pool.threads() * scratch_floats;
    const auto item_at = [&](int64_t i) { return Item(a, cut[i / a.num_kv_heads], i % a.num_kv_heads); };
    const auto partial_of = [&](int64_t i, int64_t row, int64_t partition) {
        return Partial{partials + (i * item_partials + row * partitions + partition) * floats};
    };
    context.pool.parallel_for(items * partitions, 1, [&](int64_t begin, int64_t end, int worker) {
        const Scratch scratch(memory + worker * scratch_floats, a.head_dim);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t i = unit / partitions;
            const int64_t partition = unit % partitions;
            if (partition >= cut[i / a.num_kv_heads].partitions()) continue;
            const Item item = item_at(i);
            item.load_queries(scratch.queries);
            item.attend(
                partition, scratch, [&](int64_t, int64_t row) { return partial_of(i, row, partition); },
                [](int64_t, Partial) {});
        }
    });
    context.pool.parallel_for(items, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            const Item item = item_at(i);
            for (int64_t row = 0; row < item.rows(); ++row) {
                const Partial state = partial_of(i, row, 0);
                for (int64_t p = 1; p < item.partitions_of(row); ++p) {
                    merge(state, partial_of(i, row, p), a.head_dim);
                }
                item.write(row, state);
            }
        }
    });
}

}  // namespace

void attention(KnContext& context, const KnLayer& layer, const KnBatch& batch, const float* q,
               int64_t q_stride, float* out) {
    const Attention a(context.isa, layer, q, q_stride, out);
    const std::vector<Queries> cut = cut_queries(batch, a.group);
    const int64_t items = static_cast<int64_t>(cut.size()) * a.num_kv_heads;
    int64_t partitions = 0;
    for (const Queries& queries : cut) partitions = std::max(partitions, queries.partitions());
    const int threads = context.pool.threads();
    if (threads > 1 && partitions > 1 && items < 4 * threads) {
        attend_split(context, a, cut, partitions);
        return;
    }
    const int64_t scratch_floats = Scratch::floats(a.head_dim);
    float* memory = context.attention_memory.at_least(threads * scratch_floats);
    context.pool.parallel_for(items, 1, [&](int64_t begin, int64_t end, int worker) {
        const Scratch scratch(memory + worker * scratch_floats, a.head_dim);
        for (int64_t i = begin; i < end; ++i) {
            const Queries& queries = cut[i / a.num_kv_heads];
            attend_whole(Item(a, queries, i % a.num_kv_heads), queries.partitions(), a.head_dim, scratch);
        }
    });
}

}  // namespace kn

int kn_attention(KnContext* context, const KnLayer* layer, const KnBatch* batch, const float* q,
                 int64_t q_stride, float* out) {
    kn::Lock lock(context->busy);
    return kn::or_out_of_memory([&] { kn::attention(*context, *layer, *batch, q, q_stride, out); });
}
