#include "common/dims.h"

#include <c10/util/Exception.h>

namespace hybrid {
namespace {

bool is_literal(const std::string& symbol) { return symbol.find_first_not_of("0123456789") == std::string::npos; }

std::string bracketed(const std::vector<std::string>& parts) {
  std::string text = "[";
  for (size_t i = 0; i < parts.size(); ++i) text += (i ? ", " : "") + parts[i];
  return text + "]";
}

std::string bracketed(at::IntArrayRef sizes) {
  std::vector<std::string> parts;
  for (const int64_t size : sizes) parts.push_back(std::to_string(size));
  return bracketed(parts);
}

}  // namespace

Dims& Dims::expect(const at::Tensor& tensor, const char* name, Shape shape, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.device().type() == device_, op_, ": ", name, " is on ", tensor.device().str(), "; expected ",
                    c10::DeviceTypeName(device_, /*lower_case=*/true));
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, op_, ": ", name, " has dtype ", c10::toString(tensor.scalar_type()),
                    "; expected ", c10::toString(dtype));
  const size_t already_bound = bindings_.size();
  const at::IntArrayRef sizes = tensor.sizes();
  const bool ellipsis = shape.size() > 0 && std::string(*shape.begin()) == "...";
  const size_t named = shape.size() - (ellipsis ? 1 : 0);
  bool good = ellipsis ? sizes.size() >= named : sizes.size() == named;
  if (good) {
    size_t at = 0;
    for (const std::string symbol : shape) {
      const size_t count = symbol == "..." ? sizes.size() - named : 1;
      good = matches(symbol, sizes.slice(at, count), name) && good;
      at += count;
    }
  }
  TORCH_CHECK_VALUE(good, op_, ": ", name, " has shape ", bracketed(sizes), "; expected ",
                    expectation(shape, already_bound));
  return *this;
}

Dims& Dims::expect(const std::optional<at::Tensor>& tensor, const char* name, Shape shape, at::ScalarType dtype) {
  return tensor.has_value() ? expect(*tensor, name, shape, dtype) : *this;
}

Dims& Dims::bind(const char* symbol, int64_t size, const char* source) {
  TORCH_INTERNAL_ASSERT(find(symbol) == nullptr, op_, ": ", symbol, " is bound already");
  bindings_.push_back({symbol, source, {size}});
  return *this;
}

int64_t Dims::operator[](const char* symbol) const {
  const Binding* binding = find(symbol);
  TORCH_INTERNAL_ASSERT(binding != nullptr, op_, ": no argument has the symbol ", symbol);
  return binding->sizes[0];
}

int64_t Dims::leading() const {
  const Binding* binding = find("...");
  TORCH_INTERNAL_ASSERT(binding != nullptr, op_, ": no argument has leading sizes");
  int64_t product = 1;
  for (const int64_t size : binding->sizes) product *= size;
  return product;
}

const Dims::Binding* Dims::find(const std::string& symbol) const {
  for (const Binding& binding : bindings_) {
    if (binding.symbol == symbol) return &binding;
  }
  return nullptr;
}

bool Dims::matches(const std::string& symbol, at::IntArrayRef sizes, const char* source) {
  if (is_literal(symbol)) return sizes[0] == std::stoll(symbol);
  if (const Binding* binding = find(symbol)) return sizes == at::IntArrayRef(binding->sizes);
  bindings_.push_back({symbol, source, sizes.vec()});
  return true;
}

// "[B, T] with B=8 (from rewards)": only what earlier arguments had bound, since this one's own sizes explain nothing.
std::string Dims::expectation(Shape shape, size_t already_bound) const {
  std::vector<std::string> symbols;
  std::string reasons;
  for (const std::string symbol : shape) {
    symbols.push_back(symbol);
    for (size_t i = 0; i < already_bound; ++i) {
      const Binding& binding = bindings_[i];
      if (binding.symbol != symbol) continue;
      const std::string value = symbol == "..." ? bracketed(at::IntArrayRef(binding.sizes)) : std::to_string(binding.sizes[0]);
      reasons += (reasons.empty() ? " with " : ", ") + symbol + "=" + value + " (from " + binding.source + ")";
    }
  }
  return bracketed(symbols) + reasons;
}

}  // namespace hybrid
