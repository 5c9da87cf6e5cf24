// CPU: the passes that normalise channels. Where the runs of a channel are long, a thread takes a
// group through all passes while it lies in the cache; where they are short, all channels of many
// rows are columns, which pieces of the rows are summed over.
#pragma once

#include "channel_runs.h"

namespace pydl {
inline namespace PYDL_ISA {

constexpr int64_t kShort = 32;     // elements; shorter runs of a channel are parts of rows
constexpr int64_t kWide = 1024;    // columns at least, where rows have to be repeated
constexpr int64_t kTileRows = 32;  // read twice from L2
constexpr int64_t kLong = 16384;   // elements read twice from L2

template <class T>
struct Engine {
  using A = acc_t<T>;
  // Finer than what is computed in.
  using W = std::conditional_t<std::is_same_v<A, double>, long double, double>;
  using V = typename Lanes<T>::type;
  Normed s;
  Sums sums;
  const T *x, *residual, *dy;
  T *y, *dx, *dz;  // dz is null where it is not wanted
  A *mean, *rest, *var;
  const A *weight, *bias;  // null where absent
  double eps;
  ActRuns<A> act;
  bool past_cache;

  bool by_units() const { return s.inner >= kShort || (s.outer == 1 && s.samples > 1); }
  int64_t unit() const { return s.per_group() * s.inner; }  // a group's run of memory
  const T* residual_at(int64_t i) const { return residual ? residual + i : nullptr; }

  // What the last pass starts from: dz where it was stored, else dy and the activation again.
  const T* before() const { return dz ? dz : dy; }
  ActRuns<A> act_before() const { return dz ? ActRuns<A>{} : act; }

  // The coefficients of one channel.
  struct Numbers {
    A mean, rest, rstd, weight, bias, k1, left, k2;
    double inverse;
    bool pulled = false;  // by the moments' gradients
    Coefs<A> coefs() const {
      return {&mean, &rest, &rstd, &weight, &bias, &k1, &left, pulled ? &k2 : nullptr};
    }
    // For the output alone: one rounding less.
    void fold() {
      rstd = static_cast<A>(inverse * double{weight});
      weight = 1;
    }
    void set_channel(const Engine& e, int64_t c) {
      weight = e.weight ? e.weight[c] : A(1);
      bias = e.bias ? e.bias[c] : A(0);
    }
  };
  // Of a group, but for weight and bias; `of_group` are the sums behind k1 and k2.
  Numbers numbers(int64_t sample, int64_t g, const double* of_group, double count) const {
    const int64_t of = sample * s.groups + g;
    const double inverse = 1 / std::sqrt(double{var[of]} + eps);
    Numbers n{mean[of], rest[of], static_cast<A>(inverse), 1, 0, 0, 0, 0, inverse};
    if (of_group) {
      const double k1 = of_group[0] / count;
      n.k1 = static_cast<A>(k1);
      n.left = static_cast<A>(k1 - double{n.k1});
      n.k2 = static_cast<A>(of_group[1] / count);
      n.pulled = true;
    }
    return n;
  }

  // Means are found relative to the first element: nothing of them is lost where it is large.
  double base(int64_t sample, int64_t g) const {
    return to_float(x[s.at(sample, 0, g * s.per_group())]);
  }
  void set_moments(int64_t sample, int64_t g, const Spread<W>& total) {
    const int64_t of = sample * s.groups + g;
    const W start = base(sample, g);
    mean[of] = static_cast<A>(start + total.mean);
    rest[of] = static_cast<A>((start - W{mean[of]}) + total.mean);
    var[of] = static_cast<A>(total.squares / total.count);
  }

  // ---- groups that one thread takes through all passes

  // Weight and bias of a row of all channels, for runs of several.
  struct Weights : Scratch<A> {
    int64_t width;
    explicit Weights(const Engine& e)
        : Scratch<A>(e.s.inner < kShort ? 2 * (e.period() + kPad) : 0), width(e.period() + kPad) {
      if (e.s.inner >= kShort) return;
      for (int64_t i = 0; i < e.period(); ++i) {
        this->data()[i] = e.weight ? e.weight[i / e.s.inner] : A(1);
        this->data()[width + i] = e.bias ? e.bias[i / e.s.inner] : A(0);
      }
    }
  };

  // Runs shorter than this are gathered before their moments are taken.
  static constexpr int64_t kGathered = 512;

  void add_moments(Spread<W>& total, const auto* from, int64_t n, double start) const {
    for (int64_t i = 0; i < n; i += kLong) {
      const int64_t part = n - i < kLong ? n - i : kLong;
      const Moments<A> m = moments_in_two(from + i, part);
      const W count = static_cast<W>(part);
      total.add({count, (W{m.shift} - W{start}) + W{m.rest}, W{m.variance} * count});
    }
  }
  void unit_moments(int64_t sample, int64_t g) {
    Spread<W> total{0, 0, 0};
    const double start = base(sample, g);
    if (unit() >= kGathered || s.outer == 1) {
      for (int64_t o = 0; o < s.outer; ++o) {
        add_moments(total, x + s.at(sample, o, g * s.per_group()), unit(), start);
      }
      return set_moments(sample, g, total);
    }
    constexpr int64_t kWidth = Lanes<T>::count;
    alignas(64) A gathered[8 * kGathered + kPad];
    int64_t filled = 0;
    for (int64_t o = 0; o < s.outer; ++o) {
      const T* from = x + s.at(sample, o, g * s.per_group());
      fetch_run(x + s.at(sample, 0, g * s.per_group()), Runs{s.outer, period(), unit()}, o);
      for (int64_t i = 0; i < unit(); i += kWidth) {
        const int64_t count = unit() - i < kWidth ? unit() - i : kWidth;
        store_as(gathered + filled + i, load_some(from + i, count));
      }
      filled += unit();
      if (filled + unit() <= 8 * kGathered && o + 1 < s.outer) continue;
      add_moments(total, gathered, filled, start);
      filled = 0;
    }
    set_moments(sample, g, total);
  }

  // Calls of_runs(mode, coefs, channel, start, runs) for the runs of each channel, or of the whole
  // group where they are short.
  template <class OfRuns>
  void over_unit(int64_t sample, int64_t g, const Weights& weights, const double* of_group,
                 double count, const OfRuns& of_runs) const {
    const int64_t first = g * s.per_group(), stride = period();
    Numbers one = numbers(sample, g, of_group, count);
    if (s.inner < kShort) {
      Coefs<A> coefs = one.coefs();
      coefs.weight = weights.data() + first * s.inner;
      coefs.bias = coefs.weight + weights.width;
      return of_runs(std::integral_constant<Mode, kRow>{}, coefs, first, s.at(sample, 0, first),
                     Runs{s.outer, stride, unit()});
    }
    for (int64_t c = first; c < first + s.per_group(); ++c) {
      one.set_channel(*this, c);
      of_runs(std::integral_constant<Mode, kOne>{}, one.coefs(), c, s.at(sample, 0, c),
              Runs{s.outer, stride, s.inner});
    }
  }

  void unit_apply(int64_t sample, int64_t g, const Weights& weights) const {
    over_unit(sample, g, weights, nullptr, 1,
              [&](auto mode, const Coefs<A>& c, int64_t, int64_t start, const Runs& runs) {
                forward_runs<T, decltype(mode)::value>(y + start, x + start, residual_at(start), c,
                                                       act, runs, past_cache);
              });
  }

  // Fills the totals of the group's channels. `added`: 2 (unit() + kPad) zeros where runs are
  // short.
  void unit_sums(int64_t sample, int64_t g, const Weights& weights, A* added) const {
    double* const first = sums.totals + sample * s.channels;
    double* const second = first + s.samples * s.channels;
    over_unit(sample, g, weights, nullptr, 1,
              [&](auto mode, const Coefs<A>& coefs, int64_t c, int64_t at, const Runs& runs) {
                constexpr Mode kMode = decltype(mode)::value;
                Added<A> to{added, added + (added ? unit() + kPad : 0), {0, 0}};
                sums_runs<T, kMode>(dz ? dz + at : nullptr, dy + at, x + at, residual_at(at), coefs,
                                    act, runs, to);
                if constexpr (kMode == kOne) {
                  first[c] = to.totals[0];
                  second[c] = to.totals[1];
                } else {
                  fold(to, runs.n, first + c, second + c, s.per_group());
                }
              });
  }
  // Moves the sums of n positions to those of their channels, of which there are `span`.
  void fold(const Added<A>& from, int64_t n, double* first, double* second, int64_t span) const {
    for (int64_t c = 0; c < span; ++c) first[c] = second[c] = 0;
    for (int64_t i = 0, c = 0; i < n; c = c + 1 == span ? 0 : c + 1) {
      for (int64_t stop = i + s.inner; i < stop; ++i) {
        first[c] += double{from.first[i]};
        second[c] += double{from.second[i]};
        from.first[i] = from.second[i] = 0;
      }
    }
  }

  void unit_dx(int64_t sample, int64_t g, const Weights& weights, const double* of_group,
               double count) const {
    const ActRuns<A> run = act_before();
    over_unit(sample, g, weights, of_group, count,
              [&](auto mode, const Coefs<A>& c, int64_t, int64_t start, const Runs& runs) {
                dx_runs<T, decltype(mode)::value>(dx + start, before() + start, x + start,
                                                  residual_at(start), c, run, runs, past_cache);
              });
  }

  // Calls body(sample, group) for all of them, in parallel.
  template <class Body>
  void over_units(const Body& body) const {
    parallel_for(s.samples * s.groups, row_grain(s.outer * unit()),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t k = begin; k < end; ++k) body(k / s.groups, k % s.groups);
                 });
  }

  // ---- columns: every position of a row of all channels, rows repeated to be wide enough

  int64_t period() const { return s.channels * s.inner; }
  int64_t width() const {
    const int64_t times = period() < kWide ? kWide / period() : 1;
    return period() * (times < s.outer ? times : s.outer);
  }
  Range piece(int64_t k) const { return Pieces::share(s.outer, sums.pieces, k); }

  struct Columns : Scratch<A> {
    int64_t width;
    bool pulled;
    Columns(const Engine& e, int64_t sample, const double* of_groups, double count,
            bool folded = false)
        : Scratch<A>(8 * (e.width() + kPad)),
          width(e.width() + kPad),
          pulled(of_groups != nullptr) {
      for (int64_t g = 0; g < e.s.groups; ++g) {
        Numbers one = e.numbers(sample, g, of_groups ? of_groups + 2 * g : nullptr, count);
        for (int64_t c = g * e.s.per_group(); c < (g + 1) * e.s.per_group(); ++c) {
          one.set_channel(e, c);
          if (folded) one.fold();
          const A values[8] = {one.mean, one.rest, one.rstd, one.weight,
                               one.bias, one.k1,   one.left, one.k2};
          for (int64_t start = c * e.s.inner; start < e.width(); start += e.period()) {
            for (int k = 0; k < 8; ++k) {
              for (int64_t i = start; i < start + e.s.inner; ++i) row(k)[i] = values[k];
            }
          }
        }
      }
    }
    A* row(int k) const { return this->data() + k * width; }
    Coefs<A> coefs() const {
      return {row(0), row(1), row(2), row(3), row(4), row(5), row(6), pulled ? row(7) : nullptr};
    }
  };

  void column_moments(int64_t sample, int64_t k) const;

  // Joins the moments of `height` rows to those of `before` rows; means are relative to `bases`.
  static void tile_moments(const T* from, int64_t stride, int64_t height, int64_t n, int64_t before,
                           const T* bases, W* means, W* squares);

  // The moments of a group from those of its channels' pieces.
  void join_moments(int64_t sample, int64_t g);

  // Calls body(start, n) for the rows of a sample, in parallel.
  template <class Body>
  void over_columns(int64_t sample, const Body& body) const {
    const int64_t w = width(), n = s.outer * period(), start = s.at(sample, 0, 0);
    parallel_for((n + w - 1) / w, row_grain(w), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) body(start + r * w, n - r * w < w ? n - r * w : w);
    });
  }

  void column_apply(int64_t sample) const;

  void column_sums(int64_t sample) const;

  void column_dx(int64_t sample, const double* of_groups, double count) const;

  // ---- passes

  void forward(bool find_moments, bool apply) {
    if (by_units()) {
      const Weights weights(*this);
      return over_units([&](int64_t sample, int64_t g) {
        if (find_moments) unit_moments(sample, g);
        if (apply) unit_apply(sample, g, weights);
      });
    }
    over_samples([&](int64_t sample) {
      if (find_moments) {
        parallel_for(sums.pieces, 1, [&](int64_t begin, int64_t end) {
          for (int64_t k = begin; k < end; ++k) column_moments(sample, k);
        });
        parallel_for(s.groups, row_grain(sums.pieces * s.per_group()),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t g = begin; g < end; ++g) join_moments(sample, g);
                     });
      }
      if (apply) column_apply(sample);
    });
  }

  // In parallel where there are several: what is parallel in one is then done by one thread.
  template <class Body>
  void over_samples(const Body& body) const {
    parallel_for(s.samples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t sample = begin; sample < end; ++sample) body(sample);
    });
  }

  // With `find_sums` the totals are found; with `apply` dx follows from `totals`, or from none
  // where `count` is 0.
  void backward(bool find_sums, bool apply, const double* totals, double count) const {
    const auto of_group = [&](int64_t sample, int64_t g) -> const double* {
      if (count == 0) return nullptr;
      double* const to = sums.of_groups + 2 * (sample * s.groups + g);
      to[0] = to[1] = 0;
      for (int64_t c = g * s.per_group(); c < (g + 1) * s.per_group(); ++c) {
        const double w = weight ? double{weight[c]} : 1;
        to[0] += w * totals[sample * s.channels + c];
        to[1] += w * totals[(s.samples + sample) * s.channels + c];
      }
      return to;
    };
    if (by_units()) {
      const Weights weights(*this);
      parallel_for(s.samples * s.groups, row_grain(s.outer * unit()),
                   [&](int64_t begin, int64_t end) {
                     const bool rows = find_sums && s.inner < kShort;
                     const Scratch<A> added(rows ? 2 * (unit() + kPad) : 0);
                     for (int64_t k = begin; k < end; ++k) {
                       const int64_t sample = k / s.groups, g = k % s.groups;
                       if (find_sums) unit_sums(sample, g, weights, added.data());
                       if (apply) unit_dx(sample, g, weights, of_group(sample, g), count);
                     }
                   });
      return;
    }
    over_samples([&](int64_t sample) {
      if (find_sums) column_sums(sample);
      if (!apply) return;
      for (int64_t g = 0; g < s.groups; ++g) of_group(sample, g);
      column_dx(sample, count > 0 ? sums.of_groups + 2 * sample * s.groups : nullptr, count);
    });
  }

  // total[c] = the sum over samples of the totals at `which`.
  void weight_gradient(const Out& total, int64_t which) const {
    if (total.numel == 0) return;
    if (total.numel != s.channels) {
      fail("batch_norm: wants a gradient for each of %lld channels",
           static_cast<long long>(s.channels));
    }
    dispatch_float("batch_norm", total.dtype, [&](auto zero) {
      using W = decltype(zero);
      add_partials(static_cast<W*>(total.data), sums.totals + which * s.samples * s.channels,
                   s.channels, s.samples, s.channels);
    });
  }
};

}  // namespace PYDL_ISA
}  // namespace pydl
