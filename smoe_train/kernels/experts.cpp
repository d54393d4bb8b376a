// The experts of one mixture-of-experts layer on a CPU: gather -> product -> activation -> product -> scatter, and backward.
//
// Work is cut into tasks of one expert and at most BLOCK of its rows, so that what one task touches stays in a core's
// cache, no thread waits for another inside a task, and neither a large expert nor a small number of experts leaves
// threads idle. Every output row and every weight gradient is written by one task, in an order that is fixed: results do
// not depend on the number of threads. Sums are in fp32; what is stored is rounded once.
//
// Sizes: T tokens, K slots a token, R rows sorted by expert (each expert's rows together), D d_model, F d_ff, E experts.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "products.h"
#include "vectors_and_tasks.h"

namespace {

using at::Tensor;
using namespace smoe_train;
constexpr int64_t BLOCK = 384;         // rows of a task
constexpr int64_t COLUMNS_PART = 256;  // columns of a weight's gradient that are a task where experts are few

enum class Kind { relu, gelu, swiglu };

Kind kind_of(const std::string& name) {
  if (name == "relu") return Kind::relu;
  if (name == "gelu") return Kind::gelu;
  TORCH_CHECK(name == "swiglu", "unknown kind of feed-forward: ", name);
  return Kind::swiglu;
}

struct Task {
  int64_t expert, begin, end;  // rows
};

// The rows of this operator: those of the plan that a slot owns, each expert's rounded up to a multiple of its own.
struct Layout {
  int64_t num_tokens, num_slots, num_rows, num_experts;
  std::vector<int64_t> ends, slot_of_row, row_of_slot;  // -1 for rows of padding, and for empty slots
  std::vector<Task> tasks;
  std::vector<int64_t> first_tasks;  // of each expert, and the end
  bool full = true;                  // no slot is empty

  Layout(const Tensor& row_of_slot_TK, const Tensor& rows_per_expert_E)
      : num_tokens(row_of_slot_TK.size(0)), num_slots(row_of_slot_TK.size(1)), num_experts(rows_per_expert_E.size(0)) {
    TORCH_CHECK(row_of_slot_TK.is_contiguous() && rows_per_expert_E.is_contiguous(), "a plan has to be contiguous");
    const auto* counts = rows_per_expert_E.const_data_ptr<int64_t>();
    const auto* planned = row_of_slot_TK.const_data_ptr<int64_t>();
    int64_t num_planned = 0;
    for (int64_t expert = 0; expert < num_experts; ++expert) num_planned += counts[expert];
    std::vector<int64_t> slot_of_planned(num_planned, -1);
    for (int64_t slot = 0; slot < num_tokens * num_slots; ++slot) {
      TORCH_CHECK(planned[slot] >= 0, "an empty slot's row is the number of rows, not ", planned[slot]);
      if (planned[slot] < num_planned)
        slot_of_planned[planned[slot]] = slot;
      else
        full = false;
    }
    row_of_slot.assign(num_tokens * num_slots, -1);
    const int64_t multiple = row_multiple();
    for (int64_t expert = 0, row = 0; expert < num_experts; row += counts[expert++]) {
      const int64_t begin = slot_of_row.size();
      for (int64_t i = row; i < row + counts[expert]; ++i) {
        if (slot_of_planned[i] < 0) continue;
        row_of_slot[slot_of_planned[i]] = slot_of_row.size();
        slot_of_row.push_back(slot_of_planned[i]);
      }
      const int64_t rows = round_up(slot_of_row.size() - begin, multiple);
      slot_of_row.resize(begin + rows, -1);
      first_tasks.push_back(tasks.size());
      // Equal parts rather than full blocks and a rest.
      const int64_t parts = (rows + BLOCK - 1) / BLOCK;
      const int64_t size = parts ? round_up((rows + parts - 1) / parts, ROWS) : 0;
      for (int64_t at = 0; at < rows; at += size)
        tasks.push_back({expert, begin + at, begin + std::min(at + size, rows)});
      ends.push_back(begin + rows);
    }
    first_tasks.push_back(tasks.size());
    num_rows = slot_of_row.size();
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

  // An expert's matrices; with `backward` transposed, as gradients go through them.
  Right<T> to_hidden(const T* stacked, int64_t expert, bool backward = false) const {
    return {stacked + expert * d_model * d_ff, d_ff, backward};
  }
  Right<T> to_model(int64_t expert, bool backward = false) const {
    return {out + expert * d_model * d_ff, d_model, backward};
  }
};

// Calls with_kind(std::integral_constant<Kind, kind>), so that no vector looks at it again.
template <typename WithKind>
void for_kind(Kind kind, const WithKind& with_kind) {
  if (kind == Kind::relu) with_kind(std::integral_constant<Kind, Kind::relu>{});
  if (kind == Kind::gelu) with_kind(std::integral_constant<Kind, Kind::gelu>{});
  if (kind == Kind::swiglu) with_kind(std::integral_constant<Kind, Kind::swiglu>{});
}

const Floats ZERO(0.0f), ONE(1.0f), HALF(0.5f);

inline Floats sigmoid(const Floats& x) { return ONE / (ONE + x.neg().exp_u20()); }

// Phi(x) of the exact (not the tanh) GELU.
inline Floats normal_distribution(const Floats& x) { return HALF * (ONE + (x * Floats(0.70710678f)).erf()); }

// act(hidden), or silu(gate) * hidden.
template <Kind KIND>
inline Floats activate(const Floats& gate, const Floats& hidden) {
  if constexpr (KIND == Kind::swiglu) return gate * sigmoid(gate) * hidden;
  if constexpr (KIND == Kind::relu) return clamp_min(hidden, ZERO);
  return hidden * normal_distribution(hidden);
}

// The activation once more, and the gradients of gate and hidden from its own.
template <Kind KIND>
inline std::array<Floats, 3> activate_backward(const Floats& gate, const Floats& hidden, const Floats& gradient) {
  if constexpr (KIND == Kind::swiglu) {
    const Floats s = sigmoid(gate), silu = gate * s;
    return {silu * hidden, gradient * hidden * s * (ONE + gate * (ONE - s)), gradient * silu};
  } else if constexpr (KIND == Kind::relu) {
    return {clamp_min(hidden, ZERO), ZERO, Floats::blendv(ZERO, gradient, hidden > ZERO)};
  } else {
    const Floats phi = normal_distribution(hidden);
    const Floats density = Floats(0.39894228f) * (hidden * hidden * Floats(-0.5f)).exp();
    return {hidden * phi, ZERO, gradient * (phi + hidden * density)};
  }
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

// Gate and hidden of a task's rows, both kept for the backward pass, and what the activation makes of them.
template <Kind KIND, typename T>
void to_hidden(const Task& task, const Weights<T>& weights, const T* rows_in, T* gate, T* hidden, T* activated) {
  constexpr bool GATED = KIND == Kind::swiglu;
  const int64_t rows = task.end - task.begin, d_ff = weights.d_ff;
  const T* bias = GATED ? nullptr : weights.b_in + task.expert * d_ff;
  const auto finish = [&](int64_t row, int64_t height, int64_t column, int64_t width, const auto& results) {
    for (int64_t i = 0; i < height; ++i) {
      const int64_t to = (row + i) * d_ff + column;
      for_vectors(width, [&](int64_t at, int64_t count) {
        Floats value = load(results[0] + i * COLUMNS + at, count), gate_value = ZERO;
        if constexpr (GATED) {
          gate_value = load(results[1] + i * COLUMNS + at, count);
          store(gate_value, gate + to + at, count);
        } else {
          value = value + load(bias + column + at, count);
        }
        store(value, hidden + to + at, count);
        store(activate<KIND>(gate_value, value), activated + to + at, count);
      });
    }
  };
  const Left<T> left = Left<T>::of_rows(rows_in, weights.d_model);
  const Right<T> in = weights.to_hidden(weights.in, task.expert);
  if constexpr (GATED) {
    const std::array<Right<T>, 2> both{in, weights.to_hidden(weights.gate, task.expert)};
    multiply<false>(std::array<Left<T>, 2>{left, left}, both, rows, weights.d_model, 0, d_ff, finish);
  } else {
    multiply<false>(std::array<Left<T>, 1>{left}, std::array<Right<T>, 1>{in}, rows, weights.d_model, 0, d_ff, finish);
  }
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x_TD, const Layout& layout, const Weights<T>& weights) {
  const int64_t d_model = weights.d_model, d_ff = weights.d_ff;
  Tensor gate_RF = at::empty({weights.gate ? layout.num_rows : 0, d_ff}, x_TD.options());
  Tensor hidden_RF = at::empty({layout.num_rows, d_ff}, x_TD.options());
  const std::vector<int64_t> shape{layout.num_tokens, layout.num_slots, d_model};
  Tensor y_TKD = layout.full ? at::empty(shape, x_TD.options()) : at::zeros(shape, x_TD.options());
  const T* x = x_TD.const_data_ptr<T>();
  T *gate = gate_RF.mutable_data_ptr<T>(), *hidden = hidden_RF.mutable_data_ptr<T>(), *y = y_TKD.mutable_data_ptr<T>();
  run_tasks(layout.tasks.size(), [&](int64_t number) {
    const Task& task = layout.tasks[number];
    const int64_t rows = task.end - task.begin, at_hidden = task.begin * d_ff;
    T *rows_in = space_for<T, 0>(rows * d_model), *activated = space_for<T, 1>(rows * d_ff);
    gather(layout, task, x, layout.num_slots, rows_in, d_model);
    for_kind(weights.kind, [&](auto kind) {
      to_hidden<decltype(kind)::value>(task, weights, rows_in, gate + at_hidden, hidden + at_hidden, activated);
    });
    const T* bias = weights.b_out ? weights.b_out + task.expert * d_model : nullptr;
    multiply<false>(
        std::array<Left<T>, 1>{Left<T>::of_rows(activated, d_ff)}, std::array<Right<T>, 1>{weights.to_model(task.expert)},
        rows, d_ff, 0, d_model, [&](int64_t row, int64_t height, int64_t column, int64_t width, const auto& results) {
          for (int64_t i = 0; i < height; ++i) {
            const int64_t slot = layout.slot_of_row[task.begin + row + i];
            if (slot < 0) continue;
            for_vectors(width, [&](int64_t at, int64_t count) {
              const Floats value = load(results[0] + i * COLUMNS + at, count);
              store(bias ? value + load(bias + column + at, count) : value, y + slot * d_model + column + at, count);
            });
          }
        });
  });
  return {y_TKD, gate_RF, hidden_RF};
}

// Sums the rows of each token's slots, in fp32.
template <typename T>
void sum_slots(const Layout& layout, const T* rows_RD, T* sums_TD, int64_t d_model) {
  at::parallel_for(0, layout.num_tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for_vectors(d_model, [&](int64_t at, int64_t count) {
        Floats sum(0.0f);
        for (int64_t slot = token * layout.num_slots; slot < (token + 1) * layout.num_slots; ++slot)
          if (layout.row_of_slot[slot] >= 0) sum = sum + load(rows_RD + layout.row_of_slot[slot] * d_model + at, count);
        store(sum, sums_TD + token * d_model + at, count);
      });
    }
  });
}

// Sums an expert's rows, in fp32.
template <typename T>
void sum_rows(const T* rows, int64_t num_rows, int64_t width, T* sums) {
  for_vectors(width, [&](int64_t at, int64_t count) {
    Floats sum(0.0f);
    for (int64_t begin = 0; begin < num_rows; begin += 128) {  // parts, or rounding adds up over an expert's rows
      Floats part(0.0f);
      for (int64_t row = begin; row < std::min(begin + 128, num_rows); ++row)
        part = part + load(rows + row * width + at, count);
      sum = sum + part;
    }
    store(sum, sums + at, count);
  });
}

// The rows that the backward pass of an expert works on, sorted by expert.
template <typename T>
struct Rows {
  T *x, *dy, *activated, *d_gate, *d_hidden, *dx;
};

// The gradients of a task's gate, hidden and input, with the activation once more.
template <Kind KIND, typename T>
void rows_backward(const Task& task, const Weights<T>& weights, const T* gate, const T* hidden, const Rows<T>& rows) {
  constexpr bool GATED = KIND == Kind::swiglu;
  const int64_t d_model = weights.d_model, d_ff = weights.d_ff, num_rows = task.end - task.begin;
  const int64_t at_hidden = task.begin * d_ff, at_model = task.begin * d_model;
  multiply<false>(
      std::array<Left<T>, 1>{Left<T>::of_rows(rows.dy + at_model, d_model)},
      std::array<Right<T>, 1>{weights.to_model(task.expert, true)}, num_rows, d_model, 0, d_ff,
      [&](int64_t row, int64_t height, int64_t column, int64_t width, const auto& results) {
        for (int64_t i = 0; i < height; ++i) {
          const int64_t to = at_hidden + (row + i) * d_ff + column;
          for_vectors(width, [&](int64_t at, int64_t count) {
            const Floats gate_value = GATED ? load(gate + to + at, count) : ZERO;
            const auto [activated, d_gate, d_hidden] = activate_backward<KIND>(
                gate_value, load(hidden + to + at, count), load(results[0] + i * COLUMNS + at, count));
            store(activated, rows.activated + to + at, count);
            if (GATED) store(d_gate, rows.d_gate + to + at, count);
            store(d_hidden, rows.d_hidden + to + at, count);
          });
        }
      });
  const auto finish = [&](int64_t row, int64_t height, int64_t column, int64_t width, const auto& results) {
    for (int64_t i = 0; i < height; ++i)
      for_vectors(width, [&](int64_t at, int64_t count) {
        store(load(results[0] + i * COLUMNS + at, count), rows.dx + at_model + (row + i) * d_model + column + at, count);
      });
  };
  const Left<T> d_hidden = Left<T>::of_rows(rows.d_hidden + at_hidden, d_ff);
  const Right<T> in = weights.to_hidden(weights.in, task.expert, true);
  if constexpr (GATED) {
    const std::array<Left<T>, 2> both{d_hidden, Left<T>::of_rows(rows.d_gate + at_hidden, d_ff)};
    const std::array<Right<T>, 2> through{in, weights.to_hidden(weights.gate, task.expert, true)};
    multiply<true>(both, through, num_rows, d_ff, 0, d_model, finish);
  } else {
    multiply<true>(std::array<Left<T>, 1>{d_hidden}, std::array<Right<T>, 1>{in}, num_rows, d_ff, 0, d_model, finish);
  }
}

// Columns `first` to `last` of the gradients of one or two of an expert's weights, which have the same input: the sum
// over its rows of input times gradient.
template <size_t P, typename T>
void weights_backward(const T* inputs, int64_t height, const std::array<const T*, P>& gradients, int64_t width,
                      int64_t rows, const std::array<T*, P>& to, int64_t first, int64_t last) {
  if (rows == 0) {
    for (T* one : to)
      for (int64_t row = 0; row < height; ++row) std::fill(one + row * width + first, one + row * width + last, T(0));
    return;
  }
  std::array<Left<T>, P> lefts;
  lefts.fill(transposed(inputs, rows, height));
  std::array<Right<T>, P> rights;
  for (size_t p = 0; p < P; ++p) rights[p] = {gradients[p], width};
  multiply<false>(lefts, rights, height, rows, first, last,
                  [&](int64_t row, int64_t count, int64_t column, int64_t columns, const auto& results) {
                    for (size_t p = 0; p < P; ++p)
                      for (int64_t i = 0; i < count; ++i)
                        for_vectors(columns, [&](int64_t at, int64_t left) {
                          stream(load(results[p] + i * COLUMNS + at, left), to[p] + (row + i) * width + column + at, left);
                        });
                  });
}

struct Gradients {
  Tensor x, gate, in, b_in, out, b_out;
};

template <typename T>
Gradients backward(const Tensor& dy_TKD, const Tensor& x_TD, const Layout& layout, const Tensor& gate_RF,
                   const Tensor& hidden_RF, const Weights<T>& weights, bool need_weights) {
  const int64_t d_model = weights.d_model, d_ff = weights.d_ff, num_rows = layout.num_rows;
  const bool gated = weights.kind == Kind::swiglu;
  const auto options = x_TD.options();
  Tensor x_RD = at::empty({need_weights ? num_rows : 0, d_model}, options), dy_RD = at::empty({num_rows, d_model}, options);
  Tensor activated_RF = at::empty({num_rows, d_ff}, options), d_hidden_RF = at::empty({num_rows, d_ff}, options);
  Tensor d_gate_RF = at::empty({gated ? num_rows : 0, d_ff}, options), dx_RD = at::empty({num_rows, d_model}, options);
  const Rows<T> rows{x_RD.mutable_data_ptr<T>(),       dy_RD.mutable_data_ptr<T>(),     activated_RF.mutable_data_ptr<T>(),
                     d_gate_RF.mutable_data_ptr<T>(), d_hidden_RF.mutable_data_ptr<T>(), dx_RD.mutable_data_ptr<T>()};
  const T *x = x_TD.const_data_ptr<T>(), *dy = dy_TKD.const_data_ptr<T>();
  const T *gate = gate_RF.const_data_ptr<T>(), *hidden = hidden_RF.const_data_ptr<T>();
  const auto of_rows = [&](const Task& task) {
    if (need_weights) gather(layout, task, x, layout.num_slots, rows.x + task.begin * d_model, d_model);
    gather(layout, task, dy, 1, rows.dy + task.begin * d_model, d_model);
    for_kind(weights.kind, [&](auto kind) { rows_backward<decltype(kind)::value>(task, weights, gate, hidden, rows); });
  };

  Gradients found;
  const int64_t num_experts = need_weights ? layout.num_experts : 0;
  found.in = at::empty({num_experts, d_model, d_ff}, options);
  found.out = at::empty({num_experts, d_ff, d_model}, options);
  found.gate = at::empty({gated ? num_experts : 0, d_model, d_ff}, options);
  found.b_in = at::empty({gated ? 0 : num_experts, d_ff}, options);
  found.b_out = at::empty({gated ? 0 : num_experts, d_model}, options);
  T *to_in = found.in.mutable_data_ptr<T>(), *to_out = found.out.mutable_data_ptr<T>();
  T *to_gate = found.gate.mutable_data_ptr<T>(), *to_b_in = found.b_in.mutable_data_ptr<T>();
  T* to_b_out = found.b_out.mutable_data_ptr<T>();
  const auto of_hidden = [&](int64_t expert, int64_t first, int64_t last) {
    const int64_t begin = layout.begin_of(expert), count = layout.ends[expert] - begin, at = expert * d_model * d_ff;
    const T *inputs = rows.x + begin * d_model, *d_hidden = rows.d_hidden + begin * d_ff;
    if (gated) {
      const std::array<const T*, 2> gradients{d_hidden, rows.d_gate + begin * d_ff};
      weights_backward<2, T>(inputs, d_model, gradients, d_ff, count, {to_in + at, to_gate + at}, first, last);
    } else {
      weights_backward<1, T>(inputs, d_model, {d_hidden}, d_ff, count, {to_in + at}, first, last);
      if (first == 0) sum_rows(d_hidden, count, d_ff, to_b_in + expert * d_ff);
    }
  };
  const auto of_model = [&](int64_t expert, int64_t first, int64_t last) {
    const int64_t begin = layout.begin_of(expert), count = layout.ends[expert] - begin, at = expert * d_model * d_ff;
    const T* gradients = rows.dy + begin * d_model;
    weights_backward<1, T>(rows.activated + begin * d_ff, d_ff, {gradients}, d_model, count, {to_out + at}, first, last);
    if (!gated && first == 0) sum_rows(gradients, count, d_model, to_b_out + expert * d_model);
  };

  if (layout.experts_fill_threads()) {  // an expert's weights' gradients at once, while its rows are in the cache
    run_tasks(layout.num_experts, [&](int64_t expert) {
      for (int64_t number = layout.first_tasks[expert]; number < layout.first_tasks[expert + 1]; ++number)
        of_rows(layout.tasks[number]);
      if (!need_weights) return;
      of_hidden(expert, 0, d_ff);
      of_model(expert, 0, d_model);
    });
  } else {
    run_tasks(layout.tasks.size(), [&](int64_t number) { of_rows(layout.tasks[number]); });
    const int64_t hidden_parts = (d_ff + COLUMNS_PART - 1) / COLUMNS_PART;
    const int64_t parts = hidden_parts + (d_model + COLUMNS_PART - 1) / COLUMNS_PART;
    run_tasks(num_experts * parts, [&](int64_t number) {
      const int64_t expert = number / parts, part = number % parts;
      const bool is_hidden = part < hidden_parts;
      const int64_t first = (is_hidden ? part : part - hidden_parts) * COLUMNS_PART;
      if (is_hidden)
        of_hidden(expert, first, std::min(first + COLUMNS_PART, d_ff));
      else
        of_model(expert, first, std::min(first + COLUMNS_PART, d_model));
    });
  }
  found.x = at::empty_like(x_TD);
  sum_slots(layout, rows.dx, found.x.mutable_data_ptr<T>(), d_model);
  return found;
}

// The weighted sum of each token's slots, in fp32.
template <typename T>
Tensor combine(const Tensor& y_TKD, const Tensor& weights_TK) {
  const int64_t num_tokens = y_TKD.size(0), num_slots = y_TKD.size(1), d_model = y_TKD.size(2);
  TORCH_CHECK(weights_TK.sizes() == y_TKD.sizes().slice(0, 2), "a weight for each slot of ", y_TKD.sizes(), ", not ",
              weights_TK.sizes());
  Tensor out_TD = at::empty({num_tokens, d_model}, y_TKD.options());
  const T* y = y_TKD.const_data_ptr<T>();
  const float* weights = weights_TK.const_data_ptr<float>();
  T* out = out_TD.mutable_data_ptr<T>();
  at::parallel_for(0, num_tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for_vectors(d_model, [&](int64_t at, int64_t count) {
        Floats sum(0.0f);
        for (int64_t slot = token * num_slots; slot < (token + 1) * num_slots; ++slot)
          sum = fmadd(Floats(weights[slot]), load(y + slot * d_model + at, count), sum);
        store(sum, out + token * d_model + at, count);
      });
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
      for_vectors(d_model, [&](int64_t at, int64_t count) {
        const Floats gradient = load(dout + slot / num_slots * d_model + at, count);
        product = fmadd(gradient, load(y + slot * d_model + at, count), product);
        store(gradient * weight, dy + slot * d_model + at, count);
      });
      dweights[slot] = sum_of(product);
    }
  });
  return {dy_TKD, dweights_TK};
}

// What is read by pointers from here on is as large as the plan and the weights say, and lies as they say.
void check(const Layout& layout, const Tensor& x_TD, const std::optional<Tensor>& w_gate, const Tensor& w_in,
           const std::optional<Tensor>& b_in, const Tensor& w_out, const std::optional<Tensor>& b_out) {
  TORCH_CHECK(w_in.dim() == 3 && w_in.size(0) == layout.num_experts, "the plan is for ", layout.num_experts, " experts");
  const int64_t d_model = w_in.size(1), d_ff = w_in.size(2);
  const auto is = [](const Tensor& tensor, std::vector<int64_t> sizes) {
    TORCH_CHECK(tensor.sizes() == at::IntArrayRef(sizes), "expected ", at::IntArrayRef(sizes), ", not ", tensor.sizes());
    TORCH_CHECK(tensor.is_contiguous(), "the experts' operators take contiguous tensors");
  };
  is(x_TD, {layout.num_tokens, d_model});
  is(w_in, {layout.num_experts, d_model, d_ff});
  is(w_out, {layout.num_experts, d_ff, d_model});
  if (w_gate) is(*w_gate, {layout.num_experts, d_model, d_ff});
  if (b_in) is(*b_in, {layout.num_experts, d_ff});
  if (b_out) is(*b_out, {layout.num_experts, d_model});
}

std::tuple<Tensor, Tensor, Tensor> experts_forward(
    const Tensor& x_TD, const Tensor& row_of_slot_TK, const Tensor& rows_per_expert_E, const std::string& kind,
    const std::optional<Tensor>& w_gate, const Tensor& w_in, const std::optional<Tensor>& b_in, const Tensor& w_out,
    const std::optional<Tensor>& b_out) {
  const Layout layout(row_of_slot_TK, rows_per_expert_E);
  check(layout, x_TD, w_gate, w_in, b_in, w_out, b_out);
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
  check(layout, x_TD, w_gate, w_in, b_in, w_out, b_out);
  TORCH_CHECK(hidden_RF.size(0) == layout.num_rows, "the forward pass had another layout: was oneDNN switched on or off?");
  const Gradients found = dispatch(x_TD.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    return backward<T>(dy_TKD, x_TD, layout, gate_RF, hidden_RF,
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

TORCH_LIBRARY_FRAGMENT(smoe_train, library) {
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
