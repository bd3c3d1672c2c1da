/** The page's replay makes of a run folder what the Python client makes of it. */
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { before, describe, test } from "node:test";
import { load } from "./source.mjs";

const CASES = new URL("../../../tests/client/replay_cases.json", import.meta.url);
const { configs, sizes, folders, calibrations, similarities, summaries, reasons } = JSON.parse(
  await readFile(CASES, "utf8"),
);

const bytesOf = ({ text, base64 }) =>
  new Uint8Array(text === undefined ? Buffer.from(base64, "base64") : Buffer.from(text));

describe("what the page and the Python client have to agree on", () => {
  let page;
  const ends = [];

  before(async () => {
    page = await load(
      { after: (end) => ends.push(end) },
      "replay/config-file.ts",
      "replay/config-limits.ts",
      "replay/python-values.ts",
      "replay/settings.ts",
      "replay/run-folder.ts",
      "replay/pairing.ts",
      "replay/calibration.ts",
      "pixels/similarity.ts",
      "replay/facts.ts",
    );
  });
  test.after(async () => {
    for (const end of ends) await end();
  });

  /** A run as Python's dataclass would be written down. */
  function runFacts(run) {
    const sample = (one) =>
      typeof one === "string"
        ? one
        : {
            prompt: one.prompt,
            negative_prompt: one.negativePrompt,
            requested_width: one.requestedWidth,
            requested_height: one.requestedHeight,
            width: one.width,
            height: one.height,
            seed: one.seed === null ? null : `${one.seed}`,
            request_seed: one.seed === null ? null : `${page.requestSeed(one.seed)}`,
            steps: one.steps,
            guidance_scale: one.guidanceScale,
            network_multiplier: one.networkMultiplier,
          };
    const { quantize, qtype, quantizeTe, dtype } = run.trainer;
    return {
      name: run.name,
      trainer: { quantize, qtype, quantize_te: quantizeTe, dtype },
      base_model: run.baseModel,
      network_type: run.networkType,
      pretrained: run.isPretrained,
      samples: run.samples.map(sample),
      first_samples: run.firstSamples.map(sample),
      first_replaces: run.firstReplaces,
      sample_every: run.sampleEvery,
      save_every: run.saveEvery,
      saves_kept: run.savesKept,
      total_steps: run.totalSteps,
      assumptions: [...run.assumptions],
      unresolved: [...run.unresolved],
    };
  }

  for (const { name, file, values, run, error, ...content } of configs) {
    test(`config: ${name}`, () => {
      let read;
      try {
        const found = page.readConfig(bytesOf(content), file);
        read = { values: page.shownOf(found) };
        read.run = runFacts(page.resolveRun(found));
      } catch (thrown) {
        assert.ok(thrown instanceof page.ConfigError, thrown?.stack);
        assert.ok(error !== undefined, thrown.message);
        assert.equal(thrown.message.slice(0, error.length), error);
        if (!error.endsWith(": ")) assert.equal(thrown.message, error);
      }
      assert.equal(read?.values, values);
      assert.deepEqual(read?.run, run);
    });
  }

  test("sizes", () => {
    for (const [asked, pixels] of sizes) assert.equal(page.effectiveSize(asked), pixels, `${asked}`);
  });

  /** Files as a browser hands them over. */
  function folderOf(files) {
    return page.chosenFolder(
      Object.entries(files).map(([path, content]) => {
        const file = new File([bytesOf(content)], path.split("/").at(-1));
        return Object.defineProperty(file, "webkitRelativePath", { value: `run/${path}` });
      }),
    );
  }

  for (const { name, files, rows, ignored } of folders) {
    test(`folder: ${name}`, async () => {
      const folder = folderOf(files);
      const config = await folder.config();
      const found = await page.pair(page.resolveRun(page.readConfig(config.content, config.name)), folder);
      assert.deepEqual(
        found.rows.map((row) => ({
          file: row.file.name,
          time_ms: row.file.timeMs,
          step: row.file.step,
          index: row.file.index,
          checkpoint: row.checkpoint,
          checkpoint_kept: row.checkpointKept,
          reason: row.reason?.split(", which a page cannot replace")[0] ?? null,
          is_old: page.likelyDraw(row) === "legacy",
          is_factorized: page.hasFactorizedLokr(row),
        })),
        rows,
      );
      assert.deepEqual(
        found.ignored.map((one) => [one.name, one.reason]),
        ignored,
      );
    });
  }

  for (const [number, expected] of calibrations.entries()) {
    test(`calibration ${number}: ${expected.sentence}`, () => {
      const trials = expected.trials.map(({ step, index, psnr_db }) => ({
        step,
        index,
        psnrDb: new Map(Object.entries(psnr_db)),
      }));
      const found = page.judge(trials, expected.likely, expected.with_adapter);
      assert.deepEqual(
        trials.map(page.decides),
        expected.trials.map(({ decides }) => decides),
      );
      assert.equal(found.noiseDraw, expected.noise_draw);
      assert.equal(found.matches, expected.matches);
      assert.equal(page.sentenceOf(found), expected.sentence);
    });
  }

  function drawn([width, height], [red, green, blue, bend]) {
    const data = new Uint8Array(width * height * 4);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const bent = [
          red * x + y,
          green * y + Math.floor((x * x) / bend),
          Math.floor((blue * (x + y)) / bend),
        ];
        data.set([...bent.map((value) => value % 256), 255], 4 * (y * width + x));
      }
    }
    return { width, height, data };
  }

  for (const { size, factors, ...expected } of similarities) {
    test(`similarity of ${size.join("×")}: ${expected.psnr_db} dB`, () => {
      const [first, second] = factors.map((one) => drawn(size, one));
      const found = page.compare(first, second, false);
      assert.ok(Math.abs(found.psnrDb - expected.psnr_db) < 1e-6, `${found.psnrDb}`);
      // Python's is computed in single precision.
      assert.ok(Math.abs(found.ssim - expected.ssim) < 2e-4, `${found.ssim}`);
      assert.equal(found.samePixels, expected.same_pixels);
      assert.equal(found.largestDifference, expected.largest_difference);
    });
  }

  for (const expected of summaries) {
    test(`summary: ${expected.line} ${expected.verdict}`, () => {
      const summary = {
        samples: expected.samples,
        drawn: expected.drawn,
        notDrawn: expected.not_drawn,
        reasons: new Map(Object.entries(expected.reasons)),
        identical: expected.identical,
        belowMinPsnr: expected.below_min_psnr,
        minPsnrDb: expected.min_psnr_db,
        medianPsnrDb: expected.median_psnr_db,
        lowestPsnrDb: expected.lowest_psnr_db,
      };
      assert.equal(page.countLine(summary), expected.line);
      assert.equal(page.verdictLine(summary), expected.verdict);
    });
  }

  test("reasons are counted without their details", () => {
    for (const [reason, short] of reasons) assert.equal(page.shortReason(reason), short);
  });
});
