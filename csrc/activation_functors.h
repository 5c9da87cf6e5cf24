// The formulas of math.h as the functors that the skeletons of both devices call: in and out are
// arrays of one value or register per operand.
#pragma once

#include "math.h"
#include "philox.h"

namespace pydl {
inline namespace PYDL_ISA {

template <class F>
struct UnaryForward {
  F f;
  template <class V>
  PYDL_HD void operator()(const V (&x)[1], V (&y)[1], int64_t) const {
    y[0] = f.forward(x[0]);
  }
};

template <class F>
struct UnaryBackward {
  F f;
  template <class V>
  PYDL_HD void operator()(const V (&in)[2], V (&dx)[1], int64_t) const {
    dx[0] = f.backward(in[0], in[1]);
  }
};

// An activation with a learnt parameter: y = f(x, p).
template <class F>
struct ParameterForward {
  template <class V>
  PYDL_HD void operator()(const V (&in)[2], V (&y)[1], int64_t) const {
    y[0] = F::value(in[0], in[1]);
  }
};

struct PreluBackward {
  template <class V>
  PYDL_HD void operator()(const V (&in)[2], V p, V (&dx)[1], V& sum, int64_t) const {
    dx[0] = in[0] * Prelu::slope(in[1], p);
    sum = in[0] * Prelu::by_weight(in[1], p);
  }
};

struct SwishBackward {
  template <class V>
  PYDL_HD void operator()(const V (&in)[2], V p, V (&dx)[1], V& sum, int64_t) const {
    dx[0] = in[0] * Swish::slope(in[1], p);
    sum = in[0] * Swish::by_beta(in[1], p);
  }
};

// y = dropout(f(x + bias))
template <class F>
struct BiasForward {
  F f;
  Dropout dropout;
  PYDL_HD bool by_position() const { return dropout.threshold > 0; }
  template <class V>
  PYDL_HD void operator()(const V (&in)[2], V (&y)[1], int64_t index) const {
    y[0] = f.forward(in[0] + in[1]);
    if (dropout.threshold > 0) y[0] = y[0] * keep<V>(dropout, index);
  }
};

// in: dy, x. The sum of dx over a channel is the gradient of its bias.
template <class F>
struct BiasBackward {
  F f;
  Dropout dropout;
  PYDL_HD bool by_position() const { return dropout.threshold > 0; }
  template <class V>
  PYDL_HD void operator()(const V (&in)[2], V bias, V (&dx)[1], V& sum, int64_t index) const {
    V dy = in[0];
    if (dropout.threshold > 0) dy = dy * keep<V>(dropout, index);
    dx[0] = backward_from_input(f, dy, in[1] + bias);
    sum = dx[0];
  }
};

// y = f(gate) up
template <class F>
struct GatedForward {
  F f;
  template <class V>
  PYDL_HD void operator()(const V (&in)[2], V (&y)[1], int64_t) const {
    y[0] = f.forward(in[0]) * in[1];
  }
};

// in: dy, gate, up; out: dgate, dup.
template <class F>
struct GatedBackward {
  F f;
  template <class V>
  PYDL_HD void operator()(const V (&in)[3], V (&out)[2], int64_t) const {
    out[0] = backward_from_input(f, in[0] * in[2], in[1]);
    out[1] = in[0] * f.forward(in[1]);
  }
};

}  // namespace PYDL_ISA
}  // namespace pydl
