// Products of matrices on one thread, a block of the result at a time, so that what follows a product (activation,
// scatter, rounding) is done while the block is in the nearest cache. The blocks are oneDNN's, by way of ATen's brgemm,
// which serves every CPU: a kernel is made once for each height, width and depth of a block, all of which repeat.

#pragma once

#include <ATen/Context.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <array>

#include "vectors_and_tasks.h"

namespace smoe_train {

constexpr int64_t ROWS = 64, COLUMNS = 64;  // of a block of the result
constexpr int64_t DEPTH = 128;              // of a chunk of a left matrix that is kept transposed

inline bool has_tiles() { return at::native::cpublas::could_pack(at::kBFloat16); }  // AMX

// What the number of rows of a left matrix, or the depth of a product over rows, is rounded up to.
inline int64_t row_multiple() { return has_tiles() ? 32 : 8; }

// A left matrix: rows of `stride` values, `chunk` of which lie side by side, the next chunk `next` values behind.
template <typename T>
struct Left {
  const T* data;
  int64_t stride, chunk, next;

  static Left of_rows(const T* data, int64_t depth) { return {data, depth, depth, 0}; }
};

// Values of a matrix that is read in an order which no processor foresees are asked for a step ahead.
template <typename T>
inline void prefetch(const T* from, int64_t stride, int64_t rows, int64_t columns) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; column += LINE) __builtin_prefetch(from + row * stride + column, 0, 2);
}

template <typename T>
void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t columns) {
  constexpr int SIDE = 64 / sizeof(T);  // a vector
  for (int64_t row = 0; row < rows; row += SIDE)
    for (int64_t column = 0; column < columns; column += SIDE) {
      const T* block = from + row * from_stride + column;
      T* result = to + column * to_stride + row;
      const int height = std::min<int64_t>(SIDE, rows - row), width = std::min<int64_t>(SIDE, columns - column);
      if (height == SIDE && width == SIDE) {
        prefetch(block + SIDE * from_stride, from_stride, std::min<int64_t>(SIDE, rows - row - SIDE), SIDE);
        at::vec::transpose_mxn<T, SIDE, SIDE>(block, from_stride, result, to_stride);
      } else {
        at::vec::transpose_mxn<T>(block, from_stride, result, to_stride, height, width);
      }
    }
}

// Rows, transposed, as a left matrix of `width` rows: their sum over all rows of products is a weight's gradient.
template <typename T>
Left<T> transposed(const T* rows, int64_t count, int64_t width) {
  T* space = space_for<T, -1>(round_up(count, DEPTH) * width);
  for (int64_t begin = 0; begin < count; begin += DEPTH)
    transpose(rows + begin * width, width, space + begin * width, DEPTH, std::min(DEPTH, count - begin), width);
  return {space, DEPTH, DEPTH, DEPTH * width};
}

// A right matrix: value (k, n) at data[k * stride + n], or at data[n * stride + k] if it is transposed.
template <typename T>
struct Right {
  const T* data;
  int64_t stride;
  bool is_transposed = false;
};

// Whether pairs of rows are interleaved, which bf16 instructions want.
template <typename T>
bool interleaves(int64_t depth) {
#if defined(CPU_CAPABILITY_AVX512)
  return !std::is_same_v<T, float> && depth % (has_tiles() ? 32 : 2) == 0 && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

// Brings columns of a right matrix into the form that products take, in `space`, or finds them in it. In the interleaved
// form the depth is rounded up to an even number, with zeros.
template <typename T>
Right<T> columns_of(const Right<T>& right, int64_t first, int64_t width, int64_t depth, bool interleaved, T* space) {
  const T* from = right.data + first * (right.is_transposed ? right.stride : 1);
  if (!interleaved && !right.is_transposed) return {from, right.stride};
  if (!interleaved) {
    transpose(from, right.stride, space, width, width, depth);
  } else if constexpr (!std::is_same_v<T, float>) {
#if defined(CPU_CAPABILITY_AVX512)
    if (right.is_transposed) {  // pairs stay side by side
      transpose(reinterpret_cast<const float*>(from), right.stride / 2, reinterpret_cast<float*>(space), width, width,
                depth / 2);
    } else {
      prefetch(from, right.stride, depth, width);
      at::vec::pack_vnni2(from, space, right.stride, depth, width);
    }
#endif
  }
  return {space, width};
}

// Products of P pairs of matrices of `rows` times `depth` and `depth` times columns `first` to `last`, or the sum of
// them all. Calls finish(row, rows, column, columns, results), with pointers to fp32 rows of COLUMNS values, block by block.
template <bool SUM, typename T, size_t P, typename Finish>
void multiply(const std::array<Left<T>, P>& lefts, const std::array<Right<T>, P>& rights, int64_t rows, int64_t depth,
              int64_t first, int64_t last, const Finish& finish) {
  T* const space = space_for<T, -2>(P * COLUMNS * depth);
  alignas(64) float blocks[SUM ? 1 : P][ROWS * COLUMNS];
  const bool interleaved = interleaves<T>(depth);
  for (int64_t column = first; column < last; column += COLUMNS) {
    const int64_t width = std::min(COLUMNS, last - column);
    std::array<Right<T>, P> parts;
    for (size_t p = 0; p < P; ++p)
      parts[p] = columns_of(rights[p], column, width, depth, interleaved, space + p * COLUMNS * depth);
    const int64_t next = column + COLUMNS;
    for (size_t p = 0; p < P && interleaved && next < last; ++p)  // while these columns are computed
      if (rights[p].is_transposed)
        prefetch(rights[p].data + next * rights[p].stride, rights[p].stride, std::min(COLUMNS, last - next), depth);
    for (int64_t row = 0; row < rows; row += ROWS) {
      const int64_t height = std::min(ROWS, rows - row);
      std::array<const float*, P> results;
      for (size_t p = 0; p < P; ++p) {
        const Left<T>& left = lefts[p];
        float* block = blocks[SUM ? 0 : p];
        results[p] = block;
        for (int64_t k = 0; k < depth; k += left.chunk)
          at::native::cpublas::brgemm(height, width, std::min(left.chunk, depth - k), left.stride, parts[p].stride,
                                      COLUMNS, k > 0 || (SUM && p > 0),
                                      left.data + k / left.chunk * left.next + row * left.stride,
                                      parts[p].data + k * parts[p].stride, block, interleaved);
      }
      finish(row, height, column, width, results);
    }
  }
}

}  // namespace smoe_train
