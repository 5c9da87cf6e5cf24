// CUDA: batch_norm, instance_norm and group_norm with an activation and a residual. Forward reads x
// for the moments and again to normalise it; backward reads dy and x (and the residual) for the
// sums of dz and dz xhat, and again for dx. Pieces of a channel write fp64 partials, which are
// joined in a fixed order. No atomics.
#include "channel_kernels.cuh"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

struct Call {
  const char* op;
  Normed s;
  View x;
  const View *residual, *mean, *rest, *var, *weight, *bias;
  double eps;
  int64_t act;
  double parameter;
};

template <class T>
Tensors<T> tensors_of(const Call& call) {
  using A = acc_t<T>;
  Tensors<T> t{};
  t.x = static_cast<const T*>(call.x.data);
  if (call.residual != nullptr) t.residual = static_cast<const T*>(call.residual->data);
  t.mean = static_cast<A*>(call.mean->data);
  t.rest = static_cast<A*>(call.rest->data);
  t.var = static_cast<A*>(call.var->data);
  if (call.weight != nullptr) t.weight = Weights::of(call.op, *call.weight, call.s.channels);
  if (call.bias != nullptr) t.bias = Weights::of(call.op, *call.bias, call.s.channels);
  t.eps = call.eps;
  return t;
}

void check(const Call& call) {
  call.s.check_moments(call.op, call.x, {call.mean, call.rest, call.var});
  check_activation(call.op, call.act);
  if (call.s.samples * call.s.channels >= int64_t{1} << 31) {
    fail("%s: wants fewer than 2^31 samples x channels", call.op);
  }
}

Pieces cut(const Normed& s, int64_t most) {
  Pieces pieces{s.outer, s.channels, s.inner, 1, 1};
  pieces.cut(most < 65535 ? most : 65535);
  return pieces;
}
// For passes that sum nothing: about sixteen packs a thread.
Pieces cut_freely(const Normed& s) { return cut(s, 1 + s.outer * s.inner / (kThreads * 64)); }

template <int kPack, bool kColumns>
struct Shape {
  static constexpr int pack = kPack;
  static constexpr bool columns = kColumns;
  using span = Span<kPack, kColumns>;
};

// Calls body(shape) for how memory may be walked over.
template <class T, class Body>
void with_shape(const Normed& s, bool packed, std::initializer_list<const void*> pointers,
                const Body& body) {
  constexpr int kPack = sizeof(T) <= 4 ? 16 / sizeof(T) : 1;
  packed = packed && (s.inner > 1 ? s.inner : s.channels) % kPack == 0;
  for (const void* p : pointers) packed = packed && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  if constexpr (kPack > 1) {
    if (packed && s.inner > 1) return body(Shape<kPack, false>{});
    if (packed) return body(Shape<kPack, true>{});
  }
  if (s.inner > 1) return body(Shape<1, false>{});
  body(Shape<1, true>{});
}

// The same with an activation, body(shape, f): the common ones are compiled for packs, all others
// are chosen at run time and take an element at a time.
template <class T, class Body>
void with_act(const Normed& s, int64_t act, double parameter,
              std::initializer_list<const void*> pointers, const Body& body) {
  const auto one_of = [&](auto... fs) {
    const bool found = ((act == decltype(fs)::kNumber) || ...);
    with_shape<T>(s, found, pointers, [&](auto shape) {
      if constexpr (decltype(shape)::pack > 1) {
        (void)((act == decltype(fs)::kNumber && (body(shape, fs), true)) || ...);
      } else {
        body(shape, AnyActivation{act, parameter});
      }
    });
  };
  one_of(Identity{}, Relu{}, Gelu{}, Silu{}, Mish{});
}

template <class T>
void find_moments(Stream stream, const Call& call, const Tensors<T>& t, const Sums& sums) {
  const Pieces pieces = cut(call.s, sums.pieces);
  with_shape<T>(call.s, true, {t.x}, [&](auto shape) {
    using S = decltype(shape);
    const auto kernel = &moments_kernel<T, S::pack, S::columns>;
    PYDL_LAUNCH(kernel, S::span::grid(call.s, pieces.count()), S::span::block(call.s), 0, stream, t,
                call.s, pieces, sums);
  });
  const auto kernel = &join_moments_kernel<T>;
  PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>(call.s.samples * call.s.groups)), dim3(kWarp), 0,
              stream, t, call.s, pieces, sums);
}

template <class T>
void apply(Stream stream, const Call& call, const Tensors<T>& t) {
  const Pieces pieces = cut_freely(call.s);
  with_act<T>(call.s, call.act, call.parameter, {t.x, t.residual, t.out}, [&](auto shape, auto f) {
    using S = decltype(shape);
    const auto kernel = &apply_kernel<T, decltype(f), S::pack, S::columns>;
    PYDL_LAUNCH(kernel, S::span::grid(call.s, pieces.count()), S::span::block(call.s), 0, stream, t,
                f, call.s, pieces);
  });
}

template <class T>
void find_sums(Stream stream, const Call& call, const Tensors<T>& t, const Sums& sums) {
  const Pieces pieces = cut(call.s, sums.pieces);
  with_act<T>(call.s, call.act, call.parameter, {t.x, t.residual, t.dy, t.dz},
              [&](auto shape, auto f) {
                using S = decltype(shape);
                const auto kernel = &sums_kernel<T, decltype(f), S::pack, S::columns>;
                PYDL_LAUNCH(kernel, S::span::grid(call.s, pieces.count()), S::span::block(call.s),
                            0, stream, t, f, call.s, pieces, sums);
              });
  const int64_t all = call.s.samples * call.s.channels;
  const auto kernel = &totals_kernel<0>;
  PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>((all + kThreads - 1) / kThreads)), dim3(kThreads),
              0, stream, call.s, pieces.count(), sums);
}

// From dz where it was stored, else from dy and the activation again.
template <class T>
void find_dx(Stream stream, const Call& call, Tensors<T> t, const Sums& sums, double count) {
  if (count > 0) {
    const auto kernel = &group_sums_kernel<0>;
    PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>(call.s.samples * call.s.groups)), dim3(kWarp), 0,
                stream, call.s, t.weight, sums);
  }
  const bool stored = t.dz != nullptr;
  if (stored) {
    t.dy = t.dz;
    t.residual = nullptr;
  }
  const int64_t act = stored ? Identity::kNumber : call.act;
  const Pieces pieces = cut_freely(call.s);
  with_act<T>(call.s, act, call.parameter, {t.x, t.residual, t.dy, t.out}, [&](auto shape, auto f) {
    using S = decltype(shape);
    const auto kernel = &dx_kernel<T, decltype(f), S::pack, S::columns>;
    PYDL_LAUNCH(kernel, S::span::grid(call.s, pieces.count()), S::span::block(call.s), 0, stream, t,
                f, call.s, pieces, sums, count);
  });
}

void weight_gradient(Stream stream, const Call& call, const Out& total, const Sums& sums,
                     int64_t which) {
  if (total.numel == 0) return;
  const int64_t all = call.s.samples * call.s.channels;
  if (total.numel != call.s.channels) {
    fail("%s: wants a gradient for each of %lld channels", call.op,
         static_cast<long long>(call.s.channels));
  }
  dispatch_float(call.op, total.dtype, [&](auto zero) {
    using W = decltype(zero);
    add_partials(stream, static_cast<W*>(total.data), sums.totals + which * all, call.s.channels,
                 call.s.samples, call.s.channels);
  });
}

// For tensors without elements.
void clear(Stream stream, const View& view) {
  const int64_t size = view.dtype == DType::f64 ? 8 : view.dtype == DType::f32 ? 4 : 2;
  const int64_t bytes = view.numel * size;
  if (bytes == 0) return;
  const auto kernel = &clear_kernel<0>;
  PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>((bytes + kThreads - 1) / kThreads)),
              dim3(kThreads), 0, stream, static_cast<unsigned char*>(view.data), bytes);
}

// Calls body(tensors) with the pointers of a call.
template <class Body>
void with_tensors(const Call& call, const Body& body) {
  check(call);
  dispatch_float(call.op, call.x.dtype, [&](auto zero) { body(tensors_of<decltype(zero)>(call)); });
}
template <class T>
T* data_of(const View& view) {
  return view.numel > 0 ? static_cast<T*>(view.data) : nullptr;
}

void batch_norm_fwd(Stream stream, Out y, Out mean, Out rest, Out var, Out scratch, View x,
                    Maybe residual, Maybe weight, Maybe bias, double eps, int64_t groups,
                    int64_t act, double parameter, int64_t pieces) {
  const Normed s = Normed::of("batch_norm", x, groups, {&y, &residual});
  const Call call{"batch_norm", s,       x,     &residual, &mean, &rest,
                  &var,         &weight, &bias, eps,       act,   parameter};
  const Sums sums = Sums::of("batch_norm", s, scratch, pieces);
  with_tensors(call, [&](auto t) {
    if (x.numel == 0) {
      for (const View* moment : {&mean, &rest, &var}) clear(stream, *moment);
      return;
    }
    t.out = data_of<std::remove_pointer_t<decltype(t.out)>>(y);
    find_moments(stream, call, t, sums);
    apply(stream, call, t);
  });
}

void batch_norm_moments(Stream stream, Out mean, Out rest, Out var, Out scratch, View x,
                        int64_t groups, int64_t pieces) {
  const Normed s = Normed::of("batch_norm", x, groups, {});
  const Call call{"batch_norm", s, x, nullptr, &mean, &rest, &var, nullptr, nullptr, 0, 0, 0};
  const Sums sums = Sums::of("batch_norm", s, scratch, pieces);
  with_tensors(call, [&](auto t) {
    if (x.numel > 0) return find_moments(stream, call, t, sums);
    for (const View* moment : {&mean, &rest, &var}) clear(stream, *moment);
  });
}

void batch_norm_apply(Stream stream, Out y, View x, Maybe residual, View mean, View rest, View var,
                      Maybe weight, Maybe bias, double eps, int64_t groups, int64_t act,
                      double parameter) {
  const Normed s = Normed::of("batch_norm", x, groups, {&y, &residual});
  const Call call{"batch_norm", s,       x,     &residual, &mean, &rest,
                  &var,         &weight, &bias, eps,       act,   parameter};
  with_tensors(call, [&](auto t) {
    if (x.numel == 0) return;
    t.out = data_of<std::remove_pointer_t<decltype(t.out)>>(y);
    apply(stream, call, t);
  });
}

// dz: the residual's gradient, without elements where there is no residual.
void batch_norm_bwd(Stream stream, Out dx, Out dz, Out dweight, Out dbias, Out scratch, View dy,
                    View x, Maybe residual, View mean, View rest, View var, Maybe weight,
                    Maybe bias, double eps, int64_t groups, int64_t act, double parameter,
                    int64_t pieces, bool training) {
  const Normed s =
      Normed::of("batch_norm", x, groups, {&dx, &dy, &residual, dz.numel > 0 ? &dz : &x});
  const Call call{"batch_norm", s,       x,     &residual, &mean, &rest,
                  &var,         &weight, &bias, eps,       act,   parameter};
  const Sums sums = Sums::of("batch_norm", s, scratch, pieces);
  with_tensors(call, [&](auto t) {
    using T = std::remove_pointer_t<decltype(t.out)>;
    if (x.numel == 0) {
      clear(stream, dweight);
      return clear(stream, dbias);
    }
    t.out = data_of<T>(dx);
    t.dz = data_of<T>(dz);
    t.dy = data_of<const T>(dy);
    if (training || dweight.numel > 0 || dbias.numel > 0 || t.dz != nullptr) {
      find_sums(stream, call, t, sums);
      weight_gradient(stream, call, dbias, sums, 0);
      weight_gradient(stream, call, dweight, sums, 1);
    }
    find_dx(stream, call, t, sums, training ? static_cast<double>(s.count()) : 0);
  });
}

// sums: (2, samples, channels) in fp64, of dz and of dz xhat.
void batch_norm_sums(Stream stream, Out sums, Out dz, Out scratch, View dy, View x, Maybe residual,
                     View mean, View rest, View var, Maybe weight, Maybe bias, double eps,
                     int64_t groups, int64_t act, double parameter, int64_t pieces) {
  const Normed s = Normed::of("batch_norm", x, groups, {&dy, &residual, dz.numel > 0 ? &dz : &x});
  const Call call{"batch_norm", s,       x,     &residual, &mean, &rest,
                  &var,         &weight, &bias, eps,       act,   parameter};
  const Sums found = Sums::of("batch_norm", s, scratch, pieces).with_totals("batch_norm", s, sums);
  with_tensors(call, [&](auto t) {
    using T = std::remove_pointer_t<decltype(t.out)>;
    if (x.numel == 0) return clear(stream, sums);
    t.dz = data_of<T>(dz);
    t.dy = data_of<const T>(dy);
    find_sums(stream, call, t, found);
  });
}

// dx from sums over `count` values a channel.
void batch_norm_dx(Stream stream, Out dx, Out scratch, View dy, View x, Maybe residual, View mean,
                   View rest, View var, View sums, Maybe weight, Maybe bias, double eps,
                   int64_t groups, int64_t act, double parameter, double count) {
  const Normed s = Normed::of("batch_norm", x, groups, {&dx, &dy, &residual});
  const Call call{"batch_norm", s,       x,     &residual, &mean, &rest,
                  &var,         &weight, &bias, eps,       act,   parameter};
  const Sums given = Sums::of("batch_norm", s, scratch, 1).with_totals("batch_norm", s, sums);
  with_tensors(call, [&](auto t) {
    using T = std::remove_pointer_t<decltype(t.out)>;
    if (x.numel == 0) return;
    t.out = data_of<T>(dx);
    t.dy = data_of<const T>(dy);
    find_dx(stream, call, t, given, count);
  });
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;

#define BACKEND cuda
#include "batch_norm_list.h"
