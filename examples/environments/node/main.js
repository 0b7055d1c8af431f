// Guess the number, as an environment of Rollmesh: node main.js --listen 127.0.0.1:0
//
// Nothing here is generated: the protos are read when it starts.
'use strict';

const path = require('node:path');
const { parseArgs } = require('node:util');

const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');
const { HealthImplementation } = require('grpc-health-check');

const { EnvironmentService } = require('./service');

const PROTOS = path.join(__dirname, '../../../protos');
const SERVICE = 'rollmesh.api.environment.v1.EnvironmentService';
const USAGE = `usage: node main.js [--listen HOST:PORT] [--max-episodes N]
  port 0: a free one; N: episodes at once, 1 or more`;
// Milliseconds that calls other than episodes have to end when the process is told to.
const DRAIN_MS = 2000;

function main() {
  const { listen, maxEpisodes } = options();
  const definition = protoLoader.loadSync('rollmesh/api/environment/v1/environment_service.proto', {
    includeDirs: [PROTOS],
    keepCase: true, // Fields are called what the protos call them.
    longs: String, // A seed may be larger than what a number holds exactly.
    enums: String,
    defaults: true,
    oneofs: true,
  });
  const server = new grpc.Server({
    'grpc.so_reuseport': 0,
    // Without pings a client that lost its power would keep its episodes for ever.
    'grpc.keepalive_time_ms': 20_000,
    'grpc.keepalive_timeout_ms': 5_000,
  });
  const service = new EnvironmentService(maxEpisodes);
  const health = new HealthImplementation({ '': 'SERVING', [SERVICE]: 'SERVING' });
  server.addService(definition[SERVICE], service.handlers);
  health.addToServer(server);
  server.bindAsync(listen, grpc.ServerCredentials.createInsecure(), (error, port) => {
    if (error) {
      console.error(error.message);
      process.exit(1);
    }
    console.log(`listening on ${listen.slice(0, listen.lastIndexOf(':'))}:${port}`);
  });

  const stop = () => {
    health.setStatus('', 'NOT_SERVING');
    health.setStatus(SERVICE, 'NOT_SERVING');
    service.stop();
    server.tryShutdown(() => process.exit(0));
    // Whoever watches our health never ends by itself.
    setTimeout(() => {
      server.forceShutdown();
      process.exit(0);
    }, DRAIN_MS);
  };
  process.once('SIGTERM', stop);
  process.once('SIGINT', stop);
}

function options() {
  try {
    const { values } = parseArgs({
      options: {
        listen: { type: 'string', default: '127.0.0.1:0' },
        'max-episodes': { type: 'string', default: '20000' },
      },
    });
    const maxEpisodes = Number(values['max-episodes']);
    if (!/^.+:\d+$/.test(values.listen) || !(Number.isInteger(maxEpisodes) && maxEpisodes > 0)) {
      throw new Error('an option has no such value');
    }
    return { listen: values.listen, maxEpisodes };
  } catch (error) {
    console.error(`${error.message}\n${USAGE}`);
    return process.exit(2);
  }
}

main();
