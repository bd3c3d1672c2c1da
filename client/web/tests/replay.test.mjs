/** A training run's folder, redrawn by the page in a real browser. */
import assert from "node:assert/strict";
import { mkdir, writeFile } from "node:fs/promises";
import path from "node:path";
import { after, before, describe, test } from "node:test";
import { configText, drawTrainers, writeRun, writeSample } from "./run-folder.mjs";
import {
  dataFolder,
  draw,
  drop,
  fill,
  launch,
  middleOf,
  misfits,
  noBrowser,
  open,
  shot,
  startStack,
  status,
} from "./stack.mjs";

const PATIENCE_MS = 90_000;

describe("a training run on the page", { skip: noBrowser }, () => {
  let browser;
  let stack;
  let place;
  const ends = [];
  const suite = { after: (end) => ends.push(end) };

  before(async () => {
    [browser, stack, place] = await Promise.all([launch(suite), startStack(suite), dataFolder(suite)]);
  });
  after(async () => {
    for (const end of ends.reverse()) await end();
  });

  async function choose(tab, folder) {
    await tab.locator(".dot").waitFor();
    await tab.getByLabel("Redraw a training run").setInputFiles(folder);
  }

  test("the grid fills, says how near it is, and a pair opens in full size", async () => {
    const folder = path.join(place, "a run");
    await writeRun(stack.url, folder);
    const tab = await open(browser, stack.url);
    await choose(tab, folder);
    const replay = tab.getByRole("article", { name: "Training run, redrawn" });
    await replay.locator(".verdict").waitFor({ timeout: PATIENCE_MS });
    assert.equal(
      await replay.locator(".status").textContent(),
      "4 of 5 samples drawn again; 1 not: checkpoint deleted.",
    );
    assert.match(
      await replay.locator(".verdict").textContent(),
      /^(Every picture is the trainer's own|The same to the eye|Alike, with small differences)/,
    );
    assert.equal(await replay.locator(".pair-card").count(), 5);
    assert.equal(await replay.locator('.pair-card img[alt="Ours"]').count(), 4);
    const deleted = replay.locator('.pair-card[data-key="500 0"]');
    assert.match(await deleted.textContent(), /checkpoint deleted \(max_step_saves_to_keep: 1\)/);
    assert.equal(await replay.locator(".curve circle").count(), 4);
    await replay.getByText("What was resolved and assumed, and 1 file left out").click();
    const resolved = await replay.locator("details").textContent();
    for (const said of [
      "quantized by qfloat8",
      "profile preview",
      "The noise draw is float32",
      "holiday.jpg",
    ])
      assert.ok(resolved.includes(said), resolved);
    await shot(tab, "replay");
    const card = replay.locator('.pair-card[data-key="250 0"]').getByRole("button");
    await card.focus();
    await tab.keyboard.press("Enter");
    const dialog = tab.getByRole("dialog", { name: "Step 250, sample 0" });
    const slider = dialog.getByLabel("Where our picture begins");
    const was = await slider.inputValue();
    await slider.focus();
    await tab.keyboard.press("ArrowRight");
    assert.notEqual(await slider.inputValue(), was);
    await shot(tab, "replay-slider");
    await dialog.getByLabel("difference").check();
    await dialog.getByLabel("Amplification").fill("16");
    assert.match(await dialog.locator(".overlay").getAttribute("style"), /brightness\(16\)/);
    assert.match(await dialog.textContent(), /(dB PSNR|same pixels), SSIM [01]\.\d{4}/);
    await dialog.getByRole("button", { name: "Next" }).click();
    await tab.getByRole("dialog", { name: "Step 250, sample 1" }).waitFor();
    for (const mode of ["side by side", "slider"]) {
      await tab.locator("dialog").getByLabel(mode).check();
      assert.deepEqual(await misfits(tab, 320), [], mode);
    }
    await tab.keyboard.press("Escape");
    await tab.locator("dialog").waitFor({ state: "detached" });
    assert.deepEqual(await misfits(tab, 320), []);
    await shot(tab, "replay-320");
    await replay.getByRole("button", { name: "Close replay" }).click();
    await replay.waitFor({ state: "detached" });
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("a dropped picture is compared with our picture of a sample", async () => {
    const folder = path.join(place, "compared");
    const sample = { neg: "", width: 64, height: 64, seed: 42, sample_steps: 2, guidance_scale: 4 };
    await mkdir(folder, { recursive: true });
    await writeFile(path.join(folder, "config.yaml"), configText("compared", { ...sample, prompts: ["a"] }));
    const settings = { prompt: "a", width: 64, height: 64, seed: 42, sample_steps: 2, guidance_scale: 4 };
    await writeSample(folder, 0, 0, await drawTrainers(stack.url, settings));
    const other = path.join(place, "other.png");
    await writeFile(
      other,
      await drawTrainers(stack.url, { ...settings, guidance_scale: 3, format: "IMAGE_FORMAT_PNG" }),
    );
    const tab = await open(browser, stack.url);
    await choose(tab, folder);
    const card = tab.locator('.pair-card[data-key="0 0"]').getByRole("button");
    const dialog = tab.getByRole("dialog", { name: "Step 0, sample 0" });
    const panel = tab.getByRole("article", { name: "Explained picture" });
    const lines = panel.getByRole("list", { name: "What differs" }).getByRole("listitem");
    await tab.locator(".verdict").waitFor();
    await card.click();
    await dialog.getByText("Drop a picture here to see what differs").waitFor();
    await drop(tab, other, await middleOf(dialog));
    await panel.getByText("other.png → step 0, sample 0, redrawn").waitFor();
    await panel.getByText(/pixels: PSNR \d+\.\d\d dB, SSIM 0\.\d{4}, largest difference/).waitFor();
    await dialog.waitFor({ state: "detached" });
    const found = await lines.allInnerTexts();
    assert.ok(found.includes("guidance_scale: 3.0 → 4.0"), found.join("\n"));
    assert.ok(!found.some((line) => /^(seed|prompt|width|model|sample_steps)/.test(line)), found.join("\n"));
    await shot(tab, "replay-compared");
    await panel.getByRole("button", { name: "Close the comparison" }).click();
    await panel.getByRole("button", { name: "Compare with step 0, sample 0, redrawn" }).click();
    await lines.filter({ hasText: "guidance_scale" }).waitFor();
    await panel.getByRole("button", { name: "Close the comparison" }).click();
    await card.click();
    await dialog.getByRole("button", { name: "Compare ours with other.png" }).click();
    await lines.filter({ hasText: "guidance_scale" }).waitFor();
    assert.equal(await dialog.count(), 0);
    assert.equal(await panel.evaluate((element) => element === document.activeElement), true);
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("a dropped folder that is no run is a line, and so is another architecture", async () => {
    const tab = await open(browser, stack.url);
    const folder = path.join(place, "no run");
    await mkdir(folder, { recursive: true });
    await tab.locator(".dot").waitFor();
    await drop(tab, folder);
    const error = tab.locator(".replay .error");
    await error.waitFor();
    assert.equal(
      await error.textContent(),
      "this is no run folder of ai-toolkit: there is no config.yaml in it",
    );
    const config = configText("other", { prompts: ["a"] }).replace("arch: chroma", "arch: '<b>flux'");
    await writeFile(path.join(folder, "config.yaml"), config);
    // What takes adapters leaves a folder alone.
    await drop(tab, folder, await middleOf(tab.locator("fieldset.loras")));
    await error.filter({ hasText: "flux" }).waitFor();
    assert.equal(await tab.locator("fieldset.loras").getAttribute("class"), "loras");
    assert.equal(await tab.locator("fieldset.loras .error").count(), 0);
    assert.equal(await error.textContent(), "the run trains '<b>flux'; only 'chroma' can be redrawn");
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("a replay that is cancelled, or whose tab is closed, leaves the server free", async () => {
    const folder = path.join(place, "long");
    await mkdir(folder, { recursive: true });
    const sample = { neg: "", width: 512, height: 512, sample_steps: 150, guidance_scale: 4 };
    await writeFile(path.join(folder, "config.yaml"), configText("long", { ...sample, prompts: ["a"] }));
    const settings = { prompt: "a", width: 512, height: 512, sample_steps: 1, profile: "preview" };
    await writeSample(folder, 0, 0, await drawTrainers(stack.url, settings));
    const [tab, watcher] = [await open(browser, stack.url), await open(browser, stack.url)];
    const drawing = tab.locator(".drawing-now li").filter({ hasText: /step \d+ of 150/ });
    /** 150 steps of 512 × 512 take minutes. */
    async function drawAnother() {
      await fill(watcher, { Prompt: "a", Width: "64", Height: "64", Steps: "1" });
      await draw(watcher);
      await status(watcher, /Done in/);
    }
    await choose(tab, folder);
    await drawing.first().waitFor();
    await tab.getByRole("button", { name: "Cancel replay" }).click();
    await tab.locator(".replay .status", { hasText: /^Stopped: 0 of 1 sample drawn again/ }).waitFor();
    await drawAnother();
    await tab.getByRole("button", { name: "Go on" }).click();
    await drawing.first().waitFor();
    assert.deepEqual(tab.complaints, []);
    await tab.close();
    await watcher.reload();
    await drawAnother();
    await watcher.close();
  });
});
