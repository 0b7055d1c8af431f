// The contract of protos/rollmesh/api/environment/v1. Score is left to the base class, which answers
// UNIMPLEMENTED.
#pragma once

#include <grpcpp/grpcpp.h>

#include "episodes.h"
#include "rollmesh/api/environment/v1/environment_service.grpc.pb.h"

namespace calculator {

using Api = api::EnvironmentService;
// Api::CallbackService, but for the bytes of Episode.
using Callbacks = Api::WithCallbackMethod_Describe<
    Api::WithCallbackMethod_ListTasks<Api::WithCallbackMethod_GetTask<Api::WithCallbackMethod_Score<
        Api::WithRawCallbackMethod_Episode<Api::Service>>>>>;

class Service final : public Callbacks {
 public:
  explicit Service(Episodes* episodes) : episodes_(episodes) {}

  grpc::ServerUnaryReactor* Describe(grpc::CallbackServerContext* context,
                                     const api::DescribeRequest* request,
                                     api::DescribeResponse* response) override;

  grpc::ServerUnaryReactor* ListTasks(grpc::CallbackServerContext* context,
                                      const api::ListTasksRequest* request,
                                      api::ListTasksResponse* response) override;

  grpc::ServerUnaryReactor* GetTask(grpc::CallbackServerContext* context,
                                    const api::GetTaskRequest* request,
                                    api::GetTaskResponse* response) override;

  EpisodeReactor* Episode(grpc::CallbackServerContext* context) override;

 private:
  Episodes* const episodes_;
};

}  // namespace calculator
