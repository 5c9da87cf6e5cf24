// CPU: batch_norm, instance_norm and group_norm with an activation and a residual: the moments, the
// normalisation, and backward, each alone as well, for what has to happen in between.
#include "channel_columns.h"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

struct Call {
  const char* op;
  Normed shape;
  View x, residual, weight, bias;
  const View *mean, *rest, *var;
  double eps;
  int64_t act;
  double parameter;
};

// Calls body(engine) with the pointers and settings of a call.
template <class Body>
void with_engine(const Call& call, const Sums& sums, const Body& body) {
  call.shape.check_moments(call.op, call.x, {call.mean, call.rest, call.var});
  check_activation(call.op, call.act);
  dispatch_float(call.op, call.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Parameters<A> weight(call.op, call.weight, call.shape.channels);
    const Parameters<A> bias(call.op, call.bias, call.shape.channels);
    Engine<T> engine{};
    engine.s = call.shape;
    engine.sums = sums;
    engine.x = static_cast<const T*>(call.x.data);
    engine.residual = static_cast<const T*>(call.residual.data);
    engine.mean = static_cast<A*>(call.mean->data);
    engine.rest = static_cast<A*>(call.rest->data);
    engine.var = static_cast<A*>(call.var->data);
    engine.weight = weight.data();
    engine.bias = bias.data();
    engine.eps = call.eps;
    engine.act = act_runs<T>(call.act, call.parameter);
    engine.past_cache = call.x.numel * static_cast<int64_t>(sizeof(T)) >= stream_bytes;
    body(engine);
  });
}

// What no elements have for their moments and sums.
void clear(const View& view) {
  const int64_t size = view.dtype == DType::f64 ? 8 : view.dtype == DType::f32 ? 4 : 2;
  if (view.numel > 0) memset(view.data, 0, static_cast<size_t>(view.numel * size));
}

void batch_norm_fwd(Out y, Out mean, Out rest, Out var, Out scratch, View x, Maybe residual,
                    Maybe weight, Maybe bias, double eps, int64_t groups, int64_t act,
                    double parameter, int64_t pieces) {
  const Normed shape = Normed::of("batch_norm", x, groups, {&y, &residual});
  for (const View* moment : {&mean, &rest, &var}) clear(*moment);
  const Call call{"batch_norm", shape, x,    residual, weight, bias,
                  &mean,        &rest, &var, eps,      act,    parameter};
  const Sums sums = Sums::of("batch_norm", shape, scratch, pieces);
  with_engine(call, sums, [&](auto& engine) {
    if (x.numel == 0) return;
    engine.y = static_cast<decltype(engine.y)>(y.data);
    engine.forward(true, true);
  });
}

void batch_norm_moments(Out mean, Out rest, Out var, Out scratch, View x, int64_t groups,
                        int64_t pieces) {
  const Normed shape = Normed::of("batch_norm", x, groups, {});
  for (const View* moment : {&mean, &rest, &var}) clear(*moment);
  const Call call{"batch_norm", shape, x, {}, {}, {}, &mean, &rest, &var, 0, 0, 0};
  with_engine(call, Sums::of("batch_norm", shape, scratch, pieces), [&](auto& engine) {
    if (x.numel != 0) engine.forward(true, false);
  });
}

void batch_norm_apply(Out y, View x, Maybe residual, View mean, View rest, View var, Maybe weight,
                      Maybe bias, double eps, int64_t groups, int64_t act, double parameter) {
  const Normed shape = Normed::of("batch_norm", x, groups, {&y, &residual});
  const Call call{"batch_norm", shape, x,    residual, weight, bias,
                  &mean,        &rest, &var, eps,      act,    parameter};
  with_engine(call, Sums{}, [&](auto& engine) {
    if (x.numel == 0) return;
    engine.y = static_cast<decltype(engine.y)>(y.data);
    engine.forward(false, true);
  });
}

// dz: the residual's gradient, without elements where there is no residual.
void batch_norm_bwd(Out dx, Out dz, Out dweight, Out dbias, Out scratch, View dy, View x,
                    Maybe residual, View mean, View rest, View var, Maybe weight, Maybe bias,
                    double eps, int64_t groups, int64_t act, double parameter, int64_t pieces,
                    bool training) {
  const Normed shape =
      Normed::of("batch_norm", x, groups, {&dx, &dy, &residual, dz.numel > 0 ? &dz : &x});
  const Call call{"batch_norm", shape, x,    residual, weight, bias,
                  &mean,        &rest, &var, eps,      act,    parameter};
  clear(dweight);
  clear(dbias);
  const Sums sums = Sums::of("batch_norm", shape, scratch, pieces);
  with_engine(call, sums, [&](auto& engine) {
    using P = decltype(engine.dx);
    if (x.numel == 0) return;
    engine.dx = static_cast<P>(dx.data);
    engine.dz = dz.numel > 0 ? static_cast<P>(dz.data) : nullptr;
    engine.dy = static_cast<decltype(engine.dy)>(dy.data);
    const bool weights = dweight.numel > 0 || dbias.numel > 0 || engine.dz;
    engine.backward(training || weights, true, sums.totals,
                    training ? static_cast<double>(shape.count()) : 0);
    engine.weight_gradient(dbias, 0);
    engine.weight_gradient(dweight, 1);
  });
}

// sums: (2, samples, channels) in fp64, of dz and of dz xhat.
void batch_norm_sums(Out sums, Out dz, Out scratch, View dy, View x, Maybe residual, View mean,
                     View rest, View var, Maybe weight, Maybe bias, double eps, int64_t groups,
                     int64_t act, double parameter, int64_t pieces) {
  const Normed shape =
      Normed::of("batch_norm", x, groups, {&dy, &residual, dz.numel > 0 ? &dz : &x});
  const Call call{"batch_norm", shape, x,    residual, weight, bias,
                  &mean,        &rest, &var, eps,      act,    parameter};
  const Sums found =
      Sums::of("batch_norm", shape, scratch, pieces).with_totals("batch_norm", shape, sums);
  clear(sums);
  with_engine(call, found, [&](auto& engine) {
    using P = decltype(engine.dz);
    if (x.numel == 0) return;
    engine.dz = dz.numel > 0 ? static_cast<P>(dz.data) : nullptr;
    engine.dy = static_cast<decltype(engine.dy)>(dy.data);
    engine.backward(true, false, found.totals, 0);
  });
}

// dx from sums over `count` values a channel.
void batch_norm_dx(Out dx, Out scratch, View dy, View x, Maybe residual, View mean, View rest,
                   View var, View sums, Maybe weight, Maybe bias, double eps, int64_t groups,
                   int64_t act, double parameter, double count) {
  const Normed shape = Normed::of("batch_norm", x, groups, {&dx, &dy, &residual});
  const Call call{"batch_norm", shape, x,    residual, weight, bias,
                  &mean,        &rest, &var, eps,      act,    parameter};
  const Sums given =
      Sums::of("batch_norm", shape, scratch, 1).with_totals("batch_norm", shape, sums);
  with_engine(call, given, [&](auto& engine) {
    if (x.numel == 0) return;
    engine.dx = static_cast<decltype(engine.dx)>(dx.data);
    engine.dy = static_cast<decltype(engine.dy)>(dy.data);
    engine.backward(false, true, given.totals, count);
  });
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;

#define BACKEND cpu
#include "batch_norm_list.h"
