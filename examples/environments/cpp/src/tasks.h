// The tasks: sums of two numbers below 100.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace calculator {

struct Split {
  std::string_view name;
  int first;  // Number of its first sum.
  int count;
};

// No sum is in both.
inline constexpr Split kSplits[] = {{"train", 0, 4096}, {"heldout", 4096, 256}};

struct Task {
  std::string id;  // e.g. "train-17"
  std::string split;
  std::string question;  // e.g. "37+58"
  std::string answer;    // e.g. "95"
};

// The split of that name; null: there is none.
const Split* FindSplit(std::string_view name);

// The task at `index` of a split, from 0 to count - 1.
Task TaskAt(const Split& split, int index);

// The task with that id; nothing: there is none.
std::optional<Task> FindTask(std::string_view id);

}  // namespace calculator
