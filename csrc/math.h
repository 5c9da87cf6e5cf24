// The scalar formulas, each written once for CUDA threads and for CPU vectors: V is float, double
// or a register of floats.  An activation has
//   forward(x)           the value,
//   backward(dy, s)      dy * f'(x), where s is what was saved: x, or the value where kSavesOutput.
// Parameters are doubles, narrowed at use. One exponential and one reciprocal an element at most.
#pragma once

#include <cmath>

#include "types.h"
#if !defined(__CUDACC__) && !defined(PYDL_EMULATION)
#include "vec.h"
#endif

namespace pydl {
inline namespace PYDL_ISA {

#if defined(__CUDA_ARCH__)
PYDL_HD float exponential(float x) { return __expf(x); }
PYDL_HD float reciprocal(float d) { return __fdividef(1.0f, d); }
#else
PYDL_HD float exponential(float x) { return std::exp(x); }
PYDL_HD float reciprocal(float d) { return 1.0f / d; }
#endif
PYDL_HD float exponential_minus_one(float x) { return expm1f(x); }
PYDL_HD double exponential(double x) { return exp(x); }
PYDL_HD double exponential_minus_one(double x) { return expm1(x); }
PYDL_HD double reciprocal(double d) { return 1.0 / d; }

template <class V>
PYDL_HD V select(bool where, V a, V b) {
  return where ? a : b;
}
// NaN passes through both.
template <class V>
PYDL_HD V at_most(V x, double bound) {
  const V b = splat<V>(bound);
  return x > b ? b : x;
}
template <class V>
PYDL_HD V at_least(V x, double bound) {
  const V b = splat<V>(bound);
  return x < b ? b : x;
}
PYDL_HD float magnitude(float x) { return fabsf(x); }
PYDL_HD double magnitude(double x) { return fabs(x); }
PYDL_HD float with_sign_of(float size, float x) { return copysignf(size, x); }

template <class V>
struct Logistic {
  V value, slope;
};
// 1 / (1 + e^-x) and its derivative. The exponential is of -|x|, so that nothing overflows, and the
// derivative is not formed from 1 - value, which cancels.
template <class V>
PYDL_HD Logistic<V> logistic_and_slope(V x) {
  const V e = exponential(-magnitude(x));
  const V r = reciprocal(splat<V>(1) + e);
  return {select(x < splat<V>(0), e * r, r), e * r * r};
}
template <class V>
PYDL_HD V logistic(V x) {
  return logistic_and_slope(x).value;
}

template <class V>
PYDL_HD V hyperbolic_tangent(V x) {
  const V e = exponential_minus_one(at_most(magnitude(x), 20) * splat<V>(2));
  const V r = reciprocal(e + splat<V>(2));
  // Each form where it loses the least: the first near 0, the second near 1.
  return with_sign_of(select(e < splat<V>(2), e * r, splat<V>(1) - splat<V>(2) * r), x);
}
PYDL_HD double hyperbolic_tangent(double x) { return tanh(x); }

template <class V>
struct Normal {
  V cdf, pdf;
};
// The normal distribution function and density. Tail: exp(-a^2/2) t P(t) with t = 1 / (1 + 0.33 a),
// the form of Abramowitz and Stegun 26.2.17; P is a minimax fit of degree 8 on a <= 14.5, relative
// error 6.1e-8.
template <class V>
PYDL_HD Normal<V> normal(V x) {
  const V a = at_most(magnitude(x), 14.4);
  const V e = exponential(a * (a * splat<V>(-0.5)));
  const V t = reciprocal(splat<V>(1) + a * splat<V>(0.33));
  V p = splat<V>(-0.02044235584410105);
  p = p * t + splat<V>(0.12134815845230064);
  p = p * t + splat<V>(-0.2637095318887148);
  p = p * t + splat<V>(0.22078330846407315);
  p = p * t + splat<V>(-0.053968796278803126);
  p = p * t + splat<V>(0.12077656046093099);
  p = p * t + splat<V>(0.11131944466739722);
  p = p * t + splat<V>(0.132269239751787);
  p = p * t + splat<V>(0.1316240023672993);
  const V tail = e * t * p;
  return {select(x < splat<V>(0), tail, splat<V>(1) - tail), e * splat<V>(0.3989422804014327)};
}
PYDL_HD Normal<double> normal(double x) {
  return {0.5 * erfc(-0.7071067811865476 * x), 0.3989422804014327 * exp(-0.5 * x * x)};
}

#if !defined(__CUDACC__) && !defined(PYDL_EMULATION)
// For bf16. Minimax fits: tanh(x) / x as a quotient of polynomials of x^2 on |x| <= 4, past which
// the value rounds to 1, relative error 1.4e-5; and P of degree 4 in t = 1 / (1 + 0.4 a), 8.6e-5.
PYDL_HD vlow hyperbolic_tangent(vlow x) {
  const vlow c = at_least(at_most(x, 4), -4), u = c * c;
  const vlow p =
      (splat<vlow>(0.000770069512) * u + splat<vlow>(0.105319039)) * u + splat<vlow>(0.999986471);
  const vlow q = (splat<vlow>(0.0137487346) * u + splat<vlow>(0.438551333)) * u + splat<vlow>(1);
  return c * p * reciprocal(q);
}
PYDL_HD Normal<vlow> normal(vlow x) {
  const vlow a = at_most(magnitude(x), 14.4);
  const vlow e = exponential(a * (a * splat<vlow>(-0.5)));
  const vlow t = reciprocal(splat<vlow>(1) + a * splat<vlow>(0.4));
  vlow p = splat<vlow>(-0.08309717);
  p = p * t + splat<vlow>(0.13995719);
  p = p * t + splat<vlow>(0.12409832);
  p = p * t + splat<vlow>(0.15928327);
  p = p * t + splat<vlow>(0.15971535);
  const vlow tail = e * t * p;
  return {select(x < splat<vlow>(0), tail, splat<vlow>(1) - tail),
          e * splat<vlow>(0.3989422804014327)};
}
#endif

struct Identity {
  static constexpr int kNumber = 0;
  static constexpr bool kSavesOutput = false;
  template <class V>
  PYDL_HD V forward(V x) const {
    return x;
  }
  template <class V>
  PYDL_HD V backward(V dy, V) const {
    return dy;
  }
};

struct Sigmoid {
  static constexpr int kNumber = 1;
  static constexpr bool kSavesOutput = true;
  template <class V>
  PYDL_HD V forward(V x) const {
    return logistic(x);
  }
  template <class V>
  PYDL_HD V backward(V dy, V y) const {
    return dy * (splat<V>(1) - y) * y;
  }
};

struct Tanh {
  static constexpr int kNumber = 2;
  static constexpr bool kSavesOutput = true;
  template <class V>
  PYDL_HD V forward(V x) const {
    return hyperbolic_tangent(x);
  }
  template <class V>
  PYDL_HD V backward(V dy, V y) const {
    return dy * (splat<V>(1) - y * y);
  }
};

struct Relu {
  static constexpr int kNumber = 3;
  static constexpr bool kSavesOutput = true;
  template <class V>
  PYDL_HD V forward(V x) const {
    return select(x < splat<V>(0), splat<V>(0), x);
  }
  template <class V>
  PYDL_HD V backward(V dy, V y) const {
    return select(y <= splat<V>(0), splat<V>(0), dy);
  }
};

// The sign of x decides; where slope >= 0 the output has the same sign and may be saved instead.
struct LeakyRelu {
  static constexpr int kNumber = 4;
  static constexpr bool kSavesOutput = false;
  double slope;
  template <class V>
  PYDL_HD V forward(V x) const {
    return select(x > splat<V>(0), x, x * splat<V>(slope));
  }
  template <class V>
  PYDL_HD V backward(V dy, V x) const {
    return select(x > splat<V>(0), dy, dy * splat<V>(slope));
  }
};

struct Elu {
  static constexpr int kNumber = 5;
  static constexpr bool kSavesOutput = false;
  double alpha;
  template <class V>
  PYDL_HD V forward(V x) const {
    return select(x > splat<V>(0), x, splat<V>(alpha) * exponential_minus_one(at_most(x, 0)));
  }
  template <class V>
  PYDL_HD V backward(V dy, V x) const {
    // NaN is on the side of the exponential.
    return select(x > splat<V>(0), dy, dy * splat<V>(alpha) * exponential(at_most(x, 0)));
  }
};

// Klambauer et al. 2017, arXiv 1706.02515: the constants keep mean 0 and variance 1.
struct Selu {
  static constexpr int kNumber = 6;
  static constexpr bool kSavesOutput = false;
  static constexpr double kScale = 1.0507009873554804934193349852946;
  static constexpr double kScaledAlpha = 1.6732632423543772848170429916717 * kScale;
  template <class V>
  PYDL_HD V forward(V x) const {
    const V negative = splat<V>(kScaledAlpha) * exponential_minus_one(at_most(x, 0));
    return select(x > splat<V>(0), splat<V>(kScale) * x, negative);
  }
  template <class V>
  PYDL_HD V backward(V dy, V x) const {
    const V negative = splat<V>(kScaledAlpha) * exponential(at_most(x, 0));
    return dy * select(x > splat<V>(0), splat<V>(kScale), negative);
  }
};

// Hendrycks and Gimpel 2016, arXiv 1606.08415: x Phi(x).
struct Gelu {
  static constexpr int kNumber = 7;
  static constexpr bool kSavesOutput = false;
  template <class V>
  PYDL_HD V forward(V x) const {
    return x * normal(x).cdf;
  }
  template <class V>
  PYDL_HD V backward(V dy, V x) const {
    const Normal<V> n = normal(x);
    return dy * (n.cdf + x * n.pdf);
  }
};

// (1 + tanh u) / 2 is the logistic function of 2u: one exponential.
struct GeluTanh {
  static constexpr int kNumber = 8;
  static constexpr bool kSavesOutput = false;
  static constexpr double kTwoC = 1.5957691216057308;  // 2 sqrt(2 / pi)
  static constexpr double kCubic = 0.044715;
  template <class V>
  PYDL_HD V forward(V x) const {
    return x * logistic(splat<V>(kTwoC) * (x + splat<V>(kCubic) * x * x * x));
  }
  template <class V>
  PYDL_HD V backward(V dy, V x) const {
    // Past 12 the logistic is 0 or 1 in every type, and x^3 may not overflow.
    const V c = at_least(at_most(x, 12), -12);
    const V square = c * c;
    const Logistic<V> s =
        logistic_and_slope(splat<V>(kTwoC) * c * (splat<V>(1) + splat<V>(kCubic) * square));
    const V inner = splat<V>(kTwoC) * (splat<V>(1) + splat<V>(3 * kCubic) * square);
    return dy * (s.value + c * s.slope * inner);
  }
};

// Ramachandran et al. 2017, arXiv 1710.05941: x logistic(beta x); silu where beta is 1.
struct Swish {
  static constexpr int kNumber = 10;
  static constexpr bool kSavesOutput = false;
  double beta;
  template <class V>
  PYDL_HD V forward(V x) const {
    return value(x, splat<V>(beta));
  }
  template <class V>
  PYDL_HD V backward(V dy, V x) const {
    return dy * slope(x, splat<V>(beta));
  }
  template <class V>
  static PYDL_HD V value(V x, V beta) {
    return x * logistic(beta * x);
  }
  template <class V>
  static PYDL_HD V slope(V x, V beta) {
    const Logistic<V> s = logistic_and_slope(beta * x);
    return s.value + beta * x * s.slope;
  }
  // The derivative by beta.
  template <class V>
  static PYDL_HD V by_beta(V x, V beta) {
    return x * (x * logistic_and_slope(beta * x).slope);  // x * x may be infinite
  }
};

struct Silu {
  static constexpr int kNumber = 9;
  static constexpr bool kSavesOutput = false;
  template <class V>
  PYDL_HD V forward(V x) const {
    return x * logistic(x);
  }
  template <class V>
  PYDL_HD V backward(V dy, V x) const {
    const Logistic<V> s = logistic_and_slope(x);
    return dy * (s.value + x * s.slope);
  }
};

// Misra 2019, arXiv 1908.08681: x tanh(log(1 + e^x)). With e = e^x and n = e^2 + 2e the tanh is n /
// (n + 2), and its derivative 4 e (e + 1) / (n + 2)^2. Past 20 the tanh is 1 in fp32 (40 in fp64).
struct Mish {
  static constexpr int kNumber = 11;
  static constexpr bool kSavesOutput = false;
  template <class V>
  PYDL_HD V forward(V x) const {
    const V e = exponential(at_most(x, 40));
    const V n = e * (e + splat<V>(2));
    return x * (n * reciprocal(n + splat<V>(2)));
  }
  template <class V>
  PYDL_HD V backward(V dy, V x) const {
    const V c = at_least(at_most(x, 40), -110);
    const V e = exponential(c);
    const V n = e * (e + splat<V>(2));
    const V r = reciprocal(n + splat<V>(2));
    return dy * r * (n + c * splat<V>(4) * e * (e + splat<V>(1)) * r);
  }
};

// He et al. 2015, arXiv 1502.01852: a leaky relu whose slope is learnt.
struct Prelu {
  template <class V>
  static PYDL_HD V value(V x, V weight) {
    return select(x > splat<V>(0), x, weight * x);
  }
  template <class V>
  static PYDL_HD V slope(V x, V weight) {
    return select(x > splat<V>(0), splat<V>(1), weight);
  }
  template <class V>
  static PYDL_HD V by_weight(V x, V) {
    return select(x > splat<V>(0), splat<V>(0), x);
  }
};

// dy f'(x) where only x is at hand, as in a fused op that never stored f(x).
template <class F, class V>
PYDL_HD V backward_from_input(const F& f, V dy, V x) {
  if constexpr (F::kSavesOutput) {
    return f.backward(dy, f.forward(x));
  } else {
    return f.backward(dy, x);
  }
}

// The activations by the numbers that pydl/ops/bias_act.py gives them. Calls body(F{...}).
template <class Body>
PYDL_HD auto with_activation(int64_t act, double parameter, const Body& body) {
  switch (act) {
    case Sigmoid::kNumber:
      return body(Sigmoid{});
    case Tanh::kNumber:
      return body(Tanh{});
    case Relu::kNumber:
      return body(Relu{});
    case LeakyRelu::kNumber:
      return body(LeakyRelu{parameter});
    case Elu::kNumber:
      return body(Elu{parameter});
    case Selu::kNumber:
      return body(Selu{});
    case Gelu::kNumber:
      return body(Gelu{});
    case GeluTanh::kNumber:
      return body(GeluTanh{});
    case Silu::kNumber:
      return body(Silu{});
    case Swish::kNumber:
      return body(Swish{parameter});
    case Mish::kNumber:
      return body(Mish{});
    default:
      return body(Identity{});
  }
}

// One chosen at run time: for the paths that are seldom taken, which need not be compiled for each.
struct AnyActivation {
  static constexpr bool kSavesOutput = false;
  int64_t act;
  double parameter;
  template <class V>
  PYDL_HD V forward(V x) const {
    return with_activation(act, parameter, [&](auto f) { return f.forward(x); });
  }
  template <class V>
  PYDL_HD V backward(V dy, V saved) const {
    return with_activation(act, parameter, [&](auto f) { return f.backward(dy, saved); });
  }
};
template <class V>
PYDL_HD V backward_from_input(const AnyActivation& any, V dy, V x) {
  return with_activation(any.act, any.parameter,
                         [&](auto f) { return backward_from_input(f, dy, x); });
}

// A functor's parameter, 0 where it has none.
template <class F>
constexpr double parameter_of(const F& f) {
  if constexpr (requires { f.slope; }) return f.slope;
  if constexpr (requires { f.alpha; }) return f.alpha;
  if constexpr (requires { f.beta; }) return f.beta;
  return 0;
}
template <class F>
constexpr AnyActivation any_of(const F& f) {
  return {F::kNumber, parameter_of(f)};
}

inline void check_activation(const char* op, int64_t act) {
  if (act < 0 || act > Mish::kNumber) {
    fail("%s: act is %lld, wants 0 to %d", op, static_cast<long long>(act), Mish::kNumber);
  }
}

}  // namespace PYDL_ISA
}  // namespace pydl
