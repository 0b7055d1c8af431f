package wordladder;

import io.grpc.Status;
import io.grpc.health.v1.HealthCheckRequest;
import io.grpc.health.v1.HealthCheckResponse;
import io.grpc.health.v1.HealthCheckResponse.ServingStatus;
import io.grpc.health.v1.HealthGrpc.HealthImplBase;
import io.grpc.stub.ServerCallStreamObserver;
import io.grpc.stub.StreamObserver;
import java.util.LinkedHashSet;
import java.util.Set;
import rollmesh.api.environment.v1.EnvironmentServiceGrpc;

/** grpc.health.v1: SERVING until the process is told to end. Debian has no jar of grpc-services. */
final class HealthService extends HealthImplBase {
  private static final Set<String> KNOWN = Set.of("", EnvironmentServiceGrpc.SERVICE_NAME);

  private final Set<StreamObserver<HealthCheckResponse>> watching = new LinkedHashSet<>();
  private ServingStatus status = ServingStatus.SERVING;

  @Override
  public synchronized void check(
      HealthCheckRequest request, StreamObserver<HealthCheckResponse> caller) {
    if (!KNOWN.contains(request.getService())) {
      caller.onError(Refusal.refused(Status.NOT_FOUND, "no such service"));
      return;
    }
    caller.onNext(response(status));
    caller.onCompleted();
  }

  @Override
  public synchronized void watch(
      HealthCheckRequest request, StreamObserver<HealthCheckResponse> caller) {
    boolean known = KNOWN.contains(request.getService());
    caller.onNext(response(known ? status : ServingStatus.SERVICE_UNKNOWN));
    ((ServerCallStreamObserver<HealthCheckResponse>) caller)
        .setOnCancelHandler(() -> forget(caller));
    if (known) {
      watching.add(caller);
    }
  }

  /** From now on it says NOT_SERVING. Ends the streams of those who watch, after telling them. */
  synchronized void stop() {
    status = ServingStatus.NOT_SERVING;
    for (StreamObserver<HealthCheckResponse> caller : watching) {
      caller.onNext(response(status));
      caller.onCompleted();
    }
    watching.clear();
  }

  private synchronized void forget(StreamObserver<HealthCheckResponse> caller) {
    watching.remove(caller);
  }

  private static HealthCheckResponse response(ServingStatus status) {
    return HealthCheckResponse.newBuilder().setStatus(status).build();
  }
}
