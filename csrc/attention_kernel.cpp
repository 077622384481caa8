// Exact attention of one tile of query rows: online softmax (Milakov and Gimelshein 2018) over blocks of keys
// (Dao et al. 2022), accumulated in fp32.
//
// Compiled once per instruction set with FAP_KERNEL naming the table at the end; see attention.h for what this file
// must therefore not include.
//
// A *row* is one query of one head; the rows of the query heads that share a kv head lie side by side
// (row = query * group + head), so that one packed block of keys serves them all. A *panel* is up to kPanel rows, one
// per vector lane: scores and output are kept transposed, [key][row] and [dim][row]. The softmax then works lane by
// lane, keys are read in their natural order, and a single query of many heads still fills vectors.
#include <math.h>
#include <string.h>

#include "attention.h"
#include "vectors.h"

namespace flash_attn_plus {
namespace {

// Register block of both matrix products: kRows broadcast values times kVecs vectors of rows.
// AVX2: 4 x 3 accumulators, 3 loaded vectors and 1 broadcast are exactly the 16 registers, and 7 loads feed 12 FMAs.
// Clang spills one of the 12, which halves the speed; it gets 8.
#if defined(__AVX512F__)
constexpr int kRows = 8, kVecs = 3;
#elif defined(__AVX2__) && !defined(__clang__)
constexpr int kRows = 4, kVecs = 3;
#elif defined(__aarch64__)
constexpr int kRows = 4, kVecs = 4;
#else
constexpr int kRows = 4, kVecs = 2;
#endif
constexpr int kPanel = kVecs * kLanes;
constexpr int64_t kMaxRows = 384;          // of a tile: every tile packs the keys it sees anew
constexpr int64_t kRowsBytes = 384 << 10;  // of queries and output of a tile, read once per block of keys
constexpr int64_t kKeysBytes = 128 << 10;  // of packed keys and values, read once per panel: a quarter of a small L2
constexpr int64_t kPrefetch = 8;           // keys ahead: those of a head lie too far apart for the hardware to foresee
constexpr int64_t kMaxKeys = 128;
constexpr int64_t kSumLength = 128;  // of one running fp32 sum; longer ones are summed in pieces, to lose less
constexpr int64_t kTilesPerThread = 6;  // at least, where there are so many; larger tiles pack less
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// Rows of the register block for N vectors: a single vector needs more of them to cover the latency of an FMA.
template <int N>
constexpr int kRowsFor = N == 1 ? kLanes : kRows;
static_assert(kLanes % kRows == 0, "a register block of values lies within one packed vector");

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }
int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

// Sizes that follow from the shape, and where things lie in the workspace (in floats).
struct Plan {
  int64_t group, rows;            // query heads per kv head; rows per kv head
  int64_t tile_rows, row_tiles;   // rows of a tile; tiles per kv head
  int64_t keys;                   // of one block; blocks start at its multiples, whatever the tile
  int64_t dim_v;                  // padded
  int64_t key_stride, value_stride, panel_q, panel_out;
  int64_t k, v, scores, row, q, out, shift, sum, query, end;

  explicit Plan(const Attention& a) {
    group = a.heads_k ? a.heads / a.heads_k : 1;
    rows = a.seqlen_q * group;
    dim_v = round_up(a.dim_v, kLanes);
    panel_q = a.dim * kPanel;
    panel_out = dim_v * kPanel;

    const int64_t all_panels = larger(1, ceil_div(rows, kPanel));
    const int64_t fitting = smaller(kMaxRows / kPanel, kRowsBytes / (4 * (panel_q + panel_out)));
    const int64_t wanted = kTilesPerThread * a.threads;
    int64_t panels = larger(1, smaller(fitting, all_panels));
    while (panels > 1 && a.batch * a.heads_k * ceil_div(all_panels, panels) < wanted) panels = ceil_div(panels, 2);
    tile_rows = panels * kPanel;
    row_tiles = ceil_div(rows, tile_rows);

    keys = kMaxKeys;
    while (keys > 32 && keys * (a.dim + dim_v) * 4 > kKeysBytes) keys /= 2;

    key_stride = round_up(a.dim, kLanes);
    value_stride = keys * kLanes + kLanes;  // off a power of two: the writes of one key must not share a cache set
    k = 0;
    v = k + keys * key_stride;
    scores = v + dim_v / kLanes * value_stride;
    row = scores + keys * kPanel;
    q = row + round_up(larger(a.dim, dim_v), kLanes);
    out = q + panels * panel_q;
    shift = out + panels * panel_out;
    sum = shift + panels * kPanel;
    query = sum + panels * kPanel;
    end = query + panels * kPanel;
  }
};

// Up to kPanel rows and their running softmax.
struct Panel {
  float* q;        // [dim][width], width = the panel's vectors * kLanes
  float* out;      // [dim_v][width], not yet divided by the sum
  float* shift;    // [width] running maximum of the scaled scores, in powers of two
  float* sum;      // [width]
  int32_t* query;  // [width] each row's query, counted from first_query
  int64_t first_query, last_query;
};

// The packed keys that are at hand: [begin, end) of the whole sequence, keys and values from `start` on.
struct Block {
  const float* k;  // [key][key_stride]
  const float* v;  // [dim_v / kLanes][key][kLanes], value_stride apart
  int64_t start, begin, end;
  bool finite;  // no infinity and no NaN among the values
};

// ---- loading and storing rows

// Elements i .. i + kLanes - 1 of a row of n, zero past its end.
template <class T>
FAP_INLINE Vec load_some(T type, const typename T::Bits* row, int64_t i, int64_t n) {
  if (i + kLanes <= n) return widen(type, row + i);
  typename T::Bits tail[kLanes] = {};
  memcpy(tail, row + i, (n - i) * sizeof(tail[0]));
  return widen(type, tail);
}

template <class T>
FAP_INLINE void store_some(T type, Vec x, typename T::Bits* row, int64_t i, int64_t n) {
  if (i + kLanes <= n) return narrow(type, x, row + i);
  typename T::Bits tail[kLanes];
  narrow(type, x, tail);
  memcpy(row + i, tail, (n - i) * sizeof(tail[0]));
}

template <class T>
FAP_INLINE const typename T::Bits* row_at(T, const Operand& x, int64_t batch, int64_t row, int64_t head) {
  return static_cast<const typename T::Bits*>(x.data) + batch * x.batch_stride + row * x.row_stride +
      head * x.head_stride;
}

template <class T>
FAP_INLINE void prefetch_row(T, const typename T::Bits* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(*row))) __builtin_prefetch(row + i);
}

// ---- the two matrix products

template <int N>
struct Accumulator {
  Vec at[kRowsFor<N>][N];
};

// acc[r][n] = sum over i < count of a[r * a_row + i * a_step] * b[i][n], summed in the same order for every N, so that
// a row's result does not depend on how rows are divided into panels. skip_zeros drops the terms with b == 0, whatever
// a is.
template <int N, bool skip_zeros>
FAP_INLINE Accumulator<N> multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t count) {
  Accumulator<N> acc = {};
  for (int64_t i = 0; i < count; ++i) {
    Vec column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) column[n] = load(b + (i * N + n) * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRowsFor<N>; ++r) {
      const Vec x = broadcast(a[r * a_row + i * a_step]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        if (skip_zeros) {
          const Vec sum = acc.at[r][n] + x * column[n];
          acc.at[r][n] = column[n] == Vec{} ? acc.at[r][n] : sum;
        } else {
          acc.at[r][n] += x * column[n];
        }
      }
    }
  }
  return acc;
}

// Sets the scores that the mask hides to -infinity; `key` is the first key.
template <int N>
FAP_INLINE void hide(const Attention& a, const Panel& panel, int64_t key, Accumulator<N>& scores) {
  for (int r = 0; r < kRowsFor<N>; ++r) {
    // j = key + r is seen by the queries j - last .. j - first, counted from the panel's first.
    const int64_t j = key + r - panel.first_query;
    const bool exists = key + r < a.seqlen_k;
    const int32_t low = static_cast<int32_t>(larger(-1, smaller(j - a.last, kPanel)));
    const int32_t high = exists ? static_cast<int32_t>(larger(-1, smaller(j - a.first, kPanel))) : -1;
    for (int n = 0; n < N; ++n) {
      const IntVec query = *reinterpret_cast<const IntVec*>(panel.query + n * kLanes);
      const IntVec seen = (query >= broadcast(low)) & (query <= broadcast(high));
      scores.at[r][n] = seen ? scores.at[r][n] : broadcast(-kInfinity);
    }
  }
}

template <int N, bool skip_zeros>
void add_values(
    const Plan& plan, const float* probabilities, const float* v, int64_t count, const Vec* decay, float* out) {
  for (int64_t c = 0; c < plan.dim_v; c += kRowsFor<N>) {
    const float* columns = v + c / kLanes * plan.value_stride + c % kLanes;
    const Accumulator<N> acc = multiply<N, skip_zeros>(columns, 1, kLanes, probabilities, count);
#pragma GCC unroll 16
    for (int r = 0; r < kRowsFor<N>; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        float* at = out + ((c + r) * N + n) * kLanes;
        store(at, load(at) * decay[n] + acc.at[r][n]);
      }
    }
  }
}

// One block of keys for one panel of N vectors.
template <int N>
void attend(const Attention& a, const Plan& plan, const Block& block, const Panel& panel, float* scores) {
  const int64_t begin = larger(block.begin, panel.first_query + a.first);
  const int64_t end = smaller(block.end, panel.last_query + a.last + 1);
  if (begin >= end) return;
  // Every row sees the keys in [all_begin, all_end).
  const int64_t all_begin = panel.last_query + a.first;
  const int64_t all_end = smaller(panel.first_query + a.last + 1, a.seqlen_k);
  constexpr int kStep = kRowsFor<N>;
  const int64_t low = (begin - block.start) / kStep * kStep;
  const int64_t high = round_up(end - block.start, kStep);

  bool masked = false;
  Vec best[N];
  for (int n = 0; n < N; ++n) best[n] = broadcast(-kInfinity);
  for (int64_t j = low; j < high; j += kStep) {
    const float* k = block.k + j * plan.key_stride;
    Accumulator<N> acc = multiply<N, false>(k, plan.key_stride, 1, panel.q, smaller(a.dim, kSumLength));
    for (int64_t d = kSumLength; d < a.dim; d += kSumLength) {
      const float* q = panel.q + d * N * kLanes;
      const Accumulator<N> more = multiply<N, false>(k + d, plan.key_stride, 1, q, smaller(a.dim - d, kSumLength));
#pragma GCC unroll 16
      for (int r = 0; r < kRowsFor<N>; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc.at[r][n] += more.at[r][n];
      }
    }
    const int64_t key = block.start + j;
    if (key < all_begin || key + kStep > all_end) {
      hide(a, panel, key, acc);
      masked = true;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRowsFor<N>; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        store(scores + ((j + r) * N + n) * kLanes, acc.at[r][n]);
        best[n] = max(acc.at[r][n], best[n]);
      }
    }
  }

  Vec shift[N], decay[N], sum[N];
  for (int n = 0; n < N; ++n) {
    const Vec before = load(panel.shift + n * kLanes);
    const Vec now = max(best[n], before);
    store(panel.shift + n * kLanes, now);
    shift[n] = now == broadcast(-kInfinity) ? Vec{} : now;  // nothing seen yet: keep -inf - -inf out
    decay[n] = exp2_nonpositive(before - shift[n]);
    sum[n] = Vec{};
  }
  for (int64_t j = low; j < high; ++j) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* at = scores + (j * N + n) * kLanes;
      const Vec p = exp2_nonpositive(load(at) - shift[n]);
      store(at, p);
      sum[n] += p;
    }
  }
  for (int n = 0; n < N; ++n) {
    float* at = panel.sum + n * kLanes;
    store(at, load(at) * decay[n] + sum[n]);
  }

  const float* p = scores + low * N * kLanes;
  const float* v = block.v + low * kLanes;
  if (masked && !block.finite) {
    // A hidden key counts for nothing even when its value is not finite: 0 * inf would be NaN.
    add_values<N, true>(plan, p, v, high - low, decay, panel.out);
  } else {
    add_values<N, false>(plan, p, v, high - low, decay, panel.out);
  }
}

// ---- one tile

struct Tile {
  int64_t batch, head_k, first_row, rows;
};

// Copies keys and values [block.start, block.start + n) into the workspace as fp32, padded to a multiple of kLanes
// with zeros.
template <class T>
void pack(T type, const Attention& a, const Plan& plan, const Tile& tile, int64_t n, Block& block, float* w) {
  float *k = w + plan.k, *v = w + plan.v;
  Vec zero = {};  // stays zero unless it meets an infinity or a NaN
  for (int64_t j = 0; j < n; ++j) {
    const int64_t ahead = smaller(block.start + j + kPrefetch, a.seqlen_k - 1);
    prefetch_row(type, row_at(type, a.k, tile.batch, ahead, tile.head_k), a.dim);
    prefetch_row(type, row_at(type, a.v, tile.batch, ahead, tile.head_k), a.dim_v);
    const auto* key = row_at(type, a.k, tile.batch, block.start + j, tile.head_k);
    for (int64_t d = 0; d < a.dim; d += kLanes) store(k + j * plan.key_stride + d, load_some(type, key, d, a.dim));
    const auto* value = row_at(type, a.v, tile.batch, block.start + j, tile.head_k);
    for (int64_t d = 0; d < a.dim_v; d += kLanes) {
      const Vec x = load_some(type, value, d, a.dim_v);
      zero += x * broadcast(0.0f);
      store(v + d / kLanes * plan.value_stride + j * kLanes, x);
    }
  }
  for (int64_t j = n; j < round_up(n, kLanes); ++j) {
    for (int64_t d = 0; d < a.dim; d += kLanes) store(k + j * plan.key_stride + d, Vec{});
    for (int64_t d = 0; d < a.dim_v; d += kLanes) store(v + d / kLanes * plan.value_stride + j * kLanes, Vec{});
  }
  block.k = k;
  block.v = v;
  block.finite = true;
  for (int i = 0; i < kLanes; ++i) block.finite &= zero[i] == 0.0f;
}

Panel panel_at(const Plan& plan, const Tile& tile, int64_t p, float* w) {
  Panel panel;
  panel.q = w + plan.q + p * plan.panel_q;
  panel.out = w + plan.out + p * plan.panel_out;
  panel.shift = w + plan.shift + p * kPanel;
  panel.sum = w + plan.sum + p * kPanel;
  panel.query = reinterpret_cast<int32_t*>(w + plan.query + p * kPanel);
  const int64_t first = tile.first_row + p * kPanel;
  const int64_t last = smaller(tile.first_row + tile.rows, first + kPanel) - 1;
  panel.first_query = first / plan.group;
  panel.last_query = last / plan.group;
  return panel;
}

int64_t rows_of(const Tile& tile, int64_t p) { return smaller(kPanel, tile.rows - p * kPanel); }
int64_t width_of(int64_t rows) { return round_up(rows, kLanes); }

// Where row `row` of the tile lies: in the queries, and in the output.
struct Row {
  int64_t query, head;
  Row(const Plan& plan, const Tile& tile, int64_t row)
      : query((tile.first_row + row) / plan.group),
        head(tile.head_k * plan.group + (tile.first_row + row) % plan.group) {}
};

template <class T>
FAP_INLINE const typename T::Bits* query_at(T type, const Attention& a, const Tile& tile, Row row) {
  return row_at(type, a.q, tile.batch, row.query, row.head);
}

template <class T>
FAP_INLINE typename T::Bits* out_at(T, const Attention& a, const Tile& tile, Row row) {
  return static_cast<typename T::Bits*>(a.out) +
      ((tile.batch * a.seqlen_q + row.query) * a.heads + row.head) * a.dim_v;
}

template <class T>
void start(T type, const Attention& a, const Plan& plan, const Tile& tile, int64_t p, float scale, float* w) {
  const Panel panel = panel_at(plan, tile, p, w);
  const int64_t rows = rows_of(tile, p), width = width_of(rows);
  float* row = w + plan.row;
  memset(panel.q, 0, a.dim * width * sizeof(float));
  memset(panel.out, 0, plan.dim_v * width * sizeof(float));
  for (int64_t i = 0; i < width; ++i) {
    panel.shift[i] = -kInfinity;
    panel.sum[i] = 0;
    const Row at(plan, tile, p * kPanel + smaller(i, rows - 1));
    panel.query[i] = static_cast<int32_t>(at.query - panel.first_query);
    if (i >= rows) continue;
    const Row ahead(plan, tile, smaller(p * kPanel + i + kPrefetch, tile.rows - 1));
    prefetch_row(type, query_at(type, a, tile, ahead), a.dim);
    const auto* query = query_at(type, a, tile, at);
    for (int64_t d = 0; d < a.dim; d += kLanes) store(row + d, load_some(type, query, d, a.dim) * broadcast(scale));
    for (int64_t d = 0; d < a.dim; ++d) panel.q[d * width + i] = row[d];
  }
}

template <class T>
void finish(T type, const Attention& a, const Plan& plan, const Tile& tile, int64_t p, float* w) {
  const Panel panel = panel_at(plan, tile, p, w);
  const int64_t rows = rows_of(tile, p), width = width_of(rows);
  float* row = w + plan.row;
  for (int64_t i = 0; i < rows; ++i) {
    const Row at(plan, tile, p * kPanel + i), ahead(plan, tile, smaller(p * kPanel + i + kPrefetch, tile.rows - 1));
    prefetch_row(type, out_at(type, a, tile, ahead), a.dim_v);
    const float sum = panel.sum[i];
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;  // a row that sees no key: 0, not NaN
    for (int64_t d = 0; d < a.dim_v; ++d) row[d] = panel.out[d * width + i];
    auto* out = out_at(type, a, tile, at);
    for (int64_t d = 0; d < a.dim_v; d += kLanes) {
      store_some(type, load(row + d) * broadcast(inverse), out, d, a.dim_v);
    }
    a.lse[(tile.batch * a.heads + at.head) * a.seqlen_q + at.query] =
        sum == 0.0f ? -kInfinity : panel.shift[i] * kLn2 + logf(sum);
  }
}

// attend<N> for the N that the width of the panel asks for.
template <int N>
void attend_width(
    const Attention& a, const Plan& plan, const Block& block, const Panel& panel, int64_t width, float* scores) {
  if constexpr (N > 1) {
    if (width < N * kLanes) return attend_width<N - 1>(a, plan, block, panel, width, scores);
  }
  attend<N>(a, plan, block, panel, scores);
}

template <class T>
void run_tile(T type, const Attention& a, const Plan& plan, const Tile& tile, float* w) {
  // The whole scale goes into the queries, so that a running maximum is one of the scores and no difference to it is
  // above zero: a product rounded once in the maximum and not at all in an FMA would be, for very large scores.
  const float scale = a.scale * kLog2E;

  const int64_t panels = ceil_div(tile.rows, kPanel);
  for (int64_t p = 0; p < panels; ++p) start(type, a, plan, tile, p, scale, w);

  const int64_t first_query = tile.first_row / plan.group;
  const int64_t last_query = (tile.first_row + tile.rows - 1) / plan.group;
  const int64_t begin = larger(0, first_query + a.first);
  const int64_t end = smaller(a.seqlen_k, last_query + a.last + 1);

  Block block;
  // All rows may lie before the first key or past the last one.
  for (int64_t start = begin < end ? begin / plan.keys * plan.keys : end; start < end; start += plan.keys) {
    block.begin = larger(begin, start);
    block.end = smaller(end, start + plan.keys);
    block.start = block.begin / kLanes * kLanes;
    const int64_t n = smaller(a.seqlen_k - block.start, round_up(block.end - block.start, kLanes));
    pack(type, a, plan, tile, n, block, w);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t width = width_of(rows_of(tile, p));
      attend_width<kVecs>(a, plan, block, panel_at(plan, tile, p, w), width, w + plan.scores);
    }
  }
  for (int64_t p = 0; p < panels; ++p) finish(type, a, plan, tile, p, w);
}

int64_t tiles(const Attention& a) { return a.batch * a.heads_k * Plan(a).row_tiles; }

int64_t workspace(const Attention& a) { return Plan(a).end * static_cast<int64_t>(sizeof(float)); }

void run(const Attention& a, int64_t index, float* w) {
  const Plan plan(a);
  const int64_t heads = a.batch * a.heads_k;
  Tile tile;
  // The last rows first: under a causal mask they see the most keys.
  tile.first_row = (plan.row_tiles - 1 - index / heads) * plan.tile_rows;
  tile.rows = smaller(plan.tile_rows, plan.rows - tile.first_row);
  tile.batch = index % heads / a.heads_k;
  tile.head_k = index % heads % a.heads_k;
  if (a.dtype == Dtype::kFloat) {
    run_tile(Float{}, a, plan, tile, w);
  } else if (a.dtype == Dtype::kBFloat16) {
    run_tile(BFloat16{}, a, plan, tile, w);
  } else {
    run_tile(Half{}, a, plan, tile, w);
  }
}

}  // namespace

#define FAP_STRING_(x) #x
#define FAP_STRING(x) FAP_STRING_(x)
#define FAP_JOIN_(a, b) a##b
#define FAP_JOIN(a, b) FAP_JOIN_(a, b)

extern const Kernel FAP_JOIN(kernel_, FAP_KERNEL) = {FAP_STRING(FAP_KERNEL), tiles, workspace, run};

}  // namespace flash_attn_plus
