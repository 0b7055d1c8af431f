package wordladder;

import io.grpc.Context;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.ServerCallStreamObserver;
import io.grpc.stub.StreamObserver;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.EpisodeRequest;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.EpisodeResponse;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.Message;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.Start;

/**
 * One stream, one episode. It holds no thread: gRPC calls it when something comes, and {@link #refuse}
 * may come from another thread at any time.
 */
final class EpisodeStream implements StreamObserver<EpisodeRequest> {
  private final ServerCallStreamObserver<EpisodeResponse> client;
  private final Tasks tasks;
  private final Episodes episodes;
  private Ladder ladder; // null before start
  private boolean ended;

  EpisodeStream(
      ServerCallStreamObserver<EpisodeResponse> client, Tasks tasks, Episodes episodes) {
    this.client = client;
    this.tasks = tasks;
    this.episodes = episodes;
    client.setOnCancelHandler(this::end);
    // Ends whatever ends the call. The handler alone is not told of one that gRPC itself ends, as it
    // does where bytes are no message.
    Context.current().addListener(context -> end(), Runnable::run);
  }

  @Override
  public synchronized void onNext(EpisodeRequest request) {
    if (ended) {
      return;
    }
    try {
      switch (request.getRequestCase()) {
        case START -> begin(request.getStart());
        case ACTION -> act(request.getAction());
        default -> throw Refusal.invalid("request", "nothing", "start or action");
      }
    } catch (StatusRuntimeException refusal) {
      fail(refusal);
    }
  }

  /** The client has no more actions. */
  @Override
  public synchronized void onCompleted() {
    if (ended) {
      return;
    }
    if (ladder == null) {
      fail(Refusal.invalid("request", "nothing", "start"));
      return;
    }
    answer(EpisodeResponse.newBuilder().setDone(true).setTruncated(true));
  }

  @Override
  public void onError(Throwable error) {
    end();
  }

  /** Ends the episode from outside, if it is not over yet. */
  synchronized void refuse(StatusRuntimeException refusal) {
    if (!ended) {
      fail(refusal);
    }
  }

  private void begin(Start start) {
    if (ladder != null) {
      throw Refusal.invalid("request", "start", "action, after start");
    }
    LadderService.checkName(start.getEnvironment());
    if (start.getSeed() < 0) {
      throw Refusal.invalid("start.seed", Long.toString(start.getSeed()), "0 or more");
    }
    Tasks.Task task = tasks.task(start.getTaskId());
    if (task == null) {
      throw Refusal.notFound("start.task_id", start.getTaskId());
    }
    episodes.admit(this);
    ladder = new Ladder(tasks.words, task, start.getSeed());
    answer(EpisodeResponse.newBuilder().addObservation(user(ladder.look())));
  }

  private void act(Message action) {
    if (ladder == null) {
      throw Refusal.invalid("request", "action", "start, which comes first");
    }
    if (!action.getRole().equals("assistant")) {
      throw Refusal.invalid("action.role", action.getRole(), "assistant");
    }
    Ladder.Outcome outcome = ladder.act(action.getContent());
    EpisodeResponse.Builder response =
        EpisodeResponse.newBuilder()
            .setReward(outcome.progress())
            .putRewards("progress", outcome.progress())
            .setTruncated(outcome.truncated());
    if (outcome.observation().isEmpty()) {
      response.setDone(true).putInfo("fewest_steps", Integer.toString(ladder.steps()));
    } else {
      response.addObservation(user(outcome.observation()));
    }
    answer(response);
  }

  private void answer(EpisodeResponse.Builder response) {
    client.onNext(response.build());
    if (response.getDone()) {
      end();
      client.onCompleted();
    }
  }

  private void fail(StatusRuntimeException refusal) {
    end();
    client.onError(refusal);
  }

  private synchronized void end() {
    if (!ended) {
      ended = true;
      episodes.release(this);
    }
  }

  private static Message.Builder user(String content) {
    return Message.newBuilder().setRole("user").setContent(content);
  }
}
