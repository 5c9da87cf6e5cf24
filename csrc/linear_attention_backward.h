// CPU: linear attention, backward. States are computed again from the keys, and what flows to them
// comes from a scan in the other direction.
#pragma once

#include "linear_attention_chunk.h"

namespace pydl {
inline namespace PYDL_ISA {

template <class T>
struct LinearBackward : LinearChunks<T> {
  using Base = LinearChunks<T>;
  using Base::a;
  using Base::group;
  using Base::kWidth;
  using Base::room;
  using Base::units;
  using Base::value_wide;
  using Base::wide;
  using typename Base::A;
  using typename Base::Keys;
  using typename Base::V;

  const LinearGradients& g;

  LinearBackward(const LinearAttention& call, const LinearGradients& gradients)
      : Base(call), g(gradients) {}

  void run() const {
    if (units == 0 || group == 0) return;
    if (a.causal) return causal();
    whole();
  }

  // A chunk of queries with what flows to their sums, and room to work in.
  struct Room {
    Keys keys;
    Buffer<A> q, du, rho, dq, dk, dv, rows, scores, slopes, k_columns, v_columns, flow;
    explicit Room(const LinearBackward& w)
        : keys(w),
          q(kChunk * w.wide),
          du(kChunk * w.value_wide),
          rho(kChunk),
          dq(kChunk * w.wide),
          dk(kChunk * w.wide),
          dv(kChunk * w.value_wide),
          rows(kChunk * (w.wide > w.value_wide ? w.wide : w.value_wide)),
          scores(kChunk * kChunk),
          slopes(kChunk * kChunk),
          k_columns(kChunk * w.wide),
          v_columns(kChunk * w.value_wide),
          flow(w.room) {}
  };

  void load(Room& r, int64_t unit, int64_t head, int64_t first, int64_t n) const {
    const int64_t b = Base::batch(unit), h = Base::head(unit, head);
    Base::load_queries(r.q.data(), unit, head, first, n);
    for (int64_t i = 0; i < n; ++i) {
      const A by = static_cast<const A*>(g.factor.data)[g.factor.at(b, h, first + i, 0)];
      const T* const up = Base::row(g.dout, b, h, first + i);
      A* const to = r.du.data() + i * value_wide;
      convert_row(up, a.value_width, to, by);
      r.rho.data()[i] = 0;
      if (!a.normalize) continue;
      const T* const o = Base::row(g.out, b, h, first + i);
      V sum = spread(A(0));
      for (int64_t e = 0; e < a.value_width; e += kWidth) {
        const int64_t some = a.value_width - e < kWidth ? a.value_width - e : kWidth;
        sum += plain(load_some(o + e, some)) * pydl::load(to + e);
      }
      r.rho.data()[i] = -static_cast<A>(add_lanes(sum));
    }
  }

  // dq = du S^T + rho z for n rows, from a state with a row a value.
  void from_state(Room& r, const A* state, int64_t n) const {
    multiply<A>(n, a.width, a.value_width, {r.du.data(), value_wide, 1}, state, wide, r.dq.data(),
                wide, false);
    for (int64_t i = 0; i < n; ++i) {
      blend(r.dq.data() + i * wide, A(1), Base::sum_of(state), r.rho.data()[i], wide);
    }
  }
  // What flows to the state that n queries see, added to `flow` (a row a feature); q has decayed.
  void absorb_queries(A* flow, A keep, const Room& r, int64_t n) const {
    Base::absorb(flow, keep, a.width, r.q.data(), wide, a.value_width, r.du.data(), value_wide, n,
                 r.keys.added.data());
    Base::absorb_sum(Base::sum_of(flow), keep, r.q.data(), a.normalize ? r.rho.data() : nullptr,
                     a.normalize ? n : 0);
  }
  void turn(const A* flow, A* to) const {
    transpose(flow, value_wide, a.width, a.value_width, to, wide);
    for (int64_t d = 0; d < wide; ++d) Base::sum_of(to)[d] = Base::sum_of(flow)[d];
  }
  void write_queries(Room& r, int64_t unit, int64_t head, int64_t first, int64_t n) const {
    const int64_t b = Base::batch(unit), h = Base::head(unit, head);
    for (int64_t i = 0; i < n; ++i) {
      feature_slope(a.feature, r.q.data() + i * wide, r.dq.data() + i * wide, a.width,
                    static_cast<T*>(g.dq.data) + g.dq.at(b, h, first + i, 0));
    }
  }
  void write_keys(Room& r, int64_t unit, int64_t first, int64_t n) const {
    const int64_t b = Base::batch(unit), h = unit % a.kv_heads;
    for (int64_t j = 0; j < n; ++j) {
      A *const dk = r.dk.data() + j * wide, *const dv = r.dv.data() + j * value_wide;
      if (a.hides(b, first + j)) {
        clear(dv, value_wide);
        clear(dk, wide);
      }
      feature_slope(a.feature, r.keys.k.data() + j * wide, dk, a.width,
                    static_cast<T*>(g.dk.data) + g.dk.at(b, h, first + j, 0));
      convert_back(dv, a.value_width, static_cast<T*>(g.dv.data) + g.dv.at(b, h, first + j, 0),
                   A(1));
    }
  }

  void whole() const {
    const int64_t parts = Base::pieces(a.queries), pieces = Base::pieces(a.keys);
    Buffer<A> flows(units * parts * group * room);
    parallel_for(units * parts, 1, [&](int64_t begin, int64_t end) {
      Room r(*this);
      Buffer<A> states(group * room);
      for (int64_t k = begin; k < end; ++k) {
        const int64_t u = k / parts;
        const Range64 rows = Base::piece(a.queries, k % parts, parts);
        A* const flow = flows.data() + k * group * room;
        clear(flow, group * room);
        for (int64_t h = 0; h < group; ++h) {
          Base::read_state(g.state_out, g.sum_out, u, h, true, states.data() + h * room);
        }
        for (int64_t first = rows.begin; first < rows.end; first += kChunk) {
          const int64_t n = rows.end - first < kChunk ? rows.end - first : kChunk;
          for (int64_t h = 0; h < group; ++h) {
            load(r, u, h, first, n);
            from_state(r, states.data() + h * room, n);
            write_queries(r, u, h, first, n);
            absorb_queries(flow + h * room, A(1), r, n);
          }
        }
      }
    });
    Buffer<A> totals(units * room);
    parallel_for(units, 1, [&](int64_t begin, int64_t end) {
      Buffer<A> flow(room);
      for (int64_t u = begin; u < end; ++u) {
        A* const total = totals.data() + u * room;
        clear(total, room);
        for (int64_t h = 0; h < group; ++h) {
          Base::read_state(g.dstate_out, g.dsum_out, u, h, false, flow.data());
          for (int64_t p = 0; p < parts; ++p) {
            const A* const from = flows.data() + ((u * parts + p) * group + h) * room;
            blend(flow.data(), A(1), from, A(1), room);
          }
          Base::write_state(flow.data(), u, h, g.dstate, g.dsum);
          blend(total, A(1), flow.data(), A(1), room);
        }
      }
    });
    parallel_for(units * pieces, 1, [&](int64_t begin, int64_t end) {
      Room r(*this);
      for (int64_t k = begin; k < end; ++k) {
        const int64_t u = k / pieces;
        const A* const flow = totals.data() + u * room;
        const Range64 rows = Base::piece(a.keys, k % pieces, pieces);
        turn(flow, r.flow.data());
        for (int64_t first = rows.begin; first < rows.end; first += kChunk) {
          const int64_t n = rows.end - first < kChunk ? rows.end - first : kChunk;
          r.keys.fill(*this, u, first, n);
          multiply<A>(n, a.width, a.value_width, {r.keys.v.data, r.keys.v.row, 1}, r.flow.data(),
                      wide, r.dk.data(), wide, false);
          for (int64_t j = 0; j < n; ++j) {
            blend(r.dk.data() + j * wide, A(1), Base::sum_of(flow), A(1), wide);
          }
          multiply<A>(n, a.value_width, a.width, {r.keys.k.data(), wide, 1}, flow, value_wide,
                      r.dv.data(), value_wide, false);
          write_keys(r, u, first, n);
        }
      }
    });
  }

  void causal() const {
    const int64_t pieces = Base::pieces(a.keys), each = group * room;
    // Per unit, piece and head: what the piece adds to the state that comes after it, and to what
    // flows to the state before it; then the state it begins with, and what flows to that it ends
    // with.
    Buffer<A> states(units * pieces * each), flows(units * pieces * each);
    Buffer<double> logs(a.decay ? units * pieces * group : 0);
    if (pieces > 1) {
      parallel_for(units * pieces, 1, [&](int64_t begin, int64_t end) {
        Room r(*this);
        for (int64_t k = begin; k < end; ++k) {
          totals(k / pieces, k % pieces, pieces, r, states.data() + k * each,
                 flows.data() + k * each);
        }
      });
    }
    parallel_for(units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        scan(u, pieces, states.data() + u * pieces * each, flows.data() + u * pieces * each);
      }
    });
    parallel_for(units * pieces, 1, [&](int64_t begin, int64_t end) {
      Room r(*this);
      const int64_t most = (Base::chunks(a.keys) + pieces - 1) / pieces;
      Buffer<A> held(most * each);
      for (int64_t k = begin; k < end; ++k) {
        segment(k / pieces, k % pieces, pieces, r, states.data() + k * each,
                flows.data() + k * each, held.data(), a.decay ? logs.data() + k * group : nullptr);
      }
    });
    if (g.ddecay) {
      for (int64_t h = 0; h < a.heads; ++h) {
        double sum = 0;
        for (int64_t b = 0; b < a.batch; ++b) {
          const int64_t u = b * a.kv_heads + h / group;
          for (int64_t p = 0; p < pieces; ++p) {
            sum += logs.data()[(u * pieces + p) * group + h % group];
          }
        }
        const double base = static_cast<double>(static_cast<const A*>(a.decay)[h]);
        static_cast<A*>(g.ddecay)[h] = static_cast<A>(sum / base);
      }
    }
  }

  void totals(int64_t unit, int64_t index, int64_t pieces, Room& r, A* states, A* flows) const {
    const Range64 rows = Base::piece(a.keys, index, pieces);
    const auto powers = Base::all_powers(unit);
    clear(states, group * room);
    clear(flows, group * room);
    for (int64_t first = rows.begin; first < rows.end && index < pieces - 1; first += kChunk) {
      const int64_t n = rows.end - first < kChunk ? rows.end - first : kChunk;
      r.keys.fill(*this, unit, first, n);
      for (int64_t h = 0; h < group; ++h) {
        Base::absorb_keys(states + h * room, true, r.keys, powers[static_cast<size_t>(h)], n);
      }
    }
    for (int64_t c = Base::chunks(rows.end - rows.begin) - 1; c >= 0 && index > 0; --c) {
      const int64_t first = rows.begin + c * kChunk;
      const int64_t n = rows.end - first < kChunk ? rows.end - first : kChunk;
      for (int64_t h = 0; h < group; ++h) {
        const Powers<A>& p = powers[static_cast<size_t>(h)];
        load(r, unit, h, first, n);
        decay_queries(r, p, n);
        absorb_queries(flows + h * room, p.of(n), r, n);
      }
    }
  }
  void decay_queries(Room& r, const Powers<A>& p, int64_t n) const {
    for (int64_t i = 0; i < n && p.decays; ++i) scale_row(r.q.data() + i * wide, p.up[i + 1], wide);
  }

  void scan(int64_t unit, int64_t pieces, A* states, A* flows) const {
    Buffer<A> running(room), before(room);
    const auto swap = [&](A* slot, A keep) {
      for (int64_t i = 0; i < room; ++i) before.data()[i] = running.data()[i];
      blend(running.data(), keep, slot, A(1), room);
      for (int64_t i = 0; i < room; ++i) slot[i] = before.data()[i];
    };
    for (int64_t h = 0; h < group; ++h) {
      const Powers<A> powers = Base::powers(unit, h);
      const auto keep = [&](int64_t p) {
        const Range64 rows = Base::piece(a.keys, p, pieces);
        return static_cast<A>(powers.over(rows.end - rows.begin));
      };
      // With one piece nothing was added up: its slots are only written.
      if (pieces == 1) {
        clear(states + h * room, room);
        clear(flows + h * room, room);
      }
      Base::read_state(a.state, a.sum, unit, h, true, running.data());
      for (int64_t p = 0; p < pieces; ++p) swap(states + (p * group + h) * room, keep(p));
      Base::read_state(g.dstate_out, g.dsum_out, unit, h, false, running.data());
      for (int64_t p = pieces - 1; p >= 0; --p) swap(flows + (p * group + h) * room, keep(p));
    }
  }

  // A piece of the sequence: states upwards, held chunk by chunk, then gradients downwards.
  void segment(int64_t unit, int64_t index, int64_t pieces, Room& r, A* states, A* flows, A* held,
               double* logs) const {
    const Range64 rows = Base::piece(a.keys, index, pieces);
    const auto powers = Base::all_powers(unit);
    const int64_t count = Base::chunks(rows.end - rows.begin), each = group * room;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t first = rows.begin + c * kChunk;
      for (int64_t i = 0; i < each; ++i) held[c * each + i] = states[i];
      if (c == count - 1) break;
      r.keys.fill(*this, unit, first, kChunk);
      for (int64_t h = 0; h < group; ++h) {
        Base::absorb_keys(states + h * room, true, r.keys, powers[static_cast<size_t>(h)], kChunk);
      }
    }
    for (int64_t h = 0; logs && h < group; ++h) logs[h] = 0;
    for (int64_t c = count - 1; c >= 0; --c) {
      const int64_t first = rows.begin + c * kChunk;
      const int64_t n = rows.end - first < kChunk ? rows.end - first : kChunk;
      r.keys.fill(*this, unit, first, n);
      transpose(r.keys.k.data(), wide, n, a.width, r.k_columns.data(), kChunk);
      transpose(r.keys.v.data, r.keys.v.row, n, a.value_width, r.v_columns.data(), kChunk);
      clear(r.dk.data(), n * wide);
      clear(r.dv.data(), n * value_wide);
      for (int64_t h = 0; h < group; ++h) {
        load(r, unit, h, first, n);
        const double log = chunk(r, n, held + c * each + h * room, flows + h * room,
                                 powers[static_cast<size_t>(h)]);
        if (logs) logs[h] += log;
        write_queries(r, unit, h, first, n);
        decay_queries(r, powers[static_cast<size_t>(h)], n);
        absorb_queries(flows + h * room, powers[static_cast<size_t>(h)].of(n), r, n);
      }
      write_keys(r, unit, first, n);
    }
    for (int64_t h = 0; index == 0 && h < group; ++h) {
      Base::write_state(flows + h * room, unit, h, g.dstate, g.dsum);
    }
  }

  // A head's gradients within a chunk, of `state` before it and `flow` to the state after it: dq,
  // what it adds to dk and dv, and (returned) to the gradient of the logarithm of decay.
  double chunk(Room& r, int64_t n, const A* state, const A* flow, const Powers<A>& p) const {
    A *const q = r.q.data(), *const du = r.du.data(), *const s = r.scores.data();
    A *const ds = r.slopes.data(), *const rows = r.rows.data();
    double log = 0;
    scores(n, a.width, q, wide, r.k_columns.data(), s);
    scores(n, a.value_width, du, value_wide, r.v_columns.data(), ds);
    from_state(r, state, n);
    for (int64_t i = 0; i < n; ++i) {
      settle(s + i * kChunk, i, n, p);
      log += settle_slopes(s + i * kChunk, ds + i * kChunk, r.rho.data()[i], i, n, p);
      if (!p.decays) continue;
      A* const dq = r.dq.data() + i * wide;
      scale_row(dq, p.up[i + 1], wide);
      log += static_cast<double>(i + 1) * dot(q + i * wide, dq, wide);
    }
    lower(n, a.width, ds, r.keys.k.data(), wide, r.dq.data(), wide, true);
    lower_transposed(n, a.width, ds, q, wide, r.dk.data(), wide, true);
    lower_transposed(n, a.value_width, s, du, value_wide, r.dv.data(), value_wide, true);
    turn(flow, r.flow.data());
    multiply<A>(n, a.width, a.value_width, {r.keys.v.data, r.keys.v.row, 1}, r.flow.data(), wide,
                rows, wide, false);
    for (int64_t j = 0; j < n; ++j) {
      A* const from = rows + j * wide;
      blend(from, p.of(n - 1 - j), Base::sum_of(flow), p.of(n - 1 - j), wide);
      if (p.decays) {
        log += static_cast<double>(n - 1 - j) * dot(r.keys.k.data() + j * wide, from, wide);
      }
      blend(r.dk.data() + j * wide, A(1), from, A(1), wide);
    }
    multiply<A>(n, a.value_width, a.width, {r.keys.aged(*this, p, n), wide, 1}, flow, value_wide,
                r.dv.data(), value_wide, true);
    if (p.decays) {
      const A all = dot(state, r.flow.data(), a.value_width * wide) +
                    dot(Base::sum_of(state), Base::sum_of(flow), wide);
      log += static_cast<double>(n) * p.of(n) * all;
    }
    return log;
  }
};

}  // namespace PYDL_ISA
}  // namespace pydl
