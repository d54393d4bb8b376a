// Causal or full self-attention without a mask on a CPU: scores exist for blocks of queries only, as in FlashAttention-2
// (arXiv 2307.08691), whose backward pass this is; scores, softmax and sums are in fp32, products take rounded factors.
//
// A task is one head of one sequence. Sizes: B batch, H heads, S sequence, W head width.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "products.h"
#include "vectors_and_tasks.h"

namespace {

using at::Tensor;
using namespace smoe_train;
constexpr int64_t SIDE = 64;  // queries, or keys, of a block
static_assert(SIDE == ROWS && SIDE == COLUMNS);

// One head's rows of a tensor [B, H, S, W] with any strides but that of the last dimension, which is 1.
template <typename T>
struct Head {
  T* data;
  int64_t stride;

  Head(const Tensor& tensor, int64_t task)
      : data(const_cast<T*>(tensor.const_data_ptr<T>()) + task / tensor.size(1) * tensor.stride(0) +
             task % tensor.size(1) * tensor.stride(1)),
        stride(tensor.stride(2)) {}

  T* row(int64_t index) const { return data + index * stride; }
};

// One product of two small matrices: c = a b, or c += a b.
template <typename T>
void product(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_stride, const Right<T>& b, bool interleaved,
             float* c, int64_t c_stride, bool add) {
  at::native::cpublas::brgemm(rows, columns, depth, a_stride, b.stride, c_stride, add, a, b.data, c, interleaved);
}

// What products over a head's width, and over the rows of a block, look like.
template <typename T>
struct Form {
  int64_t width;
  bool over_width, over_rows;  // whether their right matrices are interleaved

  explicit Form(int64_t head_width) : width(head_width), over_width(interleaves<T>(head_width)), over_rows(interleaves<T>(SIDE)) {}

  // Rows of a block are a product's depth: interleaved, they are rounded up, and what is behind them must be zero.
  int64_t depth(int64_t rows) const { return over_rows ? round_up(rows, row_multiple()) : rows; }

  // A block's rows as the right matrix [W, rows], where the head's width is summed over.
  Right<T> transposed_block(const Head<T>& head, int64_t first, int64_t rows, T* space) const {
    return columns_of(Right<T>{head.row(first), head.stride, true}, 0, rows, width, over_width, space);
  }

  // A block's rows as the right matrix [rows, W], where rows are summed over.
  Right<T> block(const Head<T>& head, int64_t first, int64_t rows, T* space) const {
    if (over_rows) std::fill(space, space + SIDE * width, T(0));
    return columns_of(Right<T>{head.row(first), head.stride}, 0, width, rows, over_rows, space);
  }
};

// A tensor [B, H, S, W] that lies in memory as [B, S, H, W], as projections take it.
Tensor like_heads(const Tensor& q) {
  return at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options()).transpose(1, 2);
}

Tensor with_rows(const Tensor& tensor) { return tensor.stride(3) == 1 && tensor.stride(2) % 2 == 0 ? tensor : tensor.contiguous(); }

template <typename T>
void forward_head(const Head<T>& q, const Head<T>& k, const Head<T>& v, const Head<T>& y, float* lse, int64_t length,
                  int64_t width, bool causal) {
  const Form<T> form(width);
  const int64_t padded = round_up(length, SIDE);
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  T *keys = space_for<T, 0>(padded * width), *values = space_for<T, 1>(padded * width), *p = space_for<T, 2>(SIDE * padded);
  float *scores = space_for<float, 3>(SIDE * padded), *sums = space_for<float, 4>(SIDE * width);
  std::vector<Right<T>> k_blocks, v_blocks;
  for (int64_t first = 0; first < length; first += SIDE) {
    const int64_t rows = std::min(SIDE, length - first);
    k_blocks.push_back(form.transposed_block(k, first, rows, keys + first * width));
    v_blocks.push_back(form.block(v, first, rows, values + first * width));
  }
  for (int64_t first = 0; first < length; first += SIDE) {
    const int64_t rows = std::min(SIDE, length - first), end = causal ? first + rows : length;
    for (int64_t key = 0; key < end; key += SIDE)
      product(rows, std::min(SIDE, length - key), width, q.row(first), q.stride, k_blocks[key / SIDE], form.over_width,
              scores + key, padded, false);
    float inverse[SIDE];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t seen = causal ? first + i + 1 : length;
      const float* row = scores + i * padded;
      float best = -std::numeric_limits<float>::infinity();
      Floats bests(best);
      int64_t at = 0;
      for (; at + WIDTH <= seen; at += WIDTH) bests = maximum(bests, load(row + at));
      for (; at < seen; ++at) best = std::max(best, row[at]);
      best = std::max(best, at::vec::vec_reduce_all<float>([](auto& a, auto& b) { return maximum(a, b); },
                                                            maximum(bests[0], bests[1])));
      Floats total(0.0f);
      float rest = 0.0f;
      const Floats factor(scale), shift(best * scale);
      at = 0;
      for (; at + WIDTH <= seen; at += WIDTH) {
        const Floats e = (load(row + at) * factor - shift).exp_u20();
        total = total + e;
        store(e, p + i * padded + at);
      }
      if (at < seen) {
        float left[WIDTH];
        (load(row + at, seen - at) * factor - shift).exp_u20().store(left);
        for (int64_t j = 0; j < seen - at; ++j) rest += left[j];
        store(load(left, seen - at), p + i * padded + at, seen - at);
      }
      std::fill(p + i * padded + seen, p + i * padded + round_up(end, SIDE), T(0));
      const float sum = rest + sum_of(total);
      inverse[i] = 1.0f / sum;
      lse[first + i] = best * scale + std::log(sum);
    }
    for (int64_t key = 0; key < end; key += SIDE)
      product(rows, width, form.depth(std::min(SIDE, length - key)), p + key, padded, v_blocks[key / SIDE], form.over_rows,
              sums, width, key > 0);
    for (int64_t i = 0; i < rows; ++i)
      for_vectors(width, [&](int64_t at, int64_t count) {
        store(load(sums + i * width + at, count) * Floats(inverse[i]), y.row(first + i) + at, count);
      });
  }
}

template <typename T>
void backward_head(const Head<T>& dy, const Head<T>& q, const Head<T>& k, const Head<T>& v, const Head<T>& y, const float* lse,
                   const Head<T>& dq, const Head<T>& dk, const Head<T>& dv, int64_t length, int64_t width, bool causal) {
  const Form<T> form(width);
  const int64_t size = round_up(length, SIDE) * width;
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  T* const packed = space_for<T, 0>(4 * size);
  float *dq_sums = space_for<float, 1>(size), *delta = space_for<float, 2>(length);
  std::vector<Right<T>> q_over_width, q_over_rows, dy_over_width, dy_over_rows;
  std::fill(dq_sums, dq_sums + size, 0.0f);
  for (int64_t first = 0; first < length; first += SIDE) {
    const int64_t rows = std::min(SIDE, length - first);
    T* const space = packed + 4 * first * width;
    q_over_width.push_back(form.transposed_block(q, first, rows, space));
    q_over_rows.push_back(form.block(q, first, rows, space + SIDE * width));
    dy_over_width.push_back(form.transposed_block(dy, first, rows, space + 2 * SIDE * width));
    dy_over_rows.push_back(form.block(dy, first, rows, space + 3 * SIDE * width));
  }
  for (int64_t row = 0; row < length; ++row) {
    Floats sum(0.0f);
    for_vectors(width, [&](int64_t at, int64_t count) {
      sum = fmadd(load(dy.row(row) + at, count), load(y.row(row) + at, count), sum);
    });
    delta[row] = sum_of(sum);
  }
  // Blocks of keys times queries: transposed, so that they are left matrices as they are for the keys' gradients.
  alignas(64) float s[SIDE * SIDE], dp[SIDE * SIDE];
  alignas(64) T p[SIDE * SIDE], ds[SIDE * SIDE], ds_transposed[SIDE * SIDE];
  float *dk_sums = space_for<float, 3>(2 * SIDE * width), *dv_sums = dk_sums + SIDE * width;
  T* const key_space = space_for<T, 4>(SIDE * width);
  for (int64_t key = 0; key < length; key += SIDE) {
    const int64_t keys = std::min(SIDE, length - key);
    const Right<T> k_over_rows = form.block(k, key, keys, key_space);
    bool added = false;
    for (int64_t first = causal ? key : 0; first < length; first += SIDE, added = true) {
      const int64_t rows = std::min(SIDE, length - first), number = first / SIDE;
      product(keys, rows, width, k.row(key), k.stride, q_over_width[number], form.over_width, s, SIDE, false);
      product(keys, rows, width, v.row(key), v.stride, dy_over_width[number], form.over_width, dp, SIDE, false);
      for (int64_t i = 0; i < keys; ++i) {
        // Queries before this key, in the block of the diagonal, do not see it; those behind the last do not exist.
        const int64_t begin = causal && first == key ? i : 0;
        for_vectors(rows, [&](int64_t at, int64_t count) {
          const int64_t here = i * SIDE + at;
          const Floats e = (load(s + here, count) * Floats(scale) - load(lse + first + at, count)).exp_u20();
          store(e, p + here, count);
          store(e * (load(dp + here, count) - load(delta + first + at, count)) * Floats(scale), ds + here, count);
        });
        std::fill(p + i * SIDE, p + i * SIDE + begin, T(0));
        std::fill(ds + i * SIDE, ds + i * SIDE + begin, T(0));
        std::fill(p + i * SIDE + rows, p + (i + 1) * SIDE, T(0));
        std::fill(ds + i * SIDE + rows, ds + (i + 1) * SIDE, T(0));
      }
      std::fill(ds + keys * SIDE, ds + SIDE * SIDE, T(0));
      product(keys, width, form.depth(rows), p, SIDE, dy_over_rows[number], form.over_rows, dv_sums, width, added);
      product(keys, width, form.depth(rows), ds, SIDE, q_over_rows[number], form.over_rows, dk_sums, width, added);
      transpose(ds, SIDE, ds_transposed, SIDE, SIDE, SIDE);
      product(rows, width, form.depth(keys), ds_transposed, SIDE, k_over_rows, form.over_rows, dq_sums + first * width, width,
              true);
    }
    for (int64_t i = 0; i < keys; ++i)
      for_vectors(width, [&](int64_t at, int64_t count) {
        store(load(dk_sums + i * width + at, count), dk.row(key + i) + at, count);
        store(load(dv_sums + i * width + at, count), dv.row(key + i) + at, count);
      });
  }
  for (int64_t row = 0; row < length; ++row)
    for_vectors(width, [&](int64_t at, int64_t count) {
      store(load(dq_sums + row * width + at, count), dq.row(row) + at, count);
    });
}

std::tuple<Tensor, Tensor> attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, bool causal) {
  const Tensor q = with_rows(q_any), k = with_rows(k_any), v = with_rows(v_any);
  const int64_t heads = q.size(1), length = q.size(2), width = q.size(3);
  TORCH_CHECK(k.sizes() == q.sizes() && v.sizes() == q.sizes(), "queries, keys and values differ in shape");
  Tensor y = like_heads(q), lse = at::empty({q.size(0), heads, length}, q.options().dtype(at::kFloat));
  dispatch(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    run_tasks(q.size(0) * heads, [&](int64_t task) {
      forward_head<T>({q, task}, {k, task}, {v, task}, {y, task}, lse.mutable_data_ptr<float>() + task * length, length, width,
                      causal);
    });
    return 0;
  });
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dy_any, const Tensor& q_any, const Tensor& k_any,
                                                      const Tensor& v_any, const Tensor& y_any, const Tensor& lse_any,
                                                      bool causal) {
  const Tensor dy = with_rows(dy_any), q = with_rows(q_any), k = with_rows(k_any), v = with_rows(v_any);
  const Tensor y = with_rows(y_any), lse = lse_any.contiguous();
  const int64_t heads = q.size(1), length = q.size(2), width = q.size(3);
  Tensor dq = like_heads(q), dk = like_heads(q), dv = like_heads(q);
  dispatch(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    run_tasks(q.size(0) * heads, [&](int64_t task) {
      backward_head<T>({dy, task}, {q, task}, {k, task}, {v, task}, {y, task}, lse.const_data_ptr<float>() + task * length,
                       {dq, task}, {dk, task}, {dv, task}, length, width, causal);
    });
    return 0;
  });
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(smoe_train, library) {
  library.def("attention(Tensor q, Tensor k, Tensor v, bool causal) -> (Tensor y, Tensor lse)");
  library.def(
      "attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, bool causal) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
}

TORCH_LIBRARY_IMPL(smoe_train, CPU, library) {
  library.impl("attention", &attention);
  library.impl("attention_backward", &attention_backward);
}
