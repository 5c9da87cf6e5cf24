// CPU: attention forward. A thread takes a tile of queries over all the keys they see, a tile of
// keys at a time, with the softmax' maximum and sum carried along (Milakov and Gimelshein 2018; Dao
// et al. 2022, arXiv 2205.14135).
#pragma once

#include "attention_tile.h"

namespace pydl {
inline namespace PYDL_ISA {

template <class T, bool kDot = false>
struct AttentionForward {
  using F = Factors<T, kDot>;
  using A = typename F::A;
  using N = typename F::N;
  using V = typename Register<A>::type;
  static constexpr int64_t kWidth = Register<A>::lanes;
  static constexpr int64_t kFew = kDot ? 0 : 4;  // queries; so few do not pay for packing the keys

  const Attention& a;
  const Quad &out, &lse, &rest;

  // Keys of a head, packed once and used by all its tiles of queries.
  struct Packed {
    Buffer<N> keys, values, panel;
    Buffer<uint8_t> done;
    Packed(const Attention& a, bool convert)
        : keys(tiles(a) * kKeyTile * F::depth(a.width)),
          values(convert ? tiles(a) * kKeyTile * padded<A>(a.value_width) : 0),
          panel(kDot ? kPanel<A> * F::depth(a.width) : 0),
          done(tiles(a)) {}
    static int64_t tiles(const Attention& a) { return (a.keys + kKeyTile - 1) / kKeyTile; }
    void forget(const Attention& a) {
      for (int64_t i = 0; i < tiles(a); ++i) done.data()[i] = 0;
    }
  };
  // What a tile of queries works with.
  struct Room {
    Buffer<N> q, weights;
    Buffer<A> scores, sums, most, total, factors;
    explicit Room(const Attention& a)
        : q(kQueryTile * padded<A>(a.width)),
          weights(kDot ? F::kMostRows * kKeyTile + kWidth : 0),
          scores(kQueryTile * kKeyTile + kPanel<A>),
          sums(kQueryTile * padded<A>(a.value_width)),
          most(kQueryTile),
          total(kQueryTile),
          factors(kKeyTile + kWidth) {}
  };

  bool converts() const {
    return kDot || !std::is_same_v<T, A> || a.value_width != padded<A>(a.value_width);
  }

  void run() const {
    const int64_t tiles = (a.queries + kQueryTile - 1) / kQueryTile;
    const int64_t all = a.batch * a.heads * tiles;
    // A thread's tiles follow each other in a head, so that what is packed is used again.
    parallel_for(all, 1, [&](int64_t begin, int64_t end) {
      const TileUse registers(kDot);
      Packed packed(a, converts());
      Room room(a);
      int64_t owner = -1;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t b = k / (a.heads * tiles), h = k / tiles % a.heads;
        if (const int64_t head = b * a.kv_heads + a.kv_head(h); head != owner) {
          packed.forget(a);
          owner = head;
        }
        // Early and late tiles in turn: with a causal mask they differ in work.
        const int64_t t = k % tiles;
        queries(Tile<T>{a, a.sequence(b), b, h}, t % 2 ? tiles - 1 - t / 2 : t / 2, packed, room);
      }
    });
  }

  void pack(const Tile<T>& tile, int64_t kt, Range64 keys, bool transposed, Packed& packed) const {
    // 1: the values are there; 2: the keys too.
    uint8_t& done = packed.done.data()[kt];
    const int64_t g = a.kv_head(tile.h), count = keys.end - keys.begin;
    if (transposed && done < 2) {
      const T* const k =
          static_cast<const T*>(a.k.data) + a.k.at(tile.s.b, g, tile.s.first_k + keys.begin, 0);
      N* const to = packed.keys.data() + kt * kKeyTile * F::depth(a.width);
      if constexpr (kDot) {
        pack_panels(k, a.k.strides[2], count, a.width, to, packed.panel.data());
      } else {
        pack_panels(k, a.k.strides[2], count, a.width, to);
      }
    }
    const bool values = converts() && done == 0;
    if (done < 1 + transposed) done = 1 + transposed;
    if (!values) return;
    const int64_t row = padded<A>(a.value_width);
    N* const to = packed.values.data() + kt * kKeyTile * row;
    if constexpr (kDot) {
      pack_rows(value(tile, keys.begin), a.v.strides[2], count, a.value_width, to, row);
      clear(to + even(count) * row, (up(count, F::term_grain()) - even(count)) * row);
    } else {
      for (int64_t j = 0; j < count; ++j) {
        convert_row(value(tile, keys.begin + j), a.value_width, to + j * row, A(1));
      }
    }
  }
  const T* value(const Tile<T>& tile, int64_t j) const {
    return static_cast<const T*>(a.v.data) +
           a.v.at(tile.s.b, a.kv_head(tile.h), tile.s.first_k + j, 0);
  }

  void queries(const Tile<T>& tile, int64_t qt, Packed& packed, Room& room) const {
    const Attention::Sequence& s = tile.s;
    const Range64 rows{qt * kQueryTile,
                       s.queries < (qt + 1) * kQueryTile ? s.queries : (qt + 1) * kQueryTile};
    if (rows.empty()) return;
    const int64_t count = rows.end - rows.begin, wide = padded<A>(a.value_width);
    const int64_t row = padded<A>(a.width);
    N* const q = room.q.data();
    A *const most = room.most.data(), *const total = room.total.data();
    const T* const from =
        static_cast<const T*>(a.q.data) + a.q.at(s.b, tile.h, s.first_q + rows.begin, 0);
    for (int64_t r = 0; r < count; ++r) {
      convert_row(from + r * a.q.strides[2], a.width, q + r * row,
                  static_cast<A>(F::before(a.scale)));
      most[r] = kNothing<A>;
      total[r] = 0;
    }
    clear(room.sums.data(), count * wide);
    const Range64 all = tile.keys_of(rows.begin, rows.end);
    for (int64_t kt = all.begin / kKeyTile; kt * kKeyTile < all.end; ++kt) {
      const Range64 keys{kt * kKeyTile,
                         s.keys < (kt + 1) * kKeyTile ? s.keys : (kt + 1) * kKeyTile};
      const Seen part = tile.seen(rows, keys);
      if (part.rows.empty()) continue;
      const bool few = count <= kFew;
      pack(tile, kt, keys, !few, packed);
      if constexpr (!kDot) {
        if (few) {
          const T* const k = static_cast<const T*>(a.k.data) +
                             a.k.at(s.b, a.kv_head(tile.h), s.first_k + keys.begin, 0);
          tile.products_of_few({q, row, 1}, k, a.k.strides[2], part, room.scores.data());
        }
      }
      if (!few) {
        const int64_t depth = F::depth(a.width);
        tile.products(Strided<N>{q, row, 1}, depth, packed.keys.data() + kt * kKeyTile * depth,
                      part, rows, keys, room.scores.data());
      }
      add(tile, rows, keys, part, packed, kt, room);
    }
    finish(tile, rows, room);
  }

  // Softmax of a tile's scores, and its weights' products with the values.
  void add(const Tile<T>& tile, Range64 rows, Range64 keys, const Seen& part, const Packed& packed,
           int64_t kt, Room& room) const {
    const int64_t wide = padded<A>(a.value_width);
    const bool adjusted = adjusts(a);
    Matrix<N> values{packed.values.data() + kt * kKeyTile * wide, wide};
    if (!converts()) {
      values = {reinterpret_cast<const N*>(value(tile, keys.begin)), a.v.strides[2]};
    }
    const int64_t block = F::block_rows();
    for (int64_t first = down(part.rows.begin, F::row_grain()); first < part.rows.end;
         first += block) {
      const int64_t last = first + block < part.rows.end ? first + block : part.rows.end;
      const Range64 of_first = tile.row_keys(rows.begin + first, keys);
      Range64 span{of_first.begin, tile.row_keys(rows.begin + last - 1, keys).end};
      if (span.empty()) continue;
      span = {down(span.begin, F::term_grain()), up(span.end, F::term_grain())};
      for (int64_t r = first; r < last; ++r) {
        A* const x = room.scores.data() + r * kKeyTile;
        const Range64 own = tile.row_keys(rows.begin + r, keys);
        clear(x + span.begin, (own.begin < span.end ? own.begin : span.end) - span.begin);
        clear(x + own.end, span.end - own.end);
        if (own.empty()) continue;
        weigh(tile, rows.begin + r, keys.begin + own.begin, x + own.begin, own.end - own.begin, r,
              adjusted, room);
      }
      const A* const scores = room.scores.data() + first * kKeyTile + span.begin;
      Strided<N> weights{nullptr, kKeyTile, 1};
      if constexpr (kDot) {
        for (int64_t r = 0; r < last - first; ++r) {
          narrow(scores + r * kKeyTile, span.end - span.begin, room.weights.data() + r * kKeyTile);
        }
        weights.data = room.weights.data();
      } else {
        weights.data = scores;
      }
      multiply(last - first, wide, span.end - span.begin, weights,
               values.data + span.begin * values.row, kTerms<N> * values.row,
               room.sums.data() + first * wide, wide, true);
    }
  }

  // x: n scores of query i, row r of the tile; becomes their weights.
  void weigh(const Tile<T>& tile, int64_t i, int64_t key, A* x, int64_t n, int64_t r, bool adjusted,
             Room& room) const {
    if (F::after(a.scale) != 1) {
      const A scale = static_cast<A>(a.scale);
      each([&](V s) { return s * spread(scale); }, n, x);
    }
    if (adjusted) {
      A* const side = room.factors.data();
      const size_t bytes = static_cast<size_t>(n) * sizeof(A);
      // Registers may reach past the row's end: they work on a copy.
      std::memcpy(side, x, bytes);
      tile.adjust(side, nullptr, i, key, n);
      std::memcpy(x, side, bytes);
    }
    A &most = room.most.data()[r], &total = room.total.data()[r];
    const A top = largest(x, n), above = top > most ? top : most;
    if (above == kNothing<A>) {
      // Nothing is seen so far, but a NaN must not vanish.
      for (int64_t j = 0; j < n; ++j) {
        x[j] = x[j] == x[j] ? A(0) : x[j];
        total += x[j];
      }
      return;
    }
    const A sum = exponentials(x, n, above);
    if (above != most) {
      const A share = most == kNothing<A> ? A(0) : std::exp(most - above);
      A* const sums = room.sums.data() + r * padded<A>(a.value_width);
      for (int64_t d = 0; d < padded<A>(a.value_width); d += kWidth) {
        store(sums + d, load(sums + d) * spread(share));
      }
      // A NaN that came with nothing seen stays.
      total *= total == total ? share : A(1);
      most = above;
    }
    total += sum;
    if (!a.drops) return;
    tile.factors(room.factors.data(), i, key, n);
    each([](V w, V factor) { return w * factor; }, n, x, room.factors.data());
  }

  void finish(const Tile<T>& tile, Range64 rows, const Room& room) const {
    const int64_t wide = padded<A>(a.value_width), first = tile.s.first_q;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t r = i - rows.begin;
      const A total = room.total.data()[r];
      const A inverse = total == 0 ? A(0) : 1 / total;
      T* const to = static_cast<T*>(out.data) + out.at(tile.s.b, tile.h, first + i, 0);
      const A* const sums = room.sums.data() + r * wide;
      convert_back(sums, a.value_width, to, inverse);
      // The logarithm's end, which fp32 alone would lose: weights are e^(score - lse - rest).
      const double most = room.most.data()[r], whole = most + std::log(double{total});
      const int64_t at = lse.at(tile.s.b, tile.h, first + i, 0);
      const A number = total == 0 ? kNothing<A> : static_cast<A>(whole);
      static_cast<A*>(lse.data)[at] = number;
      static_cast<A*>(rest.data)[rest.at(tile.s.b, tile.h, first + i, 0)] =
          total == 0 ? A(0) : static_cast<A>((most - double{number}) + std::log(double{total}));
    }
  }
};

}  // namespace PYDL_ISA
}  // namespace pydl
