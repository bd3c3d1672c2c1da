/** The client against a real server with a real checkpoint. */
import assert from "node:assert/strict";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { after, before, test } from "node:test";
import {
  Cancelled,
  Client,
  DeadlineExceeded,
  type GenerationEvent,
  InvalidRequest,
  LoraInvalid,
  LoraNotFound,
  ModelNotFound,
  ServerUnavailable,
} from "../src/node.js";
import { LORA_ROOT, startServer, type TestServer } from "./server.js";

let server: TestServer;
let client: Client;
const SMALL = { model: "chroma-mini", width: 64, height: 64, sampleSteps: 4 } as const;
/** Long enough that no test sees its end. */
const LONG = { model: "chroma-mini", width: 512, height: 512, sampleSteps: 150 } as const;

before(async () => {
  server = await startServer("--max-upload-bytes", "8MB");
  client = new Client(server.target);
});

after(async () => {
  client.close();
  await server.stop();
});

test("a generation tells every event and ends with its image", async () => {
  const events: GenerationEvent[] = [];
  for await (const event of client.generate("[trigger] a red circle", {
    ...SMALL,
    triggerWord: "sks",
    seed: 2n ** 40n,
    previewEvery: 2,
  })) {
    events.push(event);
  }
  const [first, last] = [events[0], events.at(-1)];
  assert.ok(first?.type === "accepted" && last?.type === "completed");
  assert.equal(first.prompts[0]?.prompt, "sks a red circle");
  assert.equal(first.prompts[0]?.seed, 2n ** 40n);
  const steps = events.filter((event) => event.type === "step");
  assert.deepEqual(
    steps.map((step) => step.step),
    [1, 2, 3, 4],
  );
  assert.equal(steps[0]?.sigmas.length, 5);
  assert.ok(events.some((event) => event.type === "preview" && event.data.length > 0));
  const ready = events.find((event) => event.type === "imageReady");
  assert.ok(ready?.type === "imageReady");
  assert.deepEqual([...ready.image.data.slice(1, 4)], [...Buffer.from("PNG")]);
  assert.equal(ready.image.blob().type, "image/png");
  // What the server wrote into it is handed on as it came, by whichever way the picture is fetched.
  assert.ok(Buffer.from(ready.image.data).includes('"prompt":"sks a red circle"'));
  const stored = await client.getImage(first.jobId, 0);
  assert.deepEqual(Buffer.from(stored.data), Buffer.from(ready.image.data));
  assert.equal(ready.image.plan.jobId, first.jobId);
  assert.ok(ready.image.prepared?.modelRevision);
  assert.equal(last.imageCount, 1);
});

test("several prompts give images in their order, and a body that repeats each", async () => {
  const images = await client.generateImages(["a red circle", { prompt: "a blue square", seed: 7 }], {
    ...SMALL,
    outputFormat: "jpeg",
  });
  assert.deepEqual(
    images.map((image) => [image.promptIndex, image.seed, image.mediaType]),
    [
      [0, 42n, "image/jpeg"],
      [1, 7n, "image/jpeg"],
    ],
  );
  const again = images[1]?.repeatRequest();
  assert.equal(again?.prompts[0]?.seed, 7);
  assert.equal(again?.prompts[0]?.prompt, "a blue square");
});

test("the same seed gives the same bytes", async () => {
  const [one, two] = [await client.generateImages("a", SMALL), await client.generateImages("a", SMALL)];
  assert.equal(one[0]?.sha256, two[0]?.sha256);
});

test("what the server refuses names every field", async () => {
  const prompts = [{ prompt: "a" }, { prompt: "b", width: 63, seed: -2 }];
  await assert.rejects(client.generateImages(prompts, { model: "chroma-mini" }), (error) => {
    assert.ok(error instanceof InvalidRequest);
    assert.equal(error.reason, "INVALID_PARAMETER");
    assert.deepEqual(error.violations.map(({ field }) => field).sort(), [
      "prompts.1.seed",
      "prompts.1.width",
    ]);
    return true;
  });
});

test("what cannot be sent is refused before it is sent", async () => {
  for (const [field, options] of [
    ["prompts.0.width", { width: 2 ** 40 }],
    ["prompts.0.sample_steps", { sampleSteps: 2.5 }],
    ["prompts.0.seed", { seed: 2 ** 60 }],
    ["prompts.0.guidance_scale", { guidanceScale: Number.NaN }],
  ] as const) {
    await assert.rejects(client.generateImages("a", options), (error) => {
      assert.ok(error instanceof InvalidRequest);
      assert.equal(error.violations[0]?.field, field);
      return true;
    });
  }
});

test("every reason has its class", async () => {
  await assert.rejects(client.generateImages("a", { model: "none" }), ModelNotFound);
  await assert.rejects(client.generateImages("a", { ...SMALL, loras: "none.safetensors" }), LoraNotFound);
  await assert.rejects(client.inspectLora("../../etc/passwd", { model: "chroma-mini" }), LoraNotFound);
});

test("a signal stops a generation, and the server is free again", async () => {
  const abort = new AbortController();
  const seen: GenerationEvent[] = [];
  await assert.rejects(async () => {
    for await (const event of client.generate("a", { ...LONG, signal: abort.signal })) {
      seen.push(event);
      if (event.type === "step") abort.abort();
    }
  }, Cancelled);
  assert.equal(seen.at(-1)?.type, "step");
  await client.generateImages("a", SMALL);
});

test("leaving the loop stops the job", async () => {
  for await (const event of client.generate("a", LONG)) {
    if (event.type === "step") break;
  }
  await client.generateImages("a", SMALL);
});

test("a deadline is the server's too", async () => {
  await assert.rejects(client.generateImages("a", { ...LONG, timeoutMs: 500 }), DeadlineExceeded);
});

test("the address that a server prints can be pasted", async () => {
  const folder = await mkdtemp(path.join(tmpdir(), "c-"));
  for (const host of ["[::1]", `unix:${folder}/c.sock`]) {
    const other = await startServer("--host", host);
    // A token, which goes to no other machine without TLS.
    const there = new Client(other.address, { token: "t" });
    try {
      assert.notEqual((await there.serverInfo()).version, "");
    } finally {
      there.close();
      await other.stop();
    }
  }
  await rm(folder, { recursive: true });
  const same = new Client(server.address);
  assert.notEqual((await same.serverInfo()).version, "");
  same.close();
  assert.throws(() => new Client("unix-abstract:x"), TypeError);
});

test("nobody at the target", async () => {
  const nobody = new Client("http://127.0.0.1:9");
  await assert.rejects(nobody.serverInfo(), (error) => {
    assert.ok(error instanceof ServerUnavailable);
    assert.match(error.message, /cannot reach http:\/\/127\.0\.0\.1:9/);
    return true;
  });
  nobody.close();
});

test("a token travels in plain text only when that is allowed", () => {
  assert.throws(() => new Client("http://example.org", { token: "secret" }), TypeError);
  assert.throws(() => new Client("http://127.0.0.1", { token: "two words" }), TypeError);
  new Client("http://127.0.0.1", { token: "secret" }).close();
  new Client("https://example.org", { token: "secret" }).close();
  new Client("http://example.org", { token: "secret", allowInsecureToken: true }).close();
});

test("models, server and adapters", async () => {
  const models = await client.listModels();
  assert.ok(models.find((model) => model.id === "chroma-mini")?.resident);
  assert.ok((await client.serverInfo()).profiles.length > 0);
  const path = (await client.listLoras())[0]?.path;
  assert.ok(path);
  const inspection = await client.inspectLora(path, { model: "chroma-mini" });
  assert.ok(inspection.matchedKeyCount > 0);
  assert.ok(inspection.blocks.length > 0);
});

/** The same adapter under another hash: a longer header. As it is, the server has it below its root too. */
function padded(adapter: Buffer): Uint8Array<ArrayBuffer> {
  const end = 8 + Number(adapter.readBigUInt64LE());
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(end));
  return new Uint8Array(
    Buffer.concat([length, adapter.subarray(8, end), Buffer.from(" ".repeat(8)), adapter.subarray(end)]),
  );
}

test("an adapter is uploaded once, changes the picture, and is deleted", async () => {
  const adapter = await readFile(path.join(LORA_ROOT, "hollow_shapes.safetensors"));
  const file = new File([padded(adapter)], "mine.safetensors");
  const progress: number[] = [];
  const stored = await client.uploadLora(file, { onProgress: (sent) => progress.push(sent) });
  assert.equal(stored.filename, "mine.safetensors");
  assert.equal(progress.at(-1), file.size);
  assert.equal((await client.uploadLora(file)).path, stored.path);
  const [plain] = await client.generateImages("a hlw red circle", SMALL);
  const [changed] = await client.generateImages("a hlw red circle", { ...SMALL, loras: stored.path });
  assert.notEqual(plain?.sha256, changed?.sha256);
  await client.deleteLora(stored.path);
  await assert.rejects(client.generateImages("a", { ...SMALL, loras: stored.path }), LoraNotFound);
});

test("an upload that is no adapter is refused", async () => {
  const junk = new Blob([new Uint8Array(5000).fill(7)]);
  await assert.rejects(client.uploadLora(junk, { filename: "junk.safetensors" }), LoraInvalid);
});
