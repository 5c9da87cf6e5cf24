// CPU: linear attention, forward. The states that parts of the sequence begin with come first, then
// the outputs, chunk by chunk.
#pragma once

#include "linear_attention_chunk.h"

namespace pydl {
inline namespace PYDL_ISA {

template <class T>
struct LinearForward : LinearChunks<T> {
  using Base = LinearChunks<T>;
  using Base::a;
  using Base::group;
  using Base::room;
  using Base::units;
  using Base::value_wide;
  using Base::wide;
  using typename Base::A;
  using typename Base::Keys;

  Quad out, factor;
  void *state_out, *sum_out;

  LinearForward(const LinearAttention& call, const Quad& o, const Quad& f, void* states, void* sums)
      : Base(call), out(o), factor(f), state_out(states), sum_out(sums) {}

  void run() const {
    if (units == 0 || group == 0) return;
    const int64_t pieces = Base::pieces(a.keys);
    // Per unit, piece and head: first what the piece adds to the state, then the state it begins
    // with (of the first piece, the whole where not causal).
    Buffer<A> states(units * pieces * group * room);
    if (!a.causal || pieces > 1) {
      parallel_for(units * pieces, 1, [&](int64_t begin, int64_t end) {
        Keys keys(*this);
        for (int64_t k = begin; k < end; ++k) {
          total(k / pieces, k % pieces, pieces, keys, states.data() + k * group * room);
        }
      });
    }
    parallel_for(units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        scan(u, pieces, states.data() + u * pieces * group * room);
      }
    });
    const int64_t parts = a.causal ? pieces : Base::pieces(a.queries);
    parallel_for(units * parts, 1, [&](int64_t begin, int64_t end) {
      Room scratch(*this);
      for (int64_t k = begin; k < end; ++k) {
        const int64_t u = k / parts, part = k % parts;
        if (a.causal) {
          causal(u, part, parts, scratch, states.data() + k * group * room);
        } else {
          whole(u, part, parts, scratch, states.data() + u * pieces * group * room);
        }
      }
    });
  }

  struct Room {
    Keys keys;
    Buffer<A> q, transposed, scores, out, sums;
    explicit Room(const LinearForward& w)
        : keys(w),
          q(kChunk * w.wide),
          transposed(w.a.causal ? kChunk * w.wide : 0),
          scores(kChunk * kChunk),
          out(kChunk * w.value_wide),
          sums(kChunk) {}
  };

  // What a piece's keys add to the state of each head; alike for all where nothing decays.
  void total(int64_t unit, int64_t index, int64_t pieces, Keys& keys, A* states) const {
    if (a.causal && index == pieces - 1) return;  // nothing begins after it
    const Range64 rows = Base::piece(a.keys, index, pieces);
    const int64_t heads = a.decay ? group : 1;
    const auto powers = Base::all_powers(unit);
    clear(states, heads * room);
    for (int64_t first = rows.begin; first < rows.end; first += kChunk) {
      const int64_t n = rows.end - first < kChunk ? rows.end - first : kChunk;
      keys.fill(*this, unit, first, n);
      for (int64_t g = 0; g < heads; ++g) {
        Base::absorb_keys(states + g * room, false, keys, powers[static_cast<size_t>(g)], n);
      }
    }
  }

  void scan(int64_t unit, int64_t pieces, A* states) const {
    Buffer<A> running(room), before(room);
    const auto slot = [&](int64_t p, int64_t g) { return states + (p * group + g) * room; };
    // The first head's totals may stand for all: it comes last.
    for (int64_t g = group - 1; g >= 0; --g) {
      const Powers<A> powers = Base::powers(unit, g);
      Base::read_state(a.state, a.sum, unit, g, false, running.data());
      for (int64_t p = 0; p < pieces; ++p) {
        const bool adds = !a.causal || p < pieces - 1;
        const A* const added = slot(p, a.decay ? g : 0);
        copy(running.data(), before.data());
        if (adds) {
          const Range64 rows = Base::piece(a.keys, p, pieces);
          const A keep = static_cast<A>(powers.over(rows.end - rows.begin));
          blend(running.data(), keep, added, A(1), room);
        }
        if (a.causal) copy(before.data(), slot(p, g));
      }
      if (!a.causal) {
        copy(running.data(), slot(0, g));
        Base::write_state(running.data(), unit, g, state_out, sum_out);
      }
    }
  }
  void copy(const A* from, A* to) const {
    for (int64_t i = 0; i < room; ++i) to[i] = from[i];
  }

  void whole(int64_t unit, int64_t part, int64_t parts, Room& r, const A* states) const {
    const Range64 rows = Base::piece(a.queries, part, parts);
    for (int64_t first = rows.begin; first < rows.end; first += kChunk) {
      const int64_t n = rows.end - first < kChunk ? rows.end - first : kChunk;
      for (int64_t g = 0; g < group; ++g) {
        const A* const state = states + g * room;
        Base::load_queries(r.q.data(), unit, g, first, n);
        multiply<A>(n, a.value_width, a.width, {r.q.data(), wide, 1}, state, value_wide,
                    r.out.data(), value_wide, false);
        for (int64_t i = 0; i < n; ++i) {
          r.sums.data()[i] = dot(r.q.data() + i * wide, Base::sum_of(state), wide);
        }
        finish(unit, g, first, n, r);
      }
    }
  }

  void causal(int64_t unit, int64_t part, int64_t parts, Room& r, A* states) const {
    const Range64 rows = Base::piece(a.queries, part, parts);
    const auto powers = Base::all_powers(unit);
    const bool last = part == parts - 1;
    for (int64_t first = rows.begin; first < rows.end; first += kChunk) {
      const int64_t n = rows.end - first < kChunk ? rows.end - first : kChunk;
      r.keys.fill(*this, unit, first, n);
      transpose(r.keys.k.data(), wide, n, a.width, r.transposed.data(), kChunk);
      for (int64_t g = 0; g < group; ++g) {
        A* const state = states + g * room;
        const Powers<A>& p = powers[static_cast<size_t>(g)];
        A *const q = r.q.data(), *const o = r.out.data();
        Base::load_queries(q, unit, g, first, n);
        scores(n, a.width, q, wide, r.transposed.data(), r.scores.data());
        multiply<A>(n, a.value_width, a.width, {q, wide, 1}, state, value_wide, o, value_wide,
                    false);
        for (int64_t i = 0; i < n; ++i) {
          if (p.decays) scale_row(o + i * value_wide, p.up[i + 1], value_wide);
          r.sums.data()[i] = settle(r.scores.data() + i * kChunk, i, n, p) +
                             p.of(i + 1) * dot(q + i * wide, Base::sum_of(state), wide);
        }
        lower(n, a.value_width, r.scores.data(), r.keys.v.data, r.keys.v.row, o, value_wide, true);
        finish(unit, g, first, n, r);
        if (last || first + kChunk < rows.end) Base::absorb_keys(state, false, r.keys, p, n);
      }
    }
    if (!last) return;
    for (int64_t g = 0; g < group; ++g) {
      Base::write_state(states + g * room, unit, g, state_out, sum_out);
    }
  }

  // Rows of output, and what they were multiplied with.
  void finish(int64_t unit, int64_t g, int64_t first, int64_t n, const Room& r) const {
    const int64_t b = Base::batch(unit), h = Base::head(unit, g);
    const A scale = static_cast<A>(a.scale), eps = static_cast<A>(a.eps);
    for (int64_t i = 0; i < n; ++i) {
      Quotient<A> q{1, scale, scale};
      if (a.normalize) q = quotient(scale, scale * r.sums.data()[i] + eps);
      static_cast<A*>(factor.data)[factor.at(b, h, first + i, 0)] = q.factor;
      if (q.lift != 1) scale_row(r.out.data() + i * value_wide, q.lift, value_wide);
      T* const to = static_cast<T*>(out.data) + out.at(b, h, first + i, 0);
      convert_back(r.out.data() + i * value_wide, a.value_width, to, q.by);
    }
  }
};

}  // namespace PYDL_ISA
}  // namespace pydl
