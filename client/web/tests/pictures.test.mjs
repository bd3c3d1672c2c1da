/** What the page reads in pictures, beside what the Python package reads in the same bytes. */
import assert from "node:assert/strict";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { after, before, describe, test } from "node:test";
import { fileURLToPath, pathToFileURL } from "node:url";
import { deflateSync } from "node:zlib";
import { build } from "vite";
import { png, text } from "./picture-files.mjs";

const at = (name) => fileURLToPath(new URL(name, import.meta.url));
const MAX_TEXT_BYTES = 8 * 1024 ** 2;
const cases = JSON.parse(await readFile(at("../../../tests/client/picture_cases.json"), "utf8"));

describe("what pictures say", () => {
  let pictures;
  let folder;

  before(async () => {
    folder = await mkdtemp(path.join(tmpdir(), "chromarpc-pictures-"));
    pictures = await built(folder);
  });
  after(() => rm(folder, { recursive: true, force: true }));

  const read = (name, data = new Uint8Array(Buffer.from(cases.files[name], "base64"))) =>
    pictures.openPicture(name, data);

  for (const [name, said] of Object.entries(cases.pictures)) {
    test(`${name} is read as the command line reads it`, async () => {
      if (said.error !== undefined) {
        await assert.rejects(read(name), (error) => {
          assert.ok(error instanceof pictures.NoPicture, error.stack);
          assert.equal(error.message, said.error);
          return true;
        });
        return;
      }
      const opened = await read(name);
      assert.deepEqual(pictures.explanation(opened), said.lines);
      const { request, urls } = opened.facts;
      assert.equal(request === undefined ? null : pictures.jsonText(request), said.request);
      assert.deepEqual(urls, said.urls);
    });
  }

  for (const { first, second, told, all } of cases.comparisons) {
    test(`${first} and ${second} differ as the command line says`, async () => {
      const [one, other] = [await read(first), await read(second)];
      const differences = pictures.compareFacts(one.facts, other.facts);
      assert.deepEqual(pictures.linesOf(differences, false), told);
      assert.deepEqual(pictures.linesOf(differences, true), all);
    });
  }

  const served = {
    models: ["chroma", "chroma-mini"],
    profiles: [
      { id: "reference", honoursNeg: false, takesTrainerOptions: false },
      { id: "preview", honoursNeg: true, takesTrainerOptions: true },
    ],
    profile: "reference",
    adapters: [],
    samplers: ["flowmatch", "euler", "heun"],
    schedules: ["flowmatch", "simple", "beta"],
    settings: ["reference", "comfyui"],
  };

  test("every field of the form that a record names is taken, and the rest is listed", async () => {
    const picture = await read("ours-preview.webp");
    const hash = `sha256:${"12".repeat(32)}`;
    const adapters = [{ path: hash, sha256: "12".repeat(32) }];
    const { values, remarks } = pictures.settingsOf(picture, { ...served, adapters }, true);
    assert.deepEqual(values, {
      triggerWord: "",
      model: "chroma",
      neg: "ugly,\nbad",
      sampler: "flowmatch",
      schedule: "flowmatch",
      shift: "",
      settings: "",
      usesNeg: false,
      prompts: ["a cat"],
      width: "80",
      height: "64",
      steps: "25",
      guidance: "4",
      seed: "42",
      isSeedRandom: false,
      loras: [
        { path: "https://example.test/a.safetensors", multiplier: 0.3, expectedSha256: "ef".repeat(32) },
        { path: hash, multiplier: 0.00001, expectedSha256: undefined },
      ],
      profile: "preview",
      isQuantized: true,
      qtype: "qfloat8",
      textQuantized: "no",
      dtype: "bf16",
      lokrForm: "weight",
      format: "webp",
    });
    assert.deepEqual(remarks, ["output.quality: the form has no field for it (90)"]);
    assert.deepEqual(pictures.urlsIn(picture.facts.request), ["https://example.test/a.safetensors"]);
    const without = pictures.settingsOf(picture, { ...served, adapters }, false);
    assert.deepEqual(
      without.values.loras.map(({ path }) => path),
      [hash],
    );
    assert.match(without.remarks[0], /^loras\.0\.path: https:\S+ was not to be fetched$/);
  });

  test("sampler, schedule, shift, settings and negative text are taken with their switch", async () => {
    const { values, remarks } = pictures.settingsOf(await read("ours-sampled.png"), served, false);
    assert.deepEqual(
      [values.sampler, values.schedule, values.shift, values.settings, values.neg, values.usesNeg],
      ["heun", "beta", "1", "comfyui", "ugly", true],
    );
    assert.deepEqual(
      remarks.filter((remark) => !remark.startsWith("loras.")),
      [],
    );
    const older = { ...served, samplers: [], schedules: [], settings: [] };
    const left = pictures.settingsOf(await read("ours-sampled.png"), older, false);
    assert.deepEqual([left.values.sampler, left.values.settings], ["flowmatch", ""]);
    assert.deepEqual(left.remarks.slice(0, 2), [
      "sampler: this server has no heun",
      "schedule: this server has no beta",
    ]);
    const odd = pictures.settingsOf(await read("ours-odd-sampling.png"), served, false);
    assert.deepEqual(
      odd.remarks.map((remark) => remark.split(":")[0]).filter((name) => !name.startsWith("loras.")),
      ["sampler", "schedule", "shift", "use_neg", "settings"],
    );
  });

  test("a picture of ComfyUI is taken as ComfyUI draws", async () => {
    const { values, remarks } = pictures.settingsOf(await read("comfyui.png"), served, false);
    assert.deepEqual(
      [values.sampler, values.schedule, values.shift, values.settings, values.neg, values.usesNeg],
      ["euler", "beta", "1", "comfyui", "blurry", true],
    );
    assert.ok(!remarks.some((remark) => remark.includes("counterpart")));
  });

  test("what the server does not have is listed by name", async () => {
    const picture = await read("ours-preview.webp");
    const profiles = served.profiles.slice(0, 1);
    const { values, remarks } = pictures.settingsOf(picture, { ...served, models: ["x"], profiles }, true);
    assert.equal(values.model, undefined);
    assert.equal(values.profile, undefined);
    assert.deepEqual(
      remarks.map((remark) => remark.split(":")[0]),
      ["model", "loras.1.path", "profile", "neg", "trainer", "output.quality"],
    );
  });

  test("an adapter of other content is told, and one of the same content is found under another name", async () => {
    const picture = await read("ours.png");
    const moved = { path: "moved.safetensors", sha256: "ab".repeat(32) };
    const other = { path: "job/l.safetensors", sha256: "cd".repeat(32) };
    const both = pictures.settingsOf(picture, { ...served, adapters: [other, moved] }, false);
    assert.equal(both.values.loras[0].path, other.path);
    assert.deepEqual(both.remarks, [
      "loras.0.sha256: job/l.safetensors has other content than recorded: cdcdcdcdcdcd, not abababababab; " +
        "the recorded one is here as moved.safetensors",
    ]);
    const one = pictures.settingsOf(picture, { ...served, adapters: [moved] }, false);
    assert.equal(one.values.loras[0].path, moved.path);
    assert.match(one.remarks[0], /is not here; moved\.safetensors has the same content/);
  });

  test("odd values of a record are listed, none is taken", async () => {
    const { values, remarks } = pictures.settingsOf(await read("ours-odd.png"), served, false);
    assert.deepEqual(
      remarks.map((remark) => remark.slice(0, remark.indexOf(":"))),
      [
        ...["loras.0.path", "loras.1.path", "loras.2.network_multiplier", "loras.2.path", "loras.3.path"],
        ...["profile", "trainer.10", "trainer.9", "trainer.a.b", "trainer.e", "trainer.f", "trainer.g"],
        ...["trainer.h", "trainer", "output.format", "output.quality", "noise_draw", "more"],
      ],
    );
    assert.equal(values.seed, "9223372036854775807");
    assert.equal(values.format, undefined);
  });

  test("a bomb is inflated no further than may be", async () => {
    const bomb = deflateSync(Buffer.alloc(200_000_000), { level: 9 });
    const data = png(...Array.from({ length: 50 }, (_, number) => text("zTXt", `${number}`, "\0", bomb)));
    const before = process.memoryUsage().arrayBuffers;
    await assert.rejects(read("bomb.png", data), /holds more than 8388608 bytes of text/);
    assert.ok(process.memoryUsage().arrayBuffers - before < 4 * MAX_TEXT_BYTES);
  });

  test("texts are counted together", async () => {
    const some = Buffer.alloc(1_000_000, "a");
    const eight = Array.from({ length: 8 }, (_, number) => text("tEXt", `${number}`, "", some));
    assert.equal((await read("eight.png", png(...eight))).file.texts.size, 8);
    const nine = png(...eight, text("zTXt", "9", "\0", deflateSync(some)));
    await assert.rejects(read("nine.png", nine), /holds more than/);
  });

  test("JSON is read and written as Python does", () => {
    const { parseJson, jsonText } = pictures;
    const kept = [
      "9007199254740993",
      "4.0",
      "1e+16",
      "1e-05",
      "0.0001",
      "-0.0",
      '"\u007f\u2028é"',
      "[]",
      "{}",
      "NaN",
    ];
    for (const text of kept) assert.equal(jsonText(parseJson(text)), text);
    const wrong = [
      "",
      "01",
      "1.",
      ".5",
      "+1",
      "[1,]",
      '{"a":1,}',
      '"\n"',
      '"\\x"',
      "[",
      "1 2",
      "'a'",
      "\ufeff1",
    ];
    for (const text of [...wrong, "9".repeat(4301), "[".repeat(100_000)])
      assert.throws(() => parseJson(text), SyntaxError, text);
    assert.deepEqual(
      [...parseJson('{"10":1,"2":1,"__proto__":1,"2":3}').entries()],
      [
        ["10", 1n],
        ["2", 3n],
        ["__proto__", 1n],
      ],
    );
  });

  test("long texts take no time", async () => {
    const begun = performance.now();
    for (const parameters of [
      `Steps: 1, ${"a".repeat(500_000)}`,
      `Steps: 1, a: "${"\\".repeat(100_000)}`,
      `Steps: 1, ${"a:".repeat(200_000)}`,
      `${"<lora:".repeat(100_000)}\nSteps: 1`,
      `${" ".repeat(500_000)}Steps: 1${"\u2003".repeat(500_000)}`,
    ]) {
      const opened = await read(
        "long.png",
        png(text("iTXt", "parameters", "\0\0\0\0", Buffer.from(parameters))),
      );
      assert.match(opened.facts.program, /AUTOMATIC1111/);
    }
    const xmp = '<r xmlns:c="urn:chromarpc:picture">'.repeat(100_000) + "<c:record".repeat(100_000);
    assert.equal(pictures.recordedText(xmp), undefined);
    assert.ok(performance.now() - begun < 5000);
  });
});

/** The page's reading of pictures, as a module for Node. */
async function built(folder) {
  const entry = path.join(folder, "entry.ts");
  const modules = ["comparison", "files", "json", "opened", "settings", "xmp"];
  await writeFile(
    entry,
    modules.map((name) => `export * from ${JSON.stringify(at(`../src/pictures/${name}.ts`))};`).join("\n"),
  );
  await build({
    configFile: false,
    logLevel: "error",
    root: at(".."),
    resolve: { alias: { "chromarpc/web": at("../../typescript/src/web.ts") } },
    build: {
      outDir: folder,
      emptyOutDir: false,
      lib: { entry, formats: ["es"], fileName: () => "pictures.mjs" },
    },
  });
  return await import(pathToFileURL(path.join(folder, "pictures.mjs")).href);
}
