// Activations and their derivatives, fused with a bias or a gate.
// A task owns a tile of one row. bias_activation reads 4 bytes and writes 4 an element, gated_activation reads 8 and writes 4;
// relu is bound by memory, the others by exp (some 20 operations a vector), which threads hide.
#include "activation/activation.h"

#include "common/math.h"
#include "common/parallel.h"

namespace hybrid::HYBRID_ISA {
namespace {

constexpr int64_t kTile = 8192;  // elements of one task: some microseconds

// An activation has value(x) and slope(x) = its derivative.
struct Relu {
  static Vec value(Vec x) { return max(Vec(0.0f), x); }  // in this order a NaN stays
  static Vec slope(Vec x) { return select(x <= 0.0f, 0.0f, 1.0f); }
};

struct Silu {  // x sigmoid(x)
  static Vec value(Vec x) { return x * sigmoid(x); }
  static Vec slope(Vec x) {
    const Vec s = sigmoid(x);
    return s * fma(x, Vec(1.0f) - s, 1.0f);
  }
};

struct GeluTanh {  // x (1 + tanh u) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3)
  static constexpr float kScale = 0.7978845608f, kCubic = 0.044715f;
  static Vec value(Vec x) {
    const Vec u = kScale * fma(kCubic * x * x, x, x);
    return (0.5f * x) * (Vec(1.0f) + tanh(u));
  }
  static Vec slope(Vec x) {
    x = max(Vec(-10.0f), min(Vec(10.0f), x));  // the slope is 0 or 1 beyond, where x^2 may overflow; a NaN stays
    const Vec square = x * x;
    const Vec t = tanh(kScale * fma(kCubic * square, x, x));
    const Vec du = kScale * fma(3.0f * kCubic, square, 1.0f);
    return fma(0.5f * x * (Vec(1.0f) - t * t), du, 0.5f * (Vec(1.0f) + t));
  }
};

struct GeluErf {  // x Phi(x), Phi the normal distribution
  static constexpr float kRootHalf = 0.7071067812f, kDensity = 0.3989422804f;
  static Vec value(Vec x) { return (0.5f * x) * (Vec(1.0f) + erf(x * kRootHalf)); }
  static Vec slope(Vec x) {
    const Vec cumulative = 0.5f * (Vec(1.0f) + erf(x * kRootHalf));
    return fma(x * kDensity, exp(-0.5f * x * x), cumulative);
  }
};

// Calls fn(the activation's type).
template <typename Fn>
void with_activation(Activation kind, const Fn& fn) {
  switch (kind) {
    case Activation::kRelu: return fn(Relu{});
    case Activation::kSilu: return fn(Silu{});
    case Activation::kGeluTanh: return fn(GeluTanh{});
    case Activation::kGeluErf: return fn(GeluErf{});
  }
}

// Calls fn(row, column, lanes) for every vector of a [rows, cols] array, a tile of a row to a task.
template <typename Fn>
void for_each_element_vec(int64_t rows, int64_t cols, const Fn& fn) {
  const int64_t tiles = (cols + kTile - 1) / kTile;            // of one row, when rows are long
  const int64_t rows_per_task = cols > 0 && cols < kTile ? kTile / cols : 1;  // when they are short
  const int64_t row_tasks = (rows + rows_per_task - 1) / rows_per_task;
  parallel_for(row_tasks * tiles, [&](int64_t task) {
    const int64_t begin = task % tiles * kTile;
    const int64_t size = cols - begin < kTile ? cols - begin : kTile;
    const int64_t first = task / tiles * rows_per_task;
    const int64_t last = first + rows_per_task < rows ? first + rows_per_task : rows;
    for (int64_t row = first; row < last; ++row) {
      for_each_vec(size, [&](int64_t i, int64_t lanes) { fn(row, begin + i, lanes); });
    }
  });
}

Vec add_bias(Vec x, const float* bias, int64_t col, int64_t lanes) {
  return bias == nullptr ? x : x + Vec::load(bias + col, lanes);
}

}  // namespace

void bias_activation(const float* x, const float* bias, float* y, int64_t rows, int64_t cols, Activation kind) {
  with_activation(kind, [&](auto act) {
    for_each_element_vec(rows, cols, [&](int64_t row, int64_t col, int64_t lanes) {
      const int64_t at = row * cols + col;
      act.value(add_bias(Vec::load(x + at, lanes), bias, col, lanes)).store(y + at, lanes);
    });
  });
}

void gated_activation(const float* gate_up, float* y, int64_t rows, int64_t cols, Activation kind) {
  with_activation(kind, [&](auto act) {
    for_each_element_vec(rows, cols, [&](int64_t row, int64_t col, int64_t lanes) {
      const float* gate = gate_up + row * 2 * cols + col;
      (act.value(Vec::load(gate, lanes)) * Vec::load(gate + cols, lanes)).store(y + row * cols + col, lanes);
    });
  });
}

void bias_activation_backward(const float* grad_y, const float* x, const float* bias, float* grad_x, int64_t rows,
                              int64_t cols, Activation kind) {
  with_activation(kind, [&](auto act) {
    for_each_element_vec(rows, cols, [&](int64_t row, int64_t col, int64_t lanes) {
      const int64_t at = row * cols + col;
      const Vec slope = act.slope(add_bias(Vec::load(x + at, lanes), bias, col, lanes));
      (Vec::load(grad_y + at, lanes) * slope).store(grad_x + at, lanes);
    });
  });
}

void gated_activation_backward(const float* grad_y, const float* gate_up, float* grad_gate_up, int64_t rows,
                               int64_t cols, Activation kind) {
  with_activation(kind, [&](auto act) {
    for_each_element_vec(rows, cols, [&](int64_t row, int64_t col, int64_t lanes) {
      const int64_t at = row * 2 * cols + col;
      const Vec gate = Vec::load(gate_up + at, lanes);
      const Vec up = Vec::load(gate_up + at + cols, lanes);
      const Vec grad = Vec::load(grad_y + row * cols + col, lanes);
      (grad * up * act.slope(gate)).store(grad_gate_up + at, lanes);
      (grad * act.value(gate)).store(grad_gate_up + at + cols, lanes);
    });
  });
}

void column_sum(const float* x, float* partial, float* out, int64_t rows, int64_t cols) {
  // One task sums kTile columns of `count` rows starting at `from`.
  const auto sum_rows = [cols](const float* from, int64_t count, float* to, int64_t tile) {
    const int64_t begin = tile * kTile;
    const int64_t size = cols - begin < kTile ? cols - begin : kTile;
    for_each_vec(size, [&](int64_t i, int64_t lanes) {
      Vec total;
      for (int64_t row = 0; row < count; ++row) total += Vec::load(from + row * cols + begin + i, lanes);
      total.store(to + begin + i, lanes);
    });
  };
  const int64_t tiles = (cols + kTile - 1) / kTile;
  const int64_t blocks = column_sum_blocks(rows);
  parallel_for(blocks * tiles, [&](int64_t task) {
    const int64_t block = task / tiles;
    const int64_t first = block * kColumnSumRows;
    const int64_t count = rows - first < kColumnSumRows ? rows - first : kColumnSumRows;
    sum_rows(x + first * cols, count, partial + block * cols, task % tiles);
  });
  parallel_for(tiles, [&](int64_t tile) { sum_rows(partial, blocks, out, tile); });
}

}  // namespace hybrid::HYBRID_ISA
