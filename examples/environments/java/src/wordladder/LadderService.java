package wordladder;

import com.google.protobuf.Duration;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.ServerCallStreamObserver;
import io.grpc.stub.StreamObserver;
import java.util.List;
import rollmesh.api.environment.v1.EnvironmentServiceGrpc.EnvironmentServiceImplBase;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.DescribeRequest;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.DescribeResponse;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.Environment;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.EpisodeRequest;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.EpisodeResponse;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.GetTaskRequest;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.GetTaskResponse;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.Limits;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.ListTasksRequest;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.ListTasksResponse;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.ObservationKind;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.Split;
import rollmesh.api.environment.v1.EnvironmentServiceOuterClass.Task;

/**
 * The contract of protos/rollmesh/api/environment/v1. Score is left to the base class, which answers
 * UNIMPLEMENTED.
 */
final class LadderService extends EnvironmentServiceImplBase {
  static final String NAME = "word-ladder";
  private static final int DEFAULT_PAGE = 100;
  private static final int MAX_PAGE = 1000;

  private final Tasks tasks = new Tasks();
  private final Episodes episodes;

  LadderService(Episodes episodes) {
    this.episodes = episodes;
  }

  @Override
  public void describe(DescribeRequest request, StreamObserver<DescribeResponse> caller) {
    Environment environment =
        Environment.newBuilder()
            .setName(NAME)
            .setVersion("1")
            .setDescription("From one word to another by changing one letter at a time.")
            .setHasEpisodes(true)
            .addObservationKinds(ObservationKind.OBSERVATION_KIND_TEXT)
            .setDeterministic(true)
            .setLimits(
                Limits.newBuilder()
                    .setMaxConcurrentEpisodes(episodes.maxRunning())
                    .setMaxTurns(Ladder.MAX_TURNS)
                    .setMaxAnswerTime(Duration.newBuilder().setSeconds(1)))
            .addSplits(split("train"))
            .addSplits(split("heldout"))
            .build();
    answer(caller, DescribeResponse.newBuilder().addEnvironments(environment).build());
  }

  @Override
  public void listTasks(ListTasksRequest request, StreamObserver<ListTasksResponse> caller) {
    try {
      answer(caller, page(request));
    } catch (StatusRuntimeException refusal) {
      caller.onError(refusal);
    }
  }

  @Override
  public void getTask(GetTaskRequest request, StreamObserver<GetTaskResponse> caller) {
    try {
      checkName(request.getEnvironment());
      Tasks.Task task = tasks.task(request.getTaskId());
      if (task == null) {
        throw Refusal.notFound("task_id", request.getTaskId());
      }
      answer(caller, GetTaskResponse.newBuilder().setTask(toProto(task)).build());
    } catch (StatusRuntimeException refusal) {
      caller.onError(refusal);
    }
  }

  @Override
  public StreamObserver<EpisodeRequest> episode(StreamObserver<EpisodeResponse> caller) {
    return new EpisodeStream((ServerCallStreamObserver<EpisodeResponse>) caller, tasks, episodes);
  }

  static void checkName(String environment) {
    if (!environment.isEmpty() && !environment.equals(NAME)) {
      throw Refusal.notFound("environment", environment);
    }
  }

  private ListTasksResponse page(ListTasksRequest request) {
    checkName(request.getEnvironment());
    String split = request.getSplit();
    List<Tasks.Task> all = tasks.split(split);
    if (all == null) {
      throw Refusal.invalid("split", split, "train or heldout");
    }
    if (request.getPageSize() < 0) {
      throw Refusal.invalid("page_size", Integer.toString(request.getPageSize()), "0 or more");
    }
    int size = request.getPageSize() == 0 ? DEFAULT_PAGE : request.getPageSize();
    int start = start(request, all.size());
    int end = Math.min(all.size(), start + Math.min(size, MAX_PAGE));
    ListTasksResponse.Builder response = ListTasksResponse.newBuilder();
    all.subList(start, end).forEach(task -> response.addTasks(toProto(task)));
    if (end < all.size()) {
      response.setNextPageToken(split + ":" + end);
    }
    return response.build();
  }

  /** The number that a page token of this split stands for: "train:100". */
  private static int start(ListTasksRequest request, int count) {
    String token = request.getPageToken();
    if (token.isEmpty()) {
      return 0;
    }
    String prefix = request.getSplit() + ":";
    if (token.startsWith(prefix) && token.substring(prefix.length()).matches("[1-9][0-9]{0,8}")) {
      int start = Integer.parseInt(token.substring(prefix.length()));
      if (start < count) {
        return start;
      }
    }
    throw Refusal.invalid("page_token", token, "one that this split's pages came with");
  }

  private Split.Builder split(String name) {
    return Split.newBuilder().setName(name).setNumTasks(tasks.split(name).size());
  }

  private Task toProto(Tasks.Task task) {
    return Task.newBuilder()
        .setId(task.id())
        .setSplit(task.split())
        .putFields("words", task.one() + " " + task.other())
        .putFields("steps", Integer.toString(tasks.words.steps(task.one(), task.other())))
        .build();
  }

  private static <T> void answer(StreamObserver<T> caller, T response) {
    caller.onNext(response);
    caller.onCompleted();
  }
}
