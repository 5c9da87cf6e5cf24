// The loop nest over tensors of one shape, in as few dimensions as their strides allow.
#pragma once

#include "registry.h"

namespace pydl {
inline namespace PYDL_ISA {

constexpr int kMaxDims = 12;

// Strides count elements. The last dimension is the innermost; the first operand decides the order.
template <int N>
struct Loop {
  int ndim;
  int64_t numel;
  int64_t sizes[kMaxDims];
  int64_t strides[N][kMaxDims];
  void* data[N];

  // Every operand is one run of memory.
  bool flat() const {
    if (ndim != 1) return false;
    for (int i = 0; i < N; ++i) {
      if (strides[i][0] != 1) return false;
    }
    return true;
  }
};

template <int N>
inline Loop<N> collapse(const char* op, const View* const (&views)[N]) {
  Loop<N> loop{};
  const View& first = *views[0];
  for (int i = 0; i < N; ++i) {
    loop.data[i] = views[i]->data;
    bool same = views[i]->ndim == first.ndim && views[i]->dtype == first.dtype;
    for (int d = 0; same && d < first.ndim; ++d) same = views[i]->sizes[d] == first.sizes[d];
    if (!same) fail("%s: tensor %d differs from tensor 0 in shape or dtype", op, i);
  }
  loop.numel = first.numel;
  // Insertion sort by the first operand's strides, largest outermost; dimensions of size 1 drop
  // out.
  constexpr int kTorchDims = 64;
  int order[kTorchDims], count = 0;
  if (first.ndim > kTorchDims)
    fail("%s: tensors have %d dimensions, at most 64 work", op, first.ndim);
  for (int d = 0; d < first.ndim; ++d) {
    if (first.sizes[d] == 1) continue;
    int at = count++;
    for (; at > 0 && first.strides[order[at - 1]] < first.strides[d]; --at)
      order[at] = order[at - 1];
    order[at] = d;
  }
  int n = 0;
  for (int k = 0; k < count; ++k) {
    const int d = order[k];
    bool merges = n > 0;
    for (int i = 0; merges && i < N; ++i) {
      merges = loop.strides[i][n - 1] == views[i]->strides[d] * first.sizes[d];
    }
    if (!merges && n == kMaxDims) fail("%s: strides need more than %d dimensions", op, kMaxDims);
    if (merges) {
      loop.sizes[n - 1] *= first.sizes[d];
    } else {
      loop.sizes[n++] = first.sizes[d];
    }
    for (int i = 0; i < N; ++i) loop.strides[i][n - 1] = views[i]->strides[d];
  }
  if (n == 0) {
    loop.sizes[0] = 1;
    for (int i = 0; i < N; ++i) loop.strides[i][0] = 1;
    n = 1;
  }
  loop.ndim = n;
  return loop;
}

}  // namespace PYDL_ISA
}  // namespace pydl
