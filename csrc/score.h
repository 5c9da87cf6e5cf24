// The scores of attention that is no dot product, for the CPU's and CUDA's kernels alike.
//
// A query q, a key k and weights w of H numbers each give a sum over h of
//   additive   w tanh(q + k)
//   gaussian   -(w (q - k))^2 / 2
// which costs L S H tanhs. A Form makes planes of a query's numbers and of a key's first, once for
// each of them, so that a pair is left with a few sums and one reciprocal; `meet` gives what all
// else of a pair follows from, t = tanh(q + k) or q - k.
#pragma once

#include <initializer_list>

#include "math.h"

namespace pydl {
inline namespace PYDL_ISA {

// Sizes of (batch, queries, width) and (batch, keys, width), dense.
struct Score {
  int64_t batch, queries, keys, width;

  static Score of(const char* op, const View& q, const View& k, const View& w, int64_t form) {
    Score s{};
    if (q.ndim == 3) s = {q.sizes[0], q.sizes[1], k.ndim == 3 ? k.sizes[1] : 0, q.sizes[2]};
    check(op, "query", q, q.dtype, {s.batch, s.queries, s.width});
    check(op, "key", k, q.dtype, {s.batch, s.keys, s.width});
    check(op, "weight", w, q.dtype, {s.width});
    if (form < 0 || form > 1)
      fail("%s: form is %lld, wants 0 or 1", op, static_cast<long long>(form));
    return s;
  }
  // Of the accumulation type: scores (batch, queries, keys), and their gradient.
  void check_scores(const char* op, const View& scores, const View& q) const {
    check(op, "scores", scores, accumulation(q), {batch, queries, keys});
  }
  // The same for dquery, and for dkey and dweight, which have a part for each piece of the queries.
  // Returns how many pieces there are.
  int64_t check_gradients(const char* op, const View& dq, const View& dk, const View& dw,
                          const View& q) const {
    const int64_t pieces = dk.ndim == 4 ? dk.sizes[0] : 0;
    check(op, "dquery", dq, accumulation(q), {batch, queries, width});
    check(op, "dkey", dk, accumulation(q), {pieces, batch, keys, width});
    check(op, "dweight", dw, accumulation(q), {pieces, batch, width});
    if (pieces < 1) fail("%s: wants a piece of the queries at least", op);
    return pieces;
  }

 private:
  static DType accumulation(const View& q) {
    return q.dtype == DType::f64 ? DType::f64 : DType::f32;
  }
  static void check(const char* op, const char* name, const View& x, DType dtype,
                    std::initializer_list<int64_t> sizes) {
    bool fits = x.dtype == dtype && x.ndim == static_cast<int32_t>(sizes.size()), dense = true;
    int64_t stride = 1;
    for (int d = x.ndim - 1; fits && d >= 0; --d) {
      fits = x.sizes[d] == sizes.begin()[d];
      dense = dense && (x.sizes[d] == 1 || x.numel == 0 || x.strides[d] == stride);
      stride *= x.sizes[d];
    }
    if (!fits) fail("%s: %s does not fit in size or dtype", op, name);
    if (!dense) fail("%s: %s wants dense memory", op, name);
  }
};

// tanh(q + k) = (e - f) / (e + f) with e = e^2k and f = e^-2q. Near 0 both are near 1 and their
// difference would lose its end: a number is kept as a high part, 1 there, and a low part. Past 1/2
// the quotient's own error would show, and 1 - 2 min(e, f) / (e + f) has less of it.
struct Additive {
  static constexpr int kQuery = 3, kKey = 3;
  // e and f and their sum fit fp32. Beyond, AdditiveFar.
  static constexpr float kMost = 40;
  template <class V>
  static PYDL_HD void of_query(V q, V (&planes)[3]) {
    split(q * splat<V>(-2), planes);
  }
  template <class V>
  static PYDL_HD void of_key(V k, V (&planes)[3]) {
    split(k * splat<V>(2), planes);
  }
  template <class V>
  static PYDL_HD V meet(const V (&q)[3], const V (&k)[3]) {
    const V difference = (k[0] - q[0]) + (k[1] - q[1]);
    const V r = reciprocal(difference + q[2]);
    const V rest = select(q[2] < k[2], q[2], k[2]) * r;
    return select(rest < splat<V>(0.5), with_sign_of(splat<V>(1) - rest, difference),
                  difference * r);
  }
  template <class V>
  static PYDL_HD V add_term(V sum, V t, V w) {
    return sum + w * t;
  }
  template <class V>
  static PYDL_HD V total(V sum) {
    return sum;
  }
  // The derivatives of the score, but for a factor: by q and k, and by w.
  template <class V>
  static PYDL_HD V by_number(V t) {
    return splat<V>(1) - t * t;
  }
  template <class V>
  static PYDL_HD V by_weight(V t) {
    return t;
  }
  // The factors.
  template <class V>
  static PYDL_HD V of_dquery(V w) {
    return w;
  }
  template <class V>
  static PYDL_HD V of_dkey(V w) {
    return w;
  }
  template <class V>
  static PYDL_HD V of_dweight(V) {
    return splat<V>(1);
  }

 private:
  // The high and the low part of e^x, and its double.
  template <class V>
  static PYDL_HD void split(V x, V (&planes)[3]) {
    const V m = exponential_minus_one(magnitude(x)), e = m + splat<V>(1), r = reciprocal(e);
    const auto near = magnitude(x) < splat<V>(0.69), negative = x < splat<V>(0);
    planes[0] = select(near, splat<V>(1), select(negative, r, e));
    planes[1] = select(near, select(negative, -(m * r), m), splat<V>(0));
    planes[2] = (planes[0] + planes[1]) * splat<V>(2);
  }
};

// A number is kept as one, itself.
struct AsGiven {
  static constexpr int kQuery = 1, kKey = 1;
  template <class V>
  static PYDL_HD void of_query(V q, V (&planes)[1]) {
    planes[0] = q;
  }
  template <class V>
  static PYDL_HD void of_key(V k, V (&planes)[1]) {
    planes[0] = k;
  }
};

// The same of any numbers, and of fp64.
struct AdditiveFar : Additive, AsGiven {
  using AsGiven::kKey;
  using AsGiven::kQuery;
  using AsGiven::of_key;
  using AsGiven::of_query;
  template <class V>
  static PYDL_HD V meet(const V (&q)[1], const V (&k)[1]) {
    return hyperbolic_tangent(q[0] + k[0]);
  }
};

struct Gaussian : AsGiven {
  template <class V>
  static PYDL_HD V meet(const V (&q)[1], const V (&k)[1]) {
    return q[0] - k[0];
  }
  template <class V>
  static PYDL_HD V add_term(V sum, V t, V w) {
    return sum + (t * w) * (t * w);
  }
  template <class V>
  static PYDL_HD V total(V sum) {
    return sum * splat<V>(-0.5);
  }
  template <class V>
  static PYDL_HD V by_number(V t) {
    return t;
  }
  template <class V>
  static PYDL_HD V by_weight(V t) {
    return t * t;
  }
  template <class V>
  static PYDL_HD V of_dquery(V w) {
    return -(w * w);
  }
  template <class V>
  static PYDL_HD V of_dkey(V w) {
    return w * w;
  }
  template <class V>
  static PYDL_HD V of_dweight(V w) {
    return -w;
  }
};

}  // namespace PYDL_ISA
}  // namespace pydl
