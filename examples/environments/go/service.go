package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "example.com/gridworld/environmentpb"
)

const (
	name        = "grid-world"
	defaultPage = 100
	maxPage     = 1000
)

// service is the contract of protos/rollmesh/api/environment/v1. Score is left to the embedded
// type, which answers UNIMPLEMENTED.
type service struct {
	pb.UnimplementedEnvironmentServiceServer
	splits   map[string][]task
	byID     map[string]task
	places   chan struct{} // one for each episode under way
	stopping <-chan struct{}
}

func newService(maxEpisodes int, stopping <-chan struct{}) *service {
	s := &service{
		splits:   map[string][]task{},
		byID:     map[string]task{},
		places:   make(chan struct{}, maxEpisodes),
		stopping: stopping,
	}
	for _, t := range allTasks() {
		s.splits[t.split] = append(s.splits[t.split], t)
		s.byID[t.id] = t
	}
	return s
}

func (s *service) Describe(context.Context, *pb.DescribeRequest) (*pb.DescribeResponse, error) {
	return &pb.DescribeResponse{Environments: []*pb.Environment{{
		Name:             name,
		Version:          "1",
		Description:      "A walk over a grid of 4×4 cells to a goal, a word for each step.",
		HasEpisodes:      true,
		ObservationKinds: []pb.ObservationKind{pb.ObservationKind_OBSERVATION_KIND_TEXT},
		Deterministic:    true,
		Limits: &pb.Limits{
			MaxConcurrentEpisodes: int32(cap(s.places)),
			MaxTurns:              maxTurns,
			MaxAnswerTime:         &durationpb.Duration{Seconds: 1},
		},
		Splits: []*pb.Split{
			{Name: "train", NumTasks: int64(len(s.splits["train"]))},
			{Name: "heldout", NumTasks: int64(len(s.splits["heldout"]))},
		},
	}}}, nil
}

func (s *service) ListTasks(_ context.Context, r *pb.ListTasksRequest) (*pb.ListTasksResponse, error) {
	if err := named(r.Environment); err != nil {
		return nil, err
	}
	tasks, found := s.splits[r.Split]
	if !found {
		return nil, invalid("split: %.40q is neither train nor heldout", r.Split)
	}
	if r.PageSize < 0 {
		return nil, invalid("page_size: %d is negative", r.PageSize)
	}
	start, err := pageStart(r, len(tasks))
	if err != nil {
		return nil, err
	}
	size := int(r.PageSize)
	if size == 0 {
		size = defaultPage
	} else if size > maxPage {
		size = maxPage
	}
	response := &pb.ListTasksResponse{}
	for _, t := range tasks[start:] {
		if len(response.Tasks) == size {
			response.NextPageToken = fmt.Sprintf("%s:%d", r.Split, start+size)
			break
		}
		response.Tasks = append(response.Tasks, toProto(t))
	}
	return response, nil
}

// pageStart is the index that a page token of this split stands for: "train:100".
func pageStart(r *pb.ListTasksRequest, count int) (int, error) {
	if r.PageToken == "" {
		return 0, nil
	}
	text := strings.TrimPrefix(r.PageToken, r.Split+":")
	start, err := strconv.Atoi(text)
	if err != nil || start < 1 || start >= count || r.PageToken != fmt.Sprintf("%s:%d", r.Split, start) {
		return 0, invalid("page_token: %.40q was not made here for split %s", r.PageToken, r.Split)
	}
	return start, nil
}

func (s *service) GetTask(_ context.Context, r *pb.GetTaskRequest) (*pb.GetTaskResponse, error) {
	if err := named(r.Environment); err != nil {
		return nil, err
	}
	t, err := s.task(r.TaskId)
	if err != nil {
		return nil, err
	}
	return &pb.GetTaskResponse{Task: toProto(t)}, nil
}

// Episode is one walk. It returns, and so gives its place back, as soon as the walk is over, the
// client has gone or its deadline has passed, or the process is told to end.
func (s *service) Episode(stream pb.EnvironmentService_EpisodeServer) error {
	requests := receive(stream)
	first, err := s.next(stream.Context(), requests)
	if err == io.EOF {
		return invalid("the stream ended before start")
	}
	if err != nil {
		return err
	}
	w, err := s.begin(first)
	if err != nil {
		return err
	}
	defer func() { <-s.places }()
	if err := stream.Send(observed(outcome{observation: w.look()})); err != nil {
		return err
	}
	for {
		request, err := s.next(stream.Context(), requests)
		if err == io.EOF { // No more actions come.
			return stream.Send(&pb.EpisodeResponse{Done: true, Truncated: true})
		}
		if err != nil {
			return err
		}
		action := request.GetAction()
		if action == nil {
			return invalid("request: after start each message is an action")
		}
		if action.Role != "assistant" {
			return invalid("action.role: %.40q is not assistant", action.Role)
		}
		response := observed(w.act(action.Content))
		if err := stream.Send(response); err != nil || response.Done {
			return err
		}
	}
}

// begin takes a place, which whoever called it gives back. Start is read before it is refused: clients
// that are still sending it when the stream ends may not learn why.
func (s *service) begin(request *pb.EpisodeRequest) (*walk, error) {
	start := request.GetStart()
	if start == nil {
		return nil, invalid("request: the first message is start")
	}
	if err := named(start.Environment); err != nil {
		return nil, err
	}
	if start.Seed < 0 {
		return nil, invalid("start.seed: %d is negative", start.Seed)
	}
	t, err := s.task(start.TaskId)
	if err != nil {
		return nil, err
	}
	select {
	case s.places <- struct{}{}:
		return newWalk(t, start.Seed), nil
	default:
		return nil, status.Errorf(codes.ResourceExhausted, "%d episodes are under way", cap(s.places))
	}
}

type received struct {
	request *pb.EpisodeRequest
	err     error
}

// receive hands on what the client sends, one message at a time, until the stream is over: Recv
// alone cannot be told that the process ends.
func receive(stream pb.EnvironmentService_EpisodeServer) <-chan received {
	requests := make(chan received)
	go func() {
		for {
			request, err := stream.Recv()
			select {
			case requests <- received{request, err}:
			case <-stream.Context().Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	return requests
}

func (s *service) next(ctx context.Context, requests <-chan received) (*pb.EpisodeRequest, error) {
	select {
	case next := <-requests:
		return next.request, next.err
	case <-ctx.Done(): // The client has gone, or its deadline has passed.
		return nil, status.FromContextError(ctx.Err()).Err()
	case <-s.stopping:
		return nil, status.Error(codes.Unavailable, "the environment is stopping")
	}
}

func (s *service) task(id string) (task, error) {
	t, found := s.byID[id]
	if !found {
		return task{}, status.Errorf(codes.NotFound, "task_id: there is no task %.100q", id)
	}
	return t, nil
}

func named(environment string) error {
	if environment != "" && environment != name {
		return status.Errorf(codes.NotFound, "environment: %.63q is not here, %s is", environment, name)
	}
	return nil
}

func invalid(format string, values ...interface{}) error {
	return status.Errorf(codes.InvalidArgument, format, values...)
}

func toProto(t task) *pb.Task {
	fields := map[string]string{"goal": t.goal.String(), "distance": strconv.Itoa(t.distance)}
	return &pb.Task{Id: t.id, Split: t.split, Fields: fields}
}

func observed(o outcome) *pb.EpisodeResponse {
	response := &pb.EpisodeResponse{Reward: o.goal + o.steps, Truncated: o.truncated}
	if o.steps != 0 {
		response.Rewards = map[string]float64{"goal": o.goal, "steps": o.steps}
	}
	if o.observation == "" {
		response.Done = true
	} else {
		response.Observation = []*pb.Message{{Role: "user", Content: o.observation}}
	}
	return response
}
