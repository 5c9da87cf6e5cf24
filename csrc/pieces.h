// How (outer, channels, inner) is cut into the pieces that are summed on their own: first along the
// outer dimension, then along the inner one where the outer has too few.
#pragma once

#include "cuda.h"
#include "registry.h"

namespace pydl {
inline namespace PYDL_ISA {

struct Range {
  int64_t begin, end;
};

struct Pieces {
  int64_t outer_size, channels, inner_size, outer_pieces, inner_pieces;

  PYDL_HD static Range share(int64_t n, int64_t parts, int64_t part) {
    return {n * part / parts, n * (part + 1) / parts};
  }
  PYDL_HD Range outer(int64_t piece) const {
    return share(outer_size, outer_pieces, piece / inner_pieces);
  }
  PYDL_HD Range inner(int64_t piece) const {
    return share(inner_size, inner_pieces, piece % inner_pieces);
  }
  int64_t count() const { return outer_pieces * inner_pieces; }

  static Pieces of(const char* op, const View& x, const View& parameter, const View& total,
                   const View& partials) {
    if (x.ndim != 3) fail("%s: wants (outer, channels, inner), got %d dimensions", op, x.ndim);
    Pieces p{x.sizes[0], x.sizes[1], x.sizes[2], 1, 1};
    if (parameter.numel != p.channels || total.numel != p.channels || partials.ndim != 2 ||
        partials.sizes[1] != p.channels || partials.sizes[0] < 1 || partials.dtype != DType::f64) {
      fail("%s: wants %lld parameters and sums, and float64 partials of (pieces, %lld)", op,
           static_cast<long long>(p.channels), static_cast<long long>(p.channels));
    }
    p.cut(partials.sizes[0]);
    return p;
  }
  // Into `most` pieces at most, and one at least.
  void cut(int64_t most) {
    outer_pieces = outer_size < most ? (outer_size > 0 ? outer_size : 1) : most;
    const int64_t left = most / outer_pieces, runs = inner_size / 4096;
    inner_pieces = runs < left ? (runs > 0 ? runs : 1) : left;
  }
};

}  // namespace PYDL_ISA
}  // namespace pydl
