package wordladder;

import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.util.HashSet;
import java.util.List;
import java.util.Set;

/** The episodes under way, so that there is a bound to them, and so that they can be told to end. */
final class Episodes {
  private final int maxRunning;
  private final Set<EpisodeStream> running = new HashSet<>();
  private boolean stopping;

  Episodes(int maxRunning) {
    this.maxRunning = maxRunning;
  }

  int maxRunning() {
    return maxRunning;
  }

  /**
   * Takes an episode up, or throws why not. Its start was read before that: clients that are still
   * sending it when the stream ends may not learn why.
   */
  synchronized void admit(EpisodeStream episode) {
    if (stopping) {
      throw stoppingNow();
    }
    if (running.size() == maxRunning) {
      throw Refusal.refused(Status.RESOURCE_EXHAUSTED, maxRunning + " episodes are under way");
    }
    running.add(episode);
  }

  synchronized void release(EpisodeStream episode) {
    running.remove(episode);
  }

  /** Ends every episode under way, and each that comes. */
  void stop() {
    List<EpisodeStream> all;
    synchronized (this) {
      stopping = true;
      all = List.copyOf(running);
    }
    // Without our lock: an episode takes its own first, then ours.
    all.forEach(episode -> episode.refuse(stoppingNow()));
  }

  private static StatusRuntimeException stoppingNow() {
    return Refusal.refused(Status.UNAVAILABLE, "the environment is stopping");
  }
}
