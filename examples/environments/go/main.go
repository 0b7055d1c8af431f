// A text grid world as an environment of Rollmesh: build/grid-world --listen 127.0.0.1:0
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"os/signal"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	pb "example.com/gridworld/environmentpb"
)

// How long calls other than episodes have to end when the process is told to.
const drain = 2 * time.Second

func main() {
	log.SetFlags(0)
	listen := flag.String("listen", "127.0.0.1:0", "`HOST:PORT` to serve at; port 0: a free one")
	maxEpisodes := flag.Int("max-episodes", 20_000, "episodes at once")
	flag.Parse()
	if *maxEpisodes < 1 {
		log.Fatalf("-max-episodes: %d is not at least 1", *maxEpisodes)
	}
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	ended, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()

	server := grpc.NewServer(
		// Without pings a client that lost its power would keep its episodes for ever.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 20 * time.Second, Timeout: 5 * time.Second}),
	)
	pb.RegisterEnvironmentServiceServer(server, newService(*maxEpisodes, ended.Done()))
	healthy := health.NewServer()
	healthy.SetServingStatus("rollmesh.api.environment.v1.EnvironmentService", healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(server, healthy)

	stopped := make(chan struct{})
	go func() {
		<-ended.Done()
		healthy.Shutdown()
		// Whoever watches our health never ends by itself.
		timer := time.AfterFunc(drain, server.Stop)
		server.GracefulStop()
		timer.Stop()
		close(stopped)
	}()
	fmt.Printf("listening on %s\n", listener.Addr())
	if err := server.Serve(listener); err != nil {
		log.Fatal(err)
	}
	<-stopped
}
