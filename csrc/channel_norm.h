// What the kernels of both devices know of (samples, outer, channels, inner), whose channels are
// normalised group by group, and check before they read.
#pragma once

#include <initializer_list>

#include "pieces.h"

namespace pydl {
inline namespace PYDL_ISA {

struct Normed {
  int64_t samples, outer, channels, inner, groups;

  PYDL_HD int64_t per_group() const { return channels / groups; }
  // Values that a group's moments are of.
  PYDL_HD int64_t count() const { return outer * inner * per_group(); }
  // Where a run of one channel starts.
  PYDL_HD int64_t at(int64_t sample, int64_t o, int64_t channel) const {
    return ((sample * outer + o) * channels + channel) * inner;
  }
  int64_t numel() const { return samples * outer * channels * inner; }

  // `alike` have the shape, the dtype and the dense memory of x, or are absent.
  static Normed of(const char* op, const View& x, int64_t groups,
                   std::initializer_list<const View*> alike) {
    if (x.ndim != 4) {
      fail("%s: wants (samples, outer, channels, inner), got %d dimensions", op, x.ndim);
    }
    const Normed shape{x.sizes[0], x.sizes[1], x.sizes[2], x.sizes[3], groups};
    if (groups < 0 || (groups == 0 ? shape.channels != 0 : shape.channels % groups != 0)) {
      fail("%s: groups is %lld, wants a divisor of %lld channels", op,
           static_cast<long long>(groups), static_cast<long long>(shape.channels));
    }
    check_dense(op, x);
    for (const View* other : alike) {
      if (other->dtype == DType::none) continue;
      bool same = other->ndim == 4 && other->dtype == x.dtype;
      for (int d = 0; same && d < 4; ++d) same = other->sizes[d] == x.sizes[d];
      if (!same) fail("%s: wants tensors of one shape and dtype", op);
      check_dense(op, *other);
    }
    return shape;
  }

  // Three numbers for each sample and group, in fp32 (fp64 for fp64).
  void check_moments(const char* op, const View& x,
                     std::initializer_list<const View*> moments) const {
    const DType wide = x.dtype == DType::f64 ? DType::f64 : DType::f32;
    for (const View* moment : moments) {
      if (moment->numel != samples * groups || moment->dtype != wide) {
        fail("%s: wants a float32 number (float64 for float64) for each of %lld groups", op,
             static_cast<long long>(samples * groups));
      }
    }
  }

 private:
  static void check_dense(const char* op, const View& x) {
    int64_t expected = 1;
    for (int d = 3; d >= 0 && x.numel > 0; --d) {
      if (x.sizes[d] != 1 && x.strides[d] != expected) fail("%s: wants dense memory", op);
      expected *= x.sizes[d];
    }
  }
};

// fp64 memory of a call: two numbers for each (sample, piece, channel), two for each (sample,
// channel), two for each (sample, group).
struct Sums {
  double *partials, *totals, *of_groups;
  int64_t pieces;

  static Sums of(const char* op, const Normed& shape, const View& scratch, int64_t pieces) {
    const int64_t cut = 2 * shape.samples * pieces * shape.channels;
    const int64_t whole = 2 * shape.samples * shape.channels;
    const int64_t wanted = cut + whole + 2 * shape.samples * shape.groups;
    if (pieces < 1 || scratch.dtype != DType::f64 || scratch.numel < wanted) {
      fail("%s: wants a piece and scratch of %lld float64 numbers", op,
           static_cast<long long>(wanted));
    }
    double* data = static_cast<double*>(scratch.data);
    return {data, data + cut, data + cut + whole, pieces};
  }
  // The same with the totals elsewhere: (2, samples, channels).
  Sums with_totals(const char* op, const Normed& shape, const View& given) const {
    if (given.dtype != DType::f64 || given.numel != 2 * shape.samples * shape.channels) {
      fail("%s: wants float64 sums of (2, samples, channels)", op);
    }
    return {partials, static_cast<double*>(given.data), of_groups, pieces};
  }
  PYDL_HD double* partial(const Normed& shape, int64_t sample, int64_t piece) const {
    return partials + (sample * pieces + piece) * 2 * shape.channels;
  }
};

// A mean and a sum of squared deviations from it, and how two sets' are joined (Chan, Golub and
// LeVeque 1983), in W.
template <class W>
struct Spread {
  W count, mean, squares;
  void add(const Spread& other) {
    if (other.count == 0) return;
    const W total = count + other.count, d = other.mean - mean;
    mean += d * (other.count / total);
    squares += other.squares + d * d * (count * (other.count / total));
    count = total;
  }
};

}  // namespace PYDL_ISA
}  // namespace pydl
