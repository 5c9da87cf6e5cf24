// The CUDA kernel of attention forward: a block has 16 queries a warp, in shared memory, and goes
// over the keys they see, a tile at a time, the next one being copied meanwhile.
#pragma once

#include "attention_warp.cuh"

namespace pydl {
inline namespace PYDL_ISA {

// How much of what a block works on, by the bytes of a row.
template <class T, int kWidth>
struct ForwardShape {
  static constexpr int kBytes = kWidth * sizeof(T);
  static constexpr int kWarps = kBytes >= 2048 ? 2 : 4, kRows = kWarps * kRowsOfWarp;
  static constexpr int kKeys = kBytes <= 256 ? 64 : kBytes <= 1024 ? 32 : 16;
  static constexpr int kStages = kTensorCores<T> ? 2 : 1;
  static constexpr int kThreadsOfBlock = kWarps * kLanesOfWarp;
  // Columns of the output that a block finds; fp64 would need too many registers for all.
  static constexpr int kPart = sizeof(T) == 8 ? 64 : kWidth, kParts = kWidth / kPart;
  static constexpr int kTiled =
      (kRows + kStages * 2 * kKeys) * kWidth * static_cast<int>(sizeof(T));
  static constexpr int shared(bool general) {
    return kTiled + (general ? kRows * kKeys * static_cast<int>(sizeof(acc_t<T>)) : 0);
  }
};

// Stores two neighbours of a row, of which `left` are there.
template <class T, class A>
PYDL_DEVICE void store_two(T* to, A first, A second, int left, bool wide) {
  if constexpr (sizeof(T) == 2) {
    if (wide && left > 1) {
      *reinterpret_cast<uint32_t*>(to) = pack_two<T>(first, second);
      return;
    }
  }
  if (left > 0) to[0] = from_float<T>(first);
  if (left > 1) to[1] = from_float<T>(second);
}

struct ForwardOut {
  Quad out, lse, rest;
  bool wide, wide_out;
};

template <class T, int kWidth, bool kGeneral>
__global__ void __launch_bounds__(ForwardShape<T, kWidth>::kThreadsOfBlock, 1)
    attention_forward_kernel(Attention a, ForwardOut o, int64_t tiles) {
  using A = acc_t<T>;
  using S = ForwardShape<T, kWidth>;
  constexpr int kTiles = S::kKeys / 8;
  PYDL_DYNAMIC_SHARED(T, memory);
  const Shared<T, kWidth> q{memory};
  const auto keys_at = [&](int stage) {
    return Shared<T, kWidth>{memory + (S::kRows + 2 * stage * S::kKeys) * kWidth};
  };
  const auto values_at = [&](int stage) {
    return Shared<T, kWidth>{memory + (S::kRows + (2 * stage + 1) * S::kKeys) * kWidth};
  };
  const int warp = threadIdx.x / kLanesOfWarp;
  const Room<A, kTiles> room{
      {reinterpret_cast<A*>(memory + (S::kRows + 2 * S::kStages * S::kKeys) * kWidth) +
       (kGeneral ? warp * kRowsOfWarp * S::kKeys : 0)}};
  const Lane l;
  // Late tiles first: with a causal mask they take longest.
  const int part = blockIdx.x % S::kParts * S::kPart;
  const int64_t block = blockIdx.x / S::kParts;
  const int64_t head = block / tiles, tile = tiles - 1 - block % tiles;
  const int64_t b = head / a.heads, h = head % a.heads, g = a.kv_head(h);
  const Attention::Sequence s = a.sequence(b);
  const int64_t q0 = tile * S::kRows;
  if (q0 >= s.queries) return;
  const int64_t q1 = q0 + S::kRows < s.queries ? q0 + S::kRows : s.queries;
  const Range64 first = a.seen(s, q0), last = a.seen(s, q1 - 1);
  const int width = static_cast<int>(a.width), value_width = static_cast<int>(a.value_width);
  const int depth = (width + 15) / 16 * 16;
  const Dropout dropout = a.dropout;

  const auto fetch = [&](int64_t k0, int stage) {
    const int count = static_cast<int>(s.keys - k0 < S::kKeys ? s.keys - k0 : S::kKeys);
    load_tile<S::kThreadsOfBlock, S::kKeys>(
        keys_at(stage), static_cast<const T*>(a.k.data) + a.k.at(s.b, g, s.first_k + k0, 0),
        a.k.strides[2], count, width, o.wide);
    load_tile<S::kThreadsOfBlock, S::kKeys>(
        values_at(stage), static_cast<const T*>(a.v.data) + a.v.at(s.b, g, s.first_k + k0, 0),
        a.v.strides[2], count, value_width, o.wide);
  };
  load_tile<S::kThreadsOfBlock, S::kRows>(
      q, static_cast<const T*>(a.q.data) + a.q.at(s.b, h, s.first_q + q0, 0), a.q.strides[2],
      static_cast<int>(q1 - q0), width, o.wide);

  const int64_t begin = first.begin / S::kKeys * S::kKeys, end = last.end;
  A sums[S::kPart / 8][4], most[2] = {nothing<A>(), nothing<A>()}, total[2] = {0, 0};
#pragma unroll
  for (int j = 0; j < S::kPart / 8; ++j) {
#pragma unroll
    for (int r = 0; r < 4; ++r) sums[j][r] = 0;
  }
  if (S::kStages == 2 && begin < end) fetch(begin, 0);
  copies_commit();
  int stage = 0;
  for (int64_t k0 = begin; k0 < end; k0 += S::kKeys) {
    if constexpr (S::kStages == 2) {
      if (k0 + S::kKeys < end) fetch(k0 + S::kKeys, stage ^ 1);
      copies_commit();
      copies_wait<1>();
    } else {
      fetch(k0, 0);
      copies_commit();
      copies_wait<0>();
    }
    __syncthreads();
    A x[kTiles][4];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) x[j][r] = 0;
    }
    product_rows<T, kTiles, kWidth>(x, q, warp * kRowsOfWarp, keys_at(stage), depth, l);
    const A scale = static_cast<A>(a.scale);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) x[j][r] *= scale;
    }
    const int64_t i0 = q0 + warp * kRowsOfWarp;
    const bool all = first.end >= k0 + S::kKeys && last.begin <= k0;
    if constexpr (kGeneral) {
      room.put(x, l);
      room.each(l, [&](int row, int column, A& one) {
        one = score_of(a, s, b, h, i0 + row, k0 + column, one).value;
      });
      room.get(x, l);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (!kGeneral && !all) {
        const Range64 seen = a.seen(s, i0 + l.g + 8 * row);
        const int from = static_cast<int>(seen.begin > k0 ? seen.begin - k0 : 0);
        const int to = static_cast<int>(seen.end - k0 < S::kKeys ? seen.end - k0 : S::kKeys);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            const int column = 8 * j + 2 * l.t + side;
            if (column < from || column >= to) x[j][2 * row + side] = nothing<A>();
          }
        }
      }
      A top = nothing<A>();
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const A one = x[j][2 * row + side];
          top = one > top ? one : top;
        }
      }
      top = largest_of_row(top);
      const A above = top > most[row] ? top : most[row];
      const A base = above == nothing<A>() ? A(0) : above;
      const A share = exponential_of(T{}, most[row] - base);
      most[row] = above;
      total[row] *= share;
#pragma unroll
      for (int j = 0; j < S::kPart / 8; ++j) {
        sums[j][2 * row] *= share;
        sums[j][2 * row + 1] *= share;
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          A& one = x[j][2 * row + side];
          one = exponential_of(T{}, one - base);
          total[row] += one;
        }
      }
    }
    if (kGeneral && a.drops) {
      room.put(x, l);
      room.each(l, [&](int row, int column, A& one) {
        one *= keep<A>(dropout, a.draw(b, h, i0 + row, k0 + column));
      });
      room.get(x, l);
    }
    Left<T, kTiles> left;
    left.set(x, room, l);
    product<T, kTiles, S::kPart / 8>(sums, left, room, values_at(stage), part, value_width, l);
    __syncthreads();
    if (S::kStages == 2) stage ^= 1;
  }
  copies_wait<0>();
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const A whole = sum_of_row(total[row]);
    const int64_t i = q0 + warp * kRowsOfWarp + l.g + 8 * row;
    if (i >= s.queries) continue;
    const A inverse = whole == 0 ? A(0) : 1 / whole;
    T* const to = static_cast<T*>(o.out.data) + o.out.at(s.b, h, s.first_q + i, 0);
#pragma unroll
    for (int j = 0; j < S::kPart / 8; ++j) {
      const int column = part + 8 * j + 2 * l.t;
      store_two(to + column, sums[j][2 * row] * inverse, sums[j][2 * row + 1] * inverse,
                value_width - column, o.wide_out);
    }
    if (l.t != 0 || part != 0) continue;
    // The logarithm's end, which fp32 alone would lose: weights are e^(score - lse - rest).
    const double base = static_cast<double>(most[row]), log_total = log(static_cast<double>(whole));
    const A number = whole == 0 ? nothing<A>() : static_cast<A>(base + log_total);
    const int64_t at = s.first_q + i;
    static_cast<A*>(o.lse.data)[o.lse.at(s.b, h, at, 0)] = number;
    static_cast<A*>(o.rest.data)[o.rest.at(s.b, h, at, 0)] =
        whole == 0 ? A(0) : static_cast<A>((base - static_cast<double>(number)) + log_total);
  }
}

}  // namespace PYDL_ISA
}  // namespace pydl
