// CPU: scores of additive and Gaussian attention and their gradients, a register of keys at a time.
// What a query and a key make of each other never leaves the registers.
#include <type_traits>

#include "rowwise.h"
#include "score.h"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

constexpr int kGroup = 4;             // queries that share a load of the keys
constexpr int64_t kQueryTile = 64;    // queries that share what was made of the keys
constexpr int64_t kColumns = 16;      // numbers of a row in one line of the cache
constexpr int64_t kPartialSum = 16;   // registers of terms that are added on their own
constexpr int64_t kPairGrain = 8192;  // pairs of numbers worth waking a thread for

// What a pair is computed in: a register of floats, or one double.
template <class A>
using Wide = typename Lanes<A>::type;
template <class A>
constexpr int64_t kWide = Lanes<A>::count;
// Keys whose gradients stay in the cache.
template <class A>
constexpr int64_t kKeyTile = kPartialSum * kWide<A>;

template <class A>
PYDL_HD Wide<A> broadcast(const A* p) {
  if constexpr (std::is_same_v<A, double>) {
    return *p;
  } else {
    return *p - vfloat{};
  }
}

// Whether Additive serves all numbers of some columns of some rows.
template <class T>
bool tame(const T* x, int64_t rows, int64_t width, int64_t columns) {
  vint wild = {};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t h = 0; h < columns; h += kLanes) {
      const auto some = load_some(x + r * width + h, columns - h);
      vfloat numbers;
      if constexpr (std::is_same_v<T, bfloat16>) {
        numbers = some.v;
      } else {
        numbers = some;
      }
      wild |= ~(magnitude(numbers) <= splat<vfloat>(Additive::kMost));  // NaN is wild
    }
  }
  bool found = false;
  for (int i = 0; i < kLanes; ++i) found |= wild[i] != 0;
  return !found;
}

// Calls body(F{}): the form that serves some columns of these queries and keys.
template <class T, class Body>
void with_form(int64_t form, const T* q, int64_t queries, const T* k, const Score& s,
               int64_t columns, const Body& body) {
  if (form == 1) return body(Gaussian{});
  if constexpr (!std::is_same_v<T, double>) {
    if (tame(q, queries, s.width, columns) && tame(k, s.keys, s.width, columns))
      return body(Additive{});
  }
  body(AdditiveFar{});
}

// Planes of `columns` numbers of `count` keys: (columns, kKey, length), 0 past the last key.
template <class F, class T, class A>
void prepare_keys(A* planes, const T* k, int64_t width, int64_t count, int64_t columns,
                  int64_t length) {
  for (int64_t h = 0; h < columns; ++h) {
    A* to = planes + h * F::kKey * length;
    for (int64_t s = 0; s < length; ++s) to[s] = s < count ? to_float(k[s * width + h]) : A(0);
    for (int64_t s = 0; s < length; s += kWide<A>) {
      Wide<A> made[F::kKey];
      F::of_key(load(to + s), made);
      for (int p = 0; p < F::kKey; ++p) store(to + p * length + s, made[p]);
    }
  }
}

// Planes of `columns` numbers of a query: (columns, kQuery). `row` is room for padded columns.
template <class F, class T, class A>
void prepare_query(A* planes, A* row, const T* q, int64_t columns) {
  for (int64_t h = 0; h < columns; ++h) row[h] = to_float(q[h]);
  for (int64_t h = 0; h < columns; h += kWide<A>) {
    Wide<A> made[F::kQuery];
    F::of_query(load(row + h), made);
    for (int64_t i = 0; i < kWide<A> && h + i < columns; ++i) {
      for (int p = 0; p < F::kQuery; ++p) {
        planes[(h + i) * F::kQuery + p] = static_cast<A>(lane(made[p], i));
      }
    }
  }
}

// The scores of kCount queries and a register of keys.
template <class F, int kCount, class A>
PYDL_HD void score_keys(A* scores, int64_t stride, const A* query, const A* key, const A* weight,
                        int64_t width, int64_t count) {
  Wide<A> totals[kCount] = {};
  for (int64_t begin = 0; begin < width; begin += kPartialSum) {
    const int64_t end = begin + kPartialSum < width ? begin + kPartialSum : width;
    Wide<A> sums[kCount] = {};
    for (int64_t h = begin; h < end; ++h) {
      Wide<A> k[F::kKey], q[F::kQuery];
#pragma GCC unroll 4
      for (int p = 0; p < F::kKey; ++p) k[p] = load(key + (h * F::kKey + p) * kWide<A>);
      const Wide<A> w = broadcast(weight + h);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
        for (int p = 0; p < F::kQuery; ++p) {
          q[p] = broadcast(query + (i * width + h) * F::kQuery + p);
        }
        sums[i] = F::add_term(sums[i], F::meet(q, k), w);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) totals[i] += sums[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) store_some(scores + i * stride, F::total(totals[i]), count);
}

template <class F, class T, class A>
void forward_tile(A* scores, const T* q, const T* k, const A* weight, const Score& s,
                  int64_t queries) {
  const Scratch<A> query(queries * s.width * F::kQuery), row(s.width + kPad);
  const Scratch<A> key(s.width * F::kKey * kWide<A>);
  for (int64_t l = 0; l < queries; ++l) {
    prepare_query<F>(query.data() + l * s.width * F::kQuery, row.data(), q + l * s.width, s.width);
  }
  for (int64_t first = 0; first < s.keys; first += kWide<A>) {
    const int64_t count = s.keys - first < kWide<A> ? s.keys - first : kWide<A>;
    prepare_keys<F>(key.data(), k + first * s.width, s.width, count, s.width, kWide<A>);
    for (int64_t l = 0; l < queries;) {
      A* const to = scores + l * s.keys + first;
      const A* const from = query.data() + l * s.width * F::kQuery;
      const bool full = queries - l >= kGroup;
      if (full) {
        score_keys<F, kGroup>(to, s.keys, from, key.data(), weight, s.width, count);
      } else {
        score_keys<F, 1>(to, s.keys, from, key.data(), weight, s.width, count);
      }
      l += full ? kGroup : 1;
    }
  }
}

// Adds what kCount queries and a tile of keys give to one column's gradients: to those of the
// queries at once, to those of the keys and of the weight a register at a time. ds: (kCount,
// kKeyTile), 0 past the last key.
template <class F, int kCount, class A>
PYDL_HD void meet_column(A* dq, A* dk, A* dw, const A* ds, const A* query, int64_t stride,
                         const A* key, int64_t length) {
  Wide<A> q[kCount][F::kQuery], dqs[kCount] = {}, weights = {};
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
    for (int p = 0; p < F::kQuery; ++p) q[i][p] = broadcast(query + i * stride + p);
  }
  for (int64_t s = 0; s < length; s += kWide<A>) {
    Wide<A> k[F::kKey], dks = {}, dws = {};
#pragma GCC unroll 4
    for (int p = 0; p < F::kKey; ++p) k[p] = load(key + p * length + s);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const Wide<A> t = F::meet(q[i], k), d = load(ds + i * kKeyTile<A> + s);
      const Wide<A> by_number = d * F::by_number(t);
      dqs[i] += by_number;
      dks += by_number;
      dws += d * F::by_weight(t);
    }
    weights += dws;
    store(dk + s, load(dk + s) + dks);
  }
  store(dw, load(dw) + weights);
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) dq[i * kColumns] = static_cast<A>(add_lanes(dqs[i]));
}

// The gradients that a piece of the queries gives to some columns. Sums of products come first,
// the factors of the weight at the end.
template <class F, class T, class A>
void backward_columns(A* dq, A* dk, A* dw, const A* ds, const T* q, const T* k, const A* weight,
                      const Score& s, int64_t queries, int64_t columns) {
  const Scratch<A> key(columns * F::kKey * kKeyTile<A>);
  Scratch<A> dkey(columns * kKeyTile<A>);
  const Scratch<A> dweight(columns * kWide<A>), upstream(kGroup * kKeyTile<A>);
  A query[kGroup * kColumns * F::kQuery], row[kColumns + kPad] = {}, sums[kGroup * kColumns];
  for (int64_t l = 0; l < queries; ++l) {
    for (int64_t h = 0; h < columns; ++h) dq[l * s.width + h] = 0;
  }
  for (int64_t first = 0; first < s.keys; first += kKeyTile<A>) {
    const int64_t count = s.keys - first < kKeyTile<A> ? s.keys - first : kKeyTile<A>;
    const int64_t length = (count + kWide<A> - 1) / kWide<A> * kWide<A>;
    prepare_keys<F>(key.data(), k + first * s.width, s.width, count, columns, length);
    dkey.clear(columns * length);
    for (int64_t l = 0; l < queries;) {
      const int64_t together = queries - l >= kGroup ? kGroup : 1;
      for (int64_t i = 0; i < together; ++i) {
        prepare_query<F>(query + i * columns * F::kQuery, row, q + (l + i) * s.width, columns);
        A* const to = upstream.data() + i * kKeyTile<A>;
        std::memcpy(to, ds + (l + i) * s.keys + first, static_cast<size_t>(count) * sizeof(A));
        for (int64_t j = count; j < length; ++j) to[j] = 0;
      }
      for (int64_t h = 0; h < columns; ++h) {
        A* const to = dkey.data() + h * length;
        A* const weights = dweight.data() + h * kWide<A>;
        const A* const from = query + h * F::kQuery;
        const A* const keys = key.data() + h * F::kKey * length;
        if (together == kGroup) {
          meet_column<F, kGroup>(sums + h, to, weights, upstream.data(), from, columns * F::kQuery,
                                 keys, length);
        } else {
          meet_column<F, 1>(sums + h, to, weights, upstream.data(), from, 0, keys, length);
        }
      }
      for (int64_t i = 0; i < together; ++i) {
        for (int64_t h = 0; h < columns; ++h) {
          dq[(l + i) * s.width + h] += F::of_dquery(weight[h]) * sums[i * kColumns + h];
        }
      }
      l += together;
    }
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t h = 0; h < columns; ++h) {
        dk[(first + j) * s.width + h] = F::of_dkey(weight[h]) * dkey.data()[h * length + j];
      }
    }
  }
  for (int64_t h = 0; h < columns; ++h) {
    const double total = add_lanes(load(dweight.data() + h * kWide<A>));
    dw[h] = static_cast<A>(F::of_dweight(static_cast<double>(weight[h])) * total);
  }
}

int64_t grain_of(int64_t pairs) { return pairs >= kPairGrain ? 1 : kPairGrain / (pairs + 1); }

void score_fwd(Out scores, View query, View key, View weight, int64_t form) {
  const Score s = Score::of("score", query, key, weight, form);
  s.check_scores("score", scores, query);
  if (scores.numel == 0) return;
  dispatch_float("score", query.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Parameters<A> w("score", weight, s.width);
    const int64_t tiles = (s.queries + kQueryTile - 1) / kQueryTile;
    const int64_t pairs = s.keys * s.width * (s.queries < kQueryTile ? s.queries : kQueryTile);
    parallel_for(s.batch * tiles, grain_of(pairs), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / tiles, first = unit % tiles * kQueryTile;
        const int64_t left = s.queries - first, count = left < kQueryTile ? left : kQueryTile;
        const int64_t row = b * s.queries + first;
        const T* const q = static_cast<const T*>(query.data) + row * s.width;
        const T* const k = static_cast<const T*>(key.data) + b * s.keys * s.width;
        A* const to = static_cast<A*>(scores.data) + row * s.keys;
        with_form(form, q, count, k, s, s.width,
                  [&](auto f) { forward_tile<decltype(f)>(to, q, k, w.data(), s, count); });
      }
    });
  });
}

// A unit is a piece of the queries and some columns: they meet no other columns' gradients.
void score_bwd(Out dquery, Out dkey, Out dweight, View dscores, View query, View key, View weight,
               int64_t form) {
  const Score s = Score::of("score", query, key, weight, form);
  s.check_scores("score", dscores, query);
  const int64_t pieces = s.check_gradients("score", dquery, dkey, dweight, query);
  if (s.batch == 0 || s.width == 0) return;
  dispatch_float("score", query.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Parameters<A> w("score", weight, s.width);
    const int64_t blocks = (s.width + kColumns - 1) / kColumns;
    const int64_t pairs = (s.queries / pieces + 1) * s.keys * kColumns;
    parallel_for(pieces * s.batch * blocks, grain_of(pairs), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t h = unit % blocks * kColumns, part = unit / blocks, b = part % s.batch;
        const Range rows = Pieces::share(s.queries, pieces, part / s.batch);
        const int64_t columns = s.width - h < kColumns ? s.width - h : kColumns;
        const int64_t row = b * s.queries + rows.begin, count = rows.end - rows.begin;
        const T* const q = static_cast<const T*>(query.data) + row * s.width;
        const T* const k = static_cast<const T*>(key.data) + b * s.keys * s.width;
        with_form(form, q + h, count, k + h, s, columns, [&](auto f) {
          backward_columns<decltype(f)>(static_cast<A*>(dquery.data) + row * s.width + h,
                                        static_cast<A*>(dkey.data) + part * s.keys * s.width + h,
                                        static_cast<A*>(dweight.data) + part * s.width + h,
                                        static_cast<const A*>(dscores.data) + row * s.keys, q + h,
                                        k + h, w.data() + h, s, count, columns);
        });
      }
    });
  });
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;
EXPORT(cpu, score_fwd, "scores, query, key, weight, form", score_fwd)
EXPORT(cpu, score_bwd, "dquery, dkey, dweight, dscores, query, key, weight, form", score_bwd)
