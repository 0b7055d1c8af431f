// Streams of episodes, on gRPC's callback API: an episode holds no thread.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <unordered_set>

#include "game.h"

namespace calculator {

// Of bytes: where messages are read, gRPC says the same of bytes that are none as of the client's last
// word.
using EpisodeReactor = grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>;

class Episode;

// The episodes under way, so that there is a bound to them, and so that they can be told to end.
class Episodes {
 public:
  explicit Episodes(std::size_t max_running) : max_running_(max_running) {}

  // The reactor of a new stream. It deletes itself.
  EpisodeReactor* Open();

  // Ends all with UNAVAILABLE, and each that comes.
  void Stop();

  std::size_t max_running() const { return max_running_; }

 private:
  friend class Episode;

  // Takes an episode up, or says why not.
  grpc::Status Admit(const std::shared_ptr<Episode>& episode);
  void Release(const std::shared_ptr<Episode>& episode);

  const std::size_t max_running_;
  std::mutex mutex_;
  bool stopping_ = false;
  std::unordered_set<std::shared_ptr<Episode>> running_;
};

}  // namespace calculator
