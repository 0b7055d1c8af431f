#include "episodes.h"

#include <optional>
#include <string>
#include <vector>

#include "refusals.h"

namespace calculator {

namespace {

const grpc::Status kStopping(grpc::StatusCode::UNAVAILABLE, "the environment is stopping");

// A stream that is refused at once.
class Refused final : public EpisodeReactor {
 public:
  explicit Refused(const grpc::Status& status) { Finish(status); }
  void OnDone() override { delete this; }
};

}  // namespace

// gRPC calls the On… methods, from threads of its own and OnCancel beside the others, until OnDone.
// `Episodes` keeps it alive until then.
class Episode final : public EpisodeReactor, public std::enable_shared_from_this<Episode> {
 public:
  explicit Episode(Episodes* all) : all_(all) { StartRead(&request_); }

  void OnReadDone(bool ok) override {
    if (!ok) {  // The client has no more actions, or has gone.
      if (game_) {
        Answer(Game::GiveUp());
      } else {
        End(Invalid("request: the stream ended before start"));
      }
      return;
    }
    const grpc::Status status = request_.has_start() ? Begin(request_.start()) : Act();
    if (!status.ok()) End(status);
  }

  void OnWriteDone(bool ok) override {
    if (ok) StartRead(&request_);  // Else the client has gone, and OnCancel comes.
  }

  void OnCancel() override { End(grpc::Status::CANCELLED); }

  void OnDone() override { all_->Ended(this); }

  // Ends the stream, unless it has ended.
  void End(const grpc::Status& status) {
    if (!ended_.exchange(true)) Finish(status);
  }

 private:
  grpc::Status Begin(const api::Start& start) {
    if (game_) return Invalid("request: a second start");
    if (grpc::Status named = CheckName(start.environment()); !named.ok()) return named;
    if (start.seed() < 0) {
      return Invalid("start.seed: " + std::to_string(start.seed()) + " is negative");
    }
    std::optional<Task> task = FindTask(start.task_id());
    if (!task) return NotFound("start.task_id", start.task_id());
    game_.emplace(std::move(*task));
    Answer(game_->Look());
    return grpc::Status::OK;
  }

  grpc::Status Act() {
    if (!request_.has_action()) return Invalid("request: neither start nor action is set");
    if (!game_) return Invalid("request: an action before start");
    if (request_.action().role() != "assistant") {
      return Invalid("action.role: " + Quoted(request_.action().role()) + " is not assistant");
    }
    Answer(game_->Act(request_.action()));
    return grpc::Status::OK;
  }

  void Answer(api::EpisodeResponse response) {
    response_ = std::move(response);
    if (!response_.done()) {
      StartWrite(&response_);
    } else if (!ended_.exchange(true)) {
      StartWriteAndFinish(&response_, {}, grpc::Status::OK);
    }
  }

  Episodes* const all_;
  std::atomic<bool> ended_ = false;
  std::optional<Game> game_;  // From `start` on.
  api::EpisodeRequest request_;
  api::EpisodeResponse response_;
};

EpisodeReactor* Episodes::Begin() {
  std::lock_guard lock(mutex_);
  if (stopping_) return new Refused(kStopping);
  if (running_.size() == max_running_) {
    return new Refused({grpc::StatusCode::RESOURCE_EXHAUSTED,
                        std::to_string(max_running_) + " episodes are under way"});
  }
  return running_.insert(std::make_shared<Episode>(this)).first->get();
}

void Episodes::Ended(Episode* episode) {
  std::shared_ptr<Episode> last;  // Destroyed after the lock is given back.
  std::lock_guard lock(mutex_);
  last = std::move(running_.extract(episode->shared_from_this()).value());
}

void Episodes::Stop() {
  std::vector<std::shared_ptr<Episode>> all;
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    all.assign(running_.begin(), running_.end());
  }
  // Outside the lock: ending one may call `Ended` from here.
  for (const std::shared_ptr<Episode>& episode : all) episode->End(kStopping);
}

}  // namespace calculator
