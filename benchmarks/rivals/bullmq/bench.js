// BullMQ, measured in the same way as the others; protocol.py describes the commands.
//
// Settings: one Node process with a worker for 100 jobs at once; addBulk fills the queue; completed jobs
// are kept (its default, because they contain the results). Node shares no memory with other processes,
// so ended jobs are counted in a variable that is written to BENCH_COUNTER every 2 ms. Callers that wait
// for a result use QueueEvents. Plain functions and coroutines run in the same event loop.

"use strict";

const fs = require("node:fs");
const { Queue, QueueEvents, Worker } = require("bullmq");

const QUEUE = "bench";
const BATCH = 1000;
const BATCH_OF_PAYLOADS = 100; // 10 MB
const CALLERS = 100;
const TEXT = "x".repeat(100_000);

const server = new URL(process.env.BENCH_REDIS_URL);
const connection = { host: server.hostname, port: Number(server.port), maxRetriesPerRequest: null };

const values = {
  noop: (number) => number,
  sync: (number) => number,
  sleep: (number) => (1 + (number % 50)) / 1000,
  cpu: () => 0.0002,
  payload: () => TEXT,
};

const functions = {
  noop: async (value) => value,
  sync: (value) => value,
  sleep: (value) => new Promise((resolve) => setTimeout(resolve, value * 1000, value)),
  cpu: async (value) => {
    const until = performance.now() + value * 1000;
    while (performance.now() < until);
    return value;
  },
  payload: async (value) => value.length,
};

function count() {
  let finished = 0n;
  const path = process.env.BENCH_COUNTER;
  if (path) {
    const file = fs.openSync(path, "r+");
    const slot = Buffer.alloc(8);
    setInterval(() => {
      slot.writeBigUInt64LE(finished);
      fs.writeSync(file, slot, 0, 8, 8);
    }, 2);
  }
  return () => (finished += 1n);
}

async function work() {
  const finished = count();
  const worker = new Worker(
    QUEUE,
    async (job) => {
      const result = await functions[job.name](job.data.value);
      finished();
      return result;
    },
    { connection, concurrency: 100 },
  );
  worker.on("error", (error) => console.error(error));
  process.on("SIGTERM", () => worker.close().then(() => process.exit(0)));
}

const seconds = (started) => ({ seconds: (performance.now() - started) / 1000 });

async function bulk(queue, workload, many) {
  const size = workload === "payload" ? BATCH_OF_PAYLOADS : BATCH;
  const started = performance.now();
  for (let first = 0; first < many; first += size) {
    const jobs = [];
    for (let number = first; number < Math.min(first + size, many); number++) {
      jobs.push({ name: workload, data: { value: values[workload](number) } });
    }
    await queue.addBulk(jobs);
  }
  return seconds(started);
}

async function enqueue(queue, callers, many) {
  let number = 0;
  const caller = async () => {
    while (number < many) await queue.add("noop", { value: number++ });
  };
  const started = performance.now();
  await Promise.all(Array.from({ length: callers }, caller));
  return seconds(started);
}

async function roundtrip(queue, many) {
  const events = new QueueEvents(QUEUE, { connection });
  await events.waitUntilReady();
  const milliseconds = [];
  for (let number = 0; number < many; number++) {
    const started = performance.now();
    const job = await queue.add("noop", { value: number });
    const result = await job.waitUntilFinished(events, 30_000);
    milliseconds.push(performance.now() - started);
    if (result !== number) throw new Error(`the result of ${number} came back as ${result}`);
  }
  await events.close();
  return { milliseconds };
}

async function answer(action, words) {
  const queue = new Queue(QUEUE, { connection });
  await queue.add("noop", { value: 0 }); // opens connections
  const last = Number(words.at(-1));
  const answers = {
    fill: () => bulk(queue, words[0], last - 1),
    enqueue: () => enqueue(queue, Number(words[0]), last),
    bulk: () => bulk(queue, "noop", last),
    roundtrip: () => roundtrip(queue, last),
  };
  console.log(JSON.stringify(await answers[action]()));
  await queue.close();
}

const [action, ...words] = process.argv.slice(2);
const done = action === "worker" ? work() : answer(action, words);
done.catch((error) => {
  console.error(error);
  process.exit(1);
});
