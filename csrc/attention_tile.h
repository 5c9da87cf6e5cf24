// CPU: what attention's passes do with a tile of scores: make it, add masks, and skip what nothing
// sees.
#pragma once

#include "attention.h"
#include "dot.h"
#include "math.h"
#include "parallel.h"

namespace pydl {
inline namespace PYDL_ISA {

constexpr int64_t kQueryTile = 96;  // a multiple of a block's rows
constexpr int64_t kKeyTile = 128;

template <class A>
constexpr A kNothing = -std::numeric_limits<A>::infinity();

constexpr int64_t down(int64_t n, int64_t grain) { return n / grain * grain; }
constexpr int64_t up(int64_t n, int64_t grain) { return down(n + grain - 1, grain); }

template <class A>
inline void clear(A* x, int64_t n) {
  if (n > 0) std::memset(x, 0, static_cast<size_t>(n) * sizeof(A));
}

// x = f(x, more...) for n numbers each, a register at a time: GCC leaves such a loop scalar.
template <class A, class F, class... More>
PYDL_HD void each(const F& f, int64_t n, A* x, const More*... more) {
  constexpr int64_t kWidth = Register<A>::lanes;
  for (int64_t j = 0; j < n; j += kWidth) {
    if constexpr (kWidth == 1) {
      x[j] = f(x[j], static_cast<A>(to_float(more[j]))...);
    } else {
      const int64_t count = n - j < kWidth ? n - j : kWidth;
      store_some(x + j, f(load_some(x + j, count), plain(load_some(more + j, count))...), count);
    }
  }
}

// The rows and columns of a tile that any query sees, relative to its corner.
struct Seen {
  Range64 rows, columns;
};

template <class T>
struct Tile {
  using A = acc_t<T>;
  using V = typename Register<A>::type;
  static constexpr int64_t kWidth = Register<A>::lanes;

  const Attention& a;
  Attention::Sequence s;
  int64_t b, h;

  // Keys that the queries [begin, end) see: both ends only grow with the query.
  Range64 keys_of(int64_t begin, int64_t end) const {
    if (begin >= end) return {0, 0};
    const Range64 first = a.seen(s, begin), last = a.seen(s, end - 1);
    return {first.begin, last.end};
  }
  // The part of a tile of queries and keys that is not all hidden.
  Seen seen(Range64 queries, Range64 keys) const {
    Seen found{{0, 0}, {0, 0}};
    if (queries.empty() || keys.empty()) return found;
    const Range64 first = a.seeing(s, keys.begin), last = a.seeing(s, keys.end - 1);
    Range64 rows{first.begin > queries.begin ? first.begin : queries.begin,
                 last.end < queries.end ? last.end : queries.end};
    if (rows.empty() || hidden(rows, keys)) return found;
    const Range64 span = keys_of(rows.begin, rows.end);
    const Range64 columns{span.begin > keys.begin ? span.begin : keys.begin,
                          span.end < keys.end ? span.end : keys.end};
    if (columns.empty()) return found;
    return {{rows.begin - queries.begin, rows.end - queries.begin},
            {columns.begin - keys.begin, columns.end - keys.begin}};
  }
  // Whether a mask of truth values hides all of it.
  bool hidden(Range64 rows, Range64 keys) const {
    const Quad& m = a.mask;
    if (!m.present() || m.dtype != DType::u8) return false;
    const auto* const data = static_cast<const uint8_t*>(m.data) + m.at(b, h, 0, 0);
    const int64_t last = m.strides[2] == 0 ? rows.begin + 1 : rows.end;
    const int64_t end = m.strides[3] == 0 ? keys.begin + 1 : keys.end;
    for (int64_t i = rows.begin; i < last; ++i) {
      const uint8_t* const row = data + i * m.strides[2];
      for (int64_t j = keys.begin; j < end; ++j) {
        if (row[j * m.strides[3]]) return false;
      }
    }
    return true;
  }

  // The columns of row i that it sees, relative to the tile's first key.
  Range64 row_keys(int64_t i, Range64 keys) const {
    const Range64 r = a.seen(s, i);
    const auto within = [&](int64_t j) {
      return (j < keys.begin ? keys.begin : j > keys.end ? keys.end : j) - keys.begin;
    };
    return {within(r.begin), within(r.end)};
  }

  // Products of `rows` queries with the packed keys, into scores of row `kKeyTile`, only where
  // something is seen. `from`: row r of the tile at r * from.row.
  template <class N>
  void products(const Strided<N>& from, int64_t depth, const N* panels, const Seen& part,
                Range64 queries, Range64 keys, A* to) const {
    for (int64_t p = part.columns.begin / kPanel<A> * kPanel<A>; p < part.columns.end;
         p += kPanel<A>) {
      const int64_t end = p + kPanel<A> < part.columns.end ? p + kPanel<A> : part.columns.end;
      const int64_t first = p > part.columns.begin ? p : part.columns.begin;
      const Range64 above = a.seeing(s, keys.begin + first);
      const int64_t last = keys.begin + end < keys.end ? keys.begin + end : keys.end;
      const Range64 below = a.seeing(s, last - 1);
      int64_t r0 = above.begin - queries.begin, r1 = below.end - queries.begin;
      r0 = r0 < part.rows.begin ? part.rows.begin : r0;
      r1 = r1 > part.rows.end ? part.rows.end : r1;
      if (r0 >= r1) continue;
      if constexpr (std::is_same_v<N, bfloat16>) {
        const int64_t grain = tile_mode ? kTileRows : 1, all = queries.end - queries.begin;
        r0 = down(r0, grain);
        r1 = up(r1, grain) < all ? up(r1, grain) : all;
      }
      multiply(r1 - r0, end - p, depth, from.from(r0, 0), panels + p * depth, kTerms<N> * kPanel<A>,
               to + r0 * kKeyTile + p, kKeyTile, false);
    }
  }

  // The same for few queries, whose keys are not worth packing.
  void products_of_few(const Strided<A>& from, const T* k, int64_t stride, const Seen& part,
                       A* to) const {
    for (int64_t j = part.columns.begin; j < part.columns.end; ++j) {
      const T* const key = k + j * stride;
      for (int64_t r = part.rows.begin; r < part.rows.end; ++r) {
        const A* const q = from.data + r * from.row;
        V sum = spread(A(0));
        for (int64_t d = 0; d < a.width; d += kWidth) {
          const int64_t n = a.width - d < kWidth ? a.width - d : kWidth;
          sum += load_some(q + d, n) * plain(load_some(key + d, n));
        }
        to[r * kKeyTile + j] = static_cast<A>(add_lanes(sum));
      }
    }
  }

  // Scores of row i for keys [first, first + n): softcap, mask and relative bias. `slope`, where
  // not null, gets the softcap's derivative.
  void adjust(A* x, A* slope, int64_t i, int64_t first, int64_t n) const {
    if (a.softcap > 0) {
      const A cap = static_cast<A>(a.softcap), inverse = static_cast<A>(1 / a.softcap);
      for (int64_t j = 0; j < n; j += kWidth) {
        const V t = hyperbolic_tangent(V(load(x + j) * spread(inverse)));
        if (slope) store(slope + j, spread(A(1)) - t * t);
        store(x + j, t * spread(cap));
      }
    }
    if (a.relative.present()) {
      const Quad& r = a.relative;
      add(x, n, r, r.at(0, h, 0, first - (i + s.shift) + a.left));
    }
    if (!a.mask.present()) return;
    const Quad& m = a.mask;
    const int64_t at = m.at(b, h, i, first), step = m.strides[3];
    if (m.dtype != DType::u8) return add(x, n, m, at);
    const auto* from = static_cast<const uint8_t*>(m.data) + at;
    if (step == 1) {
      for (int64_t j = 0; j < n; ++j) x[j] = from[j] ? x[j] : kNothing<A>;
    } else {
      for (int64_t j = 0; j < n; ++j) x[j] = from[j * step] ? x[j] : kNothing<A>;
    }
  }
  // x += n numbers of a tensor from `at` on.
  static void add(A* x, int64_t n, const Quad& from, int64_t at) {
    const int64_t step = from.strides[3];
    dispatch_float("attention", from.dtype, [&](auto zero) {
      using M = decltype(zero);
      const auto* more = static_cast<const M*>(from.data) + at;
      if constexpr (std::is_same_v<A, double> || !std::is_same_v<M, double>) {
        if (step == 1) return each([](V score, V one) { return score + one; }, n, x, more);
      }
      for (int64_t j = 0; j < n; ++j) x[j] += static_cast<A>(to_float(more[j * step]));
    });
  }

  // Dropout's factors of row i for keys [first, first + n).
  void factors(A* to, int64_t i, int64_t first, int64_t n) const {
    const int64_t at = a.draw(b, h, i, first);
    for (int64_t j = 0; j < n; j += kWidth) store(to + j, keep<V>(a.dropout, at + j));
  }
};

// What products are taken of, and how: as a pass computes, or of bf16 in pairs.
template <class T, bool kDot>
struct Factors {
  using A = acc_t<T>;
  using N = std::conditional_t<kDot, bfloat16, A>;

  // Terms of a product over n numbers.
  static int64_t depth(int64_t n) { return kDot ? even(n) : n; }
  // What a product's terms are a multiple of, and its rows where that costs nothing: with tile
  // registers more than is seen is computed, as zeros, so that it fills them.
  static int64_t term_grain() { return !kDot ? 1 : tile_mode ? kTileTerms : 2; }
  static int64_t row_grain() { return kDot && tile_mode ? kTileRows : 1; }
  static int64_t block_rows() { return kDot && tile_mode ? kTileBlock : kBlockRows<A>; }
  static constexpr int64_t kTileBlock = 2 * kTileRows;
  static constexpr int64_t kMostRows = kDot ? kTileBlock : kBlockRows<A>;
  // What queries are scaled by before products, exactly in bf16, and scores after.
  static double before(double scale) {
    int exponent;
    return kDot && std::frexp(scale, &exponent) != 0.5 ? 1 : scale;
  }
  static double after(double scale) { return before(scale) == scale ? 1 : scale; }
};

inline bool adjusts(const Attention& a) {
  return a.softcap > 0 || a.mask.present() || a.relative.present();
}

// The largest lane, of numbers.
PYDL_HD float largest_lane(vfloat x) {
  return meet_lanes<kLanes / 2>([](vfloat a, vfloat b) { return select(a > b, a, b); }, x)[0];
}
PYDL_HD double largest_lane(double x) { return x; }

// Largest of n scores; NaN does not count.
template <class A>
A largest(const A* x, int64_t n) {
  using V = typename Register<A>::type;
  constexpr int64_t kWidth = Register<A>::lanes;
  V most = spread(kNothing<A>), other = most;
  int64_t j = 0;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
    const V v = load(x + j), w = load(x + j + kWidth);
    most = select(v > most, v, most);
    other = select(w > other, w, other);
  }
  for (; j + kWidth <= n; j += kWidth) {
    const V v = load(x + j);
    most = select(v > most, v, most);
  }
  A found = largest_lane(V(select(other > most, other, most)));
  for (; j < n; ++j) found = x[j] > found ? x[j] : found;
  return found;
}

// x = e^(x - shift - rest) in place for n scores; their sum. What lies past them up to a register's
// end becomes 0.
template <class A>
A exponentials(A* x, int64_t n, A shift, A rest = 0) {
  using V = typename Register<A>::type;
  constexpr int64_t kWidth = Register<A>::lanes;
  V sum = spread(A(0));
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) {
    const V e = exponential(V((load(x + j) - spread(shift)) - spread(rest)));
    store(x + j, e);
    sum += e;
  }
  if (j < n) {
    const V e = exponential(V((load_some(x + j, n - j) - spread(shift)) - spread(rest)));
    store_some(x + j, e, n - j);
    sum += load_some(x + j, n - j);
  }
  return static_cast<A>(add_lanes(sum));
}

}  // namespace PYDL_ISA
}  // namespace pydl
