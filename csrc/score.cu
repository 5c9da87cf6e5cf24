// CUDA: scores of additive and Gaussian attention and their gradients, by tiles of queries and keys
// in shared memory. What a query and a key make of each other never leaves the registers.
#include <type_traits>

#include "channels.cuh"
#include "score.h"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

// `Near` serves most numbers, `Far` all; the same where one form does.
template <class A, bool kAdditive>
struct Forms {
  static constexpr bool kTwo = kAdditive && std::is_same_v<A, float>;
  using Far = std::conditional_t<kAdditive, AdditiveFar, Gaussian>;
  using Near = std::conditional_t<kTwo, Additive, Far>;
  static PYDL_DEVICE bool wild(A x) { return kTwo && !(magnitude(x) <= Additive::kMost); }
};

template <class T>
PYDL_DEVICE acc_t<T> number_of(const T* p, int64_t at, bool inside) {
  return inside ? to_float(p[at]) : acc_t<T>(0);
}

// Forward: 16 x 16 threads, each with kEach queries and kEach keys; kDepth numbers of a row at a
// time, whose terms are added on their own.
constexpr int kSide = 16, kDepth = 16;

template <class A>
struct ScoreTile {
  static constexpr int kEach = sizeof(A) == 8 ? 1 : 4, kRows = kSide * kEach;
  static constexpr int kStride = kRows + 4;  // spreads the stores of a row's numbers over banks
  using Plane = A[kDepth][kStride];
};

// A thread's numbers of a tile of rows, number threadIdx.x % 16 of every 16th row.
template <class Tile, class T, class A>
PYDL_DEVICE void load_rows(A (&raw)[Tile::kEach], const T* rows, int64_t count, int64_t h,
                           int64_t width) {
#pragma unroll
  for (int i = 0; i < Tile::kEach; ++i) {
    const int row = static_cast<int>(threadIdx.x) / kDepth + i * kSide;
    raw[i] = number_of(rows, row * width + h, row < count && h < width);
  }
}

template <class Tile, int kPlanes, class A, class Make>
PYDL_DEVICE void store_planes(typename Tile::Plane* to, const A (&raw)[Tile::kEach],
                              const Make& make) {
#pragma unroll
  for (int i = 0; i < Tile::kEach; ++i) {
    A made[kPlanes];
    make(raw[i], made);
#pragma unroll
    for (int p = 0; p < kPlanes; ++p)
      to[p][threadIdx.x % kDepth][threadIdx.x / kDepth + i * kSide] = made[p];
  }
}

// One form on one tile: planes to shared memory, then every pair of the thread.
template <class F, class Tile, class A>
PYDL_DEVICE void add_tile(A (&totals)[Tile::kEach][Tile::kEach], typename Tile::Plane* query,
                          typename Tile::Plane* key, const A* weight, const A (&raw_q)[Tile::kEach],
                          const A (&raw_k)[Tile::kEach]) {
  constexpr int kEach = Tile::kEach;
  using Several = Pack<A, kEach>;
  store_planes<Tile, F::kQuery>(query, raw_q,
                                [](A x, A(&made)[F::kQuery]) { F::of_query(x, made); });
  store_planes<Tile, F::kKey>(key, raw_k, [](A x, A(&made)[F::kKey]) { F::of_key(x, made); });
  __syncthreads();
  const int left = static_cast<int>(threadIdx.x) / kSide * kEach;
  const int right = static_cast<int>(threadIdx.x) % kSide * kEach;
  A sums[kEach][kEach] = {};
#pragma unroll 1
  for (int h = 0; h < kDepth; ++h) {
    Several q[F::kQuery], k[F::kKey];
#pragma unroll
    for (int p = 0; p < F::kQuery; ++p)
      q[p] = *reinterpret_cast<const Several*>(&query[p][h][left]);
#pragma unroll
    for (int p = 0; p < F::kKey; ++p) k[p] = *reinterpret_cast<const Several*>(&key[p][h][right]);
    const A w = weight[h];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      A one[F::kQuery];
#pragma unroll
      for (int p = 0; p < F::kQuery; ++p) one[p] = q[p].values[i];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        A other[F::kKey];
#pragma unroll
        for (int p = 0; p < F::kKey; ++p) other[p] = k[p].values[j];
        sums[i][j] = F::add_term(sums[i][j], F::meet(one, other), w);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) totals[i][j] += sums[i][j];
  }
}

// Grid: tiles of keys, within them of queries, within them the batch.
template <class T, bool kAdditive>
__global__ void __launch_bounds__(kThreads, 2)
    score_fwd_kernel(acc_t<T>* scores, const T* query, const T* key, const T* weight, Score s) {
  using A = acc_t<T>;
  using Tile = ScoreTile<A>;
  using Form = Forms<A, kAdditive>;
  __shared__ __align__(16) typename Tile::Plane q_planes[Form::Near::kQuery];
  __shared__ __align__(16) typename Tile::Plane k_planes[Form::Near::kKey];
  __shared__ A weights[kDepth];
  const int64_t key_tiles = (s.keys + Tile::kRows - 1) / Tile::kRows;
  const int64_t query_tiles = (s.queries + Tile::kRows - 1) / Tile::kRows;
  const int64_t first_key = blockIdx.x % key_tiles * Tile::kRows, rest = blockIdx.x / key_tiles;
  const int64_t first_query = rest % query_tiles * Tile::kRows, b = rest / query_tiles;
  const T* const q = query + (b * s.queries + first_query) * s.width;
  const T* const k = key + (b * s.keys + first_key) * s.width;
  A totals[Tile::kEach][Tile::kEach] = {};
  for (int64_t begin = 0; begin < s.width; begin += kDepth) {
    const int64_t h = begin + threadIdx.x % kDepth;
    A raw_q[Tile::kEach], raw_k[Tile::kEach];
    load_rows<Tile>(raw_q, q, s.queries - first_query, h, s.width);
    load_rows<Tile>(raw_k, k, s.keys - first_key, h, s.width);
    bool wild = false;
#pragma unroll
    for (int i = 0; i < Tile::kEach; ++i) wild |= Form::wild(raw_q[i]) || Form::wild(raw_k[i]);
    // Also the end of reading the planes before.
    const bool far = __syncthreads_or(wild);
    if (threadIdx.x < kDepth) weights[threadIdx.x] = number_of(weight, h, h < s.width);
    if (Form::kTwo && far) {
      add_tile<typename Form::Far, Tile>(totals, q_planes, k_planes, weights, raw_q, raw_k);
    } else {
      add_tile<typename Form::Near, Tile>(totals, q_planes, k_planes, weights, raw_q, raw_k);
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::kEach; ++i) {
    const int64_t l = first_query + threadIdx.x / kSide * Tile::kEach + i;
#pragma unroll
    for (int j = 0; j < Tile::kEach; ++j) {
      const int64_t at = first_key + threadIdx.x % kSide * Tile::kEach + j;
      if (l < s.queries && at < s.keys)
        scores[(b * s.queries + l) * s.keys + at] = Form::Far::total(totals[i][j]);
    }
  }
}

// Backward: a warp's lanes are 32 columns, which do not meet, and a thread has kOwn queries of a
// column in registers. The gradient of a key is the sum over a block's warps, which goes through
// shared memory, over the tiles of a block's queries, which only it adds up, and over the pieces.
constexpr int kOwn = 4, kOwnRows = kOwn * kRows;

template <class A>
struct MeetTile {
  static constexpr int kKeys = sizeof(A) == 8 ? 8 : 16;
  static constexpr int kLoads = kKeys / kRows;
  using Plane = A[kKeys][kWarp];
  using Parts = A[kRows][kKeys][kWarp];
  using Upstream = A[kKeys][kOwnRows + 4];  // padded as ScoreTile's planes are
};

// One form on a thread's queries and the keys in shared memory; returns the weight's part.
template <class F, class Tile, class A>
PYDL_DEVICE A meet_tile(A (&dq)[kOwn], typename Tile::Parts& parts, typename Tile::Plane* key,
                        const typename Tile::Upstream& upstream, const A (&raw_q)[kOwn],
                        const A (&raw_k)[Tile::kLoads]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int i = 0; i < Tile::kLoads; ++i) {
    A made[F::kKey];
    F::of_key(raw_k[i], made);
#pragma unroll
    for (int p = 0; p < F::kKey; ++p) key[p][row + i * kRows][lane] = made[p];
  }
  __syncthreads();
  A q[kOwn][F::kQuery], dw = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) F::of_query(raw_q[i], q[i]);
#pragma unroll 1
  for (int j = 0; j < Tile::kKeys; ++j) {
    A k[F::kKey], dk = 0;
#pragma unroll
    for (int p = 0; p < F::kKey; ++p) k[p] = key[p][j][lane];
    const auto ds = *reinterpret_cast<const Pack<A, kOwn>*>(&upstream[j][row * kOwn]);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const A t = F::meet(q[i], k), by_number = ds.values[i] * F::by_number(t);
      dq[i] += by_number;
      dk += by_number;
      dw += ds.values[i] * F::by_weight(t);
    }
    parts[row][j][lane] = dk;
  }
  return dw;
}

// Grid: blocks of columns, within them the batch, within it pieces of the queries.
template <class T, bool kAdditive>
__global__ void __launch_bounds__(kThreads, 2)
    score_bwd_kernel(acc_t<T>* dquery, acc_t<T>* dkey, acc_t<T>* dweight, const acc_t<T>* dscores,
                     const T* query, const T* key, const T* weight, Score s, int64_t pieces) {
  using A = acc_t<T>;
  using Tile = MeetTile<A>;
  using Form = Forms<A, kAdditive>;
  using Far = typename Form::Far;
  __shared__ typename Tile::Plane planes[Form::Near::kKey];
  __shared__ typename Tile::Parts parts;
  __shared__ __align__(32) typename Tile::Upstream upstream;
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int64_t blocks = (s.width + kWarp - 1) / kWarp, part = blockIdx.x / blocks;
  const int64_t h = blockIdx.x % blocks * kWarp + lane, b = part % s.batch;
  const Range rows = Pieces::share(s.queries, pieces, part / s.batch);
  const bool inside = h < s.width;
  const A w = number_of(weight, h, inside);
  const T* const keys = key + b * s.keys * s.width;
  A* const dk = dkey + part * s.keys * s.width;
  A dw = 0;
  for (int64_t j = row; inside && rows.begin == rows.end && j < s.keys; j += kRows)
    dk[j * s.width + h] = 0;
  for (int64_t first = rows.begin; first < rows.end; first += kOwnRows) {
    A raw_q[kOwn], dq[kOwn] = {};
    bool wild_query = false;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t l = first + row * kOwn + i;
      raw_q[i] = number_of(query, (b * s.queries + l) * s.width + h, inside && l < rows.end);
      wild_query |= Form::wild(raw_q[i]);
    }
    for (int64_t from = 0; from < s.keys; from += Tile::kKeys) {
      A raw_k[Tile::kLoads];
      bool wild = wild_query;
#pragma unroll
      for (int i = 0; i < Tile::kLoads; ++i) {
        const int64_t j = from + row + i * kRows;
        raw_k[i] = number_of(keys, j * s.width + h, inside && j < s.keys);
        wild |= Form::wild(raw_k[i]);
      }
      // Also the end of reading what is written next.
      const bool far = __syncthreads_or(wild);
      for (int i = threadIdx.x; i < Tile::kKeys * kOwnRows; i += kThreads) {
        const int64_t l = first + i / Tile::kKeys, j = from + i % Tile::kKeys;
        upstream[i % Tile::kKeys][i / Tile::kKeys] =
            number_of(dscores, (b * s.queries + l) * s.keys + j, l < rows.end && j < s.keys);
      }
      if (Form::kTwo && far) {
        dw += meet_tile<Far, Tile>(dq, parts, planes, upstream, raw_q, raw_k);
      } else {
        dw += meet_tile<typename Form::Near, Tile>(dq, parts, planes, upstream, raw_q, raw_k);
      }
      __syncthreads();
      for (int j = row; j < Tile::kKeys && inside && from + j < s.keys; j += kRows) {
        A total = 0;
#pragma unroll
        for (int r = 0; r < kRows; ++r) total += parts[r][j][lane];
        A* const to = dk + (from + j) * s.width + h;
        total *= Far::of_dkey(w);
        *to = first == rows.begin ? total : *to + total;
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t l = first + row * kOwn + i;
      if (inside && l < rows.end)
        dquery[(b * s.queries + l) * s.width + h] = Far::of_dquery(w) * dq[i];
    }
  }
  __syncthreads();
  parts[row][0][lane] = dw;
  __syncthreads();
  if (row > 0 || !inside) return;
  A total = 0;
  for (int r = 0; r < kRows; ++r) total += parts[r][0][lane];
  dweight[part * s.width + h] = Far::of_dweight(w) * total;
}

// A grid's blocks lie in one dimension, which is the long one.
dim3 grid_of(int64_t blocks) {
  if (blocks > INT32_MAX) fail("score: %lld blocks are too many", static_cast<long long>(blocks));
  return dim3(static_cast<unsigned>(blocks));
}

template <bool kAdditive>
void forward(Stream stream, const Out& scores, const View& query, const View& key,
             const View& weight, const Score& s) {
  dispatch_float("score", query.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kTile = ScoreTile<acc_t<T>>::kRows;
    const int64_t tiles = (s.queries + kTile - 1) / kTile * ((s.keys + kTile - 1) / kTile);
    const auto kernel = &score_fwd_kernel<T, kAdditive>;
    PYDL_LAUNCH(kernel, grid_of(s.batch * tiles), dim3(kThreads), 0, stream,
                static_cast<acc_t<T>*>(scores.data), static_cast<const T*>(query.data),
                static_cast<const T*>(key.data), static_cast<const T*>(weight.data), s);
  });
}

template <bool kAdditive>
void backward(Stream stream, const Out& dquery, const Out& dkey, const Out& dweight,
              const View& dscores, const View& query, const View& key, const View& weight,
              const Score& s, int64_t pieces) {
  dispatch_float("score", query.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int64_t blocks = (s.width + kWarp - 1) / kWarp;
    const auto kernel = &score_bwd_kernel<T, kAdditive>;
    PYDL_LAUNCH(kernel, grid_of(pieces * s.batch * blocks), dim3(kThreads), 0, stream,
                static_cast<A*>(dquery.data), static_cast<A*>(dkey.data),
                static_cast<A*>(dweight.data), static_cast<const A*>(dscores.data),
                static_cast<const T*>(query.data), static_cast<const T*>(key.data),
                static_cast<const T*>(weight.data), s, pieces);
  });
}

void score_fwd(Stream stream, Out scores, View query, View key, View weight, int64_t form) {
  const Score s = Score::of("score", query, key, weight, form);
  s.check_scores("score", scores, query);
  if (scores.numel == 0) return;
  (form == 0 ? forward<true> : forward<false>)(stream, scores, query, key, weight, s);
}

void score_bwd(Stream stream, Out dquery, Out dkey, Out dweight, View dscores, View query, View key,
               View weight, int64_t form) {
  const Score s = Score::of("score", query, key, weight, form);
  s.check_scores("score", dscores, query);
  const int64_t pieces = s.check_gradients("score", dquery, dkey, dweight, query);
  if (s.batch == 0 || s.width == 0) return;
  (form == 0 ? backward<true> : backward<false>)(stream, dquery, dkey, dweight, dscores, query, key,
                                                 weight, s, pieces);
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;
EXPORT(cuda, score_fwd, "scores, query, key, weight, form", score_fwd)
EXPORT(cuda, score_bwd, "dquery, dkey, dweight, dscores, query, key, weight, form", score_bwd)
