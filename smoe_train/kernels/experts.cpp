// The experts of one mixture-of-experts layer on a CPU: gather -> GEMM -> activation -> GEMM -> scatter, and backward.
//
// Work is cut into tasks of one expert and at most BLOCK of its rows, so that what one task touches stays in a core's
// cache, no thread waits for another inside a task, and neither a large expert nor a small number of experts leaves
// threads idle. GEMMs are ATen's, run by one thread each. Every output row and every weight gradient is written by one
// task: results do not depend on the number of threads.
//
// Sizes: T tokens, K slots a token, R rows sorted by expert (each expert's rows together), D d_model, F d_ff, E experts.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using at::vec::Vectorized;
using Floats = Vectorized<float>;
constexpr int64_t BLOCK = 384;  // rows of a task
constexpr int64_t WIDTH = Floats::size();

enum class Kind { relu, gelu, swiglu };

Kind kind_of(const std::string& name) {
  if (name == "relu") return Kind::relu;
  if (name == "gelu") return Kind::gelu;
  TORCH_CHECK(name == "swiglu", "unknown kind of feed-forward: ", name);
  return Kind::swiglu;
}

// Runs tasks 0 .. count - 1, each by whichever thread is free.
template <typename Run>
void run_tasks(int64_t count, const Run& run) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t task = next++; task < count; task = next++) run(task);
  });
}

struct Task {
  int64_t expert, begin, end;  // rows
};

// Where each slot's row lies, and which slot owns each row.
struct Layout {
  int64_t num_tokens, num_slots, num_rows, num_experts;
  std::vector<int64_t> ends, slot_of_row;  // -1 for rows of padding
  std::vector<Task> tasks;
  std::vector<int64_t> first_tasks;  // of each expert, and the end

  Layout(const Tensor& row_of_slot_TK, const Tensor& rows_per_expert_E)
      : num_tokens(row_of_slot_TK.size(0)), num_slots(row_of_slot_TK.size(1)), num_experts(rows_per_expert_E.size(0)) {
    const auto* counts = rows_per_expert_E.const_data_ptr<int64_t>();
    int64_t row = 0;
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      const int64_t end = row + counts[expert];
      first_tasks.push_back(tasks.size());
      // Equal parts rather than full blocks and a rest: small products are slow.
      const int64_t parts = (counts[expert] + BLOCK - 1) / BLOCK;
      const int64_t size = parts ? ((counts[expert] + parts - 1) / parts + 31) / 32 * 32 : 0;
      for (; row < end; row = std::min(row + size, end)) tasks.push_back({expert, row, std::min(row + size, end)});
      ends.push_back(end);
    }
    first_tasks.push_back(tasks.size());
    num_rows = row;
    slot_of_row.assign(num_rows, -1);
    const auto* rows = row_of_slot_TK.const_data_ptr<int64_t>();
    for (int64_t slot = 0; slot < num_tokens * num_slots; ++slot)
      if (rows[slot] < num_rows) slot_of_row[rows[slot]] = slot;  // an empty slot has no row
  }

  // Whether whole experts, as tasks, keep all threads busy.
  bool experts_fill_threads() const {
    int64_t largest = 0;
    for (int64_t expert = 0; expert < num_experts; ++expert) largest = std::max(largest, ends[expert] - begin_of(expert));
    const int64_t threads = at::get_num_threads();
    return threads == 1 || (num_experts >= 4 * threads && largest * 2 * threads <= num_rows);
  }

  int64_t begin_of(int64_t expert) const { return expert ? ends[expert - 1] : 0; }
};

// A matrix of the caller's memory; autograd knows nothing of it.
template <typename T>
Tensor matrix(const T* data, int64_t rows, int64_t columns) {
  return at::from_blob(const_cast<T*>(data), {rows, columns}, c10::CppTypeToScalarType<T>::value);
}

template <typename T>
struct Weights {
  Kind kind;
  int64_t d_model, d_ff;
  const T *gate = nullptr, *in, *out, *b_in = nullptr, *b_out = nullptr;

  Weights(const std::string& name, const std::optional<Tensor>& w_gate, const Tensor& w_in,
          const std::optional<Tensor>& bias_in, const Tensor& w_out, const std::optional<Tensor>& bias_out)
      : kind(kind_of(name)), d_model(w_in.size(1)), d_ff(w_in.size(2)), in(w_in.const_data_ptr<T>()),
        out(w_out.const_data_ptr<T>()) {
    if (kind == Kind::swiglu) {
      gate = w_gate->const_data_ptr<T>();
    } else {
      b_in = bias_in->const_data_ptr<T>();
      b_out = bias_out->const_data_ptr<T>();
    }
  }

  Tensor to_hidden(const T* stacked, int64_t expert) const {
    return matrix(stacked + expert * d_model * d_ff, d_model, d_ff);
  }
  Tensor to_model(int64_t expert) const { return matrix(out + expert * d_model * d_ff, d_ff, d_model); }
};

// WIDTH values, or the count that is left, in fp32; zeros behind them.
template <typename T>
inline Floats load(const T* from, int64_t count = WIDTH) {
  if constexpr (std::is_same_v<T, float>) {
    return count == WIDTH ? Floats::loadu(from) : Floats::loadu(from, count);
  } else {
    if (count == WIDTH) {
      Floats values;
      at::vec::load_to_float<T>(from, values);
      return values;
    }
    alignas(64) float buffer[WIDTH] = {};
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<float>(from[i]);
    return Floats::loadu(buffer);
  }
}

template <typename T>
inline void store(const Floats& values, T* to, int64_t count = WIDTH) {
  if constexpr (std::is_same_v<T, float>) {
    values.store(to, count);
  } else {
    at::vec::convert_from_float<T>(values, values).store(to, count);
  }
}

// Calls per_vector on every WIDTH values, in fp32, of inputs and outputs of equal length.
template <typename T, size_t IN, size_t OUT, typename PerVector>
inline void map_vectors(const std::array<const T*, IN>& inputs, const std::array<T*, OUT>& outputs, int64_t size,
                        const PerVector& per_vector) {
  int64_t at = 0;
  if constexpr (!std::is_same_v<T, float>) {  // two vectors of fp32 fill one of bf16
    for (; at + 2 * WIDTH <= size; at += 2 * WIDTH) {
      std::array<Floats, IN> low, high;
      for (size_t i = 0; i < IN; ++i)
        std::tie(low[i], high[i]) = at::vec::convert_to_float<T>(Vectorized<T>::loadu(inputs[i] + at));
      const std::array<Floats, OUT> first = per_vector(low), second = per_vector(high);
      for (size_t i = 0; i < OUT; ++i) at::vec::convert_from_float<T>(first[i], second[i]).store(outputs[i] + at);
    }
  }
  for (; at < size; at += WIDTH) {
    const int64_t count = std::min(WIDTH, size - at);
    std::array<Floats, IN> values;
    for (size_t i = 0; i < IN; ++i) values[i] = load(inputs[i] + at, count);
    const std::array<Floats, OUT> results = per_vector(values);
    for (size_t i = 0; i < OUT; ++i) store(results[i], outputs[i] + at, count);
  }
}

const Floats ZERO(0.0f), ONE(1.0f), HALF(0.5f);

inline Floats sigmoid(const Floats& x) { return ONE / (ONE + x.neg().exp_u20()); }

// Phi(x) of the exact (not the tanh) GELU.
inline Floats normal_distribution(const Floats& x) { return HALF * (ONE + (x * Floats(0.70710678f)).erf()); }

// activated = act(hidden), or silu(gate) * hidden.
template <typename T>
void activate(Kind kind, const T* gate, const T* hidden, T* activated, int64_t size) {
  if (kind == Kind::swiglu) {
    map_vectors<T, 2, 1>({gate, hidden}, {activated}, size, [](const std::array<Floats, 2>& v) {
      return std::array<Floats, 1>{v[0] * sigmoid(v[0]) * v[1]};
    });
  } else if (kind == Kind::relu) {
    map_vectors<T, 1, 1>({hidden}, {activated}, size, [](const std::array<Floats, 1>& v) {
      return std::array<Floats, 1>{at::vec::clamp_min(v[0], ZERO)};
    });
  } else {
    map_vectors<T, 1, 1>({hidden}, {activated}, size, [](const std::array<Floats, 1>& v) {
      return std::array<Floats, 1>{v[0] * normal_distribution(v[0])};
    });
  }
}

// The activation once more, and the gradients of what went into it from that of what came out of it.
template <typename T>
void activate_backward(Kind kind, const T* gate, const T* hidden, const T* d_activated, T* activated, T* d_gate,
                       T* d_hidden, int64_t size) {
  if (kind == Kind::swiglu) {
    map_vectors<T, 3, 3>({gate, hidden, d_activated}, {activated, d_gate, d_hidden}, size,
                         [](const std::array<Floats, 3>& v) {
                           const Floats s = sigmoid(v[0]), silu = v[0] * s;
                           const Floats slope = s * (ONE + v[0] * (ONE - s));
                           return std::array<Floats, 3>{silu * v[1], v[2] * v[1] * slope, v[2] * silu};
                         });
  } else if (kind == Kind::relu) {
    map_vectors<T, 2, 2>({hidden, d_activated}, {activated, d_hidden}, size, [](const std::array<Floats, 2>& v) {
      return std::array<Floats, 2>{at::vec::clamp_min(v[0], ZERO), Floats::blendv(ZERO, v[1], v[0] > ZERO)};
    });
  } else {
    map_vectors<T, 2, 2>({hidden, d_activated}, {activated, d_hidden}, size, [](const std::array<Floats, 2>& v) {
      const Floats phi = normal_distribution(v[0]);
      const Floats density = Floats(0.39894228f) * (v[0] * v[0] * Floats(-0.5f)).exp();
      return std::array<Floats, 2>{v[0] * phi, v[1] * (phi + v[0] * density)};
    });
  }
}

template <typename T>
void add_bias(T* rows, const T* bias, int64_t count, int64_t width) {
  for (int64_t row = 0; row < count; ++row)
    map_vectors<T, 2, 1>({rows + row * width, bias}, {rows + row * width}, width,
                         [](const std::array<Floats, 2>& v) { return std::array<Floats, 1>{v[0] + v[1]}; });
}

// Copies the rows of a task from where their slots, or tokens, have them; zeros where there is none.
template <typename T>
void gather(const Layout& layout, const Task& task, const T* from, int64_t slots_a_row, T* to, int64_t width) {
  for (int64_t row = task.begin; row < task.end; ++row, to += width) {
    const int64_t slot = layout.slot_of_row[row];
    if (slot < 0)
      std::memset(to, 0, width * sizeof(T));
    else
      std::memcpy(to, from + slot / slots_a_row * width, width * sizeof(T));
  }
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x_TD, const Layout& layout, const Weights<T>& weights) {
  const int64_t d_model = weights.d_model, d_ff = weights.d_ff;
  const bool gated = weights.kind == Kind::swiglu;
  Tensor gate_RF = at::empty({gated ? layout.num_rows : 0, d_ff}, x_TD.options());
  Tensor hidden_RF = at::empty({layout.num_rows, d_ff}, x_TD.options());
  const bool full = static_cast<int64_t>(layout.slot_of_row.size()) -
                        std::count(layout.slot_of_row.begin(), layout.slot_of_row.end(), -1) ==
                    layout.num_tokens * layout.num_slots;
  const std::vector<int64_t> shape{layout.num_tokens, layout.num_slots, d_model};
  Tensor y_TKD = full ? at::empty(shape, x_TD.options()) : at::zeros(shape, x_TD.options());
  const T* x = x_TD.const_data_ptr<T>();
  T *gate = gate_RF.mutable_data_ptr<T>(), *hidden = hidden_RF.mutable_data_ptr<T>(), *y = y_TKD.mutable_data_ptr<T>();
  run_tasks(layout.tasks.size(), [&](int64_t number) {
    const Task& task = layout.tasks[number];
    const int64_t rows = task.end - task.begin, at_hidden = task.begin * d_ff;
    thread_local std::vector<T> space;
    space.resize(std::max<size_t>(space.size(), rows * (d_model + d_ff)));
    T *rows_in = space.data(), *activated = rows_in + rows * d_model, *rows_out = rows_in;  // read before it is written
    gather(layout, task, x, layout.num_slots, rows_in, d_model);
    const Tensor in = matrix(rows_in, rows, d_model);
    Tensor hidden_rows = matrix(hidden + at_hidden, rows, d_ff);
    at::mm_out(hidden_rows, in, weights.to_hidden(weights.in, task.expert));
    if (gated) {
      Tensor gate_rows = matrix(gate + at_hidden, rows, d_ff);
      at::mm_out(gate_rows, in, weights.to_hidden(weights.gate, task.expert));
    } else {
      add_bias(hidden + at_hidden, weights.b_in + task.expert * d_ff, rows, d_ff);
    }
    activate(weights.kind, gate + at_hidden, hidden + at_hidden, activated, rows * d_ff);
    Tensor out = matrix(rows_out, rows, d_model);
    at::mm_out(out, matrix(activated, rows, d_ff), weights.to_model(task.expert));
    if (!gated) add_bias(rows_out, weights.b_out + task.expert * d_model, rows, d_model);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t slot = layout.slot_of_row[task.begin + row];
      if (slot >= 0) std::memcpy(y + slot * d_model, rows_out + row * d_model, d_model * sizeof(T));
    }
  });
  return {y_TKD, gate_RF, hidden_RF};
}

// Sums the rows of each token's slots, which lie in one or more parts of R rows each, in fp32.
template <typename T>
void sum_slots(const Layout& layout, const Tensor& row_of_slot_TK, const T* rows_PRD, int64_t parts, T* sums_TD,
               int64_t d_model) {
  const auto* rows = row_of_slot_TK.const_data_ptr<int64_t>();
  at::parallel_for(0, layout.num_tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t at = 0; at < d_model; at += WIDTH) {
        const int64_t count = std::min(WIDTH, d_model - at);
        Floats sum(0.0f);
        for (int64_t slot = token * layout.num_slots; slot < (token + 1) * layout.num_slots; ++slot)
          for (int64_t part = 0; part < parts && rows[slot] < layout.num_rows; ++part)
            sum = sum + load(rows_PRD + (part * layout.num_rows + rows[slot]) * d_model + at, count);
        store(sum, sums_TD + token * d_model + at, count);
      }
    }
  });
}

// Sums an expert's rows, in fp32.
template <typename T>
void sum_rows(const T* rows, int64_t num_rows, int64_t width, T* sums) {
  for (int64_t at = 0; at < width; at += WIDTH) {
    const int64_t count = std::min(WIDTH, width - at);
    Floats sum(0.0f);
    for (int64_t row = 0; row < num_rows; ++row) sum = sum + load(rows + row * width + at, count);
    store(sum, sums + at, count);
  }
}

struct Gradients {
  Tensor x, gate, in, b_in, out, b_out;
};

template <typename T>
Gradients backward(const Tensor& dy_TKD, const Tensor& x_TD, const Tensor& row_of_slot_TK, const Layout& layout,
                   const Tensor& gate_RF, const Tensor& hidden_RF, const Weights<T>& weights, bool need_weights) {
  const int64_t d_model = weights.d_model, d_ff = weights.d_ff, num_rows = layout.num_rows;
  const bool gated = weights.kind == Kind::swiglu;
  const auto options = x_TD.options();
  Tensor x_RD = at::empty({need_weights ? num_rows : 0, d_model}, options), dy_RD = at::empty({num_rows, d_model}, options);
  Tensor activated_RF = at::empty({num_rows, d_ff}, options), d_hidden_RF = at::empty({num_rows, d_ff}, options);
  Tensor d_gate_RF = at::empty({gated ? num_rows : 0, d_ff}, options), dx_2RD = at::empty({(gated ? 2 : 1) * num_rows, d_model}, options);
  const T *x = x_TD.const_data_ptr<T>(), *dy = dy_TKD.const_data_ptr<T>();
  const T *gate = gate_RF.const_data_ptr<T>(), *hidden = hidden_RF.const_data_ptr<T>();
  T *x_rows = x_RD.mutable_data_ptr<T>(), *dy_rows = dy_RD.mutable_data_ptr<T>(), *dx_rows = dx_2RD.mutable_data_ptr<T>();
  T *activated = activated_RF.mutable_data_ptr<T>(), *d_hidden = d_hidden_RF.mutable_data_ptr<T>();
  T* d_gate = d_gate_RF.mutable_data_ptr<T>();
  const auto of_rows = [&](const Task& task) {
    const int64_t rows = task.end - task.begin, at_hidden = task.begin * d_ff, at_model = task.begin * d_model;
    thread_local std::vector<T> space;
    space.resize(std::max<size_t>(space.size(), rows * d_ff));
    if (need_weights) gather(layout, task, x, layout.num_slots, x_rows + at_model, d_model);
    gather(layout, task, dy, 1, dy_rows + at_model, d_model);
    Tensor d_activated = matrix(space.data(), rows, d_ff);
    at::mm_out(d_activated, matrix(dy_rows + at_model, rows, d_model), weights.to_model(task.expert).t());
    activate_backward(weights.kind, gate + at_hidden, hidden + at_hidden, space.data(), activated + at_hidden,
                      d_gate + at_hidden, d_hidden + at_hidden, rows * d_ff);
    Tensor dx = matrix(dx_rows + at_model, rows, d_model);
    at::mm_out(dx, matrix(d_hidden + at_hidden, rows, d_ff), weights.to_hidden(weights.in, task.expert).t());
    if (gated) {  // summed with the other at the end: accumulating products are slow in bf16, and round in between
      Tensor dx_by_gate = matrix(dx_rows + num_rows * d_model + at_model, rows, d_model);
      at::mm_out(dx_by_gate, matrix(d_gate + at_hidden, rows, d_ff), weights.to_hidden(weights.gate, task.expert).t());
    }
  };

  Gradients found;
  const int64_t num_experts = need_weights ? layout.num_experts : 0, matrices = gated ? 3 : 2;
  found.in = at::empty({num_experts, d_model, d_ff}, options);
  found.out = at::empty({num_experts, d_ff, d_model}, options);
  found.gate = at::empty({gated ? num_experts : 0, d_model, d_ff}, options);
  found.b_in = at::empty({gated ? 0 : num_experts, d_ff}, options);
  found.b_out = at::empty({gated ? 0 : num_experts, d_model}, options);
  T *to_in = found.in.mutable_data_ptr<T>(), *to_out = found.out.mutable_data_ptr<T>();
  T *to_gate = found.gate.mutable_data_ptr<T>(), *to_b_in = found.b_in.mutable_data_ptr<T>();
  T* to_b_out = found.b_out.mutable_data_ptr<T>();
  const auto of_weights = [&](int64_t expert, int64_t which) {
    const int64_t begin = layout.begin_of(expert), rows = layout.ends[expert] - begin;
    const auto product = [&](const T* left, int64_t height, const T* right, int64_t width, T* to) {
      Tensor result = matrix(to + expert * height * width, height, width);
      if (rows == 0)
        result.zero_();
      else
        at::mm_out(result, matrix(left + begin * height, rows, height).t(), matrix(right + begin * width, rows, width));
    };
    if (which == 0) product(x_rows, d_model, d_hidden, d_ff, to_in);
    if (which == 1) product(activated, d_ff, dy_rows, d_model, to_out);
    if (which == 2) product(x_rows, d_model, d_gate, d_ff, to_gate);
    if (!gated && which == 0) sum_rows(d_hidden + begin * d_ff, rows, d_ff, to_b_in + expert * d_ff);
    if (!gated && which == 1) sum_rows(dy_rows + begin * d_model, rows, d_model, to_b_out + expert * d_model);
  };

  if (layout.experts_fill_threads()) {  // an expert's weights' gradients at once, while its rows are in the cache
    run_tasks(layout.num_experts, [&](int64_t expert) {
      for (int64_t number = layout.first_tasks[expert]; number < layout.first_tasks[expert + 1]; ++number)
        of_rows(layout.tasks[number]);
      for (int64_t which = 0; which < matrices && need_weights; ++which) of_weights(expert, which);
    });
  } else {
    run_tasks(layout.tasks.size(), [&](int64_t number) { of_rows(layout.tasks[number]); });
    run_tasks(num_experts * matrices, [&](int64_t number) { of_weights(number / matrices, number % matrices); });
  }
  found.x = at::empty_like(x_TD);
  sum_slots(layout, row_of_slot_TK, dx_rows, gated ? 2 : 1, found.x.mutable_data_ptr<T>(), d_model);
  return found;
}

// The weighted sum of each token's slots, in fp32.
template <typename T>
Tensor combine(const Tensor& y_TKD, const Tensor& weights_TK) {
  const int64_t num_tokens = y_TKD.size(0), num_slots = y_TKD.size(1), d_model = y_TKD.size(2);
  Tensor out_TD = at::empty({num_tokens, d_model}, y_TKD.options());
  const T* y = y_TKD.const_data_ptr<T>();
  const float* weights = weights_TK.const_data_ptr<float>();
  T* out = out_TD.mutable_data_ptr<T>();
  at::parallel_for(0, num_tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t at = 0; at < d_model; at += WIDTH) {
        const int64_t count = std::min(WIDTH, d_model - at);
        Floats sum(0.0f);
        for (int64_t slot = token * num_slots; slot < (token + 1) * num_slots; ++slot)
          sum = at::vec::fmadd(Floats(weights[slot]), load(y + slot * d_model + at, count), sum);
        store(sum, out + token * d_model + at, count);
      }
    }
  });
  return out_TD;
}

template <typename T>
std::tuple<Tensor, Tensor> combine_backward(const Tensor& dout_TD, const Tensor& y_TKD, const Tensor& weights_TK) {
  const int64_t num_tokens = y_TKD.size(0), num_slots = y_TKD.size(1), d_model = y_TKD.size(2);
  Tensor dy_TKD = at::empty_like(y_TKD), dweights_TK = at::empty_like(weights_TK);
  const T *dout = dout_TD.const_data_ptr<T>(), *y = y_TKD.const_data_ptr<T>();
  const float* weights = weights_TK.const_data_ptr<float>();
  T* dy = dy_TKD.mutable_data_ptr<T>();
  float* dweights = dweights_TK.mutable_data_ptr<float>();
  at::parallel_for(0, num_tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin * num_slots; slot < end * num_slots; ++slot) {
      const Floats weight(weights[slot]);
      Floats product(0.0f);
      for (int64_t at = 0; at < d_model; at += WIDTH) {
        const int64_t count = std::min(WIDTH, d_model - at);
        const Floats gradient = load(dout + slot / num_slots * d_model + at, count);
        product = at::vec::fmadd(gradient, load(y + slot * d_model + at, count), product);
        store(gradient * weight, dy + slot * d_model + at, count);
      }
      dweights[slot] = at::vec::vec_reduce_all<float>([](Floats& a, Floats& b) { return a + b; }, product);
    }
  });
  return {dy_TKD, dweights_TK};
}

template <typename Run>
auto dispatch(at::ScalarType dtype, const Run& run) {
  if (dtype == at::kFloat) return run(float{});
  TORCH_CHECK(dtype == at::kBFloat16, "the experts' kernel computes in float32 and bfloat16, not in ", dtype);
  return run(at::BFloat16{});
}

std::tuple<Tensor, Tensor, Tensor> experts_forward(
    const Tensor& x_TD, const Tensor& row_of_slot_TK, const Tensor& rows_per_expert_E, const std::string& kind,
    const std::optional<Tensor>& w_gate, const Tensor& w_in, const std::optional<Tensor>& b_in, const Tensor& w_out,
    const std::optional<Tensor>& b_out) {
  const Layout layout(row_of_slot_TK, rows_per_expert_E);
  return dispatch(x_TD.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    return forward<T>(x_TD, layout, Weights<T>(kind, w_gate, w_in, b_in, w_out, b_out));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward(
    const Tensor& dy_TKD, const Tensor& x_TD, const Tensor& row_of_slot_TK, const Tensor& rows_per_expert_E,
    const Tensor& gate_RF, const Tensor& hidden_RF, const std::string& kind, const std::optional<Tensor>& w_gate,
    const Tensor& w_in, const std::optional<Tensor>& b_in, const Tensor& w_out, const std::optional<Tensor>& b_out,
    bool need_weights) {
  const Layout layout(row_of_slot_TK, rows_per_expert_E);
  const Gradients found = dispatch(x_TD.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    return backward<T>(dy_TKD, x_TD, row_of_slot_TK, layout, gate_RF, hidden_RF,
                       Weights<T>(kind, w_gate, w_in, b_in, w_out, b_out), need_weights);
  });
  return {found.x, found.gate, found.in, found.b_in, found.out, found.b_out};
}

Tensor combine_any(const Tensor& y_TKD, const Tensor& weights_TK) {
  return dispatch(y_TKD.scalar_type(), [&](auto zero) { return combine<decltype(zero)>(y_TKD, weights_TK); });
}

std::tuple<Tensor, Tensor> combine_backward_any(const Tensor& dout_TD, const Tensor& y_TKD, const Tensor& weights_TK) {
  return dispatch(y_TKD.scalar_type(),
                  [&](auto zero) { return combine_backward<decltype(zero)>(dout_TD, y_TKD, weights_TK); });
}

}  // namespace

TORCH_LIBRARY(smoe_train, library) {
  library.def(
      "experts_forward(Tensor x, Tensor row_of_slot, Tensor rows_per_expert, str kind, Tensor? w_gate, Tensor w_in, "
      "Tensor? b_in, Tensor w_out, Tensor? b_out) -> (Tensor y, Tensor gate, Tensor hidden)");
  library.def(
      "experts_backward(Tensor dy, Tensor x, Tensor row_of_slot, Tensor rows_per_expert, Tensor gate, Tensor hidden, "
      "str kind, Tensor? w_gate, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, bool need_weights) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("combine(Tensor y, Tensor weights) -> Tensor");
  library.def("combine_backward(Tensor dout, Tensor y, Tensor weights) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(smoe_train, CPU, library) {
  library.impl("experts_forward", &experts_forward);
  library.impl("experts_backward", &experts_backward);
  library.impl("combine", &combine_any);
  library.impl("combine_backward", &combine_backward_any);
}
