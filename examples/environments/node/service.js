// The contract of protos/rollmesh/api/environment/v1. Score is left out: gRPC answers UNIMPLEMENTED.
'use strict';

const { status } = require('@grpc/grpc-js');

const { Game, MAX_TURNS, NUMBERS, SPLITS, TASKS } = require('./game');

const NAME = 'guess-the-number';
const DEFAULT_PAGE = 100;
const MAX_PAGE = 1000;

class Refusal extends Error {
  constructor(code, details) {
    super(details);
    Object.assign(this, { code, details });
  }
}

const invalid = (details) => new Refusal(status.INVALID_ARGUMENT, details);
const notFound = (details) => new Refusal(status.NOT_FOUND, details);
const stopped = () => new Refusal(status.UNAVAILABLE, 'the environment is stopping');

// What a caller sent, shortened: it goes back in a trailer, and those have to stay small.
const quoted = (value) => JSON.stringify(value.slice(0, 60));

class EnvironmentService {
  #running = new Set();
  #stopping = false;

  constructor(maxEpisodes) {
    this.maxEpisodes = maxEpisodes;
  }

  // What grpc.Server.addService takes.
  get handlers() {
    return {
      Describe: unary(() => this.#describe()),
      ListTasks: unary(listTasks),
      GetTask: unary(({ environment, task_id: id }) => {
        checkName(environment);
        return { task: findTask(id) };
      }),
      Episode: (call) => new Episode(call, this),
    };
  }

  // Ends every episode under way, and each that comes.
  stop() {
    this.#stopping = true;
    for (const episode of this.#running) episode.fail(stopped());
  }

  #describe() {
    const environment = {
      name: NAME,
      version: '1',
      description: 'A number to guess, told after each guess whether it is higher or lower.',
      has_episodes: true,
      observation_kinds: ['OBSERVATION_KIND_TEXT'],
      deterministic: true,
      limits: {
        max_concurrent_episodes: this.maxEpisodes,
        max_turns: MAX_TURNS,
        max_answer_time: { seconds: 1 },
      },
      splits: Object.entries(SPLITS).map(([name, count]) => ({ name, num_tasks: count })),
    };
    return { environments: [environment] };
  }

  // Takes an episode up, unless it has to be refused. `start` was read before that: clients that are
  // still sending it when the stream ends may not learn why.
  admit(episode) {
    if (this.#stopping) throw stopped();
    if (this.#running.size === this.maxEpisodes) {
      const details = `${this.maxEpisodes} episodes are under way`;
      throw new Refusal(status.RESOURCE_EXHAUSTED, details);
    }
    this.#running.add(episode);
  }

  release(episode) {
    this.#running.delete(episode);
  }
}

// One stream, one episode.
class Episode {
  #call;
  #service;
  #ended = false;
  #game; // From `start` on.

  constructor(call, service) {
    this.#call = call;
    this.#service = service;
    call.on('data', (request) => this.#guarded(() => this.#receive(request)));
    call.on('end', () => this.#guarded(() => this.#halfClosed()));
    // The client has gone, or its deadline has passed.
    call.on('cancelled', () => this.#end());
  }

  // Ends the stream with an error, if it is not over yet.
  fail(error) {
    if (this.#end()) this.#call.emit('error', error);
  }

  #guarded(handle) {
    if (this.#ended) return;
    try {
      handle();
    } catch (error) {
      if (error instanceof Refusal) return this.fail(error);
      console.error(error);
      this.fail(new Refusal(status.INTERNAL, 'the environment failed'));
    }
  }

  #receive({ request: kind, start, action }) {
    if (kind === 'start') {
      if (this.#game) throw invalid('request: a second start');
      checkName(start.environment);
      const seed = BigInt(start.seed);
      if (seed < 0n) throw invalid(`start.seed: ${seed} is negative`);
      const game = new Game(findTask(start.task_id).id, seed);
      this.#service.admit(this);
      this.#game = game;
      this.#answer({ observation: this.#game.look() });
    } else if (kind === 'action') {
      if (!this.#game) throw invalid('request: an action before start');
      if (action.role !== 'assistant') {
        throw invalid(`action.role: ${quoted(action.role)} is not assistant`);
      }
      this.#answer(this.#game.act(action.content));
    } else {
      throw invalid('request: neither start nor action is set');
    }
  }

  // The client has no more actions.
  #halfClosed() {
    if (!this.#game) throw invalid('request: the stream ended before start');
    this.#answer({ truncated: true });
  }

  #answer({ observation, ...outcome }) {
    if (observation) {
      this.#call.write({ ...outcome, observation: [{ role: 'user', content: observation }] });
      return;
    }
    this.#end();
    this.#call.write({ ...outcome, done: true, info: { secret: String(this.#game.secret) } });
    this.#call.end();
  }

  // Whether it was not over yet.
  #end() {
    if (this.#ended) return false;
    this.#ended = true;
    this.#service.release(this);
    return true;
  }
}

function listTasks({ environment, split, page_size: pageSize, page_token: token }) {
  checkName(environment);
  if (!Object.hasOwn(SPLITS, split)) {
    throw invalid(`split: ${quoted(split)} is neither train nor heldout`);
  }
  if (pageSize < 0) throw invalid(`page_size: ${pageSize} is negative`);
  const tasks = TASKS.filter((task) => task.split === split);
  // A page token is the split and the number of the first task: "train:100".
  const start = token === '' ? 0 : Number(token.slice(split.length + 1));
  if (token !== '' && !(token === `${split}:${start}` && tasks[start] && start > 0)) {
    throw invalid(`page_token: ${quoted(token)} was not made here for this split`);
  }
  const end = start + Math.min(pageSize || DEFAULT_PAGE, MAX_PAGE);
  return {
    tasks: tasks.slice(start, end),
    next_page_token: end < tasks.length ? `${split}:${end}` : '',
  };
}

function findTask(id) {
  const task = TASKS[NUMBERS.get(id)];
  if (!task) throw notFound(`task_id: there is no task ${quoted(id)}`);
  return task;
}

function checkName(environment) {
  if (environment !== '' && environment !== NAME) {
    throw notFound(`environment: ${quoted(environment)} is not here, ${NAME} is`);
  }
}

// A handler that answers what `answer` returns, or the Refusal that it throws.
function unary(answer) {
  return (call, callback) => {
    let response;
    try {
      response = answer(call.request);
    } catch (error) {
      if (!(error instanceof Refusal)) console.error(error);
      return callback(error);
    }
    return callback(null, response);
  };
}

module.exports = { EnvironmentService };
