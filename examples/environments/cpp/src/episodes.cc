#include "episodes.h"

#include <optional>
#include <string>
#include <vector>

#include "refusals.h"
#include "rollmesh/api/environment/v1/environment_service.grpc.pb.h"

namespace calculator {

// gRPC calls the On… methods, from threads of its own and OnCancel beside the others, until OnDone.
class Episode final : public EpisodeReactor {
 public:
  static Episode* Open(Episodes* all) {
    const auto episode = std::make_shared<Episode>(all);
    episode->self_ = episode;
    episode->StartRead(&episode->read_);
    return episode.get();
  }

  explicit Episode(Episodes* all) : all_(all) {}

  void OnReadDone(bool ok) override {
    if (!ok) {  // The client has no more actions, or has gone.
      if (game_) {
        Answer(Game::GiveUp());
      } else {
        End(Invalid("request: the stream ended before start"));
      }
      return;
    }
    api::EpisodeRequest request;
    grpc::Status status = Deserialized::Deserialize(&read_, &request);
    if (status.ok()) status = request.has_start() ? Begin(request.start()) : Act(request);
    if (!status.ok()) End(status);
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard lock(mutex_);
    if (ok && !ended_) StartRead(&read_);  // Where it is not ok the client has gone: OnCancel comes.
  }

  void OnCancel() override { End(grpc::Status::CANCELLED); }

  void OnDone() override { const std::shared_ptr<Episode> last = std::move(self_); }

  // Ends the stream, unless it has ended.
  void End(const grpc::Status& status) {
    std::lock_guard lock(mutex_);
    if (ended_) return;
    Over();
    Finish(status);
  }

 private:
  using Deserialized = grpc::SerializationTraits<api::EpisodeRequest>;
  using Serialized = grpc::SerializationTraits<api::EpisodeResponse>;

  grpc::Status Begin(const api::Start& start) {
    if (game_) return Invalid("request: a second start");
    if (grpc::Status named = CheckName(start.environment()); !named.ok()) return named;
    if (start.seed() < 0) {
      return Invalid("start.seed: " + std::to_string(start.seed()) + " is negative");
    }
    std::optional<Task> task = FindTask(start.task_id());
    if (!task) return NotFound("start.task_id", start.task_id());
    if (grpc::Status admitted = all_->Admit(self_); !admitted.ok()) return admitted;
    game_.emplace(std::move(*task));
    Answer(game_->Look());
    return grpc::Status::OK;
  }

  grpc::Status Act(const api::EpisodeRequest& request) {
    if (!request.has_action()) return Invalid("request: neither start nor action is set");
    if (!game_) return Invalid("request: an action before start");
    if (request.action().role() != "assistant") {
      return Invalid("action.role: " + Quoted(request.action().role()) + " is not assistant");
    }
    Answer(game_->Act(request.action()));
    return grpc::Status::OK;
  }

  void Answer(const api::EpisodeResponse& response) {
    std::lock_guard lock(mutex_);
    if (ended_) return;
    bool own_buffer;
    written_.Clear();
    Serialized::Serialize(response, &written_, &own_buffer);
    if (response.done()) {
      Over();
      StartWriteAndFinish(&written_, {}, grpc::Status::OK);
    } else {
      StartWrite(&written_);
    }
  }

  // Its place is free before the client knows that it is over.
  void Over() {
    ended_ = true;
    all_->Release(self_);
  }

  Episodes* const all_;
  std::shared_ptr<Episode> self_;  // Until OnDone.
  std::optional<Game> game_;       // From `start` on.
  grpc::ByteBuffer read_;
  grpc::ByteBuffer written_;
  // Held while an operation is started: none may be after the stream is finished, which another
  // thread does when the client goes or the process ends.
  std::mutex mutex_;
  bool ended_ = false;
};

EpisodeReactor* Episodes::Open() { return Episode::Open(this); }

// `start` was read before that: clients that are still sending it when the stream ends may not learn
// why.
grpc::Status Episodes::Admit(const std::shared_ptr<Episode>& episode) {
  std::lock_guard lock(mutex_);
  if (stopping_) return Stopping();
  if (running_.size() == max_running_) {
    return {grpc::StatusCode::RESOURCE_EXHAUSTED,
            std::to_string(max_running_) + " episodes are under way"};
  }
  running_.insert(episode);
  return grpc::Status::OK;
}

void Episodes::Release(const std::shared_ptr<Episode>& episode) {
  std::lock_guard lock(mutex_);
  running_.erase(episode);
}

void Episodes::Stop() {
  std::vector<std::shared_ptr<Episode>> all;
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    all.assign(running_.begin(), running_.end());
  }
  // Without the lock: an episode that ends calls `Release`.
  for (const std::shared_ptr<Episode>& episode : all) episode->End(Stopping());
}

}  // namespace calculator
