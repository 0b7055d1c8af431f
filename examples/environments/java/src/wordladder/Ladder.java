package wordladder;

import java.util.Locale;

/** One episode of the game, without gRPC. */
final class Ladder {
  static final int MAX_TURNS = 8;

  /** What came of an action. Empty observation: the ladder has come to its end. */
  record Outcome(String observation, double progress, boolean truncated) {}

  private final Words words;
  private final String goal;
  private final int steps;
  private String at;
  private int turns;

  Ladder(Words words, Tasks.Task task, long seed) {
    boolean forward = (mix(seed) & 1) == 0;
    this.words = words;
    this.at = forward ? task.one() : task.other();
    this.goal = forward ? task.other() : task.one();
    this.steps = words.steps(at, goal);
  }

  String look() {
    return at + " to " + goal;
  }

  /** The fewest steps that there could have been. */
  int steps() {
    return steps;
  }

  /**
   * Goes to the word, if it is one letter away. Its worth is the part of the way that it takes, so an
   * episode that reaches the goal is worth 1, whatever detours it took.
   */
  Outcome act(String text) {
    String word = text.strip().toLowerCase(Locale.ROOT);
    boolean allowed = words.has(word) && words.steps(at, word) == 1;
    turns++;
    double progress = 0;
    if (allowed) {
      progress = (double) (words.steps(at, goal) - words.steps(word, goal)) / steps;
      at = word;
    }
    if (at.equals(goal)) {
      return new Outcome("", progress, false);
    }
    if (turns == MAX_TURNS) {
      return new Outcome("", progress, true);
    }
    return new Outcome(allowed ? look() : "no", progress, false);
  }

  /** SplitMix64: the same number for the same seed, in every version of Java. */
  private static long mix(long seed) {
    long z = seed + 0x9E3779B97F4A7C15L;
    z = (z ^ (z >>> 30)) * 0xBF58476D1CE4E5B9L;
    z = (z ^ (z >>> 27)) * 0x94D049BB133111EBL;
    return z ^ (z >>> 31);
  }
}
