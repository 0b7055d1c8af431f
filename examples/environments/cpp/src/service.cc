#include "service.h"

#include <algorithm>
#include <optional>
#include <string>

#include "digits.h"
#include "refusals.h"

namespace calculator {
namespace {

constexpr int kDefaultPage = 100;
constexpr int kMaxPage = 1000;

void ToProto(const Task& task, api::Task* message) {
  message->set_id(task.id);
  message->set_split(task.split);
  (*message->mutable_fields())["question"] = task.question;
  (*message->mutable_fields())["answer"] = task.answer;
}

grpc::Status Page(const api::ListTasksRequest& request, api::ListTasksResponse* response) {
  if (grpc::Status named = CheckName(request.environment()); !named.ok()) return named;
  const Split* split = FindSplit(request.split());
  if (split == nullptr) {
    return Invalid("split: " + Quoted(request.split()) + " is neither train nor heldout");
  }
  if (request.page_size() < 0) {
    return Invalid("page_size: " + std::to_string(request.page_size()) + " is negative");
  }
  // A page token is the split and the number of the first task: "train:100".
  const std::string prefix = request.split() + ":";
  std::optional<int> start = 0;
  if (const std::string& token = request.page_token(); !token.empty()) {
    start = token.starts_with(prefix) ? ParseIndex(token.substr(prefix.size()), split->count)
                                      : std::nullopt;
    if (!start || *start == 0) {
      return Invalid("page_token: " + Quoted(token) + " was not made here for this split");
    }
  }
  const int size = request.page_size() == 0 ? kDefaultPage : std::min(request.page_size(), kMaxPage);
  const int end = std::min(split->count, *start + size);
  for (int index = *start; index < end; ++index) {
    ToProto(TaskAt(*split, index), response->add_tasks());
  }
  if (end < split->count) response->set_next_page_token(prefix + std::to_string(end));
  return grpc::Status::OK;
}

grpc::Status Get(const api::GetTaskRequest& request, api::GetTaskResponse* response) {
  if (grpc::Status named = CheckName(request.environment()); !named.ok()) return named;
  const std::optional<Task> task = FindTask(request.task_id());
  if (!task) return NotFound("task_id", request.task_id());
  ToProto(*task, response->mutable_task());
  return grpc::Status::OK;
}

grpc::ServerUnaryReactor* Finished(grpc::CallbackServerContext* context,
                                   const grpc::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(status);
  return reactor;
}

}  // namespace

grpc::ServerUnaryReactor* Service::Describe(grpc::CallbackServerContext* context,
                                            const api::DescribeRequest* /*request*/,
                                            api::DescribeResponse* response) {
  api::Environment* environment = response->add_environments();
  environment->set_name(kName);
  environment->set_version("1");
  environment->set_description("A sum of two numbers, with a calculator to call.");
  environment->set_has_episodes(true);
  api::Tool* tool = environment->add_tools();
  tool->set_name(kToolName);
  tool->set_description("Computes an expression of whole numbers with + - * and parentheses.");
  tool->set_parameters_schema_json(kToolSchema);
  environment->add_observation_kinds(api::OBSERVATION_KIND_TEXT);
  environment->add_observation_kinds(api::OBSERVATION_KIND_TOOL);
  environment->set_deterministic(true);
  api::Limits* limits = environment->mutable_limits();
  limits->set_max_concurrent_episodes(static_cast<int>(episodes_->max_running()));
  limits->set_max_turns(kMaxTurns);
  limits->mutable_max_answer_time()->set_seconds(1);
  for (const calculator::Split& split : kSplits) {
    api::Split* message = environment->add_splits();
    message->set_name(std::string(split.name));
    message->set_num_tasks(split.count);
  }
  return Finished(context, grpc::Status::OK);
}

grpc::ServerUnaryReactor* Service::ListTasks(grpc::CallbackServerContext* context,
                                             const api::ListTasksRequest* request,
                                             api::ListTasksResponse* response) {
  return Finished(context, Page(*request, response));
}

grpc::ServerUnaryReactor* Service::GetTask(grpc::CallbackServerContext* context,
                                           const api::GetTaskRequest* request,
                                           api::GetTaskResponse* response) {
  return Finished(context, Get(*request, response));
}

EpisodeReactor* Service::Episode(grpc::CallbackServerContext* /*context*/) {
  return episodes_->Open();
}

}  // namespace calculator
