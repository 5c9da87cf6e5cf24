// CPU: the passes over columns: rows of all channels, repeated to be wide, in pieces.
#pragma once

#include "channel_engine.h"

namespace pydl {
inline namespace PYDL_ISA {

template <class T>
void Engine<T>::column_moments(int64_t sample, int64_t k) const {
  const int64_t w = width();
  const Range rows = piece(k);
  const T* from = x + s.at(sample, rows.begin, 0);
  const int64_t n = (rows.end - rows.begin) * period(), full = n / w;
  const Scratch<W> spread(2 * w);
  W *const means = spread.data(), *const squares = means + w;
  for (int64_t r = 0; r < full; r += kTileRows) {
    const int64_t height = full - r < kTileRows ? full - r : kTileRows;
    for (int64_t c = 0; c < w; c += kWide) {
      tile_moments(from + r * w + c, w, height, w - c < kWide ? w - c : kWide, r,
                   x + s.at(sample, 0, 0) + c, means + c, squares + c);
    }
  }
  double* const partial = sums.partial(s, sample, k);
  for (int64_t c = 0; c < s.channels; ++c) {
    // A position's mean is relative to its first row.
    const W start = base(sample, c / s.per_group());
    const auto shifted = [&](int64_t i) { return to_float(x[s.at(sample, 0, 0) + i]) - start; };
    const auto each = [&](int64_t begin, int64_t end, const auto& body) {
      for (int64_t at = begin + c * s.inner; at < end; at += period()) {
        for (int64_t i = at; i < at + s.inner; ++i) body(i);
      }
    };
    const W height = static_cast<W>(full), times = static_cast<W>(w / s.channels);
    Spread<W> total{height * times, 0, 0};
    each(0, w, [&](int64_t i) { total.mean += shifted(i) + means[i]; });
    total.mean /= times;
    each(0, w, [&](int64_t i) {
      const W d = shifted(i) + means[i] - total.mean;
      total.squares += squares[i] + height * d * d;
    });
    each(full * w, n, [&](int64_t i) { total.add({1, to_float(from[i]) - start, 0}); });
    partial[c] = static_cast<double>(total.mean);
    partial[s.channels + c] = static_cast<double>(total.squares);
  }
}

template <class T>
__attribute__((noinline)) void Engine<T>::tile_moments(const T* from, int64_t stride,
                                                       int64_t height, int64_t n, int64_t before,
                                                       const T* bases, W* means, W* squares) {
  alignas(64) A shift[kWide + kPad], first[kWide + kPad] = {}, second[kWide + kPad] = {};
  constexpr int64_t kWidth = Lanes<T>::count;
  const auto over = [&](const auto& body) {
    for (int64_t i = 0; i < n; i += kWidth) body(i, n - i < kWidth ? n - i : kWidth);
  };
  over([&](int64_t i, int64_t) { store_as(shift + i, splat<V>(0)); });
  for (int64_t r = 0; r < height; ++r) {
    over([&](int64_t i, int64_t count) {
      prefetch(from + (r + 1) * stride + i);
      store_as(shift + i, load_as<V>(shift + i) + load_some(from + r * stride + i, count));
    });
  }
  const V part = splat<V>(1.0 / static_cast<double>(height));
  over([&](int64_t i, int64_t) { store_as(shift + i, load_as<V>(shift + i) * part); });
  for (int64_t r = 0; r < height; ++r) {
    over([&](int64_t i, int64_t count) {
      const V d = load_some(from + r * stride + i, count) - load_as<V>(shift + i);
      store_as(first + i, load_as<V>(first + i) + d);
      store_as(second + i, load_as<V>(second + i) + d * d);
    });
  }
  const auto old = static_cast<W>(before), now = static_cast<W>(height);
  const W share = now / (old + now), both = old * share, each = 1 / now;
  for (int64_t i = 0; i < n; ++i) {
    const W left = W{first[i]} * each;
    const W middle = (W{shift[i]} - W{to_float(bases[i])}) + left;
    const W spread = W{second[i]} - left * W{first[i]}, d = middle - means[i];
    means[i] += d * share;
    squares[i] += (spread < 0 ? 0 : spread) + d * d * both;
  }
}

template <class T>
void Engine<T>::join_moments(int64_t sample, int64_t g) {
  Spread<W> total{static_cast<W>(s.count()), 0, 0};
  const auto each = [&](const auto& body) {
    for (int64_t k = 0; k < sums.pieces; ++k) {
      const double* partial = sums.partial(s, sample, k);
      const W count = static_cast<W>((piece(k).end - piece(k).begin) * s.inner);
      for (int64_t c = g * s.per_group(); c < (g + 1) * s.per_group(); ++c) {
        body(count, W{partial[c]}, W{partial[s.channels + c]});
      }
    }
  };
  each([&](W count, W middle, W) { total.mean += count * middle; });
  total.mean /= total.count;
  each([&](W count, W middle, W squares) {
    total.squares += squares + count * (middle - total.mean) * (middle - total.mean);
  });
  set_moments(sample, g, total);
}

template <class T>
void Engine<T>::column_apply(int64_t sample) const {
  const Columns columns(*this, sample, nullptr, 1, true);
  over_columns(sample, [&](int64_t at, int64_t n) {
    forward_run<T, kColumn>(y + at, x + at, residual_at(at), columns.coefs(), act, n, past_cache);
  });
}

template <class T>
void Engine<T>::column_sums(int64_t sample) const {
  const int64_t w = width();
  const Columns columns(*this, sample, nullptr, 1);
  parallel_for(sums.pieces, 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> added(2 * (w + kPad));
    const Scratch<double> tile(2 * s.channels);
    Added<A> to{added.data(), added.data() + w + kPad, {0, 0}};
    for (int64_t k = begin; k < end; ++k) {
      double* const partial = sums.partial(s, sample, k);
      for (int64_t c = 0; c < 2 * s.channels; ++c) partial[c] = 0;
      const Range rows = piece(k);
      const int64_t n = (rows.end - rows.begin) * period(), start = s.at(sample, rows.begin, 0);
      for (int64_t i = 0; i < n; i += kRowTile * w) {
        const int64_t at = start + i, left = n - i,
                      full = left / w < kRowTile ? left / w : kRowTile;
        const auto add = [&](int64_t from, const Runs& runs) {
          sums_runs<T, kColumn>(dz ? dz + from : nullptr, dy + from, x + from, residual_at(from),
                                columns.coefs(), act, runs, to);
        };
        add(at, Runs{full, w, w});
        if (full < kRowTile) add(at + full * w, Runs{1, w, left - full * w});
        fold(to, w, tile.data(), tile.data() + s.channels, s.channels);
        for (int64_t c = 0; c < 2 * s.channels; ++c) partial[c] += tile.data()[c];
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

template <class T>
void Engine<T>::column_dx(int64_t sample, const double* of_groups, double count) const {
  const ActRuns<A> run = act_before();
  const Columns columns(*this, sample, of_groups, count);
  over_columns(sample, [&](int64_t at, int64_t n) {
    dx_run<T, kColumn>(dx + at, before() + at, x + at, residual_at(at), columns.coefs(), run, n,
                       past_cache);
  });
}

}  // namespace PYDL_ISA
}  // namespace pydl
