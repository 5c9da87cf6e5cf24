// CPU: batched products of matrices whose bits depend on the numbers alone. What a BLAS returns may
// depend on the number of threads and on where in memory the factors lie, which torch passes on.
#include <cstring>

#include "gemm.h"
#include "parallel.h"
#include "types.h"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

constexpr int64_t kTileRows = 96;           // rows of the result that share a copy of b
constexpr int64_t kPart = 256;              // terms that are added on their own
constexpr int64_t kProductGrain = 1 << 17;  // products worth waking a thread for

constexpr int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

// to (depth x kPanel) = the first `columns` columns of b, zeros past them.
template <class A>
void copy_panel(const A* b, int64_t row, int64_t column, int64_t depth, int64_t columns, A* to) {
  constexpr int64_t kTile = 16;
  if (columns < kPanel<A>) std::memset(to, 0, static_cast<size_t>(depth * kPanel<A>) * sizeof(A));
  if (column == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      std::memcpy(to + k * kPanel<A>, b + k * row, static_cast<size_t>(columns) * sizeof(A));
    }
    return;
  }
  for (int64_t begin = 0; begin < depth; begin += kTile) {
    const int64_t end = least(depth, begin + kTile);
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t k = begin; k < end; ++k) to[k * kPanel<A> + j] = b[k * row + j * column];
    }
  }
}

template <class A>
void multiply_all(const View& out, const View& a, const View& b) {
  if (out.numel == 0) return;
  const int64_t rows = out.sizes[1], columns = out.sizes[2], depth = a.sizes[2];
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t panels = (columns + kPanel<A> - 1) / kPanel<A>;
  const int64_t work = least(rows, kTileRows) * kPanel<A> * (depth + 1);
  const int64_t grain = 1 + kProductGrain / work;
  parallel_for(out.sizes[0] * row_tiles * panels, grain, [&](int64_t begin, int64_t end) {
    const Buffer<A> panel(kPart * kPanel<A>), sums(kTileRows * kPanel<A>);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t batch = unit / (row_tiles * panels), rest = unit % (row_tiles * panels);
      const int64_t i = rest / panels * kTileRows, j = rest % panels * kPanel<A>;
      const int64_t count = least(kTileRows, rows - i), width = least(kPanel<A>, columns - j);
      const Strided<A> left{static_cast<const A*>(a.data) + batch * a.strides[0] + i * a.strides[1],
                            a.strides[1], a.strides[2]};
      const A* right = static_cast<const A*>(b.data) + batch * b.strides[0] + j * b.strides[2];
      if (depth == 0) std::memset(sums.data(), 0, sizeof(A) * kTileRows * kPanel<A>);
      for (int64_t k = 0; k < depth; k += kPart) {
        const int64_t terms = least(kPart, depth - k);
        copy_panel(right + k * b.strides[1], b.strides[1], b.strides[2], terms, width,
                   panel.data());
        multiply(count, width, terms, left.from(0, k), panel.data(), kPanel<A>, sums.data(),
                 kPanel<A>, k > 0);
      }
      A* to = static_cast<A*>(out.data) + (batch * rows + i) * columns + j;
      for (int64_t r = 0; r < count; ++r) {
        std::memcpy(to + r * columns, sums.data() + r * kPanel<A>,
                    static_cast<size_t>(width) * sizeof(A));
      }
    }
  });
}

// out (batch, M, N), dense, = a (batch, M, K) b (batch, K, N), of any strides.
void product(Out out, View a, View b) {
  const bool right = out.ndim == 3 && a.ndim == 3 && b.ndim == 3 && a.sizes[0] == out.sizes[0] &&
                     b.sizes[0] == out.sizes[0] && a.sizes[1] == out.sizes[1] &&
                     b.sizes[2] == out.sizes[2] && a.sizes[2] == b.sizes[1];
  if (!right) fail("product: wants (batch, M, N), (batch, M, K) and (batch, K, N)");
  if (a.dtype != out.dtype || b.dtype != out.dtype) fail("product: wants tensors of one dtype");
  int64_t stride = 1;
  for (int d = 2; d >= 0; --d) {
    if (out.numel > 0 && out.sizes[d] > 1 && out.strides[d] != stride) {
      fail("product: wants dense memory for the result");
    }
    stride *= out.sizes[d];
  }
  if (out.dtype == DType::f32) return multiply_all<float>(out, a, b);
  if (out.dtype == DType::f64) return multiply_all<double>(out, a, b);
  fail("product: wants float32 or float64 tensors");
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;
EXPORT(cpu, product, "out, a, b", product)
