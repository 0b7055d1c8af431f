#include "tasks.h"

#include "digits.h"

namespace calculator {

const Split* FindSplit(std::string_view name) {
  for (const Split& split : kSplits) {
    if (split.name == name) return &split;
  }
  return nullptr;
}

Task TaskAt(const Split& split, int index) {
  // 100 × 100 sums, in an order in which each comes once: 7919 is prime.
  const int sum = (split.first + index) * 7919 % 10000;
  const int a = sum / 100;
  const int b = sum % 100;
  return {
      .id = std::string(split.name) + "-" + std::to_string(index),
      .split = std::string(split.name),
      .question = std::to_string(a) + "+" + std::to_string(b),
      .answer = std::to_string(a + b),
  };
}

std::optional<Task> FindTask(std::string_view id) {
  const std::size_t dash = id.find('-');
  const Split* split = FindSplit(id.substr(0, dash));
  if (split == nullptr || dash == std::string_view::npos) return std::nullopt;
  const std::optional<int> index = ParseIndex(id.substr(dash + 1), split->count);
  return index ? std::optional(TaskAt(*split, *index)) : std::nullopt;
}

}  // namespace calculator
