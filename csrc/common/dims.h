// The shape contract of a tensor function: every argument is stated once, in symbols, and a violation names the operator, the
// argument, what it has, what was expected and where each symbol's size came from.
//
//   Dims dims("gae");
//   dims.expect(rewards, "rewards", {"B", "T"}).expect(values, "values", {"B", "T"}).expect(lengths, "lengths", {"B"}, at::kLong);
//   const int64_t batch = dims["B"];
//
//   gae: values has shape [8, 64]; expected [B, T] with B=8 (from rewards), T=63 (from rewards)
#pragma once
#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

namespace hybrid {

class Dims {
 public:
  using Shape = std::initializer_list<const char*>;

  explicit Dims(const char* op, at::DeviceType device = at::kCPU) : op_(op), device_(device) {}

  // Checks device, dtype and shape. A symbol's first appearance binds it. "..." as the first symbol stands for any number
  // of leading sizes; a symbol made of digits is that size itself. Throws c10::ValueError (ValueError in Python).
  Dims& expect(const at::Tensor& tensor, const char* name, Shape shape, at::ScalarType dtype = at::kFloat);
  Dims& expect(const std::optional<at::Tensor>& tensor, const char* name, Shape shape, at::ScalarType dtype = at::kFloat);

  // Gives a symbol a size that is computed rather than seen.
  Dims& bind(const char* symbol, int64_t size, const char* source);

  int64_t operator[](const char* symbol) const;
  int64_t leading() const;  // product of the sizes that "..." stands for

 private:
  struct Binding {
    std::string symbol, source;
    std::vector<int64_t> sizes;  // one, or those of "..."
  };

  const Binding* find(const std::string& symbol) const;
  bool matches(const std::string& symbol, at::IntArrayRef sizes, const char* source);
  std::string expectation(Shape shape, size_t already_bound) const;

  const char* op_;
  at::DeviceType device_;
  std::vector<Binding> bindings_;
};

}  // namespace hybrid
