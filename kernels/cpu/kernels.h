// What one instruction set offers: plain functions over plain memory, each computing one tile.
//
// A job describes a whole operation and lives on the caller's stack; the thread pool hands out its
// tiles. Strides are in elements. Results for one row never depend on what else is in the job.
#pragma once

#include <stdint.h>

namespace headgate {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Of caches only: signed bytes, with a scale for every position and head.
constexpr int32_t kScaledBytes = 5;

// Bytes of a number in a cache.
static inline int item_size(int32_t dtype) {
  return dtype == kFloat32 ? 4 : dtype == kScaledBytes ? 1 : 2;
}

// Beside float32 inputs with weights of a DType, a product takes bfloat16 weights with inputs that are
// rounded to bfloat16 first: as such values in floats, or in pairs for an instruction that
// multiplies pairs.
enum Rounded : int32_t { kRounded = 3, kRoundedPairs = 4 };
static constexpr bool in_pairs(int32_t product) {
  return product == kRounded || product == kRoundedPairs;
}
// Attention over bytes with scales multiplies bytes where a model's products round their inputs: by an instruction
// for four of them, or without it.
enum Bytes : int32_t { kBytes = 6, kByteDots = 7 };
static constexpr bool in_bytes(int32_t product) { return product == kBytes || product == kByteDots; }

// Packed weights come in panels of so many output columns, whatever the instruction set.
constexpr int kPanel = 32;
// Rows of the input that one inner loop takes at most; packed inputs are padded to nothing: a tile
// of m rows is stored as [K][m], for kRoundedPairs as [K / 2][m] pairs, each the first one in the
// upper half, an odd K padded with zeros.
constexpr int kMaxTileRows = 12;

// y[M, N] = x[M, K] w[N, K]^T + bias[N]
struct LinearJob {
  const float* x;         // row tiles (see InputRowsJob), or x itself where M is 1
  const void* weight;     // packed panels
  const float* bias;      // or null
  float* y;
  int64_t rows, inner, columns;
  int64_t y_stride;
  int32_t product;        // a DType, or kRoundedPairs
  int32_t row_tiles;      // x is cut into so many tiles of nearly equal height
  int32_t row_groups;     // and these into so many groups
  int32_t sharing;        // threads that take a group's tiles, probably
  int64_t panel_tiles;    // of each group
  int64_t panels_per_tile;
};

// Where a product's inputs [M, K] come from: rows of x; with `norm`, after an rms_norm of x + residual,
// which is left in `total`; with `activation`, activation(gate) * up of x[M, 2K] = [gate, up].
struct RowSource {
  const float* x;
  int64_t x_stride;
  const float* norm;                         // weight [K], or null
  const float* residual;                     // or null
  int64_t residual_stride;
  float* total;                              // [M, K] without gaps, where there is a residual
  float eps;
  int32_t activation;                        // or -1
  int64_t up;                                // of gate's columns to up's: K, where both are whole
};

// How they are laid out for it: in row tiles of [K][m] floats, as they are or rounded to bfloat16; of
// [K / 2][m] pairs of such (see kRoundedPairs); or of groups of bytes, or of such in 16 bits (see
// quantised.h).
enum InputFormat : int32_t {
  kFloats = 0, kRoundedFloats = 1, kPairs = 2, kInt8Inputs = 3, kInt8Words = 4, kInt4Inputs = 5
};
constexpr int kInputColumns = 64;  // columns worked on at once

struct InputRowsJob {
  RowSource source;
  char* out;
  int64_t rows, inner;
  int32_t row_tiles, format;
  int64_t parts;                             // each row tile's columns are cut into so many
};

// Rows [first, last) of row tile `tile` when `rows` are cut into `tiles`.
struct RowRange {
  int64_t first, last;
};
static inline RowRange row_range(int64_t rows, int64_t tiles, int64_t tile) {
  return {rows * tile / tiles, rows * (tile + 1) / tiles};
}

// The ranges of `tile` and those after it, one by one, without a division for each: beside a tile of few
// multiply-adds it would be noticed.
class RowWalk {
 public:
  RowWalk(int64_t rows, int64_t tiles, int64_t tile)
      : tiles_(tiles), least_(rows / tiles), excess_(rows % tiles),
        first_(rows * tile / tiles), saved_(rows * tile % tiles) {}
  RowRange next() {
    const int64_t first = first_;
    first_ += least_;
    saved_ += excess_;
    if (saved_ >= tiles_) saved_ -= tiles_, ++first_;
    return {first, first_};
  }

 private:
  int64_t tiles_, least_, excess_;
  int64_t first_, saved_;  // rows * tile = first_ * tiles_ + saved_
};

constexpr int kMaxHeadDim = 256;
// Query rows (tokens times heads of a group) that one tile of attention takes.
constexpr int kQueryTile = 64;
// Up to so many query rows of a head, vectors run over keys; kLanes divides their dimensions then.
constexpr int kFewQueries = 12;
constexpr int kLanes = 8;  // chains that a score is the sum of, whatever the instruction set
constexpr int kPairedDims = 2 * kLanes;  // pairs of dimensions are taken where this divides them
constexpr int kByteDims = 4 * kLanes;    // and four bytes
static inline bool is_few(int queries, int dim) {
  return queries <= kFewQueries && dim % kLanes == 0;
}
// Keys are taken in blocks and partitions that start at multiples of these absolute positions,
// for every kind of row: this fixes the order of all sums.
constexpr int kKeyBlock = 64;
constexpr int kPartition = 256;

// A part of the work on one row and key/value heads that lie side by side; or on one head of rows of few
// tokens that share the item's keys.
struct AttentionItem {
  int32_t row, kv_head, kv_count;
  int32_t query_first, query_count;          // of each: query rows, token-major over its group
  int32_t partition_first, partition_last;   // partitions of keys [first, last)
  int32_t token_first;                       // the first of its `sharer_tokens`; -1: `row` alone
  int64_t partial;                           // where to leave results in `partials`; -1: in `out`
  int64_t cost;                              // nanoseconds, roughly
};

// A row of few tokens whose first keys, before all of those, other rows have too.
struct Sharer {
  int32_t row;
  int32_t queries;                           // of each key/value head
  int32_t partitions;                        // of its keys
  int32_t shared;                            // of those, the leading ones that items of several rows take
  int32_t together;                          // heads an item of its other partitions has; the last one may have fewer
  int64_t partial;                           // of those heads' first partition; the others follow, then the next heads
};

// A token of a sharer's row.
struct SharerToken {
  int32_t sharer, token;
};

struct AttentionJob {
  int64_t number;                            // no other has the same
  const float* q;
  const void* k_cache;
  const void* v_cache;
  float* out;                                // [T, H, D] without gaps
  const int32_t* cu_query_lens;
  const int32_t* context_lens;
  const int32_t* block_tables;
  const Sharer* sharers;
  const SharerToken* sharer_tokens;
  const AttentionItem* items;
  int64_t item_count, item_stride;           // a thread's next item, probably: the one so much later
  const float* k_scales;                     // [blocks, kv_heads, block_size], or null
  const float* v_scales;
  float* partials;
  int64_t q_token_stride, q_head_stride, table_stride;
  int32_t rows, heads, kv_heads, head_dim, block_size, cache_dtype;
  int32_t product;                           // cache_dtype, of Rounded, or of Bytes
  int32_t window;                            // 0: none
  float scale, soft_cap;                     // 0: none
};

// Floats that n query rows leave of a partition, each its maximum, sum, and weighted sum of values.
static inline int64_t partial_size(int64_t query_rows, int64_t head_dim) {
  return query_rows * (2 + head_dim);
}

// Puts the partials of one item together in ascending order of their keys.
struct MergeItem {
  int32_t row, kv_head, kv_count;
  int32_t query_first, query_count;
  int32_t partitions;
  int64_t partial;                           // the first one's place; the others follow
};
struct MergeJob {
  const AttentionJob* attention;
  const MergeItem* items;
};

struct EmbeddingJob {
  const int64_t* ids;
  const void* table;                         // [rows, size], the first row for `first_id`
  float* out;
  int64_t tokens, tokens_per_tile, rows, size, first_id;
  int32_t dtype;
};

struct NormJob {
  const float* x;
  const float* residual;                     // or null
  const float* weight;
  float* out;
  float* total;                              // x + residual, where there is a residual
  int64_t rows, size, rows_per_tile;
  int64_t x_stride, residual_stride;
  float eps;
};

enum Activation : int32_t { kSilu = 0, kGeluTanh = 1, kGeluErf = 2 };
struct GateJob {
  const float* x;                            // [rows, 2 * size] = [gate, up]
  float* out;                                // [rows, size]
  int64_t rows, size, rows_per_tile, x_stride;
  int32_t activation;
};

struct RotaryJob {
  float* q;                                  // both are rotated in place
  float* k;
  const int64_t* positions;
  const float* cos_sin;                      // [positions, rotary_dim]
  int64_t tokens, tokens_per_tile;
  int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride;
  int32_t heads, kv_heads, rotary_dim;
};

struct WriteKvJob {
  const float* k;
  const float* v;
  void* k_cache;
  void* v_cache;
  float* k_scales;                           // [blocks, kv_heads, block_size], or null
  float* v_scales;
  const int64_t* slots;
  int64_t tokens, tokens_per_tile;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  int32_t kv_heads, head_dim, cache_dtype, block_size;
};

// A norm of every query and key, at wish; then RotaryJob and WriteKvJob, token by token.
struct HeadsJob {
  RotaryJob rotary;
  WriteKvJob write;
  const float* q_norm;                       // [head_dim], both or none
  const float* k_norm;
  float eps;
};

constexpr int kGumbelTile = 2048;  // tokens
struct GumbelBest {
  float sum;
  int64_t token;  // -1: none has a score
};
struct GumbelJob {
  const float* scores;                       // [size]
  GumbelBest* found;                         // of each tile
  int64_t size;
  uint64_t seed;
  uint32_t position, sample_index;
  float best, temperature;                   // the sum's score is (score - best) / temperature
};

struct ArgmaxJob {
  const float* scores;                       // [rows, size]
  int64_t* tokens;                           // [rows]
  int64_t size;
};

struct Kernels {
  const char* name;
  int tile_rows;  // tallest row tile of linear
  bool pairs;     // whether there is kRoundedPairs, on a machine with AVX512_BF16, and kByteDots, with AVX512_VNNI
  void (*input_rows)(const void* job, int64_t tile);
  void (*linear)(const void* job, int64_t tile);
  void (*attention)(const void* job, int64_t tile);
  void (*attention_merge)(const void* job, int64_t tile);
  void (*embedding)(const void* job, int64_t tile);
  void (*rms_norm)(const void* job, int64_t tile);
  void (*gate)(const void* job, int64_t tile);
  void (*rotary)(const void* job, int64_t tile);
  void (*heads)(const void* job, int64_t tile);
  void (*gumbel)(const void* job, int64_t tile);
  void (*argmax)(const void* job, int64_t tile);
  void (*write_kv)(const void* job, int64_t tile);
};

// Whether the processor is Intel's: how memory is read best differs by maker.
bool is_intel();

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace headgate
