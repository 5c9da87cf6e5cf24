// CPU: batched products of matrices whose bits depend on the numbers alone. What a BLAS returns may
// depend on the number of threads and on where in memory the factors lie, which torch passes on.
//
// A thread computes a tile of the result: a part of the depth at a time it copies what the tile
// needs of both factors to its own cache, in the order of reading (Goto and van de Geijn 2008, doi
// 10.1145/1356052.1356053). Parts are cut by the depth alone, so that every sum is added alike.
#include <cstring>

#include "parallel.h"
#include "transpose.h"
#include "types.h"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

constexpr int64_t kTileRows = 192;          // of the result, a multiple of a block's
constexpr int64_t kTileColumns = 256;       // a multiple of a panel's
constexpr int64_t kPart = 256;              // terms that are added on their own
constexpr int64_t kUnits = 8;               // tiles wanted, for threads to share
constexpr int64_t kProductGrain = 1 << 17;  // products worth waking a thread for

constexpr int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
constexpr int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// to (rows x columns) = the matrix, rows padded with zeros to a register's lanes.
template <class A>
void copy_matrix(const Strided<A>& from, int64_t rows, int64_t columns, A* to, int64_t to_row) {
  constexpr int64_t kWidth = Register<A>::lanes;
  if (from.column == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      const A* const line = from.data + i * from.row;
      for (int64_t k = 0; k < columns; k += kWidth) {
        store(to + i * to_row + k, load_some(line + k, least(kWidth, columns - k)));
      }
    }
    return;
  }
  if (from.row == 1) {
    return transpose<A, false>(from.data, from.column, columns, rows, to, to_row);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < padded<A>(columns); ++k) {
      to[i * to_row + k] = k < columns ? from.data[i * from.row + k * from.column] : A(0);
    }
  }
}

// How the result is cut into tiles.
struct Tiles {
  int64_t rows, columns;
};
template <class A>
Tiles tiles(int64_t batch, int64_t rows, int64_t columns) {
  Tiles tile{kTileRows, kTileColumns};
  const auto count = [&] {
    return batch * pieces(rows, tile.rows) * pieces(columns, tile.columns);
  };
  while (count() < kUnits && (tile.rows > 48 || tile.columns > kPanel<A>)) {
    const bool wide = tile.columns > kPanel<A> && (columns > rows || tile.rows <= 48);
    (wide ? tile.columns : tile.rows) /= 2;
  }
  // Of about one height, so that threads are busy alike.
  const int64_t height = pieces(rows, pieces(rows, tile.rows));
  tile.rows = pieces(height, kBlockRows<A>) * kBlockRows<A>;
  return tile;
}

// Where a thread copies to and adds up; kept for its next call.
template <class A>
struct Room {
  Buffer<A> left{kTileRows * kPart}, right{kPart * kTileColumns}, sums{kTileRows * kTileColumns};
};

// A matrix of each of a batch; a view of two dimensions is a batch of one.
template <class A>
struct Batched {
  A* data;
  int64_t batch, row, column;
  explicit Batched(const View& x)
      : data(static_cast<A*>(x.data)),
        batch(x.ndim == 3 ? x.strides[0] : 0),
        row(x.strides[x.ndim - 2]),
        column(x.strides[x.ndim - 1]) {}
  Strided<A> from(int64_t n, int64_t i, int64_t j) const {
    return {data + n * batch + i * row + j * column, row, column};
  }
};

// sums (height x width) = the product of as many rows and columns.
template <class A>
void add_up(int64_t height, int64_t width, int64_t depth, const Strided<A>& a, const Strided<A>& b,
            Room<A>& room) {
  if (depth == 0) std::memset(room.sums.data(), 0, sizeof(A) * kTileRows * kTileColumns);
  for (int64_t k = 0; k < depth; k += kPart) {
    const int64_t terms = least(kPart, depth - k);
    Strided<A> rows = a.from(0, k);
    // Rows that are a power of two apart share a few places of the cache.
    if (rows.column != 1 || rows.row % 256 == 0) {
      copy_matrix(rows, height, terms, room.left.data(), kPart);
      rows = {room.left.data(), kPart, 1};
    }
    for (int64_t j = 0; j < width; j += kPanel<A>) {
      const int64_t columns = least(kPanel<A>, width - j);
      A* const panel = room.right.data() + j * kPart;
      copy_matrix(b.from(k, j), terms, columns, panel, kPanel<A>);
      multiply(height, columns, terms, rows, panel, kPanel<A>, room.sums.data() + j, kTileColumns,
               k > 0);
    }
  }
}

template <class A>
void multiply_all(const View& out, const View& a, const View& b, const Maybe& bias) {
  constexpr int64_t kWidth = Register<A>::lanes;
  if (out.numel == 0) return;
  const int64_t rows = out.sizes[out.ndim - 2], columns = out.sizes[out.ndim - 1];
  const int64_t batches = out.numel / (rows * columns), depth = a.sizes[a.ndim - 1];
  const Tiles tile = tiles<A>(batches, rows, columns);
  const int64_t down = pieces(rows, tile.rows), across = pieces(columns, tile.columns);
  const int64_t work = least(rows, tile.rows) * least(columns, tile.columns) * (depth + 1);
  const Batched<A> to(out), first(a), second(b);
  const A* const extra = static_cast<const A*>(bias.data);
  const int64_t grain = 1 + kProductGrain / work;
  parallel_for(batches * down * across, grain, [&](int64_t begin, int64_t end) {
    thread_local Room<A> room;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / (down * across), rest = unit % (down * across);
      const int64_t i = rest / across * tile.rows, j = rest % across * tile.columns;
      const int64_t height = least(tile.rows, rows - i), width = least(tile.columns, columns - j);
      add_up(height, width, depth, first.from(n, i, 0), second.from(n, 0, j), room);
      for (int64_t r = 0; r < height; ++r) {
        A* const line = to.data + (n * rows + i + r) * columns + j;
        const A* const sum = room.sums.data() + r * kTileColumns;
        for (int64_t c = 0; c < width; c += kWidth) {
          const int64_t count = least(kWidth, width - c);
          auto x = load(sum + c);
          if (extra) x += load_some(extra + j + c, count);
          store_some(line + c, x, count);
        }
      }
    }
  });
}

// out (batch, M, N), dense, = a (batch, M, K) b (batch, K, N), of any strides, + bias (N), dense;
// all without a batch, or with one.
void product(Out out, View a, View b, Maybe bias) {
  const int n = out.ndim;
  const bool right = (n == 2 || n == 3) && a.ndim == n && b.ndim == n &&
                     (n == 2 || (a.sizes[0] == out.sizes[0] && b.sizes[0] == out.sizes[0])) &&
                     a.sizes[n - 2] == out.sizes[n - 2] && b.sizes[n - 1] == out.sizes[n - 1] &&
                     a.sizes[n - 1] == b.sizes[n - 2];
  if (!right) fail("product: wants (batch, M, N), (batch, M, K) and (batch, K, N)");
  if (a.dtype != out.dtype || b.dtype != out.dtype || (bias.data && bias.dtype != out.dtype)) {
    fail("product: wants tensors of one dtype");
  }
  if (bias.data && (bias.ndim != 1 || bias.numel != out.sizes[n - 1] ||
                    (bias.numel > 1 && bias.strides[0] != 1))) {
    fail("product: wants a dense bias of (N)");
  }
  int64_t stride = 1;
  for (int d = n - 1; d >= 0; --d) {
    if (out.numel > 0 && out.sizes[d] > 1 && out.strides[d] != stride) {
      fail("product: wants dense memory for the result");
    }
    stride *= out.sizes[d];
  }
  if (out.dtype == DType::f32) return multiply_all<float>(out, a, b, bias);
  if (out.dtype == DType::f64) return multiply_all<double>(out, a, b, bias);
  fail("product: wants float32 or float64 tensors");
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;
EXPORT(cpu, product, "out, a, b, bias", product)
