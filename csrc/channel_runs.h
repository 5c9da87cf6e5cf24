// What the CPU kernels that normalise channels do to a run of memory. Without an activation, or
// with relu, one loop does it; with another, 512 elements at a time pass through a small buffer in
// the accumulation type, so that no formula is compiled into every loop.
#pragma once

#include <cmath>

#include "channel_norm.h"
#include "rowwise.h"

namespace pydl {
inline namespace PYDL_ISA {

constexpr int64_t kChunk = 512;

// Whose coefficients vary along a run: none, those of channels (weight, bias), all.
enum Mode { kOne, kRow, kColumn };

// A number each, or one for each position; k2 is null where dx does not depend on x through the
// moments, so that what is infinite there stays out of it.
template <class A>
struct Coefs {
  const A *mean, *rest, *rstd, *weight, *bias, *k1, *left, *k2;
  template <Mode kMode>
  PYDL_HD Coefs from(int64_t i) const {
    const int64_t stats = kMode == kColumn ? i : 0, weights = kMode == kOne ? 0 : i;
    return {mean + stats,   rest + stats, rstd + stats, weight + weights,
            bias + weights, k1 + stats,   left + stats, k2 ? k2 + stats : nullptr};
  }
};

template <class V, Mode kMode, class A>
struct At {
  const Coefs<A>& c;
  int64_t i;
  template <bool kVaries>
  static PYDL_HD V read(const A* p, int64_t i) {
    if constexpr (kVaries) return load_as<V>(p + i);
    return splat<V>(*p);
  }
  PYDL_HD V stat(const A* p) const { return read<kMode == kColumn>(p, i); }
  PYDL_HD V of_channel(const A* p) const { return read<kMode != kOne>(p, i); }
  PYDL_HD V centred(V x) const { return (x - stat(c.mean)) - stat(c.rest); }
  PYDL_HD V rstd() const { return stat(c.rstd); }
  PYDL_HD V scale() const { return rstd() * of_channel(c.weight); }
  PYDL_HD V out(V x) const { return centred(x) * scale() + of_channel(c.bias); }
  // k1 in two numbers: where all dz are alike nothing must be left of them.
  PYDL_HD V dx(V dz, V xhat) const {
    const V centred = (of_channel(c.weight) * dz - stat(c.k1)) - stat(c.left);
    if (!c.k2) return rstd() * centred;
    return rstd() * (centred - xhat * stat(c.k2));
  }
};

// in: x, and the residual.
template <class A, Mode kMode, bool kRelu, int kIn>
struct NormForward {
  Coefs<A> c;
  PYDL_HD bool by_position() const { return kMode != kOne; }
  template <class V>
  PYDL_HD void operator()(const V (&in)[kIn], V (&y)[1], int64_t i) const {
    V z = At<V, kMode, A>{c, i}.out(in[0]);
    if constexpr (kIn == 2) z = z + in[1];
    if constexpr (kRelu) z = Relu{}.forward(z);
    y[0] = z;
  }
};

// in: dz (with kRelu dy), x.
template <class A, Mode kMode, bool kRelu>
struct NormBackward {
  Coefs<A> c;
  PYDL_HD bool by_position() const { return kMode != kOne; }
  template <class V>
  PYDL_HD void operator()(const V (&in)[2], V (&dx)[1], int64_t i) const {
    const At<V, kMode, A> at{c, i};
    const V d = at.centred(in[1]);
    V dz = in[0];
    if constexpr (kRelu) {
      dz = backward_from_input(Relu{}, dz, d * at.scale() + at.of_channel(c.bias));
    }
    dx[0] = at.dx(dz, d * at.rstd());
  }
};

// An activation over a buffer.
template <class A>
struct ActRuns {
  int64_t number;
  double functor[2];
  void (*forward)(const void* functor, A* z, int64_t n);
  void (*backward)(const void* functor, A* d, const A* z, int64_t n);
  bool identity() const { return number == Identity::kNumber; }
  bool relu() const { return number == Relu::kNumber; }
};

template <class V, class F, class A>
__attribute__((noinline)) void act_forward(const void* functor, A* z, int64_t n) {
  const F f = *static_cast<const F*>(functor);
  for (int64_t i = 0; i < n; i += static_cast<int64_t>(sizeof(V) / sizeof(A)))
    store_as(z + i, f.forward(load_as<V>(z + i)));
}
template <class V, class F, class A>
__attribute__((noinline)) void act_backward(const void* functor, A* d, const A* z, int64_t n) {
  const F f = *static_cast<const F*>(functor);
  for (int64_t i = 0; i < n; i += static_cast<int64_t>(sizeof(V) / sizeof(A)))
    store_as(d + i, backward_from_input(f, load_as<V>(d + i), load_as<V>(z + i)));
}

template <class T>
ActRuns<acc_t<T>> act_runs(int64_t act, double parameter) {
  using V = typename Lanes<T>::type;
  using A = acc_t<T>;
  ActRuns<A> runs{};
  runs.number = act;
  with_activation(act, parameter, [&](auto f) {
    using F = decltype(f);
    static_assert(sizeof(F) <= sizeof(runs.functor));
    memcpy(runs.functor, &f, sizeof(F));
    runs.forward = &act_forward<V, F, A>;
    runs.backward = &act_backward<V, F, A>;
  });
  return runs;
}

// z, in the accumulation type.
template <class T, Mode kMode>
__attribute__((noinline)) void normalise(acc_t<T>* z, const T* x, const T* residual,
                                         const Coefs<acc_t<T>>& c, int64_t n) {
  using V = typename Lanes<T>::type;
  constexpr int64_t kWidth = Lanes<T>::count;
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t count = n - i < kWidth ? n - i : kWidth;
    prefetch(x + i + kPrefetchBytes / sizeof(T));
    V v = At<V, kMode, acc_t<T>>{c, i}.out(load_some(x + i, count));
    if (residual) {
      prefetch(residual + i + kPrefetchBytes / sizeof(T));
      v = v + load_some(residual + i, count);
    }
    store_as(z + i, v);
  }
}

// `past_cache`: out is aligned to 64 bytes.
template <class T>
__attribute__((noinline)) void put_all(T* out, const acc_t<T>* z, int64_t n, bool past_cache) {
  using V = typename Lanes<T>::type;
  constexpr int64_t kWidth = Lanes<T>::count, kBlock = 4 * 64 / sizeof(T);
  int64_t i = 0;
  for (; past_cache && i + kBlock <= n; i += kBlock) {
    V y[kBlock / kWidth];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kBlock / kWidth; ++r) y[r] = load_as<V>(z + i + r * kWidth);
    put<4>(out + i, y, true);
  }
  for (; i < n; i += kWidth) {
    store_some(out + i, load_as<V>(z + i), n - i < kWidth ? n - i : kWidth);
  }
}

// Calls body(i, count, past_cache) for chunks of n elements; with `past_cache` all but the first
// start at whole cache lines of `out`.
template <class T, class Body>
inline void over_chunks(const T* out, int64_t n, bool past_cache, const Body& body) {
  past_cache = PYDL_STREAMS && past_cache && n >= 2 * kChunk;
  const auto past_line = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % 64);
  if (past_line % static_cast<int64_t>(sizeof(T)) != 0) past_cache = false;
  int64_t i = 0;
  if (past_cache && past_line != 0) {
    i = (64 - past_line) / static_cast<int64_t>(sizeof(T));
    body(int64_t{0}, i, false);
  }
  for (; i < n; i += kChunk) body(i, n - i < kChunk ? n - i : kChunk, past_cache);
  if (past_cache) stream_fence();
}

template <class T, Mode kMode>
void forward_run(T* y, const T* x, const T* residual, const Coefs<acc_t<T>>& c,
                 const ActRuns<acc_t<T>>& act, int64_t n, bool past_cache) {
  using A = acc_t<T>;
  const auto at_once = [&](auto relu) {
    constexpr bool kRelu = decltype(relu)::value;
    void* const out[1] = {y};
    const void* const in[2] = {x, residual};
    if (residual) {
      const NormForward<A, kMode, kRelu, 2> f{c};
      map_run<T, NormForward<A, kMode, kRelu, 2>, 1, 2>(&f, out, in, n, 0, past_cache);
    } else {
      const NormForward<A, kMode, kRelu, 1> f{c};
      map_run<T, NormForward<A, kMode, kRelu, 1>, 1, 1>(&f, out, in, n, 0, past_cache);
    }
  };
  if (act.identity()) return at_once(std::false_type{});
  if (act.relu()) return at_once(std::true_type{});
  alignas(64) A z[kChunk + kPad];
  over_chunks(y, n, past_cache, [&](int64_t i, int64_t count, bool past) {
    normalise<T, kMode>(z, x + i, residual ? residual + i : nullptr, c.template from<kMode>(i),
                        count);
    act.forward(act.functor, z, count);
    put_all(y + i, z, count, past);
  });
}

// Runs of one kind, `stride` apart.
struct Runs {
  int64_t count, stride, n;
};

// Runs shorter than this are taken in one loop, the lines of some further on being fetched
// meanwhile: no stream is long enough for the processor to see it coming.
constexpr int64_t kShortRun = 512;
template <class T>
inline void fetch_run(const T* x, const Runs& runs, int64_t r) {
  constexpr int64_t kAhead = 4, kLine = 64 / sizeof(T);
  if (r + kAhead >= runs.count) return;
  const T* const from = x + (r + kAhead) * runs.stride;
  for (int64_t i = 0; i < runs.n + kLine; i += kLine) prefetch(from + i);
}

template <class T, Mode kMode, bool kRelu>
__attribute__((noinline)) void forward_at_once(T* y, const T* x, const T* residual,
                                               const Coefs<acc_t<T>>& c, const Runs& runs) {
  using V = typename Lanes<T>::type;
  constexpr int64_t kWidth = Lanes<T>::count;
  for (int64_t r = 0; r < runs.count; ++r) {
    fetch_run(x, runs, r);
    if (residual) fetch_run(residual, runs, r);
    for (int64_t i = 0; i < runs.n; i += kWidth) {
      const int64_t count = runs.n - i < kWidth ? runs.n - i : kWidth, at = r * runs.stride + i;
      V z = At<V, kMode, acc_t<T>>{c, i}.out(load_some(x + at, count));
      if (residual) z = z + load_some(residual + at, count);
      if constexpr (kRelu) z = Relu{}.forward(z);
      store_some(y + at, z, count);
    }
  }
}

template <class T, Mode kMode>
void forward_runs(T* y, const T* x, const T* residual, const Coefs<acc_t<T>>& c,
                  const ActRuns<acc_t<T>>& act, const Runs& runs, bool past_cache) {
  if (runs.n < kShortRun && act.identity()) {
    return forward_at_once<T, kMode, false>(y, x, residual, c, runs);
  }
  if (runs.n < kShortRun && act.relu()) {
    return forward_at_once<T, kMode, true>(y, x, residual, c, runs);
  }
  for (int64_t r = 0; r < runs.count; ++r) {
    const int64_t at = r * runs.stride;
    forward_run<T, kMode>(y + at, x + at, residual ? residual + at : nullptr, c, act, runs.n,
                          past_cache);
  }
}

// dz, the gradient before the activation, and xhat. Past n dz is 0.
template <class T, Mode kMode>
__attribute__((noinline)) void gradient(acc_t<T>* dz, acc_t<T>* xhat, const T* dy, const T* x,
                                        const T* residual, const Coefs<acc_t<T>>& c,
                                        const ActRuns<acc_t<T>>& act, int64_t n) {
  using V = typename Lanes<T>::type;
  constexpr int64_t kWidth = Lanes<T>::count;
  alignas(64) acc_t<T> z[kChunk + kPad];
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t count = n - i < kWidth ? n - i : kWidth;
    const At<V, kMode, acc_t<T>> at{c, i};
    prefetch(x + i + kPrefetchBytes / sizeof(T));
    prefetch(dy + i + kPrefetchBytes / sizeof(T));
    const V d = at.centred(load_some(x + i, count));
    store_as(xhat + i, d * at.rstd());
    store_as(dz + i, load_some(dy + i, count));
    V v = d * at.scale() + at.of_channel(c.bias);
    if (residual) v = v + load_some(residual + i, count);
    store_as(z + i, v);
  }
  act.backward(act.functor, dz, z, n);
}

// What the sums of dz and of dz xhat go to: `totals` with kOne, else arrays by position.
template <class A>
struct Added {
  A *first, *second;
  double totals[2];
};

template <class T, Mode kMode, bool kRelu>
__attribute__((noinline)) void sums_at_once(T* stored, const T* dy, const T* x, const T* residual,
                                            const Coefs<acc_t<T>>& c, const Runs& runs,
                                            Added<acc_t<T>>& to) {
  using V = typename Lanes<T>::type;
  constexpr int64_t kWidth = Lanes<T>::count, kFlush = 128;
  V first = splat<V>(0), second = splat<V>(0);
  int64_t since = 0;
  const bool brief = runs.n < kShortRun;
  for (int64_t r = 0; r < runs.count; ++r) {
    if (brief) {
      fetch_run(x, runs, r);
      fetch_run(dy, runs, r);
    }
    for (int64_t i = 0; i < runs.n; i += kWidth) {
      const int64_t count = runs.n - i < kWidth ? runs.n - i : kWidth;
      const int64_t from = r * runs.stride + i;
      const At<V, kMode, acc_t<T>> at{c, i};
      if (!brief) {
        prefetch(x + from + kPrefetchBytes / sizeof(T));
        prefetch(dy + from + kPrefetchBytes / sizeof(T));
      }
      const V d = at.centred(load_some(x + from, count));
      V dz = load_some(dy + from, count);
      if constexpr (kRelu) {
        V z = d * at.scale() + at.of_channel(c.bias);
        if (residual) z = z + load_some(residual + from, count);
        dz = backward_from_input(Relu{}, dz, z);
      }
      if (stored) store_some(stored + from, dz, count);
      if constexpr (kMode == kOne) {
        first += dz;
        second += dz * (d * at.rstd());
        if (++since == kFlush) {
          to.totals[0] += add_lanes(first);
          to.totals[1] += add_lanes(second);
          first = second = splat<V>(0);
          since = 0;
        }
      } else {
        store_as(to.first + i, load_as<V>(to.first + i) + dz);
        store_as(to.second + i, load_as<V>(to.second + i) + dz * (d * at.rstd()));
      }
    }
  }
  if constexpr (kMode == kOne) {
    to.totals[0] += add_lanes(first);
    to.totals[1] += add_lanes(second);
  }
}

// The same from buffers of dz and xhat.
template <class T, Mode kMode>
__attribute__((noinline)) void add_chunk(const acc_t<T>* dz, const acc_t<T>* xhat, int64_t at,
                                         int64_t n, Added<acc_t<T>>& to) {
  using V = typename Lanes<T>::type;
  V first = splat<V>(0), second = splat<V>(0);
  for (int64_t i = 0; i < n; i += Lanes<T>::count) {
    const V d = load_as<V>(dz + i), product = d * load_as<V>(xhat + i);
    if constexpr (kMode == kOne) {
      first += d;
      second += product;
    } else {
      store_as(to.first + at + i, load_as<V>(to.first + at + i) + d);
      store_as(to.second + at + i, load_as<V>(to.second + at + i) + product);
    }
  }
  if constexpr (kMode == kOne) {
    to.totals[0] += add_lanes(first);
    to.totals[1] += add_lanes(second);
  }
}

// stored, unless null, gets dz.
template <class T, Mode kMode>
void sums_runs(T* stored, const T* dy, const T* x, const T* residual, const Coefs<acc_t<T>>& c,
               const ActRuns<acc_t<T>>& act, const Runs& runs, Added<acc_t<T>>& to) {
  if (act.identity()) {
    return sums_at_once<T, kMode, false>(stored, dy, x, residual, c, runs, to);
  }
  if (act.relu()) return sums_at_once<T, kMode, true>(stored, dy, x, residual, c, runs, to);
  alignas(64) acc_t<T> dz[kChunk + kPad], xhat[kChunk + kPad];
  for (int64_t r = 0; r < runs.count; ++r) {
    over_chunks(x, runs.n, false, [&](int64_t i, int64_t count, bool) {
      const int64_t from = r * runs.stride + i;
      gradient<T, kMode>(dz, xhat, dy + from, x + from, residual ? residual + from : nullptr,
                         c.template from<kMode>(i), act, count);
      if (stored) put_all(stored + from, dz, count, false);
      add_chunk<T, kMode>(dz, xhat, i, count, to);
    });
  }
}

template <class T, Mode kMode>
__attribute__((noinline)) void finish_dx(acc_t<T>* dz, const acc_t<T>* xhat,
                                         const Coefs<acc_t<T>>& c, int64_t n) {
  using V = typename Lanes<T>::type;
  for (int64_t i = 0; i < n; i += Lanes<T>::count) {
    const At<V, kMode, acc_t<T>> at{c, i};
    store_as(dz + i, at.dx(load_as<V>(dz + i), load_as<V>(xhat + i)));
  }
}

// dx = rstd (weight dz - k1 - xhat k2)
template <class T, Mode kMode>
void dx_run(T* dx, const T* dy, const T* x, const T* residual, const Coefs<acc_t<T>>& c,
            const ActRuns<acc_t<T>>& act, int64_t n, bool past_cache) {
  using A = acc_t<T>;
  void* const out[1] = {dx};
  const void* const in[2] = {dy, x};
  if (act.identity()) {
    const NormBackward<A, kMode, false> f{c};
    return map_run<T, NormBackward<A, kMode, false>, 1, 2>(&f, out, in, n, 0, past_cache);
  }
  if (act.relu() && !residual) {
    const NormBackward<A, kMode, true> f{c};
    return map_run<T, NormBackward<A, kMode, true>, 1, 2>(&f, out, in, n, 0, past_cache);
  }
  alignas(64) A dz[kChunk + kPad], xhat[kChunk + kPad];
  over_chunks(dx, n, past_cache, [&](int64_t i, int64_t count, bool past) {
    const Coefs<A> here = c.template from<kMode>(i);
    gradient<T, kMode>(dz, xhat, dy + i, x + i, residual ? residual + i : nullptr, here, act,
                       count);
    finish_dx<T, kMode>(dz, xhat, here, count);
    put_all(dx + i, dz, count, past);
  });
}

template <class T, Mode kMode, bool kRelu>
__attribute__((noinline)) void dx_at_once(T* dx, const T* dy, const T* x, const Coefs<acc_t<T>>& c,
                                          const Runs& runs) {
  using V = typename Lanes<T>::type;
  constexpr int64_t kWidth = Lanes<T>::count;
  const NormBackward<acc_t<T>, kMode, kRelu> f{c};
  for (int64_t r = 0; r < runs.count; ++r) {
    fetch_run(x, runs, r);
    fetch_run(dy, runs, r);
    for (int64_t i = 0; i < runs.n; i += kWidth) {
      const int64_t count = runs.n - i < kWidth ? runs.n - i : kWidth, at = r * runs.stride + i;
      const V in[2] = {load_some(dy + at, count), load_some(x + at, count)};
      V out[1];
      f(in, out, i);
      store_some(dx + at, out[0], count);
    }
  }
}

template <class T, Mode kMode>
void dx_runs(T* dx, const T* dy, const T* x, const T* residual, const Coefs<acc_t<T>>& c,
             const ActRuns<acc_t<T>>& act, const Runs& runs, bool past_cache) {
  if (runs.n < kShortRun && act.identity()) return dx_at_once<T, kMode, false>(dx, dy, x, c, runs);
  if (runs.n < kShortRun && act.relu() && !residual) {
    return dx_at_once<T, kMode, true>(dx, dy, x, c, runs);
  }
  for (int64_t r = 0; r < runs.count; ++r) {
    const int64_t at = r * runs.stride;
    dx_run<T, kMode>(dx + at, dy + at, x + at, residual ? residual + at : nullptr, c, act, runs.n,
                     past_cache);
  }
}

}  // namespace PYDL_ISA
}  // namespace pydl
