// A calculator as an environment of Rollmesh: build/calculator --listen 127.0.0.1:0
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <charconv>
#include <chrono>
#include <csignal>
#include <iostream>
#include <memory>
#include <string>

#include "episodes.h"
#include "service.h"

namespace {

struct Options {
  std::string listen = "127.0.0.1:0";
  int max_episodes = 20'000;
};

constexpr char kUsage[] =
    "usage: calculator [--listen HOST:PORT] [--max-episodes N]\n"
    "  port 0: a free one; N: episodes at once, 1 or more\n";

bool Parse(int count, char** values, Options* options) {
  for (int i = 1; i < count; i += 2) {
    const std::string name = values[i];
    if (i + 1 == count) return false;
    const std::string value = values[i + 1];
    if (name == "--listen") {
      options->listen = value;
    } else if (name == "--max-episodes") {
      const char* end = value.data() + value.size();
      const auto parsed = std::from_chars(value.data(), end, options->max_episodes);
      if (parsed.ec != std::errc() || parsed.ptr != end || options->max_episodes < 1) return false;
    } else {
      return false;
    }
  }
  return options->listen.find(':') != std::string::npos;
}

}  // namespace

int main(int count, char** values) {
  Options options;
  if (!Parse(count, values, &options)) {
    std::cerr << kUsage;
    return 2;
  }
  // Blocked in every thread that is started from here on, so that only sigwait below gets them.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);

  calculator::Episodes episodes(static_cast<std::size_t>(options.max_episodes));
  calculator::Service service(&episodes);
  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(options.listen, grpc::InsecureServerCredentials(), &port);
  // Two servers must never share a port by accident: the kernel would split the calls.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // Without pings a client that lost its power would keep its episodes for ever.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 20'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5'000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr || port == 0) {
    std::cerr << "cannot listen at " << options.listen << "\n";
    return 1;
  }
  server->GetHealthCheckService()->SetServingStatus(
      calculator::api::EnvironmentService::service_full_name(), true);
  std::cout << "listening on " << options.listen.substr(0, options.listen.rfind(':')) << ":" << port
            << std::endl;

  int signal = 0;
  sigwait(&signals, &signal);
  server->GetHealthCheckService()->SetServingStatus(false);
  episodes.Stop();
  // Whoever watches our health never ends by itself.
  server->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(2));
  server->Wait();
  return 0;
}
