// The CUDA kernels of attention backward whose blocks have a tile of queries, for dQ and the
// relative bias' gradient, or a tile of the mask, for its gradient.
#pragma once

#include "attention_backward.cuh"

namespace pydl {
inline namespace PYDL_ISA {

// What a block of the next two kernels has of its queries.
template <class T, int kWidth>
struct QueryTiles {
  using S = BackwardShape<T, kWidth>;
  using A = acc_t<T>;
  Shared<T, kWidth> q, dout;
  T* memory;
  PYDL_DEVICE explicit QueryTiles(T* from)
      : q{from}, dout{from + S::kRows * kWidth}, memory(from) {}
  PYDL_DEVICE Shared<T, kWidth> keys(int stage) const {
    return {memory + (2 * S::kRows + 2 * stage * S::kInner) * kWidth};
  }
  PYDL_DEVICE Shared<T, kWidth> values(int stage) const {
    return {memory + (2 * S::kRows + (2 * stage + 1) * S::kInner) * kWidth};
  }
  PYDL_DEVICE A* rooms() const {
    return reinterpret_cast<A*>(reinterpret_cast<unsigned char*>(memory) + S::kTiled + S::kNumbers);
  }
  PYDL_DEVICE void fetch_queries(const Attention& a, const BackwardCall& c,
                                 const Attention::Sequence& s, int64_t h, int64_t q0) const {
    const int64_t left = s.queries - q0;
    const int count = static_cast<int>(left < 0 ? 0 : left < S::kRows ? left : S::kRows);
    load_tile<S::kThreadsOfBlock, S::kRows>(
        q, static_cast<const T*>(a.q.data) + a.q.at(s.b, h, s.first_q + q0, 0), a.q.strides[2],
        count, static_cast<int>(a.width), c.wide);
    load_tile<S::kThreadsOfBlock, S::kRows>(
        dout, static_cast<const T*>(c.g.dout.data) + c.g.dout.at(s.b, h, s.first_q + q0, 0),
        c.g.dout.strides[2], count, static_cast<int>(a.value_width), c.wide_dout);
  }
  PYDL_DEVICE void fetch_keys(const Attention& a, const BackwardCall& c,
                              const Attention::Sequence& s, int64_t g, int64_t k0,
                              int stage) const {
    const int64_t left = s.keys - k0;
    const int count = static_cast<int>(left < 0 ? 0 : left < S::kInner ? left : S::kInner);
    load_tile<S::kThreadsOfBlock, S::kInner>(
        keys(stage), static_cast<const T*>(a.k.data) + a.k.at(s.b, g, s.first_k + k0, 0),
        a.k.strides[2], count, static_cast<int>(a.width), c.wide);
    load_tile<S::kThreadsOfBlock, S::kInner>(
        values(stage), static_cast<const T*>(a.v.data) + a.v.at(s.b, g, s.first_k + k0, 0),
        a.v.strides[2], count, static_cast<int>(a.value_width), c.wide);
  }
};

// Adds the diagonals of a tile's gradients to what the block found for each offset.
template <class A, int kRows, int kInner>
PYDL_DEVICE void add_diagonals(const Attention& a, const Attention::Sequence& s, const A* slopes,
                               A* sums, int64_t q0, int64_t k0) {
  const int64_t window = a.relative.sizes[3];
  for (int d = threadIdx.x; d < kRows + kInner - 1; d += blockDim.x) {
    const int offset = d - (kRows - 1);
    const int64_t at = k0 + offset - (q0 + s.shift) + a.left;
    if (at < 0 || at >= window) continue;
    A sum = 0;
    for (int row = 0; row < kRows; ++row) {
      const int column = row + offset;
      if (column < 0 || column >= kInner) continue;
      const Room<A, kInner / 8> room{
          {const_cast<A*>(slopes) + row / kRowsOfWarp * kRowsOfWarp * kInner}};
      sum += *room.at(row % kRowsOfWarp, column);
    }
    sums[at] += sum;
  }
}

// dQ, and the relative bias' gradient of each block's queries.
template <class T, int kWidth, bool kGeneral>
__global__ void __launch_bounds__(BackwardShape<T, kWidth>::kThreadsOfBlock, 1)
    attention_queries_kernel(Attention a, BackwardCall c) {
  using A = acc_t<T>;
  using S = BackwardShape<T, kWidth>;
  constexpr int kTiles = S::kInner / 8, kOut = S::kPart / 8;
  PYDL_DYNAMIC_SHARED(T, memory);
  const QueryTiles<T, kWidth> tiles(memory);
  const int warp = threadIdx.x / kLanesOfWarp, row0 = warp * kRowsOfWarp;
  A* const rooms = tiles.rooms();
  const Room<A, kTiles> room{{rooms + (kGeneral ? row0 * S::kInner : 0)}},
      other{{rooms + (kGeneral ? (S::kRows + row0) * S::kInner : 0)}};
  const Lane l;
  const int part = blockIdx.x % S::kParts * S::kPart;
  const int64_t block = blockIdx.x / S::kParts, head = block / c.tiles;
  const int64_t tile = c.tiles - 1 - block % c.tiles;
  const int64_t b = head / a.heads, h = head % a.heads, g = a.kv_head(h);
  const Attention::Sequence s = a.sequence(b);
  const int64_t q0 = tile * S::kRows;
  const bool biased = kGeneral && c.relative != nullptr && part == 0;
  A* const sums = biased
                      ? static_cast<A*>(c.relative) + (head * c.tiles + tile) * a.relative.sizes[3]
                      : nullptr;
  if (biased) {
    for (int64_t w = threadIdx.x; w < a.relative.sizes[3]; w += blockDim.x) sums[w] = 0;
  }
  if (q0 >= s.queries) return;
  const int64_t q1 = q0 + S::kRows < s.queries ? q0 + S::kRows : s.queries;
  const Range64 first = a.seen(s, q0), last = a.seen(s, q1 - 1);
  const int depth = (static_cast<int>(a.width) + 15) / 16 * 16;
  const int value_depth = (static_cast<int>(a.value_width) + 15) / 16 * 16;
  const Dropout dropout = a.dropout;
  const A scale = static_cast<A>(a.scale);
  tiles.fetch_queries(a, c, s, h, q0);
  const RowNumbers<A> of_rows[2] = {row_numbers<A>(a, c, s, h, q0 + row0 + l.g),
                                    row_numbers<A>(a, c, s, h, q0 + row0 + l.g + 8)};
  A dq[kOut][4];
  zero(dq);
  const int64_t begin = first.begin / S::kInner * S::kInner, end = last.end;
  if (S::kStages == 2 && begin < end) tiles.fetch_keys(a, c, s, g, begin, 0);
  copies_commit();
  int stage = 0;
  for (int64_t k0 = begin; k0 < end; k0 += S::kInner) {
    if constexpr (S::kStages == 2) {
      if (k0 + S::kInner < end) tiles.fetch_keys(a, c, s, g, k0 + S::kInner, stage ^ 1);
      copies_commit();
      copies_wait<1>();
    } else {
      tiles.fetch_keys(a, c, s, g, k0, 0);
      copies_commit();
      copies_wait<0>();
    }
    __syncthreads();
    A x[kTiles][4], y[kTiles][4];
    zero(x);
    zero(y);
    product_rows<T, kTiles, kWidth>(x, tiles.q, row0, tiles.keys(stage), depth, l);
    product_rows<T, kTiles, kWidth>(y, tiles.dout, row0, tiles.values(stage), value_depth, l);
    if constexpr (kGeneral) {
      room.put(x, l);
      other.put(y, l);
      room.each(l, [&](int row, int column, A& one) {
        one *= scale;
        const int64_t i = q0 + row0 + row;
        A& dp = *other.at(row, column);
        const A slope =
            weigh<T>(a, dropout, s, b, h, i, k0 + column, row_numbers<A>(a, c, s, h, i), one, dp);
        one = dp * slope;
      });
      if (biased) {
        __syncthreads();
        add_diagonals<A, S::kRows, S::kInner>(a, s, rooms + S::kRows * S::kInner, sums, q0, k0);
        __syncthreads();
      }
      room.get(y, l);
    } else {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const Range64 seen = a.seen(s, q0 + row0 + l.g + 8 * row);
        const int from = static_cast<int>(seen.begin > k0 ? seen.begin - k0 : 0);
        const int to = static_cast<int>(seen.end - k0 < S::kInner ? seen.end - k0 : S::kInner);
        const RowNumbers<A>& of = of_rows[row];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            const int column = 8 * t + 2 * l.t + side;
            const bool there = column >= from && column < to && of.lse != nothing<A>();
            const A p = exponential_of(T{}, (x[t][2 * row + side] * scale - of.lse) - of.rest);
            A& dp = y[t][2 * row + side];
            dp = there ? p * (dp - of.delta) : A(0);
          }
        }
      }
    }
    Left<T, kTiles> left;
    left.set(y, room, l);
    product<T, kTiles, kOut>(dq, left, room, tiles.keys(stage), part, static_cast<int>(a.width), l);
    __syncthreads();
    if (S::kStages == 2) stage ^= 1;
  }
  copies_wait<0>();
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int64_t i = q0 + row0 + l.g + 8 * row;
    if (i >= s.queries) continue;
    T* const to = static_cast<T*>(c.g.dq.data) + c.g.dq.at(s.b, h, s.first_q + i, 0);
#pragma unroll
    for (int t = 0; t < kOut; ++t) {
      const int column = part + 8 * t + 2 * l.t;
      store_two(to + column, dq[t][2 * row] * scale, dq[t][2 * row + 1] * scale,
                static_cast<int>(a.width) - column, c.wide_dq);
    }
  }
}

// The mask's gradient: that of the scores, summed over what the mask was repeated over, in order.
// A block has a tile of the mask; where it has one row or column, all tiles of it.
template <class T, int kWidth>
__global__ void __launch_bounds__(BackwardShape<T, kWidth>::kThreadsOfBlock, 1)
    attention_mask_kernel(Attention a, BackwardCall c) {
  using A = acc_t<T>;
  using S = BackwardShape<T, kWidth>;
  constexpr int kTiles = S::kInner / 8;
  PYDL_DYNAMIC_SHARED(T, memory);
  const QueryTiles<T, kWidth> tiles(memory);
  const int row0 = threadIdx.x / kLanesOfWarp * kRowsOfWarp;
  A* const rooms = tiles.rooms();
  const Room<A, kTiles> room{{rooms + row0 * S::kInner}},
      other{{rooms + (S::kRows + row0) * S::kInner}},
      sums{{rooms + (2 * S::kRows + row0) * S::kInner}};
  const Lane l;
  const Quad& m = c.g.dmask;
  const int64_t query_tiles = (a.queries + S::kRows - 1) / S::kRows;
  const int64_t key_tiles = (a.keys + S::kInner - 1) / S::kInner;
  const bool by_rows = m.sizes[2] > 1, by_columns = m.sizes[3] > 1;
  const int64_t down = by_rows ? query_tiles : 1, along = by_columns ? key_tiles : 1;
  const int64_t column_tile = blockIdx.x % along, row_tile = blockIdx.x / along % down;
  const int64_t mh = blockIdx.x / along / down % m.sizes[1];
  const int64_t mb = blockIdx.x / along / down / m.sizes[1];
  const int depth = (static_cast<int>(a.width) + 15) / 16 * 16;
  const int value_depth = (static_cast<int>(a.value_width) + 15) / 16 * 16;
  const Dropout dropout = a.dropout;
  const A scale = static_cast<A>(a.scale);
  sums.each(l, [&](int, int, A& one) { one = 0; });
  for (int64_t b = m.sizes[0] > 1 ? mb : 0; b < (m.sizes[0] > 1 ? mb + 1 : a.batch); ++b) {
    const Attention::Sequence s = a.sequence(b);
    for (int64_t h = m.sizes[1] > 1 ? mh : 0; h < (m.sizes[1] > 1 ? mh + 1 : a.heads); ++h) {
      for (int64_t qt = by_rows ? row_tile : 0; qt < (by_rows ? row_tile + 1 : query_tiles); ++qt) {
        const int64_t q0 = qt * S::kRows;
        for (int64_t kt = by_columns ? column_tile : 0;
             kt < (by_columns ? column_tile + 1 : key_tiles); ++kt) {
          const int64_t k0 = kt * S::kInner;
          __syncthreads();
          tiles.fetch_queries(a, c, s, h, q0);
          tiles.fetch_keys(a, c, s, a.kv_head(h), k0, 0);
          copies_commit();
          copies_wait<0>();
          __syncthreads();
          A x[kTiles][4], y[kTiles][4];
          zero(x);
          zero(y);
          product_rows<T, kTiles, kWidth>(x, tiles.q, row0, tiles.keys(0), depth, l);
          product_rows<T, kTiles, kWidth>(y, tiles.dout, row0, tiles.values(0), value_depth, l);
          room.put(x, l);
          other.put(y, l);
          room.each(l, [&](int row, int column, A& one) {
            one *= scale;
            const int64_t i = q0 + row0 + row;
            A& dp = *other.at(row, column);
            weigh<T>(a, dropout, s, b, h, i, k0 + column, row_numbers<A>(a, c, s, h, i), one, dp);
            *sums.at(row, column) += dp;
          });
        }
      }
    }
  }
  __syncthreads();
  const auto sum_at = [&](int row, int column) {
    const Room<A, kTiles> of{
        {rooms + (2 * S::kRows + row / kRowsOfWarp * kRowsOfWarp) * S::kInner}};
    return *of.at(row % kRowsOfWarp, column);
  };
  const int rows = by_rows ? S::kRows : 1, columns = by_columns ? S::kInner : 1;
  for (int e = threadIdx.x; e < rows * columns; e += S::kThreadsOfBlock) {
    const int row = e / columns, column = e % columns;
    const int64_t i = row_tile * S::kRows + row, j = column_tile * S::kInner + column;
    if (i >= m.sizes[2] || j >= m.sizes[3]) continue;
    A sum = 0;
    for (int r = by_rows ? row : 0; r < (by_rows ? row + 1 : S::kRows); ++r) {
      for (int k = by_columns ? column : 0; k < (by_columns ? column + 1 : S::kInner); ++k)
        sum += sum_at(r, k);
    }
    static_cast<A*>(m.data)[m.at(mb, mh, i, j)] = sum;
  }
}

// drelative[h][w] = what all blocks found, in order.
template <class A>
__global__ void __launch_bounds__(kThreads)
    relative_kernel(const A* parts, Quad out, int64_t batch, int64_t heads, int64_t tiles) {
  const int64_t window = out.sizes[3];
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= heads * window) return;
  const int64_t h = at / window, w = at % window;
  A sum = 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < tiles; ++t) sum += parts[((b * heads + h) * tiles + t) * window + w];
  }
  static_cast<A*>(out.data)[out.at(0, h, 0, w)] = sum;
}

}  // namespace PYDL_ISA
}  // namespace pydl
