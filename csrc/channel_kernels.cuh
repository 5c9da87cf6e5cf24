// The CUDA kernels that normalise channels: moments and how pieces' are joined, the normalisation,
// the sums of the gradient, and dx.
#pragma once

#include "channels_span.cuh"

namespace pydl {
inline namespace PYDL_ISA {
template <class T>
struct Tensors {
  T *out, *dz;  // y or dx
  const T *x, *residual, *dy;
  acc_t<T>*mean, *rest, *var;
  Weights weight, bias;
  double eps;
};

// Called, not inlined: once for each channel of a thread, before the loop.
template <class A>
PYDL_NOINLINE A weight_of(const void* data, DType dtype, A absent, int64_t channel) {
  return data != nullptr ? load_weight<A>(Weights{data, dtype}, channel) : absent;
}
template <class A>
PYDL_NOINLINE A rstd_of(A var, double eps) {
  return static_cast<A>(1 / sqrt(static_cast<double>(var) + eps));
}

// The two for the output alone, rounded once.
template <class A>
PYDL_NOINLINE A scale_of(A var, double eps, A weight) {
  return static_cast<A>(static_cast<double>(weight) / sqrt(static_cast<double>(var) + eps));
}

// What a thread normalises its channels with; one of them where the pack is of one channel.
template <class T, int kPack, bool kColumns>
struct Coefs {
  using A = acc_t<T>;
  static constexpr int kCount = kColumns ? kPack : 1;
  A mean[kCount], rest[kCount], rstd[kCount], weight[kCount], bias[kCount];

  // Folded, the weight is in rstd.
  PYDL_DEVICE Coefs(const Tensors<T>& t, const Span<kPack, kColumns>& span, bool folded = false) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      // Threads past the last channel take the first one's, and use them for nothing.
      const int64_t g = span.inside ? span.group(j) : 0, c = span.inside ? span.of(j) : 0;
      mean[j] = t.mean[g];
      rest[j] = t.rest[g];
      rstd[j] = rstd_of<A>(t.var[g], t.eps);
      weight[j] = weight_of<A>(t.weight.data, t.weight.dtype, 1, c);
      bias[j] = weight_of<A>(t.bias.data, t.bias.dtype, 0, c);
      if (folded) {
        rstd[j] = scale_of<A>(t.var[g], t.eps, weight[j]);
        weight[j] = 1;
      }
    }
  }
  PYDL_DEVICE A centred(A x, int j) const {
    const int k = kColumns ? j : 0;
    return (x - mean[k]) - rest[k];
  }
  PYDL_DEVICE A out(A d, int j) const {
    const int k = kColumns ? j : 0;
    return d * (rstd[k] * weight[k]) + bias[k];
  }
};

template <class T, int kPack>
PYDL_DEVICE Pack<T, kPack> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, kPack>*>(from);
}

// partials: (samples, pieces, 2, channels), means relative to the group's first element, and sums
// of squared deviations.
template <class T, int kPack, bool kColumns>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(Tensors<T> t, Normed s, Pieces pieces, Sums sums) {
  using A = acc_t<T>;
  const Span<kPack, kColumns> span(s, pieces);
  A base[kPack], mean[kPack], squares[kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    const int64_t g = span.group(j) - span.sample * s.groups;
    base[j] = span.inside ? to_float(t.x[s.at(span.sample, 0, g * s.per_group())]) : A(0);
    mean[j] = squares[j] = 0;
  }
  int count = 0;
  span.each([&](int64_t at) {
    const Pack<T, kPack> x = load_pack<T, kPack>(t.x + at);
    const A part = A(1) / static_cast<A>(++count);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const A d = to_float(x.values[j]) - base[j], before = d - mean[j];
      mean[j] += before * part;
      squares[j] += before * (d - mean[j]);
    }
  });
  const int64_t rows = span.rows.end - span.rows.begin;
  const double own = count;
  if constexpr (kColumns) {
    const double part = 1 / static_cast<double>(rows);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const double middle = sum_threads<true>(own * static_cast<double>(mean[j])) * part;
      const double d = static_cast<double>(mean[j]) - middle;
      const double total = sum_threads<true>(static_cast<double>(squares[j]) + own * d * d);
      if (threadIdx.y == 0 && span.inside) {
        double* const to = sums.partial(s, span.sample, span.piece) + span.of(j);
        to[0] = middle;
        to[s.channels] = total;
      }
    }
  } else {
    double mine = 0, found = 0;
#pragma unroll
    for (int j = 0; j < kPack; ++j) mine += static_cast<double>(mean[j]);
    const int64_t all = rows * (span.packs.end - span.packs.begin) * kPack;
    const double middle = sum_threads<false>(own * mine) / static_cast<double>(all);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const double d = static_cast<double>(mean[j]) - middle;
      found += static_cast<double>(squares[j]) + own * d * d;
    }
    found = sum_threads<false>(found);
    if (threadIdx.x == 0 && threadIdx.y == 0) {
      double* const to = sums.partial(s, span.sample, span.piece) + span.channel;
      to[0] = middle;
      to[s.channels] = found;
    }
  }
}

// Grid: (samples x groups) warps.
template <class T>
__global__ void __launch_bounds__(kWarp)
    join_moments_kernel(Tensors<T> t, Normed s, Pieces pieces, Sums sums) {
  using A = acc_t<T>;
  const int64_t of = blockIdx.x, sample = of / s.groups, g = of % s.groups;
  const int64_t entries = pieces.outer_pieces * pieces.inner_pieces * s.per_group();
  // body(count, mean, squares) for every piece of every channel of the group.
  const auto each = [&](const auto& body) {
    for (int64_t e = threadIdx.x; e < entries; e += kWarp) {
      const int64_t piece = e / s.per_group(), c = g * s.per_group() + e % s.per_group();
      const double* from = sums.partial(s, sample, piece) + c;
      const Range rows = pieces.outer(piece), inner = pieces.inner(piece);
      body(static_cast<double>((rows.end - rows.begin) * (inner.end - inner.begin)), from[0],
           from[s.channels]);
    }
  };
  const double all = static_cast<double>(s.count());
  double middle = 0, squares = 0;
  each([&](double count, double mean, double) { middle += count * mean; });
  middle = sum_warp(middle) / all;
  each([&](double count, double mean, double spread) {
    squares += spread + count * (mean - middle) * (mean - middle);
  });
  squares = sum_warp(squares);
  if (threadIdx.x != 0) return;
  const double base = to_float(t.x[s.at(sample, 0, g * s.per_group())]);
  const A mean = static_cast<A>(base + middle);
  t.mean[of] = mean;
  t.rest[of] = static_cast<A>((base - static_cast<double>(mean)) + middle);
  t.var[of] = static_cast<A>(squares / all);
}

template <class T, class F, int kPack, bool kColumns>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(Tensors<T> t, F given, Normed s, Pieces pieces) {
  const F f = given;
  const Span<kPack, kColumns> span(s, pieces);
  const Coefs<T, kPack, kColumns> c(t, span, true);
  span.each([&](int64_t at) {
    const Pack<T, kPack> x = load_pack<T, kPack>(t.x + at);
    Pack<T, kPack> residual{}, y;
    if (t.residual != nullptr) residual = load_pack<T, kPack>(t.residual + at);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      acc_t<T> z = c.out(c.centred(to_float(x.values[j]), j), j);
      if (t.residual != nullptr) z += to_float(residual.values[j]);
      y.values[j] = from_float<T>(f.forward(z));
    }
    store(t.out + at, y);
  });
}

// dz, where the activation is still to be gone through, and xhat.
template <class T, class F, int kPack, bool kColumns>
PYDL_DEVICE void gradient(const Tensors<T>& t, const F& f, const Coefs<T, kPack, kColumns>& c,
                          int64_t at, acc_t<T> (&dz)[kPack], acc_t<T> (&xhat)[kPack]) {
  const Pack<T, kPack> x = load_pack<T, kPack>(t.x + at), dy = load_pack<T, kPack>(t.dy + at);
  Pack<T, kPack> residual{};
  if (t.residual != nullptr) residual = load_pack<T, kPack>(t.residual + at);
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    const acc_t<T> d = c.centred(to_float(x.values[j]), j);
    acc_t<T> z = c.out(d, j);
    if (t.residual != nullptr) z += to_float(residual.values[j]);
    dz[j] = backward_from_input(f, static_cast<acc_t<T>>(to_float(dy.values[j])), z);
    xhat[j] = d * c.rstd[kColumns ? j : 0];
  }
}

// partials: (samples, pieces, 2, channels), the sums of dz and of dz xhat. Stores dz where wanted.
template <class T, class F, int kPack, bool kColumns>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(Tensors<T> t, F given, Normed s, Pieces pieces, Sums sums) {
  using A = acc_t<T>;
  const F f = given;
  const Span<kPack, kColumns> span(s, pieces);
  const Coefs<T, kPack, kColumns> c(t, span);
  A first[kPack], second[kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) first[j] = second[j] = 0;
  span.each([&](int64_t at) {
    A dz[kPack], xhat[kPack];
    gradient(t, f, c, at, dz, xhat);
    Pack<T, kPack> out;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      first[j] += dz[j];
      second[j] += dz[j] * xhat[j];
      out.values[j] = from_float<T>(dz[j]);
    }
    if (t.dz != nullptr) store(t.dz + at, out);
  });
  const auto put = [&](int j, double one, double two) {
    double* const to = sums.partial(s, span.sample, span.piece) + span.of(j);
    to[0] = one;
    to[s.channels] = two;
  };
  if constexpr (kColumns) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const double one = sum_threads<true>(first[j]), two = sum_threads<true>(second[j]);
      if (threadIdx.y == 0 && span.inside) put(j, one, two);
    }
  } else {
    double one = 0, two = 0;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      one += static_cast<double>(first[j]);
      two += static_cast<double>(second[j]);
    }
    one = sum_threads<false>(one);
    two = sum_threads<false>(two);
    if (threadIdx.x == 0 && threadIdx.y == 0) put(0, one, two);
  }
}

// Zeros: what no elements have for their moments and sums.
template <int>
__global__ void __launch_bounds__(kThreads) clear_kernel(unsigned char* data, int64_t bytes) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < bytes) data[i] = 0;
}

// totals: (2, samples, channels). A thread a sample and channel.
template <int>
__global__ void __launch_bounds__(kThreads) totals_kernel(Normed s, int64_t count, Sums sums) {
  const int64_t of = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t all = s.samples * s.channels;
  if (of >= all) return;
  double first = 0, second = 0;
  for (int64_t piece = 0; piece < count; ++piece) {
    const double* from = sums.partial(s, of / s.channels, piece) + of % s.channels;
    first += from[0];
    second += from[s.channels];
  }
  sums.totals[of] = first;
  sums.totals[all + of] = second;
}

// The totals of a group's channels, weighted. A warp a sample and group.
template <int>
__global__ void __launch_bounds__(kWarp) group_sums_kernel(Normed s, Weights weight, Sums sums) {
  const int64_t of = blockIdx.x, sample = of / s.groups, g = of % s.groups;
  double first = 0, second = 0;
  for (int64_t c = g * s.per_group() + threadIdx.x; c < (g + 1) * s.per_group(); c += kWarp) {
    const double w = weight.data != nullptr ? load_weight<double>(weight, c) : 1;
    const double* from = sums.totals + sample * s.channels + c;
    first += w * from[0];
    second += w * from[s.samples * s.channels];
  }
  first = sum_warp(first);
  second = sum_warp(second);
  if (threadIdx.x != 0) return;
  sums.of_groups[2 * of] = first;
  sums.of_groups[2 * of + 1] = second;
}

// dx = rstd (weight dz - c1 - xhat c2), c1 and c2 the group's sums over `count` values; rstd weight
// dz, whatever x is, where count is 0.
template <class T, class F, int kPack, bool kColumns>
__global__ void __launch_bounds__(kThreads)
    dx_kernel(Tensors<T> t, F given, Normed s, Pieces pieces, Sums sums, double count) {
  using A = acc_t<T>;
  using C = Coefs<T, kPack, kColumns>;
  const F f = given;
  const Span<kPack, kColumns> span(s, pieces);
  const C c(t, span);
  const double part = 1 / count;
  A k1[C::kCount], left[C::kCount], k2[C::kCount];
#pragma unroll
  for (int j = 0; j < C::kCount; ++j) {
    const double* of = sums.of_groups + 2 * (span.inside ? span.group(j) : 0);
    // In two numbers: where all dz are alike nothing must be left of them.
    const double first = count > 0 ? of[0] * part : 0;
    k1[j] = static_cast<A>(first);
    left[j] = static_cast<A>(first - static_cast<double>(k1[j]));
    k2[j] = count > 0 ? static_cast<A>(of[1] * part) : A(0);
  }
  span.each([&](int64_t at) {
    A dz[kPack], xhat[kPack];
    gradient(t, f, c, at, dz, xhat);
    Pack<T, kPack> dx;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const int k = kColumns ? j : 0;
      const A centred = fma(c.weight[k], dz[j], -k1[k]) - left[k];
      const A pull = count > 0 ? xhat[j] * k2[k] : A(0);
      dx.values[j] = from_float<T>(c.rstd[k] * (centred - pull));
    }
    store(t.out + at, dx);
  });
}

}  // namespace PYDL_ISA
}  // namespace pydl
