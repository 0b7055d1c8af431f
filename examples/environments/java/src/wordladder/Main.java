package wordladder;

import io.grpc.Server;
import io.grpc.netty.NettyServerBuilder;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.util.concurrent.TimeUnit;

/** A word ladder as an environment of Rollmesh: build/word-ladder --listen 127.0.0.1:0. */
public final class Main {
  private static final String USAGE =
      "usage: word-ladder [--listen HOST:PORT] [--max-episodes N]\n"
          + "  port 0: a free one; N: episodes at once, 1 or more";

  /** Seconds that calls other than episodes have to end when the process is told to. */
  private static final int DRAIN_S = 2;

  private Main() {}

  public static void main(String[] args) throws InterruptedException {
    String host = "127.0.0.1";
    int port = 0;
    int maxEpisodes = 20_000;
    try {
      for (int i = 0; i < args.length; i += 2) {
        switch (args[i]) {
          case "--listen" -> {
            int colon = args[i + 1].lastIndexOf(':');
            host = args[i + 1].substring(0, colon);
            port = Integer.parseInt(args[i + 1].substring(colon + 1));
          }
          case "--max-episodes" -> maxEpisodes = Integer.parseUnsignedInt(args[i + 1]);
          default -> throw new IllegalArgumentException(args[i]);
        }
      }
      if (maxEpisodes < 1) {
        throw new IllegalArgumentException("--max-episodes");
      }
      serve(host, new InetSocketAddress(host, port), new Episodes(maxEpisodes));
    } catch (IllegalArgumentException | IndexOutOfBoundsException error) {
      System.err.println(USAGE);
      System.exit(2);
    } catch (IOException error) {
      System.err.println("cannot listen at " + host + ":" + port + ": " + error.getMessage());
      System.exit(1);
    }
  }

  private static void serve(String host, InetSocketAddress address, Episodes episodes)
      throws IOException, InterruptedException {
    HealthService health = new HealthService();
    Server server =
        NettyServerBuilder.forAddress(address)
            // Nothing here waits, so everything runs on the threads that read the sockets.
            .directExecutor()
            // Without pings a client that lost its power would keep its episodes for ever.
            .keepAliveTime(20, TimeUnit.SECONDS)
            .keepAliveTimeout(5, TimeUnit.SECONDS)
            .addService(new LadderService(episodes))
            .addService(health)
            .build()
            .start();
    Runtime.getRuntime().addShutdownHook(new Thread(() -> stop(server, episodes, health)));
    System.out.println("listening on " + host + ":" + server.getPort());
    server.awaitTermination();
  }

  private static void stop(Server server, Episodes episodes, HealthService health) {
    health.stop();
    episodes.stop();
    server.shutdown();
    try {
      if (!server.awaitTermination(DRAIN_S, TimeUnit.SECONDS)) {
        server.shutdownNow().awaitTermination(DRAIN_S, TimeUnit.SECONDS);
      }
    } catch (InterruptedException error) {
      Thread.currentThread().interrupt();
    }
    Runtime.getRuntime().halt(0); // Else the exit status would be the signal's.
  }
}
