// Numbers in ids and page tokens.
#pragma once

#include <charconv>
#include <optional>
#include <string_view>

namespace calculator {

// The number that `text` is, written as std::to_string writes it, from 0 to count - 1.
inline std::optional<int> ParseIndex(std::string_view text, int count) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = error == std::errc() && end == text.data() + text.size();
  const bool plain = whole && (text[0] != '0' || text.size() == 1) && text[0] != '-';
  return plain && value < count ? std::optional(value) : std::nullopt;
}

}  // namespace calculator
