// What the operators share: tasks for threads, vectors in fp32 over memory of fp32 or bf16, and the choice of dtype.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>
#include <vector>

namespace smoe_train {

using Floats = at::vec::VectorizedN<float, 2>;  // as many as one vector of bf16 holds
constexpr int64_t WIDTH = 2 * at::vec::Vectorized<float>::size();

inline int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// WIDTH values, or the count that is left and zeros behind them, in fp32.
template <typename T>
inline Floats load(const T* from, int64_t count = WIDTH) {
  if constexpr (std::is_same_v<T, float>) {
    if (count == WIDTH) return Floats::loadu(from);
    Floats values(0.0f);
    for (int64_t at = 0; at < count; at += WIDTH / 2)
      values[at / (WIDTH / 2)] = at::vec::Vectorized<float>::loadu(from + at, std::min(WIDTH / 2, count - at));
    return values;
  } else {
    return at::vec::convert<float, 2, T, 1>(at::vec::VectorizedN<T, 1>::loadu(from, count));
  }
}

inline float sum_of(const Floats& values) {
  return at::vec::vec_reduce_all<float>([](auto& a, auto& b) { return a + b; }, values[0] + values[1]);
}

template <typename T>
inline void store(const Floats& values, T* to, int64_t count = WIDTH) {
  if constexpr (std::is_same_v<T, float>) {
    values.store(to, count);
  } else {
#if defined(__AVX512BF16__)
    if (count == WIDTH) {  // at::vec rounds with integer instructions
      const __m512bh rounded = _mm512_cvtne2ps_pbh(values[1], values[0]);
      std::memcpy(to, &rounded, sizeof(rounded));
      return;
    }
#endif
    at::vec::convert<T, 1, float, 2>(values).store(to, count);
  }
}

// As `store`, past the caches: for what is written once and read after more than they hold, as weights' gradients are.
template <typename T>
inline void stream(const Floats& values, T* to, int64_t count = WIDTH) {
#if defined(__AVX512BF16__)
  if (count == WIDTH && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    if constexpr (std::is_same_v<T, float>) {
      _mm512_stream_ps(to, values[0]);
      _mm512_stream_ps(to + WIDTH / 2, values[1]);
    } else {
      const __m512bh rounded = _mm512_cvtne2ps_pbh(values[1], values[0]);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)rounded);
    }
    return;
  }
#endif
  store(values, to, count);
}

// After a thread's last `stream`: other threads see it.
inline void streamed() {
#if defined(__AVX512BF16__)
  _mm_sfence();
#endif
}

// Calls per_vector(at, count) for every WIDTH values of `size`, or what is left of them.
template <typename PerVector>
inline void for_vectors(int64_t size, const PerVector& per_vector) {
  int64_t at = 0;
  for (; at + WIDTH <= size; at += WIDTH) per_vector(at, WIDTH);
  if (at < size) per_vector(at, size - at);
}

// Runs tasks 0 .. count - 1, each by whichever thread is free.
template <typename Run>
void run_tasks(int64_t count, const Run& run) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t task = next++; task < count; task = next++) run(task);
    at::native::cpublas::brgemm_release();
    streamed();
  });
}

// A thread's space for `size` values, kept for the next task.
template <typename T, int WHICH>
T* space_for(int64_t size) {
  thread_local std::vector<T> space;
  space.resize(std::max<size_t>(space.size(), size));
  return space.data();
}

template <typename Run>
auto dispatch(at::ScalarType dtype, const Run& run) {
  if (dtype == at::kFloat) return run(float{});
  TORCH_CHECK(dtype == at::kBFloat16, "these operators compute in float32 and bfloat16, not in ", dtype);
  return run(at::BFloat16{});
}

}  // namespace smoe_train
