// What the CPU kernels that normalise channels do to a run of memory: 512 elements at a time pass
// through a small buffer in the accumulation type, normalised, then activated, then stored.
#pragma once

#include <cmath>

#include "channel_norm.h"
#include "rowwise.h"

namespace pydl {
inline namespace PYDL_ISA {

constexpr int64_t kChunk = 512;

// What elements are normalised with: a number each, or arrays of one for each position.
template <class A>
struct Coefs {
  const A *mean, *rest, *rstd, *scale, *bias;
  template <bool kArrays>
  PYDL_HD Coefs from(int64_t i) const {
    if constexpr (!kArrays) return *this;
    return {mean + i, rest + i, rstd + i, scale + i, bias + i};
  }
};

template <class T, bool kArrays>
struct Reader {
  using V = typename Lanes<T>::type;
  const acc_t<T>* from;
  V fixed;
  explicit Reader(const acc_t<T>* p) : from(p), fixed(splat<V>(kArrays ? 0 : *p)) {}
  V operator()(int64_t i) const {
    if constexpr (kArrays) return load_as<V>(from + i);
    return fixed;
  }
};

// An activation over a buffer; null where it is the identity.
template <class A>
struct ActRuns {
  double functor[2];
  void (*forward)(const void* functor, A* z, int64_t n);
  void (*backward)(const void* functor, A* d, const A* z, int64_t n);
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
  if (act == Identity::kNumber) return runs;
  with_activation(act, parameter, [&](auto f) {
    using F = decltype(f);
    static_assert(sizeof(F) <= sizeof(runs.functor));
    memcpy(runs.functor, &f, sizeof(F));
    runs.forward = &act_forward<V, F, A>;
    runs.backward = &act_backward<V, F, A>;
  });
  return runs;
}

template <class T, bool kArrays>
__attribute__((noinline)) void normalise(acc_t<T>* z, const T* x, const T* residual,
                                         const Coefs<acc_t<T>>& c, int64_t n) {
  using V = typename Lanes<T>::type;
  constexpr int64_t kWidth = Lanes<T>::count;
  const Reader<T, kArrays> mean(c.mean), rest(c.rest), scale(c.scale), bias(c.bias);
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t count = n - i < kWidth ? n - i : kWidth;
    prefetch(x + i + kPrefetchBytes / sizeof(T));
    V v = ((load_some(x + i, count) - mean(i)) - rest(i)) * scale(i) + bias(i);
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
  if (past_cache && past_line % static_cast<int64_t>(sizeof(T)) != 0) past_cache = false;
  int64_t i = 0;
  if (past_cache && past_line != 0) {
    i = (64 - past_line) / static_cast<int64_t>(sizeof(T));
    body(int64_t{0}, i, false);
  }
  for (; i < n; i += kChunk) body(i, n - i < kChunk ? n - i : kChunk, past_cache);
  if (past_cache) stream_fence();
}

template <class T, bool kArrays>
void forward_run(T* y, const T* x, const T* residual, const Coefs<acc_t<T>>& c,
                 const ActRuns<acc_t<T>>& act, int64_t n, bool past_cache) {
  alignas(64) acc_t<T> z[kChunk + kPad];
  over_chunks(y, n, past_cache, [&](int64_t i, int64_t count, bool past) {
    normalise<T, kArrays>(z, x + i, residual ? residual + i : nullptr, c.template from<kArrays>(i),
                          count);
    if (act.forward) act.forward(act.functor, z, count);
    put_all(y + i, z, count, past);
  });
}

// dz, the gradient before the activation, and xhat. Past `count` dz is 0.
template <class T, bool kArrays>
__attribute__((noinline)) void gradient(acc_t<T>* dz, acc_t<T>* xhat, const T* dy, const T* x,
                                        const T* residual, const Coefs<acc_t<T>>& c,
                                        const ActRuns<acc_t<T>>& act, int64_t n) {
  using V = typename Lanes<T>::type;
  constexpr int64_t kWidth = Lanes<T>::count;
  alignas(64) acc_t<T> z[kChunk + kPad];
  const Reader<T, kArrays> mean(c.mean), rest(c.rest), rstd(c.rstd), scale(c.scale), bias(c.bias);
  const bool active = act.backward != nullptr;
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t count = n - i < kWidth ? n - i : kWidth;
    prefetch(x + i + kPrefetchBytes / sizeof(T));
    prefetch(dy + i + kPrefetchBytes / sizeof(T));
    const V d = (load_some(x + i, count) - mean(i)) - rest(i);
    store_as(xhat + i, d * rstd(i));
    store_as(dz + i, load_some(dy + i, count));
    if (!active) continue;
    V v = d * scale(i) + bias(i);
    if (residual) v = v + load_some(residual + i, count);
    store_as(z + i, v);
  }
  if (active) act.backward(act.functor, dz, z, n);
}

// Adds the sums of dz and of dz xhat.
template <class T>
__attribute__((noinline)) void add_run(const acc_t<T>* dz, const acc_t<T>* xhat, int64_t n,
                                       double (&totals)[2]) {
  using V = typename Lanes<T>::type;
  V first = splat<V>(0), second = splat<V>(0);
  for (int64_t i = 0; i < n; i += Lanes<T>::count) {
    const V d = load_as<V>(dz + i);
    first += d;
    second += d * load_as<V>(xhat + i);
  }
  totals[0] += add_lanes(first);
  totals[1] += add_lanes(second);
}
template <class T>
__attribute__((noinline)) void add_positions(acc_t<T>* first, acc_t<T>* second, const acc_t<T>* dz,
                                             const acc_t<T>* xhat, int64_t n) {
  using V = typename Lanes<T>::type;
  for (int64_t i = 0; i < n; i += Lanes<T>::count) {
    const V d = load_as<V>(dz + i);
    store_as(first + i, load_as<V>(first + i) + d);
    store_as(second + i, load_as<V>(second + i) + d * load_as<V>(xhat + i));
  }
}

// stored, unless null, gets dz. With kArrays the sums go to arrays, else to totals.
template <class T, bool kArrays>
void sums_run(T* stored, const T* dy, const T* x, const T* residual, const Coefs<acc_t<T>>& c,
              const ActRuns<acc_t<T>>& act, int64_t n, acc_t<T>* first, acc_t<T>* second,
              double (&totals)[2]) {
  alignas(64) acc_t<T> dz[kChunk + kPad], xhat[kChunk + kPad];
  over_chunks(x, n, false, [&](int64_t i, int64_t count, bool) {
    gradient<T, kArrays>(dz, xhat, dy + i, x + i, residual ? residual + i : nullptr,
                         c.template from<kArrays>(i), act, count);
    if (stored) put_all(stored + i, dz, count, false);
    if constexpr (kArrays) {
      add_positions<T>(first + i, second + i, dz, xhat, count);
    } else {
      add_run<T>(dz, xhat, count, totals);
    }
  });
}

// dx = scale dz - (k1 + xhat k2)
template <class T, bool kArrays>
__attribute__((noinline)) void finish_dx(acc_t<T>* dz, const acc_t<T>* xhat, const acc_t<T>* scales,
                                         const acc_t<T>* k1s, const acc_t<T>* k2s, int64_t n) {
  using V = typename Lanes<T>::type;
  const Reader<T, kArrays> scale(scales), k1(k1s), k2(k2s);
  for (int64_t i = 0; i < n; i += Lanes<T>::count) {
    store_as(dz + i, scale(i) * load_as<V>(dz + i) - (k1(i) + load_as<V>(xhat + i) * k2(i)));
  }
}

template <class T, bool kArrays>
void dx_run(T* dx, const T* dy, const T* x, const T* residual, const Coefs<acc_t<T>>& c,
            const acc_t<T>* k1, const acc_t<T>* k2, const ActRuns<acc_t<T>>& act, int64_t n,
            bool past_cache) {
  alignas(64) acc_t<T> dz[kChunk + kPad], xhat[kChunk + kPad];
  over_chunks(dx, n, past_cache, [&](int64_t i, int64_t count, bool past) {
    const int64_t at = kArrays ? i : 0;
    gradient<T, kArrays>(dz, xhat, dy + i, x + i, residual ? residual + i : nullptr,
                         c.template from<kArrays>(i), act, count);
    finish_dx<T, kArrays>(dz, xhat, c.scale + at, k1 + at, k2 + at, count);
    put_all(dx + i, dz, count, past);
  });
}

}  // namespace PYDL_ISA
}  // namespace pydl
