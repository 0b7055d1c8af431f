package wordladder;

import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/** All tasks, in an order that does not change: two words, 2 to 4 steps from each other. */
final class Tasks {
  /** Which word an episode begins with, the seed says: a pair is in one split, both ways. */
  record Task(String id, String split, String one, String other) {}

  private static final int LEAST_STEPS = 2;
  private static final int MOST_STEPS = 4;

  final Words words = new Words();
  private final Map<String, List<Task>> splits =
      Map.of("train", new ArrayList<>(), "heldout", new ArrayList<>());
  private final Map<String, Task> byId = new HashMap<>();

  Tasks() {
    for (String one : words.all()) {
      for (String other : words.all()) {
        int steps = words.steps(one, other);
        if (one.compareTo(other) < 0 && steps >= LEAST_STEPS && steps <= MOST_STEPS) {
          String split = byId.size() % 16 == 15 ? "heldout" : "train";
          Task task = new Task(one + "-" + other, split, one, other);
          splits.get(split).add(task);
          byId.put(task.id(), task);
        }
      }
    }
  }

  /** The tasks of a split; null: there is no such split. */
  List<Task> split(String name) {
    return splits.get(name);
  }

  /** The task with that id; null: there is none. */
  Task task(String id) {
    return byId.get(id);
  }
}
