// CPU: the passes that normalise channels. Where the runs of a channel are long, a thread takes a
// group through all passes while it lies in the cache; where they are short, all channels of many
// rows are columns, which pieces of the rows are summed over.
#pragma once

#include "channel_runs.h"

namespace pydl {
inline namespace PYDL_ISA {

constexpr int64_t kShort = 32;     // elements; shorter runs of a channel are columns
constexpr int64_t kWide = 1024;    // columns at least, where channels have to be repeated
constexpr int64_t kTileRows = 16;  // read twice from L2
constexpr int64_t kLong = 16384;   // elements read twice from L2

template <class T>
struct Engine {
  using A = acc_t<T>;
  using V = typename Lanes<T>::type;
  Normed s;
  Sums sums;
  const T *x, *residual, *dy;
  T *y, *dx, *dz;  // dz is null where it is not wanted
  A *mean, *rest, *var;
  const A *weight, *bias;
  double eps;
  ActRuns<A> act;
  bool past_cache;

  bool by_units() const { return s.inner >= kShort || (s.outer == 1 && s.samples > 1); }
  int64_t unit() const { return s.per_group() * s.inner; }  // a group's run of memory
  int64_t unit_grain() const { return row_grain(s.outer * unit()); }
  const T* before() const { return dz ? dz : dy; }  // what the last pass starts from

  A rstd(int64_t of) const { return static_cast<A>(1 / std::sqrt(double{var[of]} + eps)); }
  A scale(int64_t of, int64_t c) const { return weight ? rstd(of) * weight[c] : rstd(of); }

  // The coefficients of one channel.
  struct Numbers {
    A mean, rest, rstd, scale, bias, k1, k2;
    Coefs<A> coefs() const { return {&mean, &rest, &rstd, &scale, &bias}; }
  };
  Numbers numbers(int64_t sample, int64_t c, const double* of_group, double count) const {
    const int64_t of = sample * s.groups + c / s.per_group();
    const A inverse = rstd(of);
    Numbers n{mean[of], rest[of], inverse, scale(of, c), bias ? bias[c] : A(0), 0, 0};
    if (of_group) {
      n.k1 = static_cast<A>(inverse * (of_group[0] / count));
      n.k2 = static_cast<A>(inverse * (of_group[1] / count));
    }
    return n;
  }

  // The same for `n` positions, of which each s.inner belong to a channel of [first, first + span),
  // again and again; `of_groups` are the sums of the sample's groups from the first channel's on.
  struct Arrays : Scratch<A> {
    int64_t width;
    explicit Arrays(int64_t n) : Scratch<A>(7 * (n + kPad)), width(n + kPad) {}
    A* row(int k) const { return this->data() + k * width; }
    Coefs<A> coefs() const { return {row(0), row(1), row(2), row(3), row(4)}; }
  };
  void fill(const Arrays& to, int64_t n, int64_t sample, int64_t first, int64_t span,
            const double* of_groups, double count) const {
    const int64_t group = first / s.per_group();
    for (int64_t i = 0, c = first; i < n; c = c + 1 == first + span ? first : c + 1) {
      const double* sums_of = of_groups ? of_groups + 2 * (c / s.per_group() - group) : nullptr;
      const Numbers one = numbers(sample, c, sums_of, count);
      const A values[7] = {one.mean, one.rest, one.rstd, one.scale, one.bias, one.k1, one.k2};
      for (int64_t end = i + s.inner < n ? i + s.inner : n; i < end; ++i) {
        for (int k = 0; k < 7; ++k) to.row(k)[i] = values[k];
      }
    }
  }

  // Means are found relative to the first element: nothing of them is lost where it is large.
  double base(int64_t sample, int64_t g) const {
    return to_float(x[s.at(sample, 0, g * s.per_group())]);
  }
  void set_moments(int64_t sample, int64_t g, const Spread& total) {
    const int64_t of = sample * s.groups + g;
    const double start = base(sample, g);
    mean[of] = static_cast<A>(start + total.mean);
    rest[of] = static_cast<A>((start - double{mean[of]}) + total.mean);
    var[of] = static_cast<A>(total.squares / total.count);
  }

  // ---- groups that one thread takes through all passes

  void unit_moments(int64_t sample, int64_t g) {
    Spread total{0, 0, 0};
    const double start = base(sample, g);
    for (int64_t o = 0; o < s.outer; ++o) {
      const T* from = x + s.at(sample, o, g * s.per_group());
      for (int64_t i = 0; i < unit(); i += kLong) {
        const int64_t n = unit() - i < kLong ? unit() - i : kLong;
        const Moments<A> m = moments(from + i, n);
        const auto count = static_cast<double>(n);
        total.add({count, (double{m.shift} - start) + double{m.rest}, m.variance * count});
      }
    }
    set_moments(sample, g, total);
  }

  // Calls numbers(coefs, k1, k2, channel, start, n) for each run of a channel, or arrays(...) for
  // the whole run of the group where channels are short.
  template <class OfRun>
  void over_unit(int64_t sample, int64_t g, const double* of_group, double count,
                 const OfRun& of_run) {
    const int64_t first = g * s.per_group();
    if (s.inner >= kShort) {
      for (int64_t c = first; c < first + s.per_group(); ++c) {
        const Numbers one = numbers(sample, c, of_group, count);
        for (int64_t o = 0; o < s.outer; ++o) {
          of_run(std::false_type{}, one.coefs(), &one.k1, &one.k2, c, s.at(sample, o, c), s.inner);
        }
      }
      return;
    }
    const Arrays arrays(unit());
    fill(arrays, unit(), sample, first, s.per_group(), of_group, count);
    for (int64_t o = 0; o < s.outer; ++o) {
      of_run(std::true_type{}, arrays.coefs(), arrays.row(5), arrays.row(6), first,
             s.at(sample, o, first), unit());
    }
  }

  void unit_apply(int64_t sample, int64_t g) {
    over_unit(
        sample, g, nullptr, 1,
        [&](auto arrays, const Coefs<A>& c, const A*, const A*, int64_t, int64_t at, int64_t n) {
          forward_run<T, decltype(arrays)::value>(
              y + at, x + at, residual ? residual + at : nullptr, c, act, n, past_cache);
        });
  }

  // Fills the totals of the group's channels.
  void unit_sums(int64_t sample, int64_t g) {
    double* const first = sums.totals + sample * s.channels;
    double* const second = first + s.samples * s.channels;
    for (int64_t c = g * s.per_group(); c < (g + 1) * s.per_group(); ++c) first[c] = second[c] = 0;
    const bool positions = s.inner < kShort;
    const Scratch<A> added(positions ? 2 * (unit() + kPad) : 0);
    over_unit(sample, g, nullptr, 1,
              [&](auto arrays, const Coefs<A>& coefs, const A*, const A*, int64_t c, int64_t at,
                  int64_t n) {
                constexpr bool kArrays = decltype(arrays)::value;
                A* const one = added.data();
                A* const two = kArrays ? one + unit() + kPad : nullptr;
                double totals[2] = {0, 0};
                sums_run<T, kArrays>(dz ? dz + at : nullptr, dy + at, x + at,
                                     residual ? residual + at : nullptr, coefs, act, n, one, two,
                                     totals);
                first[c] += totals[0];
                second[c] += totals[1];
                for (int64_t i = 0; kArrays && i < n; ++i) {
                  first[c + i / s.inner] += double{one[i]};
                  second[c + i / s.inner] += double{two[i]};
                  one[i] = two[i] = 0;
                }
              });
  }

  void unit_dx(int64_t sample, int64_t g, const double* of_group, double count, bool past) {
    const ActRuns<A> none{}, &run = dz ? none : act;
    over_unit(sample, g, of_group, count,
              [&](auto arrays, const Coefs<A>& c, const A* k1, const A* k2, int64_t, int64_t at,
                  int64_t n) {
                dx_run<T, decltype(arrays)::value>(dx + at, before() + at, x + at,
                                                   residual ? residual + at : nullptr, c, k1, k2,
                                                   run, n, past);
              });
  }

  // ---- columns: every position of a row of all channels, rows repeated to be wide enough

  int64_t period() const { return s.channels * s.inner; }
  int64_t width() const {
    const int64_t times = period() < kWide ? kWide / period() : 1;
    return period() * (times < s.outer ? times : s.outer);
  }
  Range piece(int64_t k) const { return Pieces::share(s.outer, sums.pieces, k); }

  void column_moments(int64_t sample, int64_t k) {
    const int64_t w = width();
    const Range rows = piece(k);
    const T* from = x + s.at(sample, rows.begin, 0);
    const int64_t n = (rows.end - rows.begin) * period(), full = n / w;
    const Scratch<double> spread(3 * w);
    double *const means = spread.data(), *const squares = means + w, *const bases = squares + w;
    for (int64_t i = 0; i < w; ++i)
      bases[i] = base(sample, i / s.inner % s.channels / s.per_group());
    for (int64_t r = 0; r < full; r += kTileRows) {
      const int64_t height = full - r < kTileRows ? full - r : kTileRows;
      for (int64_t c = 0; c < w; c += kChunk) {
        tile_moments(from + r * w + c, w, height, w - c < kChunk ? w - c : kChunk, r, bases + c,
                     means + c, squares + c);
      }
    }
    double* const partial = sums.partial(s, sample, k);
    for (int64_t c = 0; c < s.channels; ++c) {
      Spread total{0, 0, 0};
      for (int64_t start = c * s.inner; start < w; start += period()) {
        for (int64_t i = start; i < start + s.inner; ++i) {
          total.add({static_cast<double>(full), means[i], squares[i]});
          if (full * w + i < n) total.add({1, to_float(from[full * w + i]) - bases[i], 0});
        }
      }
      partial[c] = total.mean;
      partial[s.channels + c] = total.squares;
    }
  }

  // Joins the moments of `height` rows to those of `before` rows.
  __attribute__((noinline)) static void tile_moments(const T* from, int64_t stride, int64_t height,
                                                     int64_t n, int64_t before, const double* bases,
                                                     double* means, double* squares) {
    alignas(64) A shift[kChunk + kPad], first[kChunk + kPad], second[kChunk + kPad];
    constexpr int64_t kWidth = Lanes<T>::count;
    for (int64_t i = 0; i < n; i += kWidth) {
      const int64_t count = n - i < kWidth ? n - i : kWidth;
      V sum = splat<V>(0);
      for (int64_t r = 0; r < height; ++r) sum += load_some(from + r * stride + i, count);
      const V middle = sum * splat<V>(1.0 / static_cast<double>(height));
      V one = splat<V>(0), two = splat<V>(0);
      for (int64_t r = 0; r < height; ++r) {
        const V d = load_some(from + r * stride + i, count) - middle;
        one += d;
        two += d * d;
      }
      store_as(shift + i, middle);
      store_as(first + i, one);
      store_as(second + i, two);
    }
    const auto old = static_cast<double>(before), now = static_cast<double>(height);
    const double part = now / (old + now), both = old * part;
    for (int64_t i = 0; i < n; ++i) {
      const double left = double{first[i]} / now, middle = (double{shift[i]} - bases[i]) + left;
      const double spread = double{second[i]} - left * double{first[i]}, d = middle - means[i];
      means[i] += d * part;
      squares[i] += (spread > 0 || spread != spread ? spread : 0) + d * d * both;
    }
  }

  void join_moments(int64_t sample, int64_t g) {
    Spread total{0, 0, 0};
    for (int64_t k = 0; k < sums.pieces; ++k) {
      const double* partial = sums.partial(s, sample, k);
      const auto count = static_cast<double>((piece(k).end - piece(k).begin) * s.inner);
      for (int64_t c = g * s.per_group(); c < (g + 1) * s.per_group(); ++c) {
        total.add({count, partial[c], partial[s.channels + c]});
      }
    }
    set_moments(sample, g, total);
  }

  // Calls body(start, n) for the rows of a sample, in parallel.
  template <class Body>
  void over_columns(int64_t sample, const Body& body) {
    const int64_t w = width(), n = s.outer * period(), start = s.at(sample, 0, 0);
    parallel_for((n + w - 1) / w, row_grain(w), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) body(start + r * w, n - r * w < w ? n - r * w : w);
    });
  }

  void column_apply(int64_t sample) {
    const Arrays arrays(width());
    fill(arrays, width(), sample, 0, s.channels, nullptr, 1);
    over_columns(sample, [&](int64_t at, int64_t n) {
      forward_run<T, true>(y + at, x + at, residual ? residual + at : nullptr, arrays.coefs(), act,
                           n, past_cache);
    });
  }

  void column_sums(int64_t sample) {
    const int64_t w = width();
    const Arrays arrays(w);
    fill(arrays, w, sample, 0, s.channels, nullptr, 1);
    parallel_for(sums.pieces, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> added(2 * (w + kPad));
      A *const one = added.data(), *const two = one + w + kPad;
      for (int64_t k = begin; k < end; ++k) {
        double* const partial = sums.partial(s, sample, k);
        for (int64_t c = 0; c < 2 * s.channels; ++c) partial[c] = 0;
        const Range rows = piece(k);
        const int64_t n = (rows.end - rows.begin) * period(), start = s.at(sample, rows.begin, 0);
        for (int64_t i = 0, since = 0; i < n; i += w) {
          const int64_t at = start + i;
          double unused[2] = {0, 0};
          sums_run<T, true>(dz ? dz + at : nullptr, dy + at, x + at,
                            residual ? residual + at : nullptr, arrays.coefs(), act,
                            n - i < w ? n - i : w, one, two, unused);
          if (++since < kRowTile && i + w < n) continue;
          since = 0;
          for (int64_t j = 0, c = 0; j < w; c = c + 1 == s.channels ? 0 : c + 1) {
            for (int64_t stop = j + s.inner; j < stop; ++j) {
              partial[c] += double{one[j]};
              partial[s.channels + c] += double{two[j]};
              one[j] = two[j] = 0;
            }
          }
        }
      }
    });
    double* const first = sums.totals + sample * s.channels;
    double* const second = first + s.samples * s.channels;
    for (int64_t c = 0; c < s.channels; ++c) {
      first[c] = second[c] = 0;
      for (int64_t k = 0; k < sums.pieces; ++k) {
        first[c] += sums.partial(s, sample, k)[c];
        second[c] += sums.partial(s, sample, k)[s.channels + c];
      }
    }
  }

  void column_dx(int64_t sample, const double* of_groups, double count) {
    const ActRuns<A> none{}, &run = dz ? none : act;
    const Arrays arrays(width());
    fill(arrays, width(), sample, 0, s.channels, of_groups, count);
    over_columns(sample, [&](int64_t at, int64_t n) {
      dx_run<T, true>(dx + at, before() + at, x + at, residual ? residual + at : nullptr,
                      arrays.coefs(), arrays.row(5), arrays.row(6), run, n, past_cache);
    });
  }

  // ---- passes

  // Calls body(sample, group) for all of them, in parallel.
  template <class Body>
  void over_units(const Body& body) {
    parallel_for(s.samples * s.groups, unit_grain(), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) body(k / s.groups, k % s.groups);
    });
  }

  void forward(bool find_moments, bool apply) {
    if (by_units()) {
      return over_units([&](int64_t sample, int64_t g) {
        if (find_moments) unit_moments(sample, g);
        if (apply) unit_apply(sample, g);
      });
    }
    for (int64_t sample = 0; sample < s.samples; ++sample) {
      if (find_moments) {
        parallel_for(sums.pieces, 1, [&](int64_t begin, int64_t end) {
          for (int64_t k = begin; k < end; ++k) column_moments(sample, k);
        });
        for (int64_t g = 0; g < s.groups; ++g) join_moments(sample, g);
      }
      if (apply) column_apply(sample);
    }
  }

  // The sums of a group, weighted: what its gradient has to lose.
  void group_sums(int64_t sample, int64_t g, const double* totals) {
    double* const to = sums.of_groups + 2 * (sample * s.groups + g);
    to[0] = to[1] = 0;
    for (int64_t c = g * s.per_group(); c < (g + 1) * s.per_group(); ++c) {
      const double w = weight ? double{weight[c]} : 1;
      to[0] += w * totals[sample * s.channels + c];
      to[1] += w * totals[(s.samples + sample) * s.channels + c];
    }
  }

  // With `find_sums` the totals are found, with `apply` dx follows from them (or from `totals`),
  // or from none where `count` is 0.
  void backward(bool find_sums, bool apply, const double* totals, double count) {
    const auto of_group = [&](int64_t sample, int64_t g) {
      if (count > 0) group_sums(sample, g, totals);
      return count > 0 ? sums.of_groups + 2 * (sample * s.groups + g) : nullptr;
    };
    if (by_units()) {
      return over_units([&](int64_t sample, int64_t g) {
        if (find_sums) unit_sums(sample, g);
        if (apply) unit_dx(sample, g, of_group(sample, g), count, past_cache);
      });
    }
    for (int64_t sample = 0; sample < s.samples; ++sample) {
      if (find_sums) column_sums(sample);
      if (!apply) continue;
      for (int64_t g = 0; g < s.groups; ++g) of_group(sample, g);
      column_dx(sample, count > 0 ? sums.of_groups + 2 * sample * s.groups : nullptr, count);
    }
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
