// A client of Rollmesh in Node: creates a job, watches it to its end, samples from what it learned.
//
//   node client.js --address 127.0.0.1:7400 [--job job.json] [--project demo]
//
// Nothing here is generated and nothing here is Python: the protos are read when it starts.
'use strict';

const { randomUUID } = require('node:crypto');
const fs = require('node:fs');
const path = require('node:path');
const { setTimeout: sleep } = require('node:timers/promises');
const { parseArgs } = require('node:util');

const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');
const protobuf = require('protobufjs');

const REPOSITORY = path.join(__dirname, '../../..');
const PROTOS = path.join(REPOSITORY, 'protos');
const FILES = ['job_service', 'sampling_service'].map(
  (name) => `rollmesh/api/coordinator/v1/${name}.proto`,
);

// keepCase: fields are called what the protos call them. Enums are their names, 64-bit integers
// are numbers (versions and event numbers are far below 2^53).
const READING = { keepCase: true, enums: String, longs: Number, defaults: true, oneofs: true };

async function main() {
  const { values: options } = parseArgs({
    options: {
      address: { type: 'string', default: '127.0.0.1:7400' },
      job: { type: 'string', default: path.join(__dirname, 'job.json') },
      project: { type: 'string', default: 'demo' },
    },
  });
  const definition = protoLoader.loadSync(FILES, { ...READING, includeDirs: [PROTOS] });
  const { v1 } = grpc.loadPackageDefinition(definition).rollmesh.api.coordinator;
  const credentials = grpc.credentials.createInsecure();
  const jobs = new v1.JobService(options.address, credentials);
  const sampling = new v1.SamplingService(options.address, credentials);

  const parent = `projects/${options.project}`;
  const spec = toMessage(jobSpecType(), JSON.parse(fs.readFileSync(options.job)), 'spec');
  // The same request_id twice is one job: that makes it safe to send again after a failure.
  const request = { request_id: randomUUID(), parent, spec };
  const { job } = await unary(jobs, 'CreateJob', request);
  console.log(`created ${job.name}`);

  const state = await watch(jobs, job.name);
  if (state !== 'JOB_STATE_SUCCEEDED') {
    console.error(`the job ended as ${state}`);
    return 1;
  }
  const { job: done } = await unary(jobs, 'GetJob', { name: job.name });
  await sample(sampling, parent, done.adapter, '12+34');
  return 0;
}

// One request, one response, at most 20 seconds.
function unary(client, method, request) {
  const deadline = new Date(Date.now() + 20_000);
  return new Promise((resolve, reject) => {
    client[method](request, { deadline }, (error, response) =>
      error ? reject(error) : resolve(response),
    );
  });
}

// Prints every event of the job and returns the state that it ends in. Events are numbered, so a
// connection that breaks is taken up again after the last one seen: none is missed, none is twice.
async function watch(client, name) {
  let last = 0;
  let state = 'JOB_STATE_UNSPECIFIED';
  for (let failures = 0; ; failures += 1) {
    try {
      for await (const { event } of client.WatchJob({ name, after_event: last })) {
        failures = 0;
        last = event.number;
        if (event.event === 'state_changed') state = event.state_changed.to;
        console.log(`${event.number} ${describe(event)}`);
      }
      return state;
    } catch (error) {
      if (error.code !== grpc.status.UNAVAILABLE || failures === 10) throw error;
      await sleep(500);
    }
  }
}

function describe(event) {
  const what = event[event.event];
  switch (event.event) {
    case 'state_changed':
      return `state ${what.to.replace('JOB_STATE_', '')} ${what.reason}`.trimEnd();
    case 'step_completed': {
      const { reward_mean: reward, loss } = what.metrics;
      return `step ${what.step} version ${what.policy_version} reward ${number(reward)} loss ${number(loss)}`;
    }
    case 'evaluation_completed':
      return `evaluation at step ${what.step} reward ${number(what.reward_mean)} on ${what.num_tasks} tasks`;
    case 'warning':
      return `warning ${what.reason} ${what.message}`;
    default:
      return `event of a kind that this client does not know`;
  }
}

function number(value) {
  return value === undefined ? '?' : value.toFixed(4);
}

// Greedy sampling from the newest version of the adapter, printed token by token as it comes.
async function sample(client, project, adapter, question) {
  const { vocab } = JSON.parse(
    fs.readFileSync(path.join(REPOSITORY, 'models/arith/tokenizer.json')),
  ).model;
  // The model's tokens are single characters, so its chat template is soon written out. Other
  // models need their tokenizer; there is one for Node as well.
  const prompt = ['<|begin|>', '<|user|>', ...question, '<|end|>', '<|assistant|>'];
  const texts = Object.fromEntries(Object.entries(vocab).map(([text, id]) => [id, text]));
  const call = client.Sample({
    project,
    policy: { adapter }, // without policy_version: the newest
    prompt_token_ids: prompt.map((text) => vocab[text]),
    num_completions: 1,
    params: { max_tokens: 8, temperature: 0 },
  });
  let answer = '';
  for await (const { chunk } of call) {
    const logprobs = float32s(chunk.logprobs);
    chunk.token_ids.forEach((id, i) => {
      console.log(`token ${id} ${JSON.stringify(texts[id])} logprob ${logprobs[i].toFixed(4)}`);
      if (texts[id] !== '<|end|>') answer += texts[id];
    });
    for (const span of chunk.spans) {
      console.log(`  by version ${span.policy_version}, digest ${span.digest}`);
    }
    if (chunk.stop_reason !== 'STOP_REASON_UNSPECIFIED') {
      console.log(`ended by ${chunk.stop_reason.replace('STOP_REASON_', '')}`);
    }
  }
  console.log(`${question} = ${answer}`);
}

// The elements of a float32 Tensor: little-endian on every machine.
function float32s(tensor) {
  const { data } = tensor ?? { data: Buffer.alloc(0) };
  return Array.from({ length: data.length / 4 }, (_, i) => data.readFloatLE(4 * i));
}

function jobSpecType() {
  const root = new protobuf.Root();
  root.resolvePath = (_, file) => (file.startsWith('google/') ? file : path.join(PROTOS, file));
  return root.loadSync(FILES, { keepCase: true }).lookupType('rollmesh.api.coordinator.v1.JobSpec');
}

// A message from its JSON form. protobufjs would ignore a misspelt key, and takes a Struct only in
// its wire form; this refuses the one and converts the other.
function toMessage(type, json, where) {
  if (type.fullName === '.google.protobuf.Struct') return toValue(json).structValue;
  const message = {};
  for (const [key, value] of Object.entries(json)) {
    const field = type.fields[key];
    if (!field) throw new Error(`${where}.${key}: no such key; known: ${Object.keys(type.fields)}`);
    const { resolvedType } = field.resolve();
    const convert = (inner, at) =>
      resolvedType instanceof protobuf.Type ? toMessage(resolvedType, inner, at) : inner;
    message[key] = field.repeated
      ? value.map((inner, i) => convert(inner, `${where}.${key}[${i}]`))
      : convert(value, `${where}.${key}`);
  }
  return message;
}

// A google.protobuf.Value.
function toValue(json) {
  if (json === null) return { nullValue: 0 };
  if (Array.isArray(json)) return { listValue: { values: json.map(toValue) } };
  if (typeof json === 'object') {
    const fields = Object.entries(json).map(([key, value]) => [key, toValue(value)]);
    return { structValue: { fields: Object.fromEntries(fields) } };
  }
  if (typeof json === 'boolean') return { boolValue: json };
  return typeof json === 'number' ? { numberValue: json } : { stringValue: json };
}

// What a refusal carries besides its message: google.rpc.Status, in a trailer. These are the parts
// of Google's public error model that Rollmesh uses.
const ERRORS = protobuf.parse(
  `
  syntax = "proto3";
  package google.rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }
  message RetryInfo { Duration retry_delay = 1; }
  message BadRequest {
    message FieldViolation { string field = 1; string description = 2; }
    repeated FieldViolation field_violations = 1;
  }
  `,
  { keepCase: true },
).root;

function explain(error) {
  const lines = [`refused: ${grpc.status[error.code]}: ${error.details}`];
  const [bytes] = error.metadata?.get('grpc-status-details-bin') ?? [];
  if (bytes) {
    for (const detail of ERRORS.lookupType('google.rpc.Status').decode(bytes).details) {
      const name = detail.type_url.split('/').pop();
      const type = name.startsWith('google.rpc.') && ERRORS.lookup(name);
      if (type) lines.push(`  ${type.name} ${JSON.stringify(type.decode(detail.value))}`);
    }
  }
  return lines.join('\n');
}

main().then(
  (status) => process.exit(status),
  (error) => {
    console.error('code' in error && 'details' in error ? explain(error) : `error: ${error.message}`);
    process.exit(1);
  },
);
