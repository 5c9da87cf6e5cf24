// The CUDA kernels of attention backward: the weights are computed again from the scores. Here a
// block has a tile of keys, for dK and dV; attention_queries.cuh has the others. Nothing is added
// by two blocks. In each a warp has 16 rows.
#pragma once

#include "attention_checks.h"
#include "attention_forward.cuh"

namespace pydl {
inline namespace PYDL_ISA {

template <class T, int kWidth>
struct BackwardShape {
  static constexpr int kBytes = kWidth * sizeof(T);
  static constexpr int kWarps = kBytes >= 2048 ? 1 : kBytes >= 1024 ? 2 : 4;
  static constexpr int kRows = kWarps * kRowsOfWarp;  // what stays in the block
  static constexpr int kInner = kBytes <= 128 ? 64 : kBytes <= 1024 ? 32 : 16;  // what passes by
  static constexpr int kStages = kTensorCores<T> ? 2 : 1;
  static constexpr int kThreadsOfBlock = kWarps * kLanesOfWarp;
  // Columns of a gradient that a block finds.
  static constexpr int kPart = sizeof(T) >= 4 || kWidth < 128 ? 64 : 128;
  static constexpr int kParts = kWidth / kPart;
  static constexpr int kTiled =
      (2 * kRows + kStages * 2 * kInner) * kWidth * static_cast<int>(sizeof(T));
  static constexpr int kRoom = kRows * kInner * static_cast<int>(sizeof(acc_t<T>));
  static constexpr int kNumbers = kStages * 3 * kInner * static_cast<int>(sizeof(acc_t<T>));
  static constexpr int shared(int rooms) { return kTiled + kNumbers + rooms * kRoom; }
};

struct BackwardCall {
  AttentionGradients g;
  void* delta;     // (batch, heads, rows) in the accumulation type
  void* relative;  // (batch, heads, tiles, window) likewise, where wanted
  int64_t tiles;
  bool wide, wide_dout, wide_dq, wide_dk, wide_dv;
};

// Sums of dout out, less dlse. A warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    delta_kernel(Attention a, AttentionGradients g, acc_t<T>* delta, int64_t count) {
  using A = acc_t<T>;
  const int64_t at =
      static_cast<int64_t>(blockIdx.x) * (kThreads / kLanesOfWarp) + threadIdx.x / kLanesOfWarp;
  if (at >= count) return;
  const int64_t rows = g.out.sizes[2], i = at % rows, h = at / rows % a.heads,
                b = at / rows / a.heads;
  const T* const out = static_cast<const T*>(g.out.data) + g.out.at(b, h, i, 0);
  const T* const dout = static_cast<const T*>(g.dout.data) + g.dout.at(b, h, i, 0);
  A sum = 0;
  for (int64_t d = threadIdx.x % kLanesOfWarp; d < a.value_width; d += kLanesOfWarp) {
    sum += static_cast<A>(to_float(out[d])) * static_cast<A>(to_float(dout[d]));
  }
  for (int half = kLanesOfWarp / 2; half > 0; half /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, half);
  if (threadIdx.x % kLanesOfWarp != 0) return;
  if (g.dlse.present()) sum -= static_cast<const A*>(g.dlse.data)[g.dlse.at(b, h, i, 0)];
  delta[at] = sum;
}

// What a row of scores was normalised by, and what its gradients have in common.
template <class A>
struct RowNumbers {
  A lse, rest, delta;
};
template <class A>
PYDL_DEVICE RowNumbers<A> row_numbers(const Attention& a, const BackwardCall& c,
                                      const Attention::Sequence& s, int64_t h, int64_t i) {
  if (i >= s.queries) return {nothing<A>(), A(0), A(0)};
  const int64_t at = s.first_q + i;
  const AttentionGradients& g = c.g;
  return {static_cast<const A*>(g.lse.data)[g.lse.at(s.b, h, at, 0)],
          static_cast<const A*>(g.rest.data)[g.rest.at(s.b, h, at, 0)],
          static_cast<const A*>(c.delta)[(s.b * a.heads + h) * g.out.sizes[2] + at]};
}

// A score x (scaled) and the gradient dp of its weight become the weight, with dropout, and the
// gradient of the score before the mask. Returns the softcap's derivative.
template <class T, class A>
PYDL_DEVICE A weigh(const Attention& a, const Dropout& dropout, const Attention::Sequence& s,
                    int64_t b, int64_t h, int64_t i, int64_t j, const RowNumbers<A>& row, A& x,
                    A& dp) {
  const Score<A> score = score_of(a, s, b, h, i, j, x);
  if (score.value == nothing<A>() || row.lse == nothing<A>()) {
    x = dp = 0;
    return 0;
  }
  const A p = exponential_of(T{}, (score.value - row.lse) - row.rest);
  const A f = a.drops ? keep<A>(dropout, a.draw(b, h, i, j)) : A(1);
  x = p * f;
  dp = p * (dp * f - row.delta);
  return score.slope;
}

template <class A, int kTiles>
PYDL_DEVICE void zero(A (&c)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int r = 0; r < 4; ++r) c[j][r] = 0;
  }
}

// dK and dV. Scores are transposed: rows are keys, columns queries.
template <class T, int kWidth, bool kGeneral>
__global__ void __launch_bounds__(BackwardShape<T, kWidth>::kThreadsOfBlock, 1)
    attention_keys_kernel(Attention a, BackwardCall c) {
  using A = acc_t<T>;
  using S = BackwardShape<T, kWidth>;
  constexpr int kTiles = S::kInner / 8, kOut = S::kPart / 8;
  PYDL_DYNAMIC_SHARED(T, memory);
  const Shared<T, kWidth> keys{memory}, values{memory + S::kRows * kWidth};
  const auto q_at = [&](int stage) {
    return Shared<T, kWidth>{memory + (2 * S::kRows + 2 * stage * S::kInner) * kWidth};
  };
  const auto dout_at = [&](int stage) {
    return Shared<T, kWidth>{memory + (2 * S::kRows + (2 * stage + 1) * S::kInner) * kWidth};
  };
  A* const numbers = reinterpret_cast<A*>(reinterpret_cast<unsigned char*>(memory) + S::kTiled);
  const int warp = threadIdx.x / kLanesOfWarp, row0 = warp * kRowsOfWarp;
  A* const rooms = numbers + S::kNumbers / sizeof(A) + (kGeneral ? row0 * S::kInner : 0);
  const Room<A, kTiles> room{{rooms}}, other{{rooms + (kGeneral ? S::kRows * S::kInner : 0)}};
  const Lane l;
  const int part = blockIdx.x % S::kParts * S::kPart;
  const int64_t block = blockIdx.x / S::kParts, head = block / c.tiles, tile = block % c.tiles;
  const int64_t b = head / a.kv_heads, g = head % a.kv_heads, each = a.heads / a.kv_heads;
  const Attention::Sequence s = a.sequence(b);
  const int64_t k0 = tile * S::kRows;
  if (k0 >= s.keys) return;
  const int64_t k1 = k0 + S::kRows < s.keys ? k0 + S::kRows : s.keys;
  const Range64 first = a.seeing(s, k0), last = a.seeing(s, k1 - 1);
  const int width = static_cast<int>(a.width), value_width = static_cast<int>(a.value_width);
  const int depth = (width + 15) / 16 * 16, value_depth = (value_width + 15) / 16 * 16;
  const Dropout dropout = a.dropout;
  const A scale = static_cast<A>(a.scale);

  const int64_t begin = first.begin / S::kInner * S::kInner;
  const int64_t of_head = last.end > begin ? (last.end - begin + S::kInner - 1) / S::kInner : 0;
  const int64_t steps = of_head * each;
  const auto fetch = [&](int64_t step, int stage) {
    const int64_t h = g * each + step / of_head, q0 = begin + step % of_head * S::kInner;
    const int count = static_cast<int>(s.queries - q0 < S::kInner ? s.queries - q0 : S::kInner);
    load_tile<S::kThreadsOfBlock, S::kInner>(
        q_at(stage), static_cast<const T*>(a.q.data) + a.q.at(s.b, h, s.first_q + q0, 0),
        a.q.strides[2], count, width, c.wide);
    load_tile<S::kThreadsOfBlock, S::kInner>(
        dout_at(stage),
        static_cast<const T*>(c.g.dout.data) + c.g.dout.at(s.b, h, s.first_q + q0, 0),
        c.g.dout.strides[2], count, value_width, c.wide_dout);
    for (int i = threadIdx.x; i < S::kInner; i += S::kThreadsOfBlock) {
      const RowNumbers<A> row = row_numbers<A>(a, c, s, h, q0 + i);
      A* const to = numbers + stage * 3 * S::kInner + i;
      to[0] = row.lse;
      to[S::kInner] = row.rest;
      to[2 * S::kInner] = row.delta;
    }
  };
  load_tile<S::kThreadsOfBlock, S::kRows>(
      keys, static_cast<const T*>(a.k.data) + a.k.at(s.b, g, s.first_k + k0, 0), a.k.strides[2],
      static_cast<int>(k1 - k0), width, c.wide);
  load_tile<S::kThreadsOfBlock, S::kRows>(
      values, static_cast<const T*>(a.v.data) + a.v.at(s.b, g, s.first_k + k0, 0), a.v.strides[2],
      static_cast<int>(k1 - k0), value_width, c.wide);

  A dk[kOut][4], dv[kOut][4];
  zero(dk);
  zero(dv);
  if (S::kStages == 2 && steps > 0) fetch(0, 0);
  copies_commit();
  int stage = 0;
  for (int64_t step = 0; step < steps; ++step) {
    if constexpr (S::kStages == 2) {
      if (step + 1 < steps) fetch(step + 1, stage ^ 1);
      copies_commit();
      copies_wait<1>();
    } else {
      fetch(step, 0);
      copies_commit();
      copies_wait<0>();
    }
    __syncthreads();
    const int64_t h = g * each + step / of_head, q0 = begin + step % of_head * S::kInner;
    const A* const of_rows = numbers + stage * 3 * S::kInner;
    const auto row_at = [&](int i) {
      return RowNumbers<A>{of_rows[i], of_rows[S::kInner + i], of_rows[2 * S::kInner + i]};
    };
    A x[kTiles][4], y[kTiles][4];
    zero(x);
    zero(y);
    product_rows<T, kTiles, kWidth>(x, keys, row0, q_at(stage), depth, l);
    product_rows<T, kTiles, kWidth>(y, values, row0, dout_at(stage), value_depth, l);
    if constexpr (kGeneral) {
      room.put(x, l);
      other.put(y, l);
      room.each(l, [&](int row, int column, A& one) {
        one *= scale;
        A& dp = *other.at(row, column);
        const A slope =
            weigh<T>(a, dropout, s, b, h, q0 + column, k0 + row0 + row, row_at(column), one, dp);
        dp *= slope;
      });
      room.get(x, l);
      other.get(y, l);
    } else {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int64_t j = k0 + row0 + l.g + 8 * row;
        const Range64 seeing = j < s.keys ? a.seeing(s, j) : Range64{0, 0};
        const int from = static_cast<int>(seeing.begin > q0 ? seeing.begin - q0 : 0);
        const int to = static_cast<int>(seeing.end - q0 < S::kInner ? seeing.end - q0 : S::kInner);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            const int column = 8 * t + 2 * l.t + side;
            const RowNumbers<A> of = row_at(column);
            A &one = x[t][2 * row + side], &dp = y[t][2 * row + side];
            const bool there = column >= from && column < to && of.lse != nothing<A>();
            one = there ? exponential_of(T{}, (one * scale - of.lse) - of.rest) : A(0);
            dp = there ? one * (dp - of.delta) : A(0);
          }
        }
      }
    }
    Left<T, kTiles> left;
    left.set(x, room, l);
    product<T, kTiles, kOut>(dv, left, room, dout_at(stage), part, value_width, l);
    left.set(y, room, l);
    product<T, kTiles, kOut>(dk, left, room, q_at(stage), part, width, l);
    __syncthreads();
    if (S::kStages == 2) stage ^= 1;
  }
  copies_wait<0>();
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int64_t j = k0 + row0 + l.g + 8 * row;
    if (j >= s.keys) continue;
    T* const to_k = static_cast<T*>(c.g.dk.data) + c.g.dk.at(s.b, g, s.first_k + j, 0);
    T* const to_v = static_cast<T*>(c.g.dv.data) + c.g.dv.at(s.b, g, s.first_k + j, 0);
#pragma unroll
    for (int t = 0; t < kOut; ++t) {
      const int column = part + 8 * t + 2 * l.t;
      store_two(to_k + column, dk[t][2 * row] * scale, dk[t][2 * row + 1] * scale, width - column,
                c.wide_dk);
      store_two(to_v + column, dv[t][2 * row], dv[t][2 * row + 1], value_width - column, c.wide_dv);
    }
  }
}

}  // namespace PYDL_ISA
}  // namespace pydl
