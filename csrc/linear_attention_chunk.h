// CPU: what linear attention's passes do with a chunk of a sequence: features, products with the
// state, and scores within the chunk.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "attention_tile.h"
#include "linear_attention.h"
#include "transpose.h"

namespace pydl {
inline namespace PYDL_ISA {

// Scratch memory of every kind is counted in these: a chunk's rows, and rows of its triangle that
// are multiplied at once (two register blocks).
constexpr int64_t kChunk = 64;
constexpr int64_t kSlice = 12;

// to = phi(from), padded with zeros.
template <class T, class A>
void feature_row(Feature feature, const T* from, int64_t n, A* to) {
  using V = typename Register<A>::type;
  constexpr int64_t kWidth = Register<A>::lanes;
  if (feature == Feature::identity) return convert_row(from, n, to, A(1));
  if (feature == Feature::softmax) {
    convert_row(from, n, to, A(1));
    const A total = exponentials(to, n, largest(to, n));
    for (int64_t i = 0; i < n; i += kWidth) store(to + i, load(to + i) / spread(total));
    return;
  }
  const V zero = spread(A(0)), one = spread(A(1));
  const auto of = [&](const V& x) {
    return feature == Feature::relu ? V(select(x <= zero, zero, x))
                                    : V(select(x > zero, x + one, exponential(at_most(x, 0))));
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, of(plain(load(from + i))));
  if (i < n) {
    const V y = of(plain(load_some(from + i, n - i)));
    store(to + i, zero);
    store_some(to + i, y, n - i);
  }
}
// The same of many rows; `to` has padded ones.
template <class T, class A>
void feature_rows(Feature feature, const T* from, int64_t stride, int64_t rows, int64_t n, A* to) {
  const int64_t to_row = padded<A>(n);
  if (stride == n && to_row == n && feature != Feature::softmax) {
    return feature_row(feature, from, rows * n, to);
  }
  for (int64_t i = 0; i < rows; ++i) feature_row(feature, from + i * stride, n, to + i * to_row);
}

// Through phi: to = phi'(x) d, where `f` is phi(x).
template <class T, class A>
void feature_slope(Feature feature, const A* f, const A* d, int64_t n, T* to) {
  using V = typename Register<A>::type;
  constexpr int64_t kWidth = Register<A>::lanes;
  const V zero = spread(A(0)), one = spread(A(1));
  V mean = zero;
  if (feature == Feature::softmax) {
    for (int64_t i = 0; i < n; i += kWidth) {
      const int64_t some = n - i < kWidth ? n - i : kWidth;
      mean += load_some(f + i, some) * load_some(d + i, some);
    }
    mean = spread(static_cast<A>(add_lanes(mean)));
  }
  for (int64_t i = 0; i < n; i += kWidth) {
    const V y = load(f + i);
    V x = load(d + i);
    if (feature == Feature::elu) {
      x = x * select(y > one, one, y);
    } else if (feature == Feature::relu) {
      x = select(y <= zero, zero, x);
    } else if (feature == Feature::softmax) {
      x = y * (x - mean);
    }
    store_some(to + i, typename Lanes<T>::type{x}, n - i < kWidth ? n - i : kWidth);
  }
}

// c = x y, where nothing of x (n x n, rows kChunk apart) lies above its diagonal.
template <class A>
void lower(int64_t n, int64_t columns, const A* x, const A* y, int64_t y_row, A* c, int64_t c_row,
           bool add) {
  for (int64_t r = 0; r < n; r += kSlice) {
    const int64_t end = n - r < kSlice ? n : r + kSlice;
    multiply<A>(end - r, columns, end, {x + r * kChunk, kChunk, 1}, y, y_row, c + r * c_row, c_row,
                add);
  }
}
// c = x^T y.
template <class A>
void lower_transposed(int64_t n, int64_t columns, const A* x, const A* y, int64_t y_row, A* c,
                      int64_t c_row, bool add) {
  for (int64_t r = 0; r < n; r += kSlice) {
    const int64_t end = n - r < kSlice ? n : r + kSlice;
    multiply<A>(end - r, columns, n - r, {x + r * kChunk + r, 1, kChunk}, y + r * y_row, y_row,
                c + r * c_row, c_row, add);
  }
}
// The lower triangle of a b^T, from b transposed.
template <class A>
void scores(int64_t n, int64_t depth, const A* a, int64_t a_row, const A* b, A* to) {
  for (int64_t r = 0; r < n; r += kSlice) {
    const int64_t end = n - r < kSlice ? n : r + kSlice;
    multiply<A>(end - r, end, depth, {a + r * a_row, a_row, 1}, b, kChunk, to + r * kChunk, kChunk,
                false);
  }
}

// A head's powers of decay, or ones.
template <class A>
struct Powers {
  bool decays = false;
  double base = 1;
  A up[kChunk + 1];  // base^m
  // For row i and column j of a chunk at kChunk - i + j: base^(i - j), and i - j.
  A back[2 * kChunk], apart[2 * kChunk];

  void fill(const A* decay) {
    decays = decay != nullptr;
    if (!decays) return;
    base = static_cast<double>(*decay);
    for (int64_t m = 0; m <= kChunk; ++m) up[m] = static_cast<A>(std::pow(base, m));
    for (int64_t t = 0; t < 2 * kChunk; ++t) {
      back[t] = t <= kChunk ? up[kChunk - t] : A(0);
      apart[t] = static_cast<A>(kChunk - t);
    }
  }
  A of(int64_t m) const { return decays ? up[m] : A(1); }
  double over(int64_t rows) const {
    return decays ? std::pow(base, static_cast<double>(rows)) : 1.0;
  }
};

template <class A>
inline A dot(const A* x, const A* y, int64_t n) {
  constexpr int64_t kWidth = Register<A>::lanes;
  typename Register<A>::type sum = spread(A(0));
  for (int64_t i = 0; i < n; i += kWidth) sum += load(x + i) * load(y + i);
  return static_cast<A>(add_lanes(sum));
}
// x = keep x + factor y, of padded rows.
template <class A>
inline void blend(A* x, A keep, const A* y, A factor, int64_t n) {
  constexpr int64_t kWidth = Register<A>::lanes;
  for (int64_t i = 0; i < n; i += kWidth) {
    store(x + i, load(x + i) * spread(keep) + load(y + i) * spread(factor));
  }
}
template <class A>
inline void scale_row(A* x, A factor, int64_t n) {
  constexpr int64_t kWidth = Register<A>::lanes;
  for (int64_t i = 0; i < n; i += kWidth) store(x + i, load(x + i) * spread(factor));
}

// Row i of a chunk's scores: what lies above the diagonal becomes 0, the rest decays; their sum.
template <class A>
A settle(A* x, int64_t i, int64_t n, const Powers<A>& powers) {
  using V = typename Register<A>::type;
  constexpr int64_t kWidth = Register<A>::lanes;
  const V zero = spread(A(0));
  V sum = zero;
  for (int64_t j = 0; j < n; j += kWidth) {
    V y = j <= i ? V(load_some(x + j, i + 1 - j < kWidth ? i + 1 - j : kWidth)) : zero;
    if (powers.decays && j <= i) y = y * load(powers.back + kChunk - i + j);
    store(x + j, y);
    sum += y;
  }
  return static_cast<A>(add_lanes(sum));
}

// Row i of what flows to the scores `s` (as settled), which is x + rho before they decay and is
// left after; returns what flows to the logarithm of decay.
template <class A>
double settle_slopes(const A* s, A* x, A rho, int64_t i, int64_t n, const Powers<A>& powers) {
  using V = typename Register<A>::type;
  constexpr int64_t kWidth = Register<A>::lanes;
  V sum = spread(A(0));
  for (int64_t j = 0; j < n; j += kWidth) {
    const int64_t some = i + 1 - j < kWidth ? i + 1 - j : kWidth;
    V y = spread(A(0));
    if (some > 0) {
      y = load_some(x + j, some) + spread(rho);
      if (powers.decays) {
        const A* const at = powers.apart + kChunk - i + j;
        sum += load_some(s + j, some) * y * load(at);
        y = y * load(powers.back + kChunk - i + j);
      }
    }
    store(x + j, spread(A(0)));
    if (some > 0) store_some(x + j, y, some);
  }
  return add_lanes(sum);
}

template <class T>
struct LinearChunks {
  using A = acc_t<T>;
  using V = typename Register<A>::type;
  static constexpr int64_t kWidth = Register<A>::lanes;
  static constexpr int64_t kTasks = 16;     // enough for any number of threads that gains by more
  static constexpr int64_t kLongest = 128;  // chunks whose states a task of the backward pass holds

  const LinearAttention& a;
  int64_t wide, value_wide, group, units, room;

  explicit LinearChunks(const LinearAttention& call)
      : a(call),
        wide(padded<A>(a.width)),
        value_wide(padded<A>(a.value_width)),
        group(a.kv_heads > 0 ? a.heads / a.kv_heads : 0),
        units(a.batch * a.kv_heads) {
    const int64_t by_keys = a.width * value_wide, by_values = a.value_width * wide;
    // A state, either way up, and its sum of features behind it.
    room = (by_keys > by_values ? by_keys : by_values) + wide;
  }

  static int64_t chunks(int64_t rows) { return (rows + kChunk - 1) / kChunk; }
  // How many parts a sequence is cut into: by its sizes alone, so that the bits are the same in any
  // number of threads.
  int64_t pieces(int64_t rows) const {
    const int64_t most = chunks(rows);
    int64_t n = units >= kTasks || units == 0 ? 1 : (kTasks + units - 1) / units;
    const int64_t bounded = (most + kLongest - 1) / kLongest;
    n = n < bounded ? bounded : n;
    return n > most ? (most > 0 ? most : 1) : n;
  }
  static Range64 piece(int64_t rows, int64_t index, int64_t count) {
    const int64_t all = chunks(rows);
    const int64_t end = all * (index + 1) / count * kChunk;
    return {all * index / count * kChunk, end < rows ? end : rows};
  }

  A* sum_of(A* state) const { return state + room - wide; }
  const A* sum_of(const A* state) const { return state + room - wide; }
  int64_t head(int64_t unit, int64_t g) const { return unit % a.kv_heads * group + g; }
  int64_t batch(int64_t unit) const { return unit / a.kv_heads; }
  Powers<A> powers(int64_t unit, int64_t g) const {
    Powers<A> p;
    p.fill(a.decay ? static_cast<const A*>(a.decay) + head(unit, g) : nullptr);
    return p;
  }
  std::vector<Powers<A>> all_powers(int64_t unit) const {
    std::vector<Powers<A>> found(static_cast<size_t>(group));
    for (int64_t g = 0; g < group; ++g) found[static_cast<size_t>(g)] = powers(unit, g);
    return found;
  }

  const T* row(const Quad& x, int64_t b, int64_t h, int64_t i) const {
    return static_cast<const T*>(x.data) + x.at(b, h, i, 0);
  }

  // A chunk of keys: features, and values where they lie or converted; transposed where wanted.
  struct Keys {
    Buffer<A> k, copies, weighted, added;
    Matrix<A> v{nullptr, 0};
    explicit Keys(const LinearChunks& w)
        : k(kChunk * w.wide),
          copies(kChunk * w.value_wide),
          weighted(kChunk * w.wide),
          added(w.room) {}
    void fill(const LinearChunks& w, int64_t unit, int64_t first, int64_t n) {
      const int64_t b = w.batch(unit), h = unit % w.a.kv_heads;
      const T* const values = w.row(w.a.v, b, h, first);
      const int64_t stride = w.a.v.strides[2];
      feature_rows(w.a.feature, w.row(w.a.k, b, h, first), w.a.k.strides[2], n, w.a.width,
                   k.data());
      bool some = false;
      for (int64_t j = 0; j < n; ++j) {
        if (!w.a.hides(b, first + j)) continue;
        clear(k.data() + j * w.wide, w.wide);
        some = true;
      }
      if (!some) {
        v = in_place_or(values, stride, n, w.a.value_width, copies.data());
        return;
      }
      for (int64_t j = 0; j < n; ++j) {
        A* const to = copies.data() + j * w.value_wide;
        if (w.a.hides(b, first + j)) {
          clear(to, w.value_wide);
        } else {
          convert_row(values + j * stride, w.a.value_width, to, A(1));
        }
      }
      v = {copies.data(), w.value_wide};
    }
    // Keys times what they still weigh after the last of the chunk.
    const A* aged(const LinearChunks& w, const Powers<A>& p, int64_t n) const {
      if (!p.decays) return k.data();
      for (int64_t j = 0; j < n; ++j) {
        A* const to = weighted.data() + j * w.wide;
        const A* const from = k.data() + j * w.wide;
        for (int64_t d = 0; d < w.wide; d += kWidth) {
          store(to + d, load(from + d) * spread(p.up[n - 1 - j]));
        }
      }
      return weighted.data();
    }
  };

  void load_queries(A* to, int64_t unit, int64_t g, int64_t first, int64_t n) const {
    feature_rows(a.feature, row(a.q, batch(unit), head(unit, g), first), a.q.strides[2], n, a.width,
                 to);
  }

  // state (rows x columns) = keep state + x^T y over n rows of x and y, which are added up first: a
  // long sequence would lose what single rows add to a large sum.
  void absorb(A* state, A keep, int64_t rows, const A* x, int64_t x_row, int64_t columns,
              const A* y, int64_t y_row, int64_t n, A* added) const {
    const int64_t row = padded<A>(columns);
    multiply<A>(rows, columns, n, {x, 1, x_row}, y, y_row, added, row, false);
    blend(state, keep, added, A(1), rows * row);
  }
  // sum = keep sum + the n rows of x, with weights or without.
  void absorb_sum(A* sum, A keep, const A* x, const A* weights, int64_t n) const {
    for (int64_t d = 0; d < wide; d += kWidth) {
      V added = spread(A(0));
      for (int64_t i = 0; i < n; ++i) {
        const V y = load(x + i * wide + d);
        added += weights ? V(y * spread(weights[i])) : y;
      }
      store(sum + d, load(sum + d) * spread(keep) + added);
    }
  }
  // Takes a chunk of keys into a state that has a row a feature, or a row a value.
  void absorb_keys(A* state, bool by_values, const Keys& keys, const Powers<A>& p,
                   int64_t n) const {
    const A* const k = keys.aged(*this, p, n);
    if (by_values) {
      absorb(state, p.of(n), a.value_width, keys.v.data, keys.v.row, a.width, k, wide, n,
             keys.added.data());
    } else {
      absorb(state, p.of(n), a.width, k, wide, a.value_width, keys.v.data, keys.v.row, n,
             keys.added.data());
    }
    absorb_sum(sum_of(state), p.of(n), k, nullptr, n);
  }

  // A state of the caller's, or zeros, either way up.
  void read_state(const void* states, const void* sums, int64_t unit, int64_t g, bool by_values,
                  A* to) const {
    clear(to, room);
    const int64_t b = batch(unit), h = head(unit, g);
    if (states) {
      const A* const from = static_cast<const A*>(states) + a.state_at(b, h);
      for (int64_t d = 0; d < a.width; ++d) {
        for (int64_t e = 0; e < a.value_width; ++e) {
          to[by_values ? e * wide + d : d * value_wide + e] = from[d * a.value_width + e];
        }
      }
    }
    if (!sums) return;
    const A* const from = static_cast<const A*>(sums) + a.sum_at(b, h);
    for (int64_t d = 0; d < a.width; ++d) sum_of(to)[d] = from[d];
  }
  void write_state(const A* state, int64_t unit, int64_t g, void* states, void* sums) const {
    const int64_t b = batch(unit), h = head(unit, g);
    if (states) {
      A* const to = static_cast<A*>(states) + a.state_at(b, h);
      for (int64_t d = 0; d < a.width; ++d) {
        for (int64_t e = 0; e < a.value_width; ++e)
          to[d * a.value_width + e] = state[d * value_wide + e];
      }
    }
    if (!sums) return;
    A* const to = static_cast<A*>(sums) + a.sum_at(b, h);
    for (int64_t d = 0; d < a.width; ++d) to[d] = sum_of(state)[d];
  }
};

}  // namespace PYDL_ISA
}  // namespace pydl
