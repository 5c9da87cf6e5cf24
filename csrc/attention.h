// What an attention call is, for the CPU's and CUDA's kernels alike: tensors by their strides,
// which keys a query sees, and what is added to a score.
//
// Scores are s = softcap(scale q k) + mask + relative, weights p = softmax(s) over the keys that
// are seen, and the output is sum p v with dropout of p. A query that sees no key has output 0.
#pragma once

#include <initializer_list>

#include "philox.h"

namespace pydl {
inline namespace PYDL_ISA {

// (batch, heads, rows, columns); a stride of 0 repeats.
struct Quad {
  void* data = nullptr;
  DType dtype = DType::none;
  int64_t sizes[4] = {}, strides[4] = {};

  static Quad of(const char* op, const char* name, const View& view) {
    Quad q;
    if (view.dtype == DType::none || (view.ndim != 4 && view.numel == 0)) return q;
    if (view.ndim != 4) fail("%s: %s has %d dimensions, wants 4", op, name, view.ndim);
    q.data = view.data;
    q.dtype = view.dtype;
    for (int d = 0; d < 4; ++d) {
      q.sizes[d] = view.sizes[d];
      q.strides[d] = view.sizes[d] == 1 ? 0 : view.strides[d];
    }
    if (view.numel == 0) q.strides[3] = 1;
    return q;
  }
  PYDL_HD bool present() const { return data != nullptr; }
  PYDL_HD int64_t at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return b * strides[0] + h * strides[1] + i * strides[2] + j * strides[3];
  }
};

struct Range64 {
  int64_t begin, end;
  PYDL_HD bool empty() const { return begin >= end; }
};

struct Attention {
  int64_t batch, heads, kv_heads, queries, keys, width, value_width;
  Quad q, k, v, mask, relative;          // relative: (1, heads, 1, left + 1 + right)
  const int64_t *offsets_q, *offsets_k;  // packed sequences: where each begins, and the last ends
  double scale, softcap;                 // a softcap of 0 is none
  int64_t left, right;                   // keys seen before and after a query's own; -1: all
  bool bottom;                           // the last query's own key is the last one, not the first
  Dropout dropout;
  bool drops;

  PYDL_HD int64_t kv_head(int64_t h) const { return h / (heads / kv_heads); }
  PYDL_HD bool packed() const { return offsets_q != nullptr; }

  // Sequence b: where its queries and keys begin, and how many there are.
  struct Sequence {
    int64_t b, first_q, first_k, queries, keys, shift;
  };
  PYDL_HD Sequence sequence(int64_t b) const {
    Sequence s{b, 0, 0, queries, keys, 0};
    if (packed()) {
      s = {0,
           offsets_q[b],
           offsets_k[b],
           offsets_q[b + 1] - offsets_q[b],
           offsets_k[b + 1] - offsets_k[b],
           0};
    }
    if (bottom) s.shift = s.keys - s.queries;
    return s;
  }
  // The keys that query i sees, as far as the window tells.
  PYDL_HD Range64 seen(const Sequence& s, int64_t i) const {
    const int64_t own = i + s.shift;
    int64_t begin = left < 0 ? 0 : own - left, end = right < 0 ? s.keys : own + right + 1;
    begin = begin < 0 ? 0 : begin;
    end = end > s.keys ? s.keys : end;
    return {begin, end < begin ? begin : end};
  }
  // The queries that see key j.
  PYDL_HD Range64 seeing(const Sequence& s, int64_t j) const {
    const int64_t own = j - s.shift;
    int64_t begin = right < 0 ? 0 : own - right, end = left < 0 ? s.queries : own + left + 1;
    begin = begin < 0 ? 0 : begin;
    end = end > s.queries ? s.queries : end;
    return {begin, end < begin ? begin : end};
  }
  // Where dropout's draw for (b, h, i, j) stands.
  PYDL_HD int64_t draw(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return ((b * heads + h) * queries + i) * keys + j;
  }
};

// The arguments of a call that are no outputs.
struct AttentionArgs {
  const View *q, *k, *v, *mask, *relative, *offsets_q, *offsets_k, *seed;
  int64_t longest_q, longest_k;
  double scale, softcap;
  int64_t left, right;
  bool bottom;
  double dropout_p;
};

inline Attention attention_of(const char* op, const AttentionArgs& args) {
  Attention a{};
  a.q = Quad::of(op, "query", *args.q);
  a.k = Quad::of(op, "key", *args.k);
  a.v = Quad::of(op, "value", *args.v);
  a.mask = Quad::of(op, "mask", *args.mask);
  a.relative = Quad::of(op, "relative", *args.relative);
  if (args.q->ndim != 4 || args.k->ndim != 4 || args.v->ndim != 4) {
    fail("%s: wants query, key and value of 4 dimensions", op);
  }
  for (const View* view : {args.q, args.k, args.v}) {
    if (view->dtype != args.q->dtype) fail("%s: wants query, key and value of one dtype", op);
    if (view->strides[3] != 1 && view->sizes[3] > 1 && view->numel > 0) {
      fail("%s: wants neighbouring elements in the last dimension", op);
    }
  }
  a.batch = args.q->sizes[0];
  a.heads = args.q->sizes[1];
  a.queries = args.q->sizes[2];
  a.width = args.q->sizes[3];
  a.kv_heads = args.k->sizes[1];
  a.keys = args.k->sizes[2];
  a.value_width = args.v->sizes[3];
  const bool fits = args.k->sizes[0] == a.batch && args.v->sizes[0] == a.batch &&
                    args.v->sizes[1] == a.kv_heads && args.v->sizes[2] == a.keys &&
                    args.k->sizes[3] == a.width;
  if (!fits || (a.kv_heads > 0 ? a.heads % a.kv_heads != 0 : a.heads != 0)) {
    fail(
        "%s: wants key (batch, kv heads, keys, width) and value (batch, kv heads, keys, value "
        "width) that fit a query of (%lld, %lld, %lld, %lld)",
        op, static_cast<long long>(a.batch), static_cast<long long>(a.heads),
        static_cast<long long>(a.queries), static_cast<long long>(a.width));
  }
  if (args.offsets_q->dtype != DType::none) {
    const int64_t count = args.offsets_q->numel;
    if (a.batch != 1 || count < 1 || args.offsets_k->numel != count ||
        args.offsets_q->dtype != DType::i64 || args.offsets_k->dtype != DType::i64) {
      fail("%s: wants offsets of int64, alike for queries and keys, and a batch of 1", op);
    }
    a.offsets_q = static_cast<const int64_t*>(args.offsets_q->data);
    a.offsets_k = static_cast<const int64_t*>(args.offsets_k->data);
    a.batch = count - 1;
    a.queries = args.longest_q;
    a.keys = args.longest_k;
  }
  if (a.mask.present()) {
    const int64_t wanted[4] = {a.batch, a.heads, a.queries, a.keys};
    for (int d = 0; d < 4; ++d) {
      if (a.mask.sizes[d] != 1 && a.mask.sizes[d] != wanted[d]) {
        fail("%s: mask has size %lld in dimension %d, wants 1 or %lld", op,
             static_cast<long long>(a.mask.sizes[d]), d, static_cast<long long>(wanted[d]));
      }
    }
  }
  a.scale = args.scale;
  a.softcap = args.softcap;
  a.left = args.left;
  a.right = args.right;
  a.bottom = args.bottom;
  if (a.relative.present() && (a.left < 0 || a.right < 0 || a.relative.sizes[1] != a.heads ||
                               a.relative.sizes[3] != a.left + 1 + a.right)) {
    fail("%s: relative wants (1, heads, 1, left + 1 + right) and a window", op);
  }
  a.dropout = dropout_of(op, *args.seed, args.dropout_p);
  a.drops = args.dropout_p > 0;
  return a;
}

}  // namespace PYDL_ISA
}  // namespace pydl
