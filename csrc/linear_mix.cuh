// CUDA: linear attention's passes are one kernel. Each finds
//
//   y_i = sum_j (a_i b_j + extra) decay^|i - j| x_j
//
// over the j before (or after) i, chunk by chunk with the state sum_j b_j x_j^T between them:
//
//                    a      b      x      extra                 over
//   output           f      g      v      y of x = 1: the sums  j <= i
//   gradient of f    du     v      g      rho_i                 j <= i
//   gradient of g    v      du     f      rho_j                 j >= i
//   gradient of v    g      f      du     none                  j >= i
//
// (letters as in linear_attention.h). A block has a tile of x's columns, and walks the sequence or
// a piece of it; where there are pieces, what each adds to the state is found first, and a scan
// gives the states that they begin with. 16-bit tensors multiply in tensor cores as tf32, whose
// range is that of fp32: states of any length fit. What goes into the state, which may be a result,
// is multiplied in three parts, to fp32.
#pragma once

#include "attention_forward.cuh"
#include "linear_attention.h"

namespace pydl {
inline namespace PYDL_ISA {

// Rows of features, or of numbers times a factor.
struct Side {
  Quad x, factor;
  Feature feature;
  bool keys;  // belongs to the keys: fewer heads, and hidden rows are zeros
  bool wide;  // rows may be read 16 bytes at a time
  PYDL_HD int64_t columns() const { return x.sizes[3]; }
};

// States of (width, value width), and sums of features of (width), by number.
template <class A>
struct States {
  A *state, *sum;
  int64_t state_step, sum_step;
};

enum class Extra { none, column, row };
enum class Weight { one, rho };

template <class A>
struct Mix {
  Side a, b, x;
  Extra extra;            // column: sums of scores and of b; row: a_i and b_j have one column more
  Weight a_more, b_more;  // what that column holds; b_more also weighs the sums of b
  bool causal, reverse, only_state, by_values;  // by_values: rows of the state are values
  int64_t batch, heads, kv_heads, member;  // member: the head of a key head's; -1: blocks have all
  int64_t rows, pieces, tiles, width, value_width;
  const A *decay, *rho;
  const uint8_t* hidden;
  int64_t hidden_strides[2];
  States<A> begin, end;  // where a block's state comes from and goes to, where not null
  bool begin_of_piece, end_of_piece;
  // What becomes of y.
  Quad y, factor, like;  // like: what y is the gradient of, where it has a slope
  Feature feature;
  bool wide_y, normalize;
  A scale, eps;
  A* raw;  // (batch, kv heads, rows, columns): y of a key head's heads so far
  bool first, last;
  // With logs the state's derivative by decay's logarithm, from the piece's beginning on, is
  // carried along: a block's part of the gradient is what that adds to y, times the features y
  // belongs to, and what flows to the piece's last state times that state's derivative.
  double* logs;
  States<A> flow;
  bool flow_of_piece;

  PYDL_HD int64_t group() const { return heads / kv_heads; }
  PYDL_HD bool hides(int64_t b_, int64_t j) const {
    return hidden && hidden[b_ * hidden_strides[0] + j * hidden_strides[1]];
  }
};

constexpr int64_t kPieceRows = 64;  // pieces of a sequence begin at multiples of it
PYDL_HD Range64 rows_of_piece(int64_t rows, int64_t pieces, int64_t piece) {
  const int64_t all = (rows + kPieceRows - 1) / kPieceRows;
  const int64_t end = all * (piece + 1) / pieces * kPieceRows;
  return {all * piece / pieces * kPieceRows, end < rows ? end : rows};
}

template <class A>
PYDL_DEVICE double power(const A* decay, int64_t h, int64_t exponent) {
  return decay ? pow(static_cast<double>(decay[h]), static_cast<double>(exponent)) : 1.0;
}

// A row has kColumns elements and four more, so that eight rows of a column lie in different banks.
template <class A, int kColumns>
struct Rows32 {
  static constexpr int kRow = kColumns + 4;
  A* data;
  PYDL_DEVICE A& at(int row, int column) const { return data[row * kRow + column]; }
};

template <class T, int kDepth>
struct MixShape {
  using A = acc_t<T>;
  static constexpr bool kDouble = sizeof(A) == 8;
  static constexpr int kChunk = kDouble ? (kDepth <= 64 ? 32 : 16) : (kDepth <= 64 ? 64 : 32);
  static constexpr int kTile = kDouble || kDepth > 128 ? 32 : 64;
  static constexpr int kWarps = kChunk / kRowsOfWarp, kThreadsOfBlock = kWarps * kLanesOfWarp;
  static constexpr int kSide = kChunk * (kDepth + 4), kX = kChunk * (kTile + 4),
                       kState = kDepth * (kTile + 4), kScores = kChunk * (kChunk + 4);
  static constexpr int kNumbers = kDepth + kTile + 3 * kChunk + 4;
  static constexpr int shared(bool logs) {
    return (2 * kSide + kX + kState + kScores + kNumbers + (logs ? kState + kTile : 0)) *
           static_cast<int>(sizeof(A));
  }
};

template <class A>
struct Featured {
  A value, slope;
};
template <class T, class A>
PYDL_DEVICE Featured<A> featured(Feature feature, A x) {
  if (feature == Feature::identity) return {x, A(1)};
  if (feature == Feature::relu) return {x <= 0 ? A(0) : x, x <= 0 ? A(0) : A(1)};
  if (x > 0) return {x + 1, A(1)};
  const A e = exponential_of(T{}, x);
  return {e, e};
}

// Rows first to first + count of a side, columns from `column` on, up to `padded` ones with zeros.
template <class T, int kThreadsOfBlock, int kChunk, class A, int kColumns>
PYDL_DEVICE void load_rows(const Rows32<A, kColumns>& to, const Mix<A>& m, const Side& side,
                           int64_t b, int64_t h, int64_t first, int count, int column, int padded) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t head = side.keys ? h / m.group() : h;
  const int columns = static_cast<int>(side.columns()) - column;
  const int each = side.wide ? kVector : 1, of_row = padded / each;
  for (int k = threadIdx.x; k < kChunk * of_row; k += kThreadsOfBlock) {
    const int row = k / of_row, at = k % of_row * each;
    const bool there = row < count && at < columns && !(side.keys && m.hides(b, first + row));
    A* const place = &to.at(row, at);
    if (!there) {
      for (int i = 0; i < each; ++i) place[i] = 0;
      continue;
    }
    const A by =
        side.factor.present()
            ? static_cast<const A*>(side.factor.data)[side.factor.at(b, head, first + row, 0)]
            : A(1);
    const T* const from =
        static_cast<const T*>(side.x.data) + side.x.at(b, head, first + row, column + at);
    if (side.wide) {
      const auto pack = *reinterpret_cast<const Pack<T, kVector>*>(from);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        place[i] = featured<T>(side.feature, static_cast<A>(to_float(pack.values[i]))).value * by;
      }
    } else {
      *place = featured<T>(side.feature, static_cast<A>(to_float(*from))).value * by;
    }
  }
}

// A number as tf32 and what that leaves out, as tf32.
PYDL_DEVICE uint32_t rest_of(float x, uint32_t rounded) { return tf32_of(x - bits_float(rounded)); }

// c += left right for the warp's 16 rows, over k from `begin` to `end` (a multiple of 8 more);
// tiles of 8 columns from `from` to `to`. left(row, k) and right(k, column) are numbers. kExact:
// nearly as in fp32, by two further products of what the first leaves out.
template <class T, bool kExact, int kTiles, class A, class L, class R>
PYDL_DEVICE void multiply_rows(A (&c)[kTiles][4], int begin, int end, int from, int to,
                               const Lane& l, const L& left, const R& right) {
  if constexpr (kTensorCores<T>) {
#pragma unroll 2
    for (int k = begin; k < end; k += 8) {
      const float x[4] = {left(l.g, k + l.t), left(l.g + 8, k + l.t), left(l.g, k + 4 + l.t),
                          left(l.g + 8, k + 4 + l.t)};
      uint32_t a[4], more[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        a[r] = tf32_of(x[r]);
        if (kExact) more[r] = rest_of(x[r], a[r]);
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j < from || j >= to) continue;
        const float low = right(k + l.t, 8 * j + l.g), high = right(k + 4 + l.t, 8 * j + l.g);
        const uint32_t b0 = tf32_of(low), b1 = tf32_of(high);
        if constexpr (kExact) {
          mma_tf32(c[j], more, b0, b1);
          mma_tf32(c[j], a, rest_of(low, b0), rest_of(high, b1));
        }
        mma_tf32(c[j], a, b0, b1);
      }
    }
  } else {
#pragma unroll 2
    for (int k = begin; k < end; ++k) {
      const A low = left(l.g, k), high = left(l.g + 8, k);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j < from || j >= to) continue;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const A one = right(k, 8 * j + 2 * l.t + side);
          c[j][side] += low * one;
          c[j][2 + side] += high * one;
        }
      }
    }
  }
}

template <class A, int kTiles>
PYDL_DEVICE void empty(A (&c)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int r = 0; r < 4; ++r) c[j][r] = 0;
  }
}

template <class T, int kDepth>
__global__ void __launch_bounds__(MixShape<T, kDepth>::kThreadsOfBlock, 1)
    linear_mix_kernel(Mix<acc_t<T>> m) {
  using A = acc_t<T>;
  using S = MixShape<T, kDepth>;
  constexpr int kChunk = S::kChunk, kTile = S::kTile, kBlock = S::kThreadsOfBlock;
  constexpr int kScored = kChunk / 8, kTiles = kTile / 8;
  PYDL_DYNAMIC_SHARED(A, memory);
  const Rows32<A, kDepth> left{memory}, right{memory + S::kSide};
  const Rows32<A, kTile> x{memory + 2 * S::kSide}, state{x.data + S::kX};
  const Rows32<A, kChunk> scores{state.data + S::kState};
  A* const of_rows = scores.data + S::kScores;  // the state's further column,
  A* const of_columns = of_rows + kDepth;       // or row
  A* const more_left = of_columns + kTile;
  A* const more_right = more_left + kChunk;
  A* const up = more_right + kChunk;  // decay^0 to decay^kChunk
  // Derivatives of the state, and of its row, by decay's logarithm.
  const Rows32<A, kTile> slopes{of_rows + S::kNumbers};
  A* const of_slopes = slopes.data + S::kState;
  const bool logs = m.logs != nullptr;

  const int tile = static_cast<int>(blockIdx.x % m.tiles);
  const int64_t rest = blockIdx.x / m.tiles, piece = rest % m.pieces, unit = rest / m.pieces;
  const bool all = m.member < 0;
  const int64_t b = unit / (all ? m.heads : m.kv_heads);
  const int64_t h = all ? unit % m.heads : unit % m.kv_heads * m.group() + m.member;
  const int64_t number = b * m.heads + h;
  const int thread = threadIdx.x, warp = thread / kLanesOfWarp, row0 = warp * kRowsOfWarp;
  const Lane l;
  const int depth = static_cast<int>(m.by_values ? m.value_width : m.width);
  const int padded = (depth + 7) / 8 * 8;
  const int column0 = tile * kTile;
  const int columns_left = static_cast<int>(m.x.columns()) - column0;
  const int columns = columns_left < kTile ? columns_left : kTile;
  const int tiles_used = (columns + 7) / 8;
  const Range64 piece_rows = rows_of_piece(m.rows, m.pieces, piece);
  const bool updates = m.causal || m.only_state;
  const bool decays = m.decay != nullptr;

  for (int p = thread; p <= kChunk; p += kBlock) up[p] = static_cast<A>(power(m.decay, h, p));
  {
    const int64_t slot = m.begin_of_piece ? piece * m.batch * m.heads + number : number;
    const A* const from = m.begin.state ? m.begin.state + slot * m.begin.state_step : nullptr;
    for (int k = thread; k < kDepth * kTile; k += kBlock) {
      const int r = k / kTile, c = k % kTile;
      A one = 0;
      if (from && r < depth && c < columns) {
        one = m.by_values ? from[(column0 + c) * m.value_width + r]
                          : from[r * m.value_width + column0 + c];
      }
      state.at(r, c) = one;
    }
    const A* const sum = m.begin.sum ? m.begin.sum + slot * m.begin.sum_step : nullptr;
    for (int k = thread; k < kDepth; k += kBlock) {
      of_rows[k] = sum && m.extra == Extra::column && k < depth ? sum[k] : A(0);
    }
    for (int k = thread; k < kTile; k += kBlock) {
      of_columns[k] = sum && m.extra == Extra::row && k < columns ? sum[column0 + k] : A(0);
    }
    for (int k = thread; logs && k < S::kState + kTile; k += kBlock) slopes.data[k] = 0;
  }
  double log = 0;

  const int64_t chunks = (piece_rows.end - piece_rows.begin + kChunk - 1) / kChunk;
  for (int64_t step = 0; step < chunks; ++step) {
    const int64_t chunk = m.reverse ? chunks - 1 - step : step;
    const int64_t first = piece_rows.begin + chunk * kChunk;
    const int n =
        static_cast<int>(piece_rows.end - first < kChunk ? piece_rows.end - first : kChunk);
    if (updates) {
      load_rows<T, kBlock, kChunk>(right, m, m.b, b, h, first, n, 0, padded);
      load_rows<T, kBlock, kChunk>(x, m, m.x, b, h, first, n, column0, kTile);
    }
    if (!m.only_state) load_rows<T, kBlock, kChunk>(left, m, m.a, b, h, first, n, 0, padded);
    for (int k = thread; k < kChunk; k += kBlock) {
      const A rho = m.rho && k < n ? m.rho[number * m.rows + first + k] : A(0);
      more_left[k] = m.a_more == Weight::one ? A(1) : rho;
      more_right[k] = k >= n ? A(0) : m.b_more == Weight::one ? A(1) : rho;
    }
    __syncthreads();

    // The powers of decay that the state has before row i, and that row j has in the state after.
    const auto seen = [&](int i) { return i >= n ? A(0) : m.reverse ? up[n - 1 - i] : up[i + 1]; };
    const auto kept = [&](int j) { return j >= n ? A(0) : m.reverse ? up[j + 1] : up[n - 1 - j]; };

    if (!m.only_state) {
      A y[kTiles][4], slope_of_y[kTiles][4], total[2] = {0, 0};
      empty(y);
      empty(slope_of_y);
      multiply_rows<T, false, kTiles>(
          y, 0, padded, 0, tiles_used, l, [&](int i, int k) { return left.at(row0 + i, k); },
          [&](int k, int c) { return state.at(k, c); });
      if (logs) {
        multiply_rows<T, false, kTiles>(
            slope_of_y, 0, padded, 0, tiles_used, l,
            [&](int i, int k) { return left.at(row0 + i, k); },
            [&](int k, int c) { return slopes.at(k, c); });
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int i = row0 + l.g + 8 * (r / 2);
        const A by = m.causal && decays ? seen(i) : A(1);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const int c = 8 * j + 2 * l.t + r % 2;
          if (m.extra == Extra::row) y[j][r] += more_left[i] * of_columns[c];
          y[j][r] *= by;
          if (logs) {
            const A more = m.extra == Extra::row ? more_left[i] * of_slopes[c] : A(0);
            slope_of_y[j][r] = (slope_of_y[j][r] + more) * by + static_cast<A>(i + 1) * y[j][r];
          }
        }
      }
      if (m.extra == Extra::column) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int i = row0 + l.g + 8 * side;
          for (int k = l.t; k < depth; k += 4) total[side] += left.at(i, k) * of_rows[k];
          if (m.causal && decays) total[side] *= seen(i);
        }
      }
      if (m.causal) {
        // Tiles of scores that a warp's rows see: those up to its own, or from them on.
        const int from = m.reverse ? row0 / 8 : 0;
        const int to = m.reverse ? kScored : row0 / 8 + kRowsOfWarp / 8;
        A s[kScored][4];
        empty(s);
        const auto of_left = [&](int i, int k) { return left.at(row0 + i, k); };
        const auto of_right = [&](int k, int c) { return right.at(c, k); };
        if (m.extra == Extra::column) {
          // Their sums go into the factors, which states' gradients are made of.
          multiply_rows<T, true, kScored>(s, 0, padded, from, to, l, of_left, of_right);
        } else {
          multiply_rows<T, false, kScored>(s, 0, padded, from, to, l, of_left, of_right);
        }
#pragma unroll
        for (int j = 0; j < kScored; ++j) {
          if (j < from || j >= to) continue;
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int i = row0 + l.g + 8 * (r / 2), c = 8 * j + 2 * l.t + r % 2;
            const int apart = m.reverse ? c - i : i - c;
            A one = s[j][r];
            if (m.extra == Extra::row) one += more_left[i] * more_right[c];
            if (apart < 0) {
              one = 0;
            } else if (decays) {
              one *= up[apart];
            }
            total[r / 2] += one;
            scores.at(i, c) = one;
          }
        }
        __syncwarp();
        multiply_rows<T, false, kTiles>(
            y, 8 * from, 8 * to, 0, tiles_used, l,
            [&](int i, int k) { return scores.at(row0 + i, k); },
            [&](int k, int c) { return x.at(k, c); });
        if (logs) {
          multiply_rows<T, false, kTiles>(
              slope_of_y, 8 * from, 8 * to, 0, tiles_used, l,
              [&](int i, int k) { return scores.at(row0 + i, k) * static_cast<A>(row0 + i - k); },
              [&](int k, int c) { return x.at(k, c); });
        }
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const A sum = sum_of_row(total[side]);
        const int i = row0 + l.g + 8 * side;
        const int64_t at = first + i;
        if (i >= n) continue;
        if (m.factor.present()) {
          Quotient<A> q{1, m.scale, m.scale};
          if (m.normalize) q = quotient<A>(m.scale, m.scale * sum + m.eps);
          if (tile == 0 && l.t == 0) {
            static_cast<A*>(m.factor.data)[m.factor.at(b, h, at, 0)] = q.factor;
          }
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            y[j][2 * side] = y[j][2 * side] * q.lift * q.by;
            y[j][2 * side + 1] = y[j][2 * side + 1] * q.lift * q.by;
          }
        }
        const bool hidden = m.a.keys && m.hides(b, at);
        const int64_t head = m.a.keys ? h / m.group() : h;
        T* const to = static_cast<T*>(m.y.data) + m.y.at(b, head, at, column0);
        A* const raw =
            m.raw ? m.raw + ((b * m.kv_heads + head) * m.rows + at) * m.x.columns() + column0
                  : nullptr;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const int c = 8 * j + 2 * l.t;
          A two[2];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            A one = hidden ? A(0) : y[j][2 * side + k];
            if (c + k >= columns) one = 0;
            A slope = 1;
            if (m.like.present() && c + k < columns && !hidden) {
              const A value = static_cast<A>(to_float(
                  static_cast<const T*>(m.like.data)[m.like.at(b, head, at, column0 + c + k)]));
              const Featured<A> f = featured<T>(m.feature, value);
              slope = f.slope;
              if (logs) {
                log +=
                    static_cast<double>(f.value) * static_cast<double>(slope_of_y[j][2 * side + k]);
              }
            }
            if (raw && c + k < columns) {
              if (!m.first) one += raw[c + k];
              if (!m.last) raw[c + k] = one;
            }
            two[k] = one * slope;
          }
          if (!raw || m.last) store_two(to + c, two[0], two[1], columns - c, m.wide_y);
        }
      }
    }
    __syncthreads();
    if (updates && (m.end.state || m.end.sum || logs || step + 1 < chunks)) {
      const A keep = decays ? up[n] : A(1);
      for (int r0 = row0; logs && r0 < padded; r0 += kChunk) {
        A added[kTiles][4];
        empty(added);
        multiply_rows<T, false, kTiles>(
            added, 0, (n + 7) / 8 * 8, 0, tiles_used, l,
            [&](int i, int k) {
              return right.at(k, r0 + i) * (kept(k) * static_cast<A>(n - 1 - k));
            },
            [&](int k, int c) { return x.at(k, c); });
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int row = r0 + l.g + 8 * (r / 2), c = 8 * j + 2 * l.t + r % 2;
            if (row >= padded) continue;
            A& one = slopes.at(row, c);
            one = (one + static_cast<A>(n) * state.at(row, c)) * keep + added[j][r];
          }
        }
      }
      for (int r0 = row0; r0 < padded; r0 += kChunk) {
        A added[kTiles][4];
        empty(added);
        multiply_rows<T, true, kTiles>(
            added, 0, (n + 7) / 8 * 8, 0, tiles_used, l,
            [&](int i, int k) { return right.at(k, r0 + i) * (decays ? kept(k) : A(1)); },
            [&](int k, int c) { return x.at(k, c); });
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int row = r0 + l.g + 8 * (r / 2);
            if (row >= padded) continue;
            A& one = state.at(row, 8 * j + 2 * l.t + r % 2);
            one = one * keep + added[j][r];
          }
        }
      }
      if (m.extra == Extra::column) {
        for (int d = thread; d < depth; d += kBlock) {
          A added = 0;
          for (int k = 0; k < n; ++k) added += right.at(k, d) * (more_right[k] * kept(k));
          of_rows[d] = of_rows[d] * keep + added;
        }
      } else if (m.extra == Extra::row) {
        for (int c = thread; c < columns; c += kBlock) {
          A added = 0, slope = 0;
          for (int k = 0; k < n; ++k) {
            const A one = x.at(k, c) * (more_right[k] * kept(k));
            added += one;
            slope += one * static_cast<A>(n - 1 - k);
          }
          if (logs) {
            of_slopes[c] = (of_slopes[c] + static_cast<A>(n) * of_columns[c]) * keep + slope;
          }
          of_columns[c] = of_columns[c] * keep + added;
        }
      }
    }
    __syncthreads();
  }

  const int64_t slot = m.end_of_piece ? piece * m.batch * m.heads + number : number;
  if (chunks == 0) __syncthreads();
  if (m.end.state) {
    A* const to = m.end.state + slot * m.end.state_step;
    for (int k = thread; k < depth * kTile; k += kBlock) {
      const int r = k / kTile, c = k % kTile;
      if (c >= columns) continue;
      to[m.by_values ? (column0 + c) * m.value_width + r : r * m.value_width + column0 + c] =
          state.at(r, c);
    }
  }
  if (m.end.sum) {
    A* const to = m.end.sum + slot * m.end.sum_step;
    if (m.extra == Extra::column) {
      for (int k = thread; tile == 0 && k < depth; k += kBlock) to[k] = of_rows[k];
    } else {
      for (int k = thread; k < columns; k += kBlock) to[column0 + k] = of_columns[k];
    }
  }
  if (logs) {
    const int64_t at = m.flow_of_piece ? piece * m.batch * m.heads + number : number;
    if (m.flow.state) {
      const A* const from = m.flow.state + at * m.flow.state_step;
      for (int k = thread; k < depth * kTile; k += kBlock) {
        const int r = k / kTile, c = k % kTile;
        if (c >= columns) continue;
        const A one =
            from[m.by_values ? (column0 + c) * m.value_width + r : r * m.value_width + column0 + c];
        log += static_cast<double>(one) * static_cast<double>(slopes.at(r, c));
      }
    }
    if (m.flow.sum) {
      const A* const from = m.flow.sum + at * m.flow.sum_step + column0;
      for (int k = thread; k < columns; k += kBlock) {
        log += static_cast<double>(from[k]) * static_cast<double>(of_slopes[k]);
      }
    }
    // Added up in an order that does not depend on who comes first.
    double* const sums = reinterpret_cast<double*>(memory);
    __syncthreads();
    sums[thread] = log;
    __syncthreads();
    for (int half = kBlock / 2; half > 0; half /= 2) {
      if (thread < half) sums[thread] += sums[thread + half];
      __syncthreads();
    }
    if (thread == 0) {
      m.logs[((h * m.batch + b) * m.pieces + piece) * m.tiles + tile] = sums[0];
    }
  }
}

// What pieces add to the state becomes the states they begin with; `end` is what comes after all.
template <class A>
struct Scan {
  States<A> pieces, begin, end;
  const A* decay;
  int64_t units, heads, rows, count, width, value_width;
  bool reverse;
};
template <class A>
__global__ void __launch_bounds__(kThreads) linear_scan_kernel(Scan<A> s) {
  const int64_t state = s.width * s.value_width, each = state + s.width;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= s.units * each) return;
  const int64_t unit = k / each, at = k % each;
  const bool sum = at >= state;
  const auto place = [&](const States<A>& of, int64_t number) -> A* {
    if (sum) return of.sum ? of.sum + number * of.sum_step + at - state : nullptr;
    return of.state ? of.state + number * of.state_step + at : nullptr;
  };
  const A* const begin = place(s.begin, unit);
  A running = begin ? *begin : A(0);
  for (int64_t step = 0; step < s.count; ++step) {
    const int64_t p = s.reverse ? s.count - 1 - step : step;
    const Range64 rows = rows_of_piece(s.rows, s.count, p);
    A* const one = place(s.pieces, p * s.units + unit);
    const A added = *one;
    *one = running;
    const A keep = static_cast<A>(power(s.decay, unit % s.heads, rows.end - rows.begin));
    running = running * keep + added;
  }
  if (A* const end = place(s.end, unit)) *end = running;
}

// rho, a warp a row: -sum of factor dout out where normalised, else 0.
template <class T>
struct Rho {
  using A = acc_t<T>;
  Quad dout, out, factor;
  A* rho;
  int64_t heads, rows, count;
  bool normalize;
};
template <class T>
__global__ void __launch_bounds__(kThreads) linear_rho_kernel(Rho<T> r) {
  using A = acc_t<T>;
  const int64_t at =
      static_cast<int64_t>(blockIdx.x) * (kThreads / kLanesOfWarp) + threadIdx.x / kLanesOfWarp;
  if (at >= r.count) return;
  const int64_t i = at % r.rows, h = at / r.rows % r.heads, b = at / r.rows / r.heads;
  A sum = 0;
  if (r.normalize) {
    const T* const out = static_cast<const T*>(r.out.data) + r.out.at(b, h, i, 0);
    const T* const dout = static_cast<const T*>(r.dout.data) + r.dout.at(b, h, i, 0);
    const A by = static_cast<const A*>(r.factor.data)[r.factor.at(b, h, i, 0)];
    for (int64_t e = threadIdx.x % kLanesOfWarp; e < r.out.sizes[3]; e += kLanesOfWarp) {
      sum -= static_cast<A>(to_float(out[e])) * (static_cast<A>(to_float(dout[e])) * by);
    }
    for (int half = kLanesOfWarp / 2; half > 0; half /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, half);
    }
  }
  if (threadIdx.x % kLanesOfWarp == 0) r.rho[at] = sum;
}

// The gradient by decay of a head, from that by its logarithm in parts.
template <class A>
struct DecayGradient {
  const double* logs;  // (heads, parts)
  int64_t parts;
  const A* decay;
  A* ddecay;
};
template <class A>
__global__ void __launch_bounds__(kThreads) linear_decay_kernel(DecayGradient<A> d) {
  __shared__ double partial[kThreads];
  const int64_t h = blockIdx.x;
  double sum = 0;
  for (int64_t k = threadIdx.x; k < d.parts; k += kThreads) sum += d.logs[h * d.parts + k];
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    d.ddecay[h] = static_cast<A>(partial[0] / static_cast<double>(d.decay[h]));
  }
}

}  // namespace PYDL_ISA
}  // namespace pydl
