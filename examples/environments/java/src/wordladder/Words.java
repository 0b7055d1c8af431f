package wordladder;

import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.stream.IntStream;

/** The words of words.txt, and how many steps lie between any two of them. */
final class Words {
  private final List<String> words;
  private final Map<String, Integer> numbers = new HashMap<>();
  private final int[][] steps;

  Words() {
    words = read();
    for (int i = 0; i < words.size(); i++) {
      numbers.put(words.get(i), i);
    }
    List<List<Integer>> near = new ArrayList<>();
    for (String word : words) {
      near.add(IntStream.range(0, words.size()).filter(i -> isStep(word, words.get(i))).boxed().toList());
    }
    steps = new int[words.size()][];
    for (int from = 0; from < words.size(); from++) {
      steps[from] = stepsFrom(from, near);
    }
  }

  List<String> all() {
    return words;
  }

  boolean has(String word) {
    return numbers.containsKey(word);
  }

  /** The fewest letters to change on the way. Every word can be reached from every other one. */
  int steps(String from, String to) {
    return steps[numbers.get(from)][numbers.get(to)];
  }

  private static int[] stepsFrom(int from, List<List<Integer>> near) {
    int[] found = new int[near.size()];
    ArrayDeque<Integer> queue = new ArrayDeque<>(List.of(from));
    while (!queue.isEmpty()) {
      int at = queue.remove();
      for (int next : near.get(at)) {
        if (next != from && found[next] == 0) {
          found[next] = found[at] + 1;
          queue.add(next);
        }
      }
    }
    return found;
  }

  private static boolean isStep(String one, String other) {
    int different = 0;
    for (int i = 0; i < one.length(); i++) {
      different += one.charAt(i) == other.charAt(i) ? 0 : 1;
    }
    return different == 1;
  }

  private static List<String> read() {
    try (InputStream file = Words.class.getResourceAsStream("words.txt")) {
      return new String(file.readAllBytes(), StandardCharsets.US_ASCII).lines().toList();
    } catch (IOException error) {
      throw new UncheckedIOException(error);
    }
  }
}
