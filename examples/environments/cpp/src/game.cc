#include "game.h"

#include <nlohmann/json.hpp>

#include "expression.h"

namespace calculator {
namespace {

// What the model is told of its call: the value, or why there is none. A model wrote the name and
// the arguments, so they may be anything.
std::string Call(const api::ToolCall& call) {
  constexpr std::size_t kMaxArguments = 1000;
  if (call.name() != kToolName) return "no such tool";
  if (call.arguments_json().size() > kMaxArguments) return "bad arguments";
  const auto arguments = nlohmann::json::parse(call.arguments_json(), nullptr, false);
  if (!arguments.is_object() || arguments.size() != 1) return "bad arguments";
  const auto expression = arguments.find("expression");
  if (expression == arguments.end() || !expression->is_string()) return "bad arguments";
  const auto value = Evaluate(expression->get_ref<const std::string&>());
  return value ? std::to_string(*value) : "bad expression";
}

std::string_view Stripped(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n";
  const std::size_t first = text.find_first_not_of(kSpace);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

api::EpisodeResponse Over(bool truncated) {
  api::EpisodeResponse response;
  response.set_done(true);
  response.set_truncated(truncated);
  return response;
}

}  // namespace

api::EpisodeResponse Game::Look() const {
  api::EpisodeResponse response;
  api::Message* message = response.add_observation();
  message->set_role("user");
  message->set_content(task_.question);
  return response;
}

api::EpisodeResponse Game::Act(const api::Message& action) {
  ++turns_;
  if (action.tool_calls().empty()) {
    api::EpisodeResponse response = Over(false);
    response.set_reward(Stripped(action.content()) == task_.answer ? 1.0 : 0.0);
    (*response.mutable_rewards())["correct"] = response.reward();
    (*response.mutable_info())["answer"] = task_.answer;
    return response;
  }
  if (turns_ == kMaxTurns) return Over(true);
  api::EpisodeResponse response;
  for (const api::ToolCall& call : action.tool_calls()) {
    api::Message* message = response.add_observation();
    message->set_role("tool");
    message->set_tool_call_id(call.id());
    // Each call has to be answered, or the chat would be malformed.
    message->set_content(response.observation_size() > kMaxCalls ? "too many calls" : Call(call));
  }
  return response;
}

api::EpisodeResponse Game::GiveUp() { return Over(true); }

}  // namespace calculator
