/** Jobs, and connections that break, against a real server behind a door. */
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import {
  Cancelled,
  Client,
  type GenerationEvent,
  ImageNotFound,
  JobNotEnded,
  JobNotFound,
  RequestIdReused,
  ServerUnavailable,
} from "../src/node.js";
import { randomUuid } from "../src/waiting.js";
import { type Door, doorTo, startServer, type TestServer } from "./server.js";

const MODEL = { model: "chroma-mini" } as const;
const SMALL = { ...MODEL, width: 64, height: 64, sampleSteps: 3 } as const;
const MIDDLING = { ...MODEL, width: 256, height: 128, sampleSteps: 30, previewEvery: 5 } as const;
const LONG = { ...MODEL, width: 512, height: 512, sampleSteps: 150 } as const;

let server: TestServer;
let client: Client;
let door: Door;

before(async () => {
  server = await startServer();
  client = new Client(server.target);
  door = await doorTo(server.port);
});

after(async () => {
  client.close();
  await door.close();
  await server.stop();
});

async function all(events: AsyncIterable<GenerationEvent>): Promise<GenerationEvent[]> {
  const seen: GenerationEvent[] = [];
  for await (const event of events) seen.push(event);
  return seen;
}

test("a job is made, watched twice, listed, and its picture fetched again", async () => {
  const job = await client.createJob(["a red circle", "a blue square"], SMALL);
  const [one, two] = await Promise.all([all(client.watchJob(job.jobId)), all(client.watchJob(job.jobId))]);
  assert.deepEqual(
    one.map((event) => event.type).filter((type) => type === "imageReady"),
    ["imageReady", "imageReady"],
  );
  assert.equal(two.at(-1)?.type, "completed");
  const ended = await client.getJob(job.jobId);
  assert.equal(ended.state, "succeeded");
  assert.equal(ended.doneSteps, 6);
  assert.equal(ended.images.length, 2);
  const ready = one.find((event) => event.type === "imageReady" && event.promptIndex === 1);
  const image = await client.getImage(job.jobId, 1);
  assert.ok(ready?.type === "imageReady");
  assert.equal(image.sha256, ready.image.sha256);
  assert.ok((await client.listJobs({ states: ["succeeded"] })).some(({ jobId }) => jobId === job.jobId));
  await assert.rejects(client.getImage(job.jobId, 2), ImageNotFound);
  await client.deleteJob(job.jobId);
  await assert.rejects(client.getJob(job.jobId), JobNotFound);
});

test("watching from the middle tells only what followed", async () => {
  const job = await client.createJob("a", SMALL);
  const events = await all(client.watchJob(job.jobId));
  const middle = events.find((event) => event.type === "prepared");
  assert.ok(middle);
  const rest = await all(client.watchJob(job.jobId, { afterSequence: middle.sequence }));
  assert.ok(rest.every((event) => event.sequence > middle.sequence));
  assert.equal(rest.at(-1)?.type, "completed");
  assert.ok(rest.some((event) => event.type === "imageReady"));
});

test("the same request id finds the same job; another request under it is refused", async () => {
  const requestId = randomUuid();
  const one = await client.createJob("a", { ...SMALL, requestId });
  const again = await client.createJob("a", { ...SMALL, requestId });
  assert.equal(again.jobId, one.jobId);
  await assert.rejects(client.createJob("b", { ...SMALL, requestId }), RequestIdReused);
  await all(client.watchJob(one.jobId));
});

test("a job that ended is drawn again with the seed that was drawn", async () => {
  const old = await client.createJob("a", { ...SMALL, seed: -1 });
  await all(client.watchJob(old.jobId));
  const requestId = randomUuid();
  const made = await client.redrawJob(old.jobId, { requestId });
  assert.notEqual(made.jobId, old.jobId);
  assert.equal((await client.redrawJob(old.jobId, { requestId })).jobId, made.jobId);
  await assert.rejects(client.redrawJob(made.jobId, { requestId }), RequestIdReused);
  await all(client.watchJob(made.jobId));
  const [before, after] = await Promise.all([old, made].map(({ jobId }) => client.getImage(jobId, 0)));
  assert.equal(after?.sha256, before?.sha256);
  assert.equal(after?.seed, before?.seed);
});

test("a job is cancelled while it runs, and told as it is", async () => {
  const job = await client.createJob("a", LONG);
  await assert.rejects(client.deleteJob(job.jobId), JobNotEnded);
  await assert.rejects(async () => {
    for await (const event of client.watchJob(job.jobId)) {
      if (event.type === "step") await client.cancelJob(job.jobId);
    }
  }, Cancelled);
  assert.equal((await client.getJob(job.jobId)).state, "cancelled");
});

test("leaving a watch leaves the job alone", async () => {
  const job = await client.createJob("a", MIDDLING);
  for await (const event of client.watchJob(job.jobId)) if (event.type === "step") break;
  assert.equal((await all(client.watchJob(job.jobId))).at(-1)?.type, "completed");
});

test("a watch goes on at the next event after the connection was lost", async () => {
  const shaky = new Client(door.target);
  const job = await client.createJob("a", MIDDLING);
  const attempts: number[] = [];
  const sequences: number[] = [];
  let cuts = 0;
  const events = shaky.watchJob(job.jobId, { onReconnect: (attempt) => attempts.push(attempt) });
  for await (const event of events) {
    if (event.type !== "heartbeat") sequences.push(event.sequence);
    if (event.type === "step" && event.step % 10 === 5 && cuts < 3) {
      cuts += 1;
      door.shut();
      setTimeout(() => door.open(), 100);
    }
  }
  shaky.close();
  assert.equal(cuts, 3);
  assert.ok(attempts.includes(1) && attempts.includes(0), `${attempts}`);
  assert.deepEqual(
    sequences,
    [...new Set(sequences)].sort((a, b) => a - b),
  );
});

test("a generation that reattaches survives a lost connection and ends with its image", async () => {
  const shaky = new Client(door.target);
  const types: string[] = [];
  let isCut = false;
  for await (const event of shaky.generate("a", { ...MIDDLING, reattach: true })) {
    types.push(event.type);
    if (event.type === "step" && !isCut) {
      isCut = true;
      door.shut();
      setTimeout(() => door.open(), 100);
    }
  }
  shaky.close();
  assert.deepEqual(types.slice(-2), ["imageReady", "completed"]);
  assert.equal(types.filter((type) => type === "accepted").length, 1);
});

test("a generation that reattaches is cancelled when it is left", async () => {
  let jobId = "";
  for await (const event of client.generate("a", { ...LONG, reattach: true })) {
    if (event.type === "accepted") jobId = event.jobId;
    if (event.type === "step") break;
  }
  await assert.rejects(all(client.watchJob(jobId)), Cancelled);
});

/** Waits without watching, which would keep the job alive. */
async function untilCancelled(requestId: string): Promise<void> {
  const deadline = Date.now() + 30_000;
  for (;;) {
    const job = (await client.listJobs()).find((one) => one.requestId === requestId);
    if (job?.state === "cancelled") return;
    assert.ok(Date.now() < deadline, `the job is ${job?.state}`);
  }
}

test("a generation with a request id ends at once when its user leaves", async () => {
  const left = randomUuid();
  for await (const event of client.generate("a", { ...LONG, requestId: left })) {
    if (event.type === "accepted") break;
  }
  await untilCancelled(left);
  const aborted = randomUuid();
  const abort = new AbortController();
  await assert.rejects(async () => {
    const events = client.generate("a", { ...LONG, requestId: aborted, signal: abort.signal });
    for await (const event of events) if (event.type === "accepted") abort.abort();
  }, Cancelled);
  await untilCancelled(aborted);
});

test("a generation that is left before its answer ends too", async () => {
  for (const reattach of [false, true]) {
    const requestId = randomUuid();
    const abort = new AbortController();
    const events = client.generate("a", { ...LONG, requestId, reattach, signal: abort.signal });
    const first = assert.rejects(events.next(), Cancelled);
    abort.abort();
    await first;
    // Either the call never arrived, or its job is over.
    const job = (await client.listJobs()).find((one) => one.requestId === requestId);
    if (job !== undefined) await untilCancelled(requestId);
  }
});

test("a generation whose connection was lost is found again under its request id", async () => {
  const shaky = new Client(door.target);
  const options = { ...MIDDLING, requestId: randomUuid() };
  let jobId = "";
  await assert.rejects(async () => {
    for await (const event of shaky.generate("a", options)) {
      if (event.type === "accepted") jobId = event.jobId;
      if (event.type === "step") door.shut();
    }
  }, ServerUnavailable);
  door.open();
  const again = await all(shaky.generate("a", options));
  shaky.close();
  assert.equal(again[0]?.type === "accepted" && again[0].jobId, jobId);
  assert.equal(again.at(-1)?.type, "completed");
});

test("without reattaching a lost connection is told", async () => {
  const shaky = new Client(door.target);
  await assert.rejects(async () => {
    for await (const event of shaky.generate("a", LONG)) {
      if (event.type === "step") door.shut();
    }
  }, ServerUnavailable);
  door.open();
  shaky.close();
});
