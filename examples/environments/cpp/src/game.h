// One episode: a question, calls of the calculator, an answer. Knows no gRPC.
#pragma once

#include <string>

#include "rollmesh/api/environment/v1/environment_service.pb.h"
#include "tasks.h"

namespace calculator {

namespace api = rollmesh::api::environment::v1;

inline constexpr int kMaxTurns = 4;
inline constexpr int kMaxCalls = 8;  // In one action.
inline constexpr char kToolName[] = "calculator";
inline constexpr char kToolSchema[] =
    R"({"type":"object","properties":{"expression":{"type":"string"}},)"
    R"("required":["expression"],"additionalProperties":false})";

class Game {
 public:
  explicit Game(Task task) : task_(std::move(task)) {}

  // What there is to see at first.
  api::EpisodeResponse Look() const;

  // What comes of a message of the assistant: where it calls tools, what they say; else it is the
  // answer.
  api::EpisodeResponse Act(const api::Message& action);

  // What it is worth where no more actions come: nothing.
  static api::EpisodeResponse GiveUp();

 private:
  Task task_;
  int turns_ = 0;
};

}  // namespace calculator
