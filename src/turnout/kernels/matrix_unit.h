// The processor's matrix unit, Intel AMX: eight tiles of 16 rows of 64 bytes, and products of two into a third.
#pragma once

#include <cstdint>

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && \
    defined(__AVX512BW__) && defined(__linux__)
#define TURNOUT_MATRIX_UNIT 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace turnout {

constexpr int UNIT_ROWS = 16;   // of a tile
constexpr int UNIT_BYTES = 64;  // of a tile's row

enum Grant { NOT_COMPILED, GRANTED, NOT_GRANTED };

// Linux saves tiles only for processes that asked: once is enough for all their threads.
inline Grant ask_matrix_unit() {
#if defined(TURNOUT_MATRIX_UNIT)
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0 ? GRANTED : NOT_GRANTED;
#else
  return NOT_COMPILED;
#endif
}

// While it lives, the calling thread's tiles are whole ones; after it they are free, as the next to use them expects.
class Tiles {
 public:
  explicit Tiles(bool used) : used_(used) {
#if defined(TURNOUT_MATRIX_UNIT)
    if (!used_) return;
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    static_assert(sizeof shape == 64, "the layout is the processor's");
    for (int i = 0; i < 8; i++) {
      shape.row_bytes[i] = UNIT_BYTES;
      shape.rows[i] = UNIT_ROWS;
    }
    asm volatile("" ::: "memory");  // the compiler takes it to read eight bytes
    _tile_loadconfig(&shape);
#endif
  }
  ~Tiles() {
#if defined(TURNOUT_MATRIX_UNIT)
    if (used_) _tile_release();
#endif
  }
  Tiles(const Tiles&) = delete;

 private:
  const bool used_;
};

}  // namespace turnout
