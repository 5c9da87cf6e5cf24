// CPU: attention backward. The weights are computed again from the scores and their sums. A thread
// takes the heads that share keys, a tile of keys over all queries that see it: dK and dV grow in
// place, dQ over the tiles of keys (in pieces, added in a fixed order, where heads are few).
#pragma once

#include "attention_checks.h"
#include "attention_tile.h"

namespace pydl {
inline namespace PYDL_ISA {

template <class T, bool kDot = false>
struct AttentionBackward {
  using F = Factors<T, kDot>;
  using A = typename F::A;
  using N = typename F::N;
  using V = typename Register<A>::type;
  static constexpr int64_t kWidth = Register<A>::lanes;
  static constexpr int64_t kTasks = 16;  // enough for any number of threads that gains by more

  const Attention& a;
  const AttentionGradients& g;

  int64_t wide() const { return padded<A>(a.width); }
  int64_t value_wide() const { return padded<A>(a.value_width); }
  int64_t key_tiles() const { return (a.keys + kKeyTile - 1) / kKeyTile; }
  int64_t window() const { return a.relative.sizes[3]; }
  int64_t query_tiles() const { return (a.queries + kQueryTile - 1) / kQueryTile; }

  // A head's queries and upstream gradient as they are computed with: as rows, and for products of
  // pairs with the queries as terms, a tile after the other.
  struct Head {
    Buffer<N> q, dout, q_terms, d_terms, room;
    Buffer<A> delta, lse, rest;
    Matrix<N> d{nullptr, 0};
    explicit Head(const AttentionBackward& w)
        : q(w.a.queries * w.wide()),
          dout(w.a.queries * w.value_wide()),
          q_terms(kDot ? w.wide() * w.query_tiles() * kQueryTile : 0),
          d_terms(kDot ? w.value_wide() * w.query_tiles() * kQueryTile : 0),
          room(kDot ? kQueryTile * (w.wide() > w.value_wide() ? w.wide() : w.value_wide()) : 0),
          delta(w.a.queries),
          lse(w.a.queries),
          rest(w.a.queries) {}
    void fill(const AttentionBackward& w, const Tile<T>& tile) {
      const Attention& a = w.a;
      const int64_t first = tile.s.first_q;
      const auto row = [&](const Quad& x, int64_t i) {
        return static_cast<const T*>(x.data) + x.at(tile.s.b, tile.h, first + i, 0);
      };
      const int64_t count = tile.s.queries;
      d = in_place_or(row(w.g.dout, 0), w.g.dout.strides[2], count, a.value_width, dout.data());
      for (int64_t i = 0; i < count; ++i) {
        convert_row(row(a.q, i), a.width, q.data() + i * w.wide(),
                    static_cast<A>(F::before(a.scale)));
        const T *const o = row(w.g.out, i), *const up = row(w.g.dout, i);
        V sum = spread(A(0));
        for (int64_t k = 0; k < a.value_width; k += kWidth) {
          const int64_t n = a.value_width - k < kWidth ? a.value_width - k : kWidth;
          sum += plain(load_some(o + k, n)) * plain(load_some(up + k, n));
        }
        const auto number = [&](const Quad& x) {
          return static_cast<const A*>(x.data)[x.at(tile.s.b, tile.h, first + i, 0)];
        };
        lse.data()[i] = number(w.g.lse);
        rest.data()[i] = number(w.g.rest);
        delta.data()[i] = static_cast<A>(add_lanes(sum));
        if (w.g.dlse.present()) delta.data()[i] -= number(w.g.dlse);
      }
      if constexpr (kDot) {
        for (int64_t i = 0; i < count; i += kQueryTile) {
          const int64_t n = count - i < kQueryTile ? count - i : kQueryTile;
          transpose_rows(q.data() + i * w.wide(), w.wide(), n, a.width,
                         q_terms.data() + i * w.wide(), kQueryTile, room.data());
          transpose_rows(d.data + i * d.row, d.row, n, a.value_width,
                         d_terms.data() + i * w.value_wide(), kQueryTile, room.data());
        }
      }
    }
  };
  // A tile of keys and values: transposed for the scores, as rows for dQ.
  struct Keys {
    Buffer<N> k, v, rows, panel;
    Matrix<N> in_rows{nullptr, 0};
    explicit Keys(const AttentionBackward& w)
        : k(kKeyTile * F::depth(w.a.width)),
          v(kKeyTile * F::depth(w.a.value_width)),
          rows(kKeyTile * w.wide()),
          panel(kDot ? kPanel<A> * (w.wide() + w.value_wide()) : 0) {}
    void fill(const AttentionBackward& w, const Tile<T>& tile, Range64 keys) {
      const Attention& a = w.a;
      const int64_t head = a.kv_head(tile.h), first = tile.s.first_k + keys.begin;
      const int64_t count = keys.end - keys.begin;
      const T* const from_k = static_cast<const T*>(a.k.data) + a.k.at(tile.s.b, head, first, 0);
      const T* const from_v = static_cast<const T*>(a.v.data) + a.v.at(tile.s.b, head, first, 0);
      if constexpr (kDot) {
        pack_panels(from_k, a.k.strides[2], count, a.width, k.data(), panel.data());
        pack_panels(from_v, a.v.strides[2], count, a.value_width, v.data(), panel.data());
        pack_rows(from_k, a.k.strides[2], count, a.width, rows.data(), w.wide());
        clear(rows.data() + even(count) * w.wide(), (kKeyTile - even(count)) * w.wide());
        in_rows = {rows.data(), w.wide()};
      } else {
        pack_panels(from_k, a.k.strides[2], count, a.width, k.data());
        pack_panels(from_v, a.v.strides[2], count, a.value_width, v.data());
        in_rows = in_place_or(from_k, a.k.strides[2], count, a.width, rows.data());
      }
    }
  };
  struct Room {
    Buffer<A> weights, slopes;
    Buffer<N> weight_pairs, slope_pairs, slope_rows;
    Buffer<A> factors, caps, row;
    Room()
        : weights(kQueryTile * kKeyTile + kPanel<A>),
          slopes(kQueryTile * kKeyTile + kPanel<A>),
          weight_pairs(kDot ? kQueryTile * kKeyTile : 0),
          slope_pairs(kDot ? kQueryTile * kKeyTile : 0),
          slope_rows(kDot ? kQueryTile * kKeyTile + kWidth : 0),
          factors(kKeyTile + kWidth),
          caps(kKeyTile + kWidth),
          row(kKeyTile + kWidth) {}
  };

  void run() const {
    const int64_t groups = a.batch * a.kv_heads;
    if (groups == 0) return;
    const int64_t each = a.heads / a.kv_heads;
    int64_t pieces = groups >= kTasks ? 1 : (kTasks + groups - 1) / groups;
    if (pieces > key_tiles()) pieces = key_tiles() > 0 ? key_tiles() : 1;
    const int64_t all_rows = a.batch * a.heads * a.queries;
    const bool biased = g.drelative.present();
    Buffer<A> parts(pieces > 1 ? pieces * all_rows * wide() : 0);
    Buffer<A> biases(biased ? pieces * a.batch * a.heads * window() : 0);
    parallel_for(groups * pieces, 1, [&](int64_t begin, int64_t end) {
      const TileUse registers(kDot);
      Head head(*this);
      Keys keys(*this);
      Room room;
      const int64_t most = (key_tiles() + pieces - 1) / pieces * kKeyTile;
      Buffer<A> dk(most * wide()), dv(most * value_wide());
      Buffer<A> own(pieces > 1 ? 0 : a.queries * wide());
      for (int64_t k = begin; k < end; ++k) {
        const int64_t piece = k % pieces, b = k / pieces / a.kv_heads;
        const int64_t kv_head = k / pieces % a.kv_heads, first = kv_head * each;
        const int64_t t0 = key_tiles() * piece / pieces, t1 = key_tiles() * (piece + 1) / pieces;
        const Attention::Sequence s = a.sequence(b);
        clear(dk.data(), (t1 - t0) * kKeyTile * wide());
        clear(dv.data(), (t1 - t0) * kKeyTile * value_wide());
        for (int64_t h = first; h < first + each; ++h) {
          const Tile<T> tile{a, s, b, h};
          head.fill(*this, tile);
          const int64_t at = (piece * a.batch + b) * a.heads + h;
          A* const dq = pieces > 1 ? parts.data() + at * a.queries * wide() : own.data();
          A* const bias = biased ? biases.data() + at * window() : nullptr;
          clear(dq, s.queries * wide());
          if (bias) clear(bias, window());
          for (int64_t t = t0; t < t1; ++t) {
            const Range64 span{t * kKeyTile,
                               s.keys < (t + 1) * kKeyTile ? s.keys : (t + 1) * kKeyTile};
            if (span.empty()) continue;
            keys.fill(*this, tile, span);
            key_tile(tile, span, head, keys, room, dq, dk.data() + (t - t0) * kKeyTile * wide(),
                     dv.data() + (t - t0) * kKeyTile * value_wide(), bias);
          }
          if (pieces == 1) write_queries(tile, dq, 1, 0);
        }
        write_keys(s, kv_head, t0 * kKeyTile, t1 * kKeyTile, dk.data(), dv.data());
      }
    });
    if (pieces > 1) {
      parallel_for(a.batch * a.heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          const int64_t b = k / a.heads, h = k % a.heads;
          write_queries(Tile<T>{a, a.sequence(b), b, h}, parts.data() + k * a.queries * wide(),
                        pieces, all_rows * wide());
        }
      });
    }
    if (biased) write_biases(biases.data(), pieces);
    if (g.dmask.present()) mask_gradient();
  }

  void key_tile(const Tile<T>& tile, Range64 keys, const Head& head, const Keys& packed, Room& room,
                A* dq, A* dk, A* dv, A* bias) const {
    const Range64 first = a.seeing(tile.s, keys.begin), last = a.seeing(tile.s, keys.end - 1);
    for (int64_t qt = first.begin / kQueryTile; qt * kQueryTile < last.end; ++qt) {
      const Range64 rows{qt * kQueryTile, tile.s.queries < (qt + 1) * kQueryTile
                                              ? tile.s.queries
                                              : (qt + 1) * kQueryTile};
      Seen part = tile.seen(rows, keys);
      if (part.rows.empty()) continue;
      if constexpr (kDot) {
        const int64_t grain = tile_mode ? kTileTerms : kWidth;
        part.columns = {down(part.columns.begin, grain), up(part.columns.end, grain)};
        // Queries are terms of products: what pads the last of them is zeros, what follows is not.
        part.rows.begin = down(part.rows.begin, F::term_grain());
      }
      slopes(tile, rows, keys, part, head, packed, room, true, bias);
      const int64_t r0 = part.rows.begin, c0 = part.columns.begin;
      const int64_t count = part.rows.end - r0, columns = part.columns.end - c0;
      const A* const w = room.weights.data() + r0 * kKeyTile + c0;
      const A* const ds = room.slopes.data() + r0 * kKeyTile + c0;
      const int64_t i = rows.begin + r0;
      if constexpr (kDot) {
        pair_up(part, room);
        const int64_t depth = up(count, F::term_grain());
        const N* const d_terms = head.d_terms.data() + rows.begin * value_wide() + r0;
        const N* const q_terms = head.q_terms.data() + rows.begin * wide() + r0;
        multiply(a.value_width, columns, depth, {d_terms, kQueryTile, 1},
                 room.weight_pairs.data() + 2 * c0, 2 * kKeyTile, dv + c0, kKeyTile, true);
        multiply(a.width, columns, depth, {q_terms, kQueryTile, 1},
                 room.slope_pairs.data() + 2 * c0, 2 * kKeyTile, dk + c0, kKeyTile, true);
        multiply(count, wide(), columns, {room.slope_rows.data() + c0, kKeyTile, 1},
                 packed.in_rows.data + c0 * wide(), 2 * wide(), dq + i * wide(), wide(), true);
      } else {
        multiply<A>(columns, value_wide(), count, {w, 1, kKeyTile}, head.d.data + i * head.d.row,
                    head.d.row, dv + c0 * value_wide(), value_wide(), true);
        multiply<A>(columns, wide(), count, {ds, 1, kKeyTile}, head.q.data() + i * wide(), wide(),
                    dk + c0 * wide(), wide(), true);
        multiply<A>(count, wide(), columns, {ds, kKeyTile, 1},
                    packed.in_rows.data + c0 * packed.in_rows.row, packed.in_rows.row,
                    dq + i * wide(), wide(), true);
      }
    }
  }

  // What products of pairs take of a tile's weights and slopes: neighbouring queries side by side,
  // and the slopes as rows too.
  void pair_up(const Seen& part, Room& room) const
    requires kDot
  {
    const int64_t c0 = part.columns.begin, n = part.columns.end - c0;
    for (int64_t r = part.rows.begin; r < part.rows.end; ++r) {
      const int64_t at = r * kKeyTile + c0, to = (r - part.rows.begin) * kKeyTile;
      narrow(room.slopes.data() + at, n, room.slope_rows.data() + to + c0);
      if ((r - part.rows.begin) % 2) continue;
      const bool two = r + 1 < part.rows.end;
      const A *const w = room.weights.data() + at, *const ds = room.slopes.data() + at;
      side_by_side(w, two ? w + kKeyTile : nullptr, n, room.weight_pairs.data() + to + 2 * c0);
      side_by_side(ds, two ? ds + kKeyTile : nullptr, n, room.slope_pairs.data() + to + 2 * c0);
    }
    const int64_t count = part.rows.end - part.rows.begin;
    for (int64_t r = even(count); r < up(count, F::term_grain()); r += 2) {
      clear(room.weight_pairs.data() + r * kKeyTile + 2 * c0, 2 * n);
      clear(room.slope_pairs.data() + r * kKeyTile + 2 * c0, 2 * n);
    }
  }

  // A tile's weights (with dropout) and the gradients of its scores: before the softcap where
  // `through`, else of what the mask was added to. Zeros where a query does not see a key.
  void slopes(const Tile<T>& tile, Range64 rows, Range64 keys, const Seen& part, const Head& head,
              const Keys& packed, Room& room, bool through, A* bias) const {
    const int64_t first = rows.begin;
    tile.products(Strided<N>{head.q.data() + first * wide(), wide(), 1}, F::depth(a.width),
                  packed.k.data(), part, rows, keys, room.weights.data());
    tile.products(Strided<N>{head.d.data + first * head.d.row, head.d.row, 1},
                  F::depth(a.value_width), packed.v.data(), part, rows, keys, room.slopes.data());
    const A after = static_cast<A>(F::after(a.scale));
    const bool capped = a.softcap > 0 && through, adjusted = adjusts(a);
    for (int64_t r = part.rows.begin; r < part.rows.end; ++r) {
      A *const x = room.weights.data() + r * kKeyTile, *const y = room.slopes.data() + r * kKeyTile;
      Range64 own = tile.row_keys(first + r, keys);
      const A lse = head.lse.data()[first + r];
      if (lse == kNothing<A>) own.end = own.begin;  // it sees nothing
      for (A* row : {x, y}) {
        const int64_t stop = own.begin < part.columns.end ? own.begin : part.columns.end;
        clear(row + part.columns.begin, stop - part.columns.begin);
        clear(row + own.end, part.columns.end - own.end);
      }
      const int64_t n = own.end - own.begin;
      if (n <= 0) continue;
      const int64_t i = first + r, key = keys.begin + own.begin;
      A *const w = x + own.begin, *const ds = y + own.begin, *const side = room.row.data();
      if (after != 1) {
        each([&](V score) { return score * spread(after); }, n, w);
      }
      if (adjusted) {
        std::memcpy(side, w, static_cast<size_t>(n) * sizeof(A));
        tile.adjust(side, capped ? room.caps.data() : nullptr, i, key, n);
        std::memcpy(w, side, static_cast<size_t>(n) * sizeof(A));
      }
      exponentials(w, n, lse, head.rest.data()[i]);
      const A delta = head.delta.data()[i];
      if (a.drops) {
        A* const f = room.factors.data();
        tile.factors(f, i, key, n);
        each([&](V up, V weight, V factor) { return weight * (up * factor - spread(delta)); }, n,
             ds, w, f);
        each([](V weight, V factor) { return weight * factor; }, n, w, f);
      } else {
        each([&](V up, V weight) { return weight * (up - spread(delta)); }, n, ds, w);
      }
      if (bias) {
        A* const to = bias + (key - (i + tile.s.shift) + a.left);
        each([](V sum, V slope) { return sum + slope; }, n, to, ds);
      }
      if (capped) {
        each([](V slope, V cap) { return slope * cap; }, n, ds, room.caps.data());
      }
    }
  }

  // dq = scale times the sum of `count` parts, `apart` numbers apart.
  void write_queries(const Tile<T>& tile, A* parts, int64_t count, int64_t apart) const {
    const A scale = static_cast<A>(a.scale);
    for (int64_t i = 0; i < tile.s.queries; ++i) {
      T* const to = static_cast<T*>(g.dq.data) + g.dq.at(tile.s.b, tile.h, tile.s.first_q + i, 0);
      A* const sum = parts + i * wide();
      for (int64_t k = 1; k < count; ++k) {
        each([](V x, V part) { return x + part; }, a.width, sum, parts + k * apart + i * wide());
      }
      convert_back(sum, a.width, to, scale);
    }
  }
  // The gradients of keys and values: a row each, or a column of their tile.
  void write_keys(const Attention::Sequence& s, int64_t head, int64_t begin, int64_t end, A* dk,
                  A* dv) const {
    if constexpr (kDot) {
      Buffer<A> rows(kKeyTile * (wide() > value_wide() ? wide() : value_wide()));
      const auto turn = [&](A* tile, int64_t n) {
        transpose(tile, kKeyTile, n, kKeyTile, rows.data(), padded<A>(n));
        std::memcpy(tile, rows.data(), static_cast<size_t>(kKeyTile * padded<A>(n)) * sizeof(A));
      };
      for (int64_t j = 0; j < end - begin; j += kKeyTile) {
        turn(dk + j * wide(), a.width);
        turn(dv + j * value_wide(), a.value_width);
      }
    }
    const A after = static_cast<A>(F::after(a.scale));
    for (int64_t j = begin; j < end && j < s.keys; ++j) {
      T* const to_k = static_cast<T*>(g.dk.data) + g.dk.at(s.b, head, s.first_k + j, 0);
      T* const to_v = static_cast<T*>(g.dv.data) + g.dv.at(s.b, head, s.first_k + j, 0);
      const A *const k = dk + (j - begin) * wide(), *const v = dv + (j - begin) * value_wide();
      convert_back(k, a.width, to_k, after);
      convert_back(v, a.value_width, to_v, A(1));
    }
  }
  void write_biases(const A* parts, int64_t pieces) const {
    for (int64_t h = 0; h < a.heads; ++h) {
      for (int64_t w = 0; w < window(); ++w) {
        double sum = 0;
        for (int64_t k = 0; k < pieces * a.batch; ++k)
          sum += parts[(k * a.heads + h) * window() + w];
        static_cast<A*>(g.drelative.data)[g.drelative.at(0, h, 0, w)] = static_cast<A>(sum);
      }
    }
  }

  // The mask's gradient: the scores' summed over what it was repeated over, a tile after the other
  // for each part of the mask.
  void mask_gradient() const {
    const Quad& m = g.dmask;
    const int64_t tiles = query_tiles();
    const bool by_queries = m.sizes[2] > 1, by_keys = !by_queries && m.sizes[3] > 1;
    const int64_t blocks = by_queries ? tiles : by_keys ? key_tiles() : 1;
    for (int64_t i = 0; i < m.sizes[0] * m.sizes[1] * m.sizes[2] * m.sizes[3]; ++i) {
      static_cast<A*>(m.data)[i] = 0;
    }
    parallel_for(m.sizes[0] * m.sizes[1] * blocks, 1, [&](int64_t begin, int64_t end) {
      const TileUse registers(kDot);
      Head head(*this);
      Keys keys(*this);
      Room room;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t block = k % blocks, mh = k / blocks % m.sizes[1],
                      mb = k / blocks / m.sizes[1];
        for (int64_t b = 0; b < a.batch; ++b) {
          if (m.sizes[0] > 1 && b != mb) continue;
          for (int64_t h = 0; h < a.heads; ++h) {
            if (m.sizes[1] > 1 && h != mh) continue;
            const Tile<T> tile{a, a.sequence(b), b, h};
            head.fill(*this, tile);
            for (int64_t kt = by_keys ? block : 0; kt < (by_keys ? block + 1 : key_tiles()); ++kt) {
              const Range64 span{kt * kKeyTile, tile.s.keys < (kt + 1) * kKeyTile
                                                    ? tile.s.keys
                                                    : (kt + 1) * kKeyTile};
              if (span.empty()) continue;
              keys.fill(*this, tile, span);
              for (int64_t qt = by_queries ? block : 0; qt < (by_queries ? block + 1 : tiles);
                   ++qt) {
                mask_tile(tile, qt, span, head, keys, room);
              }
            }
          }
        }
      }
    });
  }
  void mask_tile(const Tile<T>& tile, int64_t qt, Range64 keys, const Head& head,
                 const Keys& packed, Room& room) const {
    const Range64 rows{qt * kQueryTile, tile.s.queries < (qt + 1) * kQueryTile
                                            ? tile.s.queries
                                            : (qt + 1) * kQueryTile};
    const Seen part = tile.seen(rows, keys);
    if (part.rows.empty()) return;
    slopes(tile, rows, keys, part, head, packed, room, false, nullptr);
    const Quad& m = g.dmask;
    for (int64_t r = part.rows.begin; r < part.rows.end; ++r) {
      const A* const ds = room.slopes.data() + r * kKeyTile;
      A* const to = static_cast<A*>(m.data) + m.at(tile.b, tile.h, rows.begin + r, keys.begin);
      for (int64_t j = part.columns.begin; j < part.columns.end; ++j) {
        to[j * m.strides[3]] += ds[j];
      }
    }
  }
};

}  // namespace PYDL_ISA
}  // namespace pydl
