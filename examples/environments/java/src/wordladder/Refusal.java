package wordladder;

import io.grpc.Status;
import io.grpc.StatusRuntimeException;

/** What a caller is told who asks for what is not to be had. */
final class Refusal {
  private Refusal() {}

  static StatusRuntimeException invalid(String field, String value, String allowed) {
    return refused(Status.INVALID_ARGUMENT, field + ": " + quoted(value) + " is not " + allowed);
  }

  static StatusRuntimeException notFound(String field, String value) {
    return refused(Status.NOT_FOUND, field + ": there is no " + quoted(value));
  }

  static StatusRuntimeException refused(Status status, String message) {
    return status.withDescription(message).asRuntimeException();
  }

  /** What a caller sent goes back shortened: trailers have to stay small. */
  private static String quoted(String value) {
    return "'" + value.substring(0, Math.min(value.length(), 60)) + "'";
  }
}
