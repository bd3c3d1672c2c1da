/** The page's replay against a client that draws without a server: what is asked for, in which order, how it ends. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { before, describe, test } from "node:test";
import { png } from "./picture-files.mjs";
import { load } from "./source.mjs";

const TIME_MS = 1_795_648_911_717;
const CONFIG = {
  name: "my_run",
  process: [
    {
      trigger_word: "sks",
      train: { dtype: "bf16", steps: 500 },
      save: { save_every: 250 },
      network: { type: "lora" },
      model: {
        name_or_path: "models/chroma-mini.safetensors",
        arch: "chroma",
        quantize: true,
        qtype: "qint8",
      },
      sample: {
        neg: "bad",
        width: 64,
        height: 64,
        seed: 42,
        walk_seed: true,
        sample_steps: 2,
        guidance_scale: 4,
        prompts: ["a [trigger] circle", "a square --m 0.8", "a star --seed 7"],
      },
    },
  ],
};

/** Stands for a picture: its pixels are one grey, whose value comes of all that decided it. */
function picture({ prompt, seed, noiseDraw, adapter = "", size = 64 }) {
  const hash = createHash("sha256")
    .update(JSON.stringify([prompt, `${seed}`, noiseDraw, adapter]))
    .digest();
  return new TextEncoder().encode(JSON.stringify({ size, values: [...hash] }));
}

function adapterFile(step) {
  const metadata = { ss_base_model_version: "chroma", training_info: JSON.stringify({ step }) };
  const header = Buffer.from(JSON.stringify({ __metadata__: metadata }));
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(BigInt(header.length));
  return Buffer.concat([size, header]);
}

const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");

describe("a replay on the page", () => {
  let page;
  let errors;
  const ends = [];

  before(async () => {
    page = await load(
      { after: (end) => ends.push(end) },
      "replay/session.ts",
      "replay/run-folder.ts",
      "replay/drawing.ts",
      "replay/serving.ts",
      "pixels/picture-file.ts",
      "replay/config-file.ts",
      "replay/config-limits.ts",
    );
    errors = page.chromarpc;
  });
  test.after(async () => {
    for (const end of ends) await end();
  });

  async function decode(data) {
    try {
      const { size, values } = JSON.parse(new TextDecoder().decode(data));
      const pixels = Uint8Array.from({ length: size * size * 4 }, (_, at) => values[at % values.length]);
      return { width: size, height: size, data: pixels };
    } catch {
      throw new page.NoPicture("is no picture, or a broken one");
    }
  }

  /** The folder of a run whose pictures were drawn with a noise draw. */
  function folderOf({ noiseDraw = "float32", timeMs = TIME_MS, change = () => undefined, ...more } = {}) {
    const config = structuredClone(CONFIG);
    change(config.process[0]);
    const files = { ".job_config.json": JSON.stringify({ config }) };
    for (const step of [0, 250, 500]) {
      const name = step === 500 ? "my_run.safetensors" : `my_run_000000${step}.safetensors`;
      if (step > 0) files[name] = adapterFile(step);
      const adapter = step > 0 ? sha256(files[name]) : "";
      const prompts = [
        ["a sks circle", 42],
        ["a square", 43],
        ["a star", 7],
      ];
      for (const [index, [prompt, seed]] of prompts.entries()) {
        const number = `${step}`.padStart(9, "0");
        files[`samples/${timeMs + step}__${number}_${index}.jpg`] = picture({
          prompt,
          seed,
          noiseDraw,
          adapter,
        });
      }
    }
    Object.assign(files, more.files);
    for (const name of more.without ?? []) delete files[name];
    return page.chosenFolder(
      Object.entries(files).map(([path, content]) => {
        const file = new File([content], path.split("/").at(-1));
        return Object.defineProperty(file, "webkitRelativePath", { value: `my run/${path}` });
      }),
    );
  }

  class FakeClient {
    requests = [];
    uploads = [];
    deleted = [];
    stored = new Map();
    models = ["chroma", "chroma-mini"];
    limits = { maxStreams: 16, maxQueuedJobs: 16 };
    atOnce = 0;
    mostAtOnce = 0;
    before = async () => undefined;

    async serverInfo() {
      return {
        version: "1",
        devices: [],
        profiles: [{ id: "exact" }, { id: "preview" }],
        limits: this.limits,
      };
    }
    async listModels() {
      return this.models.map((id) => ({ id, aliasOf: "", baseCheckpoint: `org/${id}` }));
    }
    async listLoras() {
      return [...this.stored].map(([path, hash]) => ({ path, sha256: hash }));
    }
    async uploadLora(file, { filename }) {
      const hash = sha256(Buffer.from(await file.arrayBuffer()));
      this.uploads.push(filename);
      this.stored.set(`sha256:${hash}`, hash);
      return { path: `sha256:${hash}`, sha256: hash };
    }
    async deleteJob(jobId) {
      this.deleted.push(jobId);
    }
    async *generateRequest(request, { signal }) {
      const jobId = `job ${this.requests.push(request)}`;
      this.mostAtOnce = Math.max(this.mostAtOnce, ++this.atOnce);
      try {
        yield { type: "accepted", jobId };
        await this.before(request, signal);
        yield { type: "step", step: 1, totalSteps: 2 };
        const [{ prompt, seed }] = request.prompts;
        const noiseDraw = request.noiseDraw === 1 ? "float32" : "legacy";
        const adapter = request.loras[0] ? this.stored.get(request.loras[0].path) : "";
        const data = picture({ prompt, seed, noiseDraw, adapter });
        yield { type: "imageReady", image: { data, mediaType: "image/jpeg", warnings: [] } };
      } finally {
        this.atOnce -= 1;
      }
    }
  }

  /** Holds requests with an adapter back until so many are there. */
  function meeting(client, count) {
    let open;
    const opened = new Promise((resolve) => {
      open = resolve;
    });
    return async ({ loras }) => {
      if (loras.length === 0) return;
      if (client.atOnce === count) open();
      await opened;
    };
  }

  /** Runs a replay; what came of it. */
  async function replayed(client, folder, { options = {}, kept = { pictures: new Map() }, abort } = {}) {
    const results = new Map();
    const said = [];
    const watcher = {
      say: (line) => said.push(line),
      opened: () => undefined,
      chosen: (_, assumptions) => said.push(...assumptions),
      calibrated: (_, assumptions) => said.push(...assumptions),
      started: () => undefined,
      event: () => undefined,
      result: (result) => results.set(page.keyOf(result.row.file), result),
    };
    const signal = (abort ?? new AbortController()).signal;
    const wanted = { model: undefined, drawAnyway: false, ...options };
    let error;
    const calibration = await page
      .replay(client, folder, wanted, kept, decode, watcher, signal)
      .catch((thrown) => {
        error = thrown;
      });
    return { calibration, results, said, error, kept };
  }

  const all = (results) => [...results.values()];
  const identical = (results) => all(results).filter(({ similarity }) => similarity?.identical).length;

  test("every sample is drawn once, but for the calibration's other draw, with adapters sent once", async () => {
    const client = new FakeClient();
    client.before = meeting(client, 4);
    const { results, calibration, error } = await replayed(client, folderOf());
    assert.equal(error, undefined);
    assert.deepEqual([calibration.noiseDraw, calibration.matches], ["float32", true]);
    assert.deepEqual([results.size, identical(results)], [9, 9]);
    assert.equal(client.requests.length, 10);
    assert.equal(client.deleted.length, 10); // they do not push the person's own jobs out of sight
    assert.deepEqual(client.uploads.sort(), ["my_run.safetensors", "my_run_000000250.safetensors"]);
    assert.equal(client.mostAtOnce, 4);
  });

  test("what is asked for is what the trainer drew", async () => {
    const client = new FakeClient();
    await replayed(client, folderOf());
    const request = client.requests.find(
      ({ prompts, loras }) => loras.length > 0 && prompts[0].prompt === "a square",
    );
    const [prompt] = request.prompts;
    assert.deepEqual(
      [prompt.neg, prompt.width, prompt.height, prompt.seed, prompt.sampleSteps, prompt.guidanceScale],
      ["bad", 64, 64, 43n, 2, 4],
    );
    const [lora] = request.loras;
    assert.deepEqual([lora.path, lora.networkMultiplier], [`sha256:${lora.expectedSha256}`, 0.8]);
    assert.deepEqual([request.model, request.profile], ["chroma-mini", "preview"]);
    const { quantize, qtype, quantizeTe, dtype } = request.trainer;
    assert.deepEqual([quantize, qtype, quantizeTe, dtype], [true, "qint8", true, "bf16"]);
    assert.equal(request.output.pictureRecord, false);
    assert.equal(request.output.format, 4); // IMAGE_FORMAT_JPEG_TRAINER
  });

  test("an adapter that the server has is not sent", async () => {
    const client = new FakeClient();
    client.stored.set("below/root.safetensors", sha256(adapterFile(250)));
    await replayed(client, folderOf());
    assert.deepEqual(client.uploads, ["my_run.safetensors"]);
  });

  test("the legacy draw is found, and kept for samples of its time", async () => {
    const folder = folderOf({ noiseDraw: "legacy", timeMs: 1_748_000_000_000 });
    const { results, said } = await replayed(new FakeClient(), folder);
    assert.equal(identical(results), 9);
    assert.ok(
      said.some((line) => line.startsWith("The noise draw is legacy")),
      `${said}`,
    );
  });

  test("a LoKr is drawn in the form of its time", async () => {
    for (const [timeMs, noiseDraw, form] of [
      [1_748_000_000_000, "legacy", 2],
      [1_784_500_000_000, "legacy", 1],
      [TIME_MS, "float32", 1],
    ]) {
      const client = new FakeClient();
      const change = (process) => {
        process.network = { type: "lokr" };
      };
      await replayed(client, folderOf({ timeMs, noiseDraw, change }));
      assert.equal(client.requests.at(-1).trainer.lokrForm, form, `${timeMs}`);
    }
  });

  test("where neither draw matches, nothing more is drawn unless it is wanted", async () => {
    const folder = folderOf({ noiseDraw: "another" });
    const client = new FakeClient();
    const { results, calibration, kept } = await replayed(client, folder);
    assert.equal(calibration.matches, false);
    assert.equal(client.requests.length, 6); // three samples of step 0, twice
    assert.equal(
      all(results).filter(({ reason }) => reason?.startsWith("base or settings differ")).length,
      6,
    );
    const anyway = await replayed(client, folder, { options: { drawAnyway: true }, kept });
    assert.equal(all(anyway.results).filter(({ drawn }) => drawn).length, 9);
    assert.equal(client.requests.length, 12);
  });

  test("deleted checkpoints, broken pictures and other sizes have reasons, and the rest goes on", async () => {
    const name = (step, index) => `samples/${TIME_MS + step}__${`${step}`.padStart(9, "0")}_${index}.jpg`;
    const folder = folderOf({
      without: ["my_run_000000250.safetensors"],
      files: { [name(500, 0)]: "{", [name(500, 1)]: JSON.stringify({ size: 80, values: [1] }) },
    });
    const { results } = await replayed(new FakeClient(), folder);
    assert.equal(identical(results), 4);
    assert.equal(results.get("250 0").reason, "checkpoint deleted (max_step_saves_to_keep: 5)");
    assert.equal(results.get("500 0").reason, "the trainer's file is no picture, or a broken one");
    assert.equal(
      results.get("500 1").reason,
      "it has 80×80 pixels and the config says 64×64: the config was changed since",
    );
  });

  test("an adapter that the server refuses costs its rows only", async () => {
    const client = new FakeClient();
    const refused = `sha256:${sha256(adapterFile(250))}`;
    client.before = async ({ loras }) => {
      if (loras[0]?.path === refused)
        throw new errors.LoraIncompatible("the LoRA fits no layer", { code: 9 });
    };
    const { results } = await replayed(client, folderOf());
    assert.equal(identical(results), 6);
    assert.equal(results.get("250 1").reason, "the LoRA fits no layer");
  });

  test("a full queue is waited for, and a quota that no waiting helps is a reason", async () => {
    const client = new FakeClient();
    let full = 5;
    client.before = async ({ loras }) => {
      if (loras.length > 0 && full-- > 0) throw new errors.QueueFull("full", { code: 8, retryAfterMs: 1 });
    };
    const waited = await replayed(client, folderOf());
    assert.equal(identical(waited.results), 9);
    assert.ok(waited.said.includes("waiting: full"));
    client.before = async () => {
      throw new errors.QuotaExceeded("too large", { code: 8 });
    };
    const refused = await replayed(client, folderOf());
    assert.deepEqual([...new Set(all(refused.results).map(({ reason }) => reason))], ["too large"]);
    assert.equal(refused.calibration.matches, null);
  });

  test("no more are asked for at once than the server lets", async () => {
    const client = new FakeClient();
    client.limits = { maxStreams: 2, maxQueuedJobs: 16 };
    client.before = meeting(client, 2);
    const { results } = await replayed(client, folderOf());
    assert.deepEqual([identical(results), client.mostAtOnce], [9, 2]);
  });

  test("a replay that is stopped leaves no stream open, and goes on with what is missing", async () => {
    const client = new FakeClient();
    const abort = new AbortController();
    client.before = async ({ loras }, signal) => {
      if (loras.length === 0) return;
      abort.abort();
      if (!signal.aborted) await new Promise((resolve) => signal.addEventListener("abort", resolve));
      throw new errors.Cancelled("cancelled by this side", { code: 1 });
    };
    const folder = folderOf();
    const stopped = await replayed(client, folder, { abort });
    assert.ok(stopped.error instanceof page.Interrupted, stopped.error?.stack);
    assert.equal(client.atOnce, 0);
    const before = client.requests.length;
    client.before = async () => undefined;
    const gone = await replayed(client, folder, { kept: stopped.kept });
    assert.equal(identical(gone.results), 9);
    assert.ok(client.requests.slice(before).every(({ loras }) => loras.length > 0));
  });

  test("a server that goes away ends it after some tries, and what was drawn stays", async () => {
    const client = new FakeClient();
    client.before = async ({ loras }) => {
      if (loras.length > 0) throw new errors.ServerUnavailable("gone", { code: 14, retryAfterMs: 1 });
    };
    const { error, results } = await replayed(client, folderOf());
    assert.ok(error instanceof errors.ServerUnavailable);
    assert.equal(identical(results), 3);
    assert.equal(client.atOnce, 0);
  });

  test("a model that nobody can guess is asked for", async () => {
    const client = new FakeClient();
    client.models = ["one", "other"];
    const folder = folderOf();
    const { error } = await replayed(client, folder);
    assert.ok(error instanceof page.ModelWanted, error?.stack);
    assert.deepEqual([error.models, client.requests], [["one", "other"], []]);
    const { results } = await replayed(client, folder, { options: { model: "other" } });
    assert.equal(identical(results), 9);
  });

  test("a server without the trainer's profiles is said", async () => {
    const client = new FakeClient();
    client.serverInfo = async () => ({ profiles: [{ id: "reference" }] });
    const { error } = await replayed(client, folderOf());
    assert.match(error.message, /serves none of the profiles preview, preview-exact; it has reference/);
  });

  for (const [says, files] of [
    ["no run folder of ai-toolkit", {}],
    ["no training config of ai-toolkit", { "config.yaml": "a: 1" }],
    ["that is no training config of ai-toolkit", { "config.yaml": new Uint8Array(2 ** 20 + 1) }],
    ["holds itself", { "config.yaml": "a: &a [*a]" }],
    ["the run trains 'flux'", { "config.yaml": "config: {name: x, process: [{model: {arch: flux}}]}" }],
    ["no sample of ai-toolkit", { "config.yaml": "config: {name: x, process: [{model: {arch: chroma}}]}" }],
  ]) {
    test(`a folder that is no run is a line: ${says}`, async () => {
      const names = ["config.yaml", "optimizer.pt"].filter(
        (name) => files[name] !== undefined || name !== "config.yaml",
      );
      const folder = page.chosenFolder(
        names.map((name) =>
          Object.defineProperty(new File([files[name] ?? ""], name), "webkitRelativePath", {
            value: `x/${name}`,
          }),
        ),
      );
      const client = new FakeClient();
      const { error } = await replayed(client, folder);
      assert.ok(error instanceof page.Unusable, error?.stack);
      assert.ok(error.message.includes(says), error.message);
      assert.equal(client.requests.length, 0);
    });
  }

  test("hostile configs end in a sentence, and soon", () => {
    const large = 2 ** 20;
    for (const text of [
      "[",
      "{a: ",
      "- ",
      "? ",
      "]",
      "a: b\n",
      "\n",
      '"',
      "&a ",
      "!!str ",
      "a:",
      "[{",
      "*a,",
      "x\n ",
    ]) {
      const content = new TextEncoder().encode(text.repeat(large / text.length));
      const start = performance.now();
      assert.throws(() => page.readConfig(content, "config.yaml"), page.ConfigError, text);
      assert.ok(performance.now() - start < 10_000, `${text} took ${performance.now() - start} ms`);
    }
    for (const text of ["[", '{"a":', '"\\', "-", "9"]) {
      const content = new TextEncoder().encode(text.repeat(large / text.length));
      assert.throws(() => page.readConfig(content, ".job_config.json"), page.ConfigError, text);
    }
  });
});

describe("what a picture file says of itself", () => {
  let page;
  const ends = [];
  before(async () => {
    page = await load({ after: (end) => ends.push(end) }, "pixels/picture-file.ts");
  });
  test.after(async () => {
    for (const end of ends) await end();
  });

  const jpeg = (width, height, rest = "ffda0002 11 ffd9") =>
    Buffer.from(
      `ffd8 ffe00004 0000 ffc00008 08 ${height.toString(16).padStart(4, "0")} ${width.toString(16).padStart(4, "0")} 00 ${rest}`.replaceAll(
        " ",
        "",
      ),
      "hex",
    );

  test("its kind and size", () => {
    assert.deepEqual(page.pictureHead(jpeg(320, 192)), { mediaType: "image/jpeg", width: 320, height: 192 });
    const webp = Buffer.from(
      "52494646 16000000 57454250 56503820 0a000000 000000 9d012a 4001 c000".replaceAll(" ", ""),
      "hex",
    );
    assert.deepEqual(page.pictureHead(webp), { mediaType: "image/webp", width: 320, height: 192 });
  });

  test("what follows a PNG is not the picture's", () => {
    const head = { mediaType: "image/png", width: 64, height: 64 };
    assert.deepEqual(page.pictureHead(Buffer.concat([png(), Buffer.alloc(100)])), head);
  });

  for (const [what, data] of [
    ["nothing", Buffer.alloc(0)],
    ["a PNG that is cut off", png().subarray(0, -12)],
    ["a text", Buffer.from("<svg xmlns='http://www.w3.org/2000/svg'/>")],
    ["a JPEG that is cut off", jpeg(64, 64, "ffda0002 11")],
    ["a JPEG that ends in its head", jpeg(64, 64).subarray(0, 9)],
    ["a JPEG without pixels", jpeg(0, 64)],
    ["a JPEG of many pixels", jpeg(65_000, 65_000)],
  ]) {
    test(`${what} is refused`, () => assert.throws(() => page.pictureHead(data), page.NoPicture));
  }
});
