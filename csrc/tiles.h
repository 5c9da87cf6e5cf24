// CPU: products of bf16 numbers by tile registers, AMX-TILE and AMX-BF16 (Intel's manual, volume 2:
// TDPBF16PS): eight registers of 16 rows of 64 bytes, a product of two of which is added to a third
// by one instruction, in fp32. A program asks the system for them once, and a thread sets them up.
#pragma once

#include "vec.h"

namespace pydl {

// 0: none; 1: the processor's; 2: what stands for them, for tests.
extern int tile_mode;

inline namespace PYDL_ISA {

constexpr int64_t kTileRows = 16, kTileTerms = 32, kTileColumns = 16;

#if PYDL_LEVEL == 2

struct Tiles {
  static void set_up() {
    // Palette 1; bytes of a row at 16, rows at 48, of each register.
    alignas(64) uint8_t shape[64] = {1};
    for (int i = 0; i < 8; ++i) {
      shape[16 + 2 * i] = 64;
      shape[48 + i] = kTileRows;
    }
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  static void give_back() { asm volatile("tilerelease" : : : "memory"); }

  template <int kTo>
  PYDL_HD void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTo));
  }
  template <int kTo>
  PYDL_HD void load(const void* from, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
                 :
                 : "r"(from), "r"(row_bytes), "i"(kTo)
                 : "memory");
  }
  template <int kFrom>
  PYDL_HD void store(void* to, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
                 :
                 : "r"(to), "r"(row_bytes), "i"(kFrom)
                 : "memory");
  }
  template <int kTo, int kLeft, int kRight>
  PYDL_HD void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kTo), "i"(kLeft), "i"(kRight));
  }
};

// The same to the last places (the processor takes numbers too small for fp32's exponent as 0).
struct StandInTiles {
  alignas(64) uint8_t registers[8][kTileRows][64];

  template <int kTo>
  void zero() {
    std::memset(registers[kTo], 0, sizeof registers[kTo]);
  }
  template <int kTo>
  void load(const void* from, int64_t row_bytes) {
    for (int r = 0; r < kTileRows; ++r) {
      std::memcpy(registers[kTo][r], static_cast<const uint8_t*>(from) + r * row_bytes, 64);
    }
  }
  template <int kFrom>
  void store(void* to, int64_t row_bytes) {
    for (int r = 0; r < kTileRows; ++r) {
      std::memcpy(static_cast<uint8_t*>(to) + r * row_bytes, registers[kFrom][r], 64);
    }
  }
  // A row of the right register is of two terms that lie side by side; their sums meet at the end.
  template <int kTo, int kLeft, int kRight>
  void dot() {
    constexpr uint32_t kUpper = 0xffff0000u;
    for (int r = 0; r < kTileRows; ++r) {
      vfloat first{}, second{};
      for (int k = 0; k < kTileTerms / 2; ++k) {
        uint32_t pair;
        std::memcpy(&pair, registers[kLeft][r] + 4 * k, 4);
        const vuint left = pair - vuint{};
        const vuint right = *reinterpret_cast<const vuint_any*>(registers[kRight][k]);
        first += (vfloat)(left << 16) * (vfloat)(right << 16);
        second += (vfloat)(left & kUpper) * (vfloat)(right & kUpper);
      }
      float* const to = reinterpret_cast<float*>(registers[kTo][r]);
      pydl::store(to, pydl::load(to) + (first + second));
    }
  }
};

// Calls body with the constants 0 to kCount - 1.
template <int kCount, class Body>
PYDL_HD void times(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (body(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// c (kRows x kColumns registers) = a b, added to c where `add`.
template <class Registers, int kRows, int kColumns>
void tile_block(int64_t depth, const bfloat16* a, int64_t a_row, const bfloat16* b, int64_t b_row,
                float* c, int64_t c_row, bool add) {
  constexpr int kLeft = 4, kRight = 6;
  Registers tiles;
  const auto each_sum = [&](const auto& body) {
    times<kRows>([&](auto i) {
      times<kColumns>([&](auto j) { body(i, j, c + i * kTileRows * c_row + j * kTileColumns); });
    });
  };
  each_sum([&](auto i, auto j, float* at) {
    if (add) {
      tiles.template load<i * kColumns + j>(at, c_row * 4);
    } else {
      tiles.template zero<i * kColumns + j>();
    }
  });
  for (int64_t k = 0; k < depth; k += kTileTerms) {
    times<kRows>(
        [&](auto i) { tiles.template load<kLeft + i>(a + i * kTileRows * a_row + k, a_row * 2); });
    times<kColumns>([&](auto j) {
      tiles.template load<kRight + j>(b + k / 2 * b_row + 2 * j * kTileColumns, b_row * 2);
    });
    each_sum([&](auto i, auto j, float*) {
      tiles.template dot<i * kColumns + j, kLeft + i, kRight + j>();
    });
  }
  each_sum(
      [&](auto i, auto j, float* at) { tiles.template store<i * kColumns + j>(at, c_row * 4); });
}

// c (rows x columns) = a b, added to c where `add`; `rows` and `depth` are multiples of a
// register's, `columns` are rounded up to one. b_row is from two terms of b to the next two.
template <class Registers>
void tile_products(int64_t rows, int64_t columns, int64_t depth, const bfloat16* a, int64_t a_row,
                   const bfloat16* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  for (int64_t i = 0; i < rows; i += 2 * kTileRows) {
    const bool two = rows - i > kTileRows;
    for (int64_t j = 0; j < columns; j += 2 * kTileColumns) {
      const bool wide = columns - j > kTileColumns;
      const auto block = two    ? wide ? &tile_block<Registers, 2, 2> : &tile_block<Registers, 2, 1>
                         : wide ? &tile_block<Registers, 1, 2>
                                : &tile_block<Registers, 1, 1>;
      block(depth, a + i * a_row, a_row, b + 2 * j, b_row, c + i * c_row + j, c_row, add);
    }
  }
}

#endif

// A thread's use of the registers, from here to the end of its scope.
class TileUse {
 public:
  explicit TileUse(bool wanted) : own_(wanted && tile_mode == 1) {
#if PYDL_LEVEL == 2
    if (own_) Tiles::set_up();
#endif
  }
  ~TileUse() {
#if PYDL_LEVEL == 2
    if (own_) Tiles::give_back();
#endif
  }
  TileUse(const TileUse&) = delete;
  TileUse& operator=(const TileUse&) = delete;

 private:
  bool own_;
};

}  // namespace PYDL_ISA
}  // namespace pydl
