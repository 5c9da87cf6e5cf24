// CUDA: linear attention, forward and backward, each a few launches of one kernel.
#include "linear_mix.cuh"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

constexpr const char* kOp = "linear_attention";

template <class T>
Side side_of(const Quad& x, bool keys, Feature feature = Feature::identity,
             const Quad& factor = Quad{}) {
  return {x, factor, feature, keys, rows_wide<T>(x)};
}

// A call's launches.
template <class T>
struct LinearCall {
  using A = acc_t<T>;
  Stream stream;
  const LinearAttention& a;
  int64_t pieces;     // of the keys, or of both sequences where causal
  States<A> partial;  // of pieces, by (piece, batch, head)

  States<A> whole(const void* state, const void* sum) const {
    return {static_cast<A*>(const_cast<void*>(state)), static_cast<A*>(const_cast<void*>(sum)),
            a.width * a.value_width, a.width};
  }
  // `count` pieces in memory, each of all batches and heads.
  States<A> pieces_at(void* data) const {
    const int64_t size = a.width * a.value_width;
    return {static_cast<A*>(data), static_cast<A*>(data) + size, size + a.width, size + a.width};
  }

  Mix<A> mix(const Side& left, const Side& right, const Side& x, Extra extra, int64_t rows) const {
    Mix<A> m{};
    m.a = left;
    m.b = right;
    m.x = x;
    m.extra = extra;
    m.causal = a.causal;
    m.batch = a.batch;
    m.heads = a.heads;
    m.kv_heads = a.kv_heads;
    m.member = -1;
    m.rows = rows;
    m.width = a.width;
    m.value_width = a.value_width;
    m.decay = static_cast<const A*>(a.decay);
    m.hidden = a.hidden;
    for (int d = 0; d < 2; ++d) m.hidden_strides[d] = a.hidden_strides[d];
    m.normalize = a.normalize;
    m.feature = a.feature;
    m.scale = static_cast<A>(a.scale);
    m.eps = static_cast<A>(a.eps);
    m.first = m.last = true;
    m.pieces = pieces;
    return m;
  }

  template <int kDepth>
  void launch_at(Mix<A> m) const {
    using S = MixShape<T, kDepth>;
    // One where there are no columns: sums and factors are there still.
    m.tiles = m.x.columns() > S::kTile ? (m.x.columns() + S::kTile - 1) / S::kTile : 1;
    // Where no state is carried along, rows are cut to fill the device.
    if (!m.causal && !m.only_state) m.pieces = (m.rows + 4 * kPieceRows - 1) / (4 * kPieceRows);
    const int64_t units = m.batch * (m.member < 0 ? m.heads : m.kv_heads);
    const int64_t blocks = units * m.pieces * m.tiles;
    if (blocks >= int64_t{1} << 31) {
      fail("%s: %lld blocks are too many", kOp, static_cast<long long>(blocks));
    }
    if (blocks == 0) return;
    const auto kernel = &linear_mix_kernel<T, kDepth>;
    PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(S::kThreadsOfBlock),
                S::shared(m.logs != nullptr), stream, m);
  }
  void launch(const Mix<A>& m) const {
    const int64_t depth = m.by_values ? a.value_width : a.width;
    if (depth <= 64) return launch_at<64>(m);
    if (depth <= 128) return launch_at<128>(m);
    launch_at<256>(m);
  }

  void scan(const States<A>& of_pieces, const States<A>& begin, const States<A>& end, int64_t rows,
            bool reverse) const {
    const Scan<A> s{of_pieces,         begin,         end,    static_cast<const A*>(a.decay),
                    a.batch * a.heads, a.heads,       rows,   pieces,
                    a.width,           a.value_width, reverse};
    const int64_t all = s.units * a.width * (a.value_width + 1);
    if (all == 0) return;
    const auto kernel = &linear_scan_kernel<A>;
    PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>((all + kThreads - 1) / kThreads)),
                dim3(kThreads), 0, stream, s);
  }
  // The state that all rows lead to from `begin`, or, in pieces, those that each begins with.
  // `more`: what weighs the sums.
  void totals(const Side& b, const Side& x, Weight more, const A* rho, int64_t rows, bool reverse,
              const States<A>& begin, const States<A>& end, const States<A>& of_pieces) const {
    Mix<A> m = mix(b, b, x, Extra::column, rows);
    m.only_state = true;
    m.reverse = reverse;
    m.b_more = more;
    m.rho = rho;
    if (pieces > 1) {
      m.end = of_pieces;
      m.end_of_piece = true;
      launch(m);
      scan(of_pieces, begin, end, rows, reverse);
    } else {
      m.begin = begin;
      m.end = end;
      launch(m);
    }
  }
  // Where a causal pass takes its states from and leaves the last one.
  void carry(Mix<A>& m, const States<A>& of_pieces, const States<A>& begin,
             const States<A>& end) const {
    if (pieces > 1) {
      m.begin = of_pieces;
      m.begin_of_piece = true;
    } else {
      m.begin = begin;
      m.end = end;
    }
  }
};

int64_t pieces_of(const char* name, const View& pieces, const LinearAttention& a, DType wide,
                  int64_t sets) {
  const int64_t each = sets * a.batch * a.heads * a.width * (a.value_width + 1);
  if (pieces.numel == 0 || each == 0) return 1;
  if (pieces.dtype != wide || pieces.numel % each != 0) {
    fail("%s: %s wants %lld numbers a piece", kOp, name, static_cast<long long>(each));
  }
  return pieces.numel / each;
}

void check(const LinearAttention& a) {
  const int64_t width = a.width > a.value_width ? a.width : a.value_width;
  if (width > 256) {
    fail("%s: heads are %lld wide, wants 256 at most", kOp, static_cast<long long>(width));
  }
  if (a.feature == Feature::softmax) {
    fail("%s: backend 'cuda' wants softmax of features taken before", kOp);
  }
}

// pieces: where the sequence is cut, (pieces, batch, heads, width (value width + 1)) in the
// accumulation type, to be written over.
void linear_attention_fwd(Stream stream, Out out, Out factor, Out state_out, Out sum_out,
                          Out pieces, View query, View key, View value, Maybe decay, Maybe state,
                          Maybe sum, Maybe key_padding_mask, int64_t feature, bool causal,
                          bool normalize, double scale, double eps) {
  const LinearAttention a =
      linear_attention_of(kOp, {&query, &key, &value, &decay, &state, &sum, &key_padding_mask,
                                feature, causal, normalize, scale, eps});
  check(a);
  const DType wide = accumulation_of(query.dtype);
  const Quad o = quad_of(kOp, "out", out, query.dtype, query, a.value_width);
  const Quad f = quad_of(kOp, "factor", factor, wide, query, 1);
  void* const states =
      dense_of(kOp, "state_out", state_out, wide, {a.batch, a.heads, a.width, a.value_width});
  void* const sums = dense_of(kOp, "sum_out", sum_out, wide, {a.batch, a.heads, a.width});
  if (a.kv_heads == 0) return;
  dispatch_float(kOp, query.dtype, [&](auto zero) {
    using T = decltype(zero);
    LinearCall<T> call{stream, a, pieces_of("pieces", pieces, a, wide, 1), {}};
    call.partial = call.pieces_at(pieces.data);
    const Side q = side_of<T>(a.q, false, a.feature), k = side_of<T>(a.k, true, a.feature),
               v = side_of<T>(a.v, true);
    const auto begin = call.whole(a.state, a.sum), end = call.whole(states, sums);
    auto m = call.mix(q, k, v, Extra::column, a.queries);
    if (!a.causal || call.pieces > 1) {
      call.totals(k, v, Weight::one, nullptr, a.keys, false, begin, end, call.partial);
    }
    if (a.causal) {
      call.carry(m, call.partial, begin, end);
    } else {
      m.begin = end;
    }
    m.y = o;
    m.factor = f;
    m.wide_y = rows_wide<T>(o);
    call.launch(m);
  });
}

// pieces: as above, once for states and once for what flows to them; numbers: in the accumulation
// type, one a row of queries, and (keys, width + value width) a head of keys where it serves many;
// logs: float64, for ddecay, one a block of dquery's. All to be written over.
void linear_attention_bwd(Stream stream, Out dquery, Out dkey, Out dvalue, Out ddecay, Out dstate,
                          Out dsum, Out pieces, Out numbers, Out logs, View dout, Maybe dstate_out,
                          Maybe dsum_out, View out, View factor, View state_out, View sum_out,
                          View query, View key, View value, Maybe decay, Maybe state, Maybe sum,
                          Maybe key_padding_mask, int64_t feature, bool causal, bool normalize,
                          double scale, double eps) {
  const LinearAttention a =
      linear_attention_of(kOp, {&query, &key, &value, &decay, &state, &sum, &key_padding_mask,
                                feature, causal, normalize, scale, eps});
  check(a);
  const DType wide = accumulation_of(query.dtype);
  const LinearGradients g =
      gradients_of(kOp, a, query, key, value,
                   {&dquery, &dkey, &dvalue, &ddecay, &dstate, &dsum, &dout, &dstate_out, &dsum_out,
                    &out, &factor, &state_out, &sum_out});
  if (a.kv_heads == 0) return;
  const int64_t group = a.heads / a.kv_heads, rows = a.batch * a.heads * a.queries;
  const int64_t of_keys = group > 1 ? a.batch * a.kv_heads * a.keys : 0;
  const int64_t most = rows + of_keys * (a.width + a.value_width);
  if (numbers.numel < most || (most > 0 && numbers.dtype != wide)) {
    fail("%s: wants %lld numbers", kOp, static_cast<long long>(most));
  }
  if (!a.causal && g.dstate == nullptr && a.batch * a.heads * a.width * a.value_width > 0) {
    fail("%s: wants dstate and dsum where not causal: keys get their gradients through them", kOp);
  }
  dispatch_float(kOp, query.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const LinearCall<T> call{stream, a, pieces_of("pieces", pieces, a, wide, 2), {}};
    const auto states = call.pieces_at(pieces.data);
    const auto flows = call.pieces_at(
        pieces.numel == 0 ? nullptr : static_cast<A*>(pieces.data) + pieces.numel / 2);
    const Side q = side_of<T>(a.q, false, a.feature), k = side_of<T>(a.k, true, a.feature),
               v = side_of<T>(a.v, true),
               du = side_of<T>(g.dout, false, Feature::identity, g.factor);
    A* const rho = static_cast<A*>(numbers.data);
    A *const raw_k = group > 1 ? rho + rows : nullptr, *const raw_v =
                                                           group > 1 ? raw_k + of_keys * a.width
                                                                     : nullptr;
    if (rows > 0) {
      const Rho<T> r{g.dout, g.out, g.factor, rho, a.heads, a.queries, rows, a.normalize};
      constexpr int kEach = kThreads / kLanesOfWarp;
      const auto kernel = &linear_rho_kernel<T>;
      PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>((rows + kEach - 1) / kEach)), dim3(kThreads),
                  0, stream, r);
    }
    const auto begin = call.whole(a.state, a.sum);
    const auto gained = call.whole(g.dstate_out, g.dsum_out), lost = call.whole(g.dstate, g.dsum);
    if (!a.causal || call.pieces > 1) {
      call.totals(q, du, Weight::rho, rho, a.queries, true, gained, lost, flows);
    }
    if (a.causal && call.pieces > 1) {
      call.totals(k, v, Weight::one, nullptr, a.keys, false, begin, {}, states);
    }

    double* log = nullptr;
    int64_t parts = 0;
    if (g.ddecay) {
      // The blocks of dquery's pass.
      constexpr int64_t kTile = sizeof(A) == 8 ? 32 : 64;
      const int64_t tile = a.value_width > 128 ? 32 : kTile;
      parts = a.batch * call.pieces * ((a.width + tile - 1) / tile);
      parts = parts > 0 ? parts : a.batch * call.pieces;
      if (logs.dtype != DType::f64 || logs.numel < a.heads * parts) {
        fail("%s: wants %lld logs", kOp, static_cast<long long>(a.heads * parts));
      }
      log = static_cast<double*>(logs.data);
    }

    auto dq = call.mix(du, v, k, Extra::row, a.queries);
    dq.by_values = true;
    dq.a_more = Weight::rho;
    dq.b_more = Weight::one;
    dq.rho = rho;
    dq.y = g.dq;
    dq.wide_y = rows_wide<T>(g.dq);
    dq.like = a.q;
    dq.logs = log;
    if (a.causal) {
      call.carry(dq, states, begin, {});
      dq.flow = call.pieces > 1 ? flows : gained;
      dq.flow_of_piece = call.pieces > 1;
    } else {
      dq.begin = call.whole(g.state_out, g.sum_out);
    }
    call.launch(dq);

    auto dk = call.mix(v, du, q, Extra::row, a.keys);
    dk.by_values = true;
    dk.a_more = Weight::one;
    dk.b_more = Weight::rho;
    dk.rho = a.causal ? rho : nullptr;
    dk.y = g.dk;
    dk.wide_y = rows_wide<T>(g.dk);
    dk.like = a.k;
    dk.raw = raw_k;
    auto dv = call.mix(k, q, du, Extra::none, a.keys);
    dv.y = g.dv;
    dv.wide_y = rows_wide<T>(g.dv);
    dv.raw = raw_v;
    for (auto* m : {&dk, &dv}) {
      m->reverse = true;
      if (a.causal) {
        call.carry(*m, flows, gained, lost);
        (m == &dk ? m->end.state : m->end.sum) = nullptr;
      } else {
        m->begin = lost;
      }
      for (int64_t member = 0; member < group; ++member) {
        m->member = member;
        m->first = member == 0;
        m->last = member == group - 1;
        call.launch(*m);
      }
    }
    if (log) {
      const DecayGradient<A> d{log, parts, static_cast<const A*>(a.decay),
                               static_cast<A*>(g.ddecay)};
      const auto kernel = &linear_decay_kernel<A>;
      PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>(a.heads)), dim3(kThreads), 0, stream, d);
    }
  });
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;

#define BACKEND cuda
#include "linear_attention_list.h"
