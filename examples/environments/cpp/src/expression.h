// Whole numbers with + - * and parentheses: what the tool computes.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace calculator {

// The value of `text`; nothing, where it is no such expression, or too long, too deep or too large
// to compute.
std::optional<std::int64_t> Evaluate(std::string_view text);

}  // namespace calculator
