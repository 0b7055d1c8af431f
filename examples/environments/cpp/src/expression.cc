#include "expression.h"

#include <cstddef>

namespace calculator {
namespace {

// A model wrote it: what it may cost is bounded.
constexpr std::size_t kMaxLength = 200;
constexpr int kMaxDepth = 32;

using Number = std::optional<std::int64_t>;

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Number Whole() {
    const Number value = Sum(0);
    Skip();
    return text_.empty() ? value : std::nullopt;
  }

 private:
  Number Sum(int depth) {
    Number left = Product(depth);
    while (left) {
      std::int64_t result = 0;
      if (Take('+')) {
        const Number right = Product(depth);
        if (!right || __builtin_add_overflow(*left, *right, &result)) return std::nullopt;
      } else if (Take('-')) {
        const Number right = Product(depth);
        if (!right || __builtin_sub_overflow(*left, *right, &result)) return std::nullopt;
      } else {
        break;
      }
      left = result;
    }
    return left;
  }

  Number Product(int depth) {
    Number left = Factor(depth);
    while (left && Take('*')) {
      std::int64_t result = 0;
      const Number right = Factor(depth);
      if (!right || __builtin_mul_overflow(*left, *right, &result)) return std::nullopt;
      left = result;
    }
    return left;
  }

  Number Factor(int depth) {
    if (depth == kMaxDepth) return std::nullopt;
    if (Take('-')) {
      std::int64_t result = 0;
      const Number value = Factor(depth + 1);
      if (!value || __builtin_sub_overflow(std::int64_t{0}, *value, &result)) return std::nullopt;
      return result;
    }
    if (Take('(')) {
      const Number value = Sum(depth + 1);
      return Take(')') ? value : std::nullopt;
    }
    return Literal();
  }

  Number Literal() {
    Skip();
    if (text_.empty() || !IsDigit(text_.front())) return std::nullopt;
    std::int64_t value = 0;
    for (; !text_.empty() && IsDigit(text_.front()); text_.remove_prefix(1)) {
      if (__builtin_mul_overflow(value, 10, &value) ||
          __builtin_add_overflow(value, text_.front() - '0', &value)) {
        return std::nullopt;
      }
    }
    return value;
  }

  bool Take(char wanted) {
    Skip();
    if (text_.empty() || text_.front() != wanted) return false;
    text_.remove_prefix(1);
    return true;
  }

  void Skip() {
    while (!text_.empty() && text_.front() == ' ') text_.remove_prefix(1);
  }

  static bool IsDigit(char c) { return c >= '0' && c <= '9'; }

  std::string_view text_;
};

}  // namespace

std::optional<std::int64_t> Evaluate(std::string_view text) {
  return text.size() <= kMaxLength ? Parser(text).Whole() : std::nullopt;
}

}  // namespace calculator
