// How CUDA kernels walk over the channels of (samples, outer, channels, inner), 16 bytes at a time
// where memory allows, and how a block adds up what its threads found.
#pragma once

#include "channel_norm.h"
#include "rowwise.cuh"

namespace pydl {
inline namespace PYDL_ISA {

// A thread's part. With kColumns (inner is 1) the 32 threads of a warp have packs of neighbouring
// channels, and the eight warps every eighth row; else a block has one channel.
template <int kPack, bool kColumns>
struct Span {
  const Normed& s;
  int64_t sample, channel, piece;
  bool inside;
  Range rows, packs;

  // Grid: (samples x blocks of channels, pieces).
  PYDL_DEVICE Span(const Normed& shape, const Pieces& pieces) : s(shape), piece(blockIdx.y) {
    const int64_t blocks = blocks_of(shape.channels);
    sample = blockIdx.x / blocks;
    channel = blockIdx.x % blocks;
    if constexpr (kColumns) channel = (channel * kWarp + threadIdx.x) * kPack;
    inside = channel < shape.channels;
    rows = pieces.outer(piece);
    packs = Pieces::share(shape.inner / kPack, pieces.inner_pieces, piece % pieces.inner_pieces);
  }
  PYDL_HD static int64_t blocks_of(int64_t channels) {
    constexpr int64_t kEach = kWarp * kPack;
    return kColumns ? (channels + kEach - 1) / kEach : channels;
  }
  // body(offset) for every pack.
  template <class Body>
  PYDL_DEVICE void each(const Body& body) const {
    if (!inside) return;
    for (int64_t r = rows.begin + threadIdx.y; r < rows.end; r += blockDim.y) {
      const int64_t start = s.at(sample, r, channel);
      if constexpr (kColumns) {
        body(start);
      } else {
        for (int64_t i = packs.begin + threadIdx.x; i < packs.end; i += blockDim.x) {
          body(start + i * kPack);
        }
      }
    }
  }
  // The channel of a pack's element.
  PYDL_DEVICE int64_t of(int j) const { return kColumns ? channel + j : channel; }
  PYDL_DEVICE int64_t group(int j) const {
    // Channels are fewer than 2^31: a division of 32 bits is a few instructions.
    return sample * s.groups + static_cast<uint32_t>(of(j)) / static_cast<uint32_t>(s.per_group());
  }

  // Threads of a block: 256, along a run and over rows.
  static dim3 block(const Normed& shape) {
    unsigned along = kWarp;
    while (!kColumns && along < kThreads && along * kPack < shape.inner) along *= 2;
    return dim3(along, kThreads / along);
  }
  static dim3 grid(const Normed& shape, int64_t pieces) {
    return dim3(static_cast<unsigned>(shape.samples * blocks_of(shape.channels)),
                static_cast<unsigned>(pieces));
  }
};

// The sum over a block's threads, for all of them, in a fixed order; with kColumns over those of
// the same channels, one in each warp.
template <bool kColumns>
PYDL_DEVICE double sum_threads(double value) {
  __shared__ double shared[kRows][kColumns ? kWarp : 1];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int lane = kColumns ? thread % kWarp : 0, warp = thread / kWarp;
  if constexpr (!kColumns) {
    for (int half = kWarp / 2; half > 0; half /= 2)
      value += __shfl_xor_sync(0xffffffffu, value, half);
  }
  __syncthreads();  // the sums before may still be read
  if (kColumns || thread % kWarp == 0) shared[warp][lane] = value;
  __syncthreads();
  double total = 0;
  for (int k = 0; k < kRows; ++k) total += shared[k][lane];
  return total;
}

PYDL_DEVICE double sum_warp(double value) {
  for (int half = kWarp / 2; half > 0; half /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, half);
  return value;
}

}  // namespace PYDL_ISA
}  // namespace pydl
