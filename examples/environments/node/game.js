// Guess the number: the game alone, without gRPC.
'use strict';

const LOWEST = 1;
const HIGHEST = 9;
const MAX_TURNS = 6;

// Every task asks the same, so that nothing but the answers can be learned; its number and the
// episode's seed say which number is the secret.
const SPLITS = { train: 512, heldout: 128 };
const TASKS = Object.entries(SPLITS).flatMap(([split, count]) =>
  Array.from({ length: count }, (_, i) => ({ id: `${split}-${i}`, split })),
);
const NUMBERS = new Map(TASKS.map((task, number) => [task.id, number]));

class Game {
  // `seed` is a BigInt: it may be larger than what a number holds exactly.
  constructor(taskId, seed) {
    const drawn = mix(mix(seed) + BigInt(NUMBERS.get(taskId)));
    this.secret = LOWEST + Number(drawn % BigInt(HIGHEST - LOWEST + 1));
    this.turns = 0;
  }

  look() {
    return `${LOWEST}-${HIGHEST}?`;
  }

  // What comes of a guess. Without an observation the game is over.
  act(text) {
    this.turns += 1;
    const guess = /^[1-9]$/.test(text.trim()) ? Number(text) : undefined;
    if (guess === this.secret) {
      const late = (1 - this.turns) / 10;
      return { reward: (11 - this.turns) / 10, rewards: { found: 1, late }, truncated: false };
    }
    if (this.turns === MAX_TURNS) return { reward: 0, rewards: {}, truncated: true };
    if (guess === undefined) return { observation: 'digit?', reward: 0, rewards: {} };
    return { observation: guess < this.secret ? 'higher' : 'lower', reward: 0, rewards: {} };
  }
}

// SplitMix64: the same number for the same seed, in every version of Node.
function mix(seed) {
  const wrap = (value) => BigInt.asUintN(64, value);
  let z = wrap(seed + 0x9e3779b97f4a7c15n);
  z = wrap((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n);
  z = wrap((z ^ (z >> 27n)) * 0x94d049bb133111ebn);
  return z ^ (z >> 31n);
}

module.exports = { Game, MAX_TURNS, NUMBERS, SPLITS, TASKS };
