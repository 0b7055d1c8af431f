package main

import (
	"fmt"
	"strings"
)

const (
	size     = 4
	maxTurns = 8
	stepCost = 0.02
)

// cell is a place on the grid: row and column, from 1, the first one at the top left.
type cell struct{ row, column int }

func (c cell) String() string { return fmt.Sprintf("%d,%d", c.row, c.column) }

func (c cell) distance(other cell) int {
	return abs(c.row-other.row) + abs(c.column-other.column)
}

var moves = map[string]cell{"up": {-1, 0}, "down": {1, 0}, "left": {0, -1}, "right": {0, 1}}

// task is a goal and how far from it an episode begins; the seed says in which cell.
type task struct {
	id, split string
	goal      cell
	distance  int
	starts    []cell
}

// allTasks are all goals with all distances, in an order that does not change. No goal and distance
// of "heldout" is in "train".
func allTasks() []task {
	var tasks []task
	for _, goal := range cells() {
		for distance := 1; distance <= 2*(size-1); distance++ {
			var starts []cell
			for _, start := range cells() {
				if start.distance(goal) == distance {
					starts = append(starts, start)
				}
			}
			if len(starts) == 0 {
				continue
			}
			split := "train"
			if len(tasks)%5 == 4 {
				split = "heldout"
			}
			id := fmt.Sprintf("goal-%d-%d-distance-%d", goal.row, goal.column, distance)
			tasks = append(tasks, task{id, split, goal, distance, starts})
		}
	}
	return tasks
}

func cells() []cell {
	var all []cell
	for row := 1; row <= size; row++ {
		for column := 1; column <= size; column++ {
			all = append(all, cell{row, column})
		}
	}
	return all
}

// walk is one episode.
type walk struct {
	at, goal cell
	turns    int
}

// outcome is what came of an action. Without an observation the walk is over.
type outcome struct {
	observation string
	goal, steps float64
	truncated   bool
}

func newWalk(t task, seed int64) *walk {
	return &walk{at: t.starts[mix(uint64(seed))%uint64(len(t.starts))], goal: t.goal}
}

func (w *walk) look() string { return fmt.Sprintf("at %s go %s", w.at, w.goal) }

func (w *walk) act(text string) outcome {
	w.turns++
	move, known := moves[strings.ToLower(strings.TrimSpace(text))]
	next := cell{w.at.row + move.row, w.at.column + move.column}
	if next.row >= 1 && next.row <= size && next.column >= 1 && next.column <= size {
		w.at = next // Else it ran into the edge, and stays where it is.
	}
	switch {
	case w.at == w.goal:
		return outcome{goal: 1, steps: -stepCost}
	case w.turns == maxTurns:
		return outcome{steps: -stepCost, truncated: true}
	case !known:
		return outcome{observation: "up/down/left/right?", steps: -stepCost}
	default:
		return outcome{observation: w.look(), steps: -stepCost}
	}
}

func abs(n int) int {
	if n < 0 {
		return -n
	}
	return n
}

// mix is SplitMix64: the same number for the same seed, in every version of Go and on every machine.
func mix(seed uint64) uint64 {
	z := seed + 0x9E3779B97F4A7C15
	z = (z ^ z>>30) * 0xBF58476D1CE4E5B9
	z = (z ^ z>>27) * 0x94D049BB133111EB
	return z ^ z>>31
}
