/** The page in a real browser, on the real stack, drawing with a real checkpoint. */
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { readdir, readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { after, before, describe, test } from "node:test";
import {
  COMMAND,
  dataFolder,
  draw,
  fill,
  freePort,
  LORA_ROOT,
  launch,
  misfits,
  noBrowser,
  open,
  shot,
  startGateway,
  startServer,
  startStack,
  status,
} from "./stack.mjs";

const CIRCLE = "a large red circle in the middle on a white background";
/** Long enough that no test sees its end. */
const LONG = { Width: "512", Height: "512", Steps: "150" };
const LOST = /Failed to load resource|ERR_/;

describe("the page", { skip: noBrowser }, () => {
  let browser;
  let stack;
  const ends = [];
  const suite = { after: (end) => ends.push(end) };

  before(async () => {
    browser = await launch(suite);
    stack = await startStack(suite, "--alias", "chroma=chroma-mini");
  });
  after(async () => {
    for (const end of ends.reverse()) await end();
  });

  test("a stranger makes a picture: steps rise, previews sharpen, the image comes", async () => {
    const tab = await open(browser, stack.url);
    await shot(tab, "empty");
    await fill(tab, { Prompt: CIRCLE });
    await draw(tab);
    const seen = new Set();
    const previews = new Set();
    const image = tab.locator("img.final");
    while ((await image.count()) === 0) {
      const step = /Step (\d+) of 25/.exec(await tab.locator(".status").textContent())?.[1];
      if (step !== undefined) seen.add(Number(step));
      const preview = await tab.evaluate(() => document.querySelector("img.preview")?.src);
      if (preview) previews.add(preview);
      if (seen.size === 4) await shot(tab, "drawing");
    }
    assert.ok(seen.size >= 3, `steps seen: ${[...seen]}`);
    assert.deepEqual(
      [...seen],
      [...seen].sort((a, b) => a - b),
    );
    assert.ok(previews.size >= 3, `previews seen: ${previews.size}`);
    await status(tab, /Done in/);
    await image.evaluate((element) => element.decode());
    assert.equal(await image.evaluate((element) => element.naturalWidth), 256);
    await shot(tab, "done");
    const [download] = await Promise.all([tab.waitForEvent("download"), tab.getByText("Download").click()]);
    const file = await readFile(await download.path());
    assert.equal(file.subarray(1, 4).toString(), "PNG");
    assert.match(download.suggestedFilename(), /^chromarpc-.*\.png$/);
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("the request is copied as JSON, Python and curl", async () => {
    const context = { permissions: ["clipboard-read", "clipboard-write"] };
    const tab = await open(browser, stack.url, context);
    await fill(tab, { Prompt: "it's a red circle", Width: "64", Height: "64", Steps: "2" });
    await draw(tab);
    await status(tab, /Done in/);
    const texts = {};
    for (const form of ["JSON", "Python", "curl"]) {
      await tab.locator(".copy").getByRole("button", { name: form }).click();
      await tab.getByText(`${form} copied ✓`).waitFor();
      texts[form] = await tab.evaluate(() => navigator.clipboard.readText());
    }
    const body = JSON.parse(texts.JSON);
    assert.equal(body.prompts[0].prompt, "it's a red circle");
    assert.equal(body.prompts[0].width, 64);
    assert.match(texts.Python, /from chromarpc import Client/);
    assert.match(texts.curl, /^curl -X POST 'http:\/\/127\.0\.0\.1:\d+\/v1\/inference'/);
    await tab.close();
  });

  test("cancelling stops the run", async () => {
    const tab = await open(browser, stack.url);
    await fill(tab, { Prompt: CIRCLE, ...LONG });
    await draw(tab);
    await status(tab, /Step \d+ of 150/);
    await tab.getByRole("button", { name: "Cancel", exact: true }).click();
    assert.match(await status(tab, /Cancelled/), /Cancelled after \d+ of 150 steps/);
    await shot(tab, "cancelled");
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("a reload comes back to the run", async (context) => {
    if (!(await stack.hasJobs())) return context.skip("this server has no JobService");
    const tab = await open(browser, stack.url);
    await fill(tab, { Prompt: CIRCLE, Width: "256", Height: "256", Steps: "150" });
    await draw(tab);
    await status(tab, /Step \d+ of 150/);
    await tab.reload();
    assert.match(await status(tab, /Step \d+ of 150/), /Step \d+/);
    await tab.locator("img.preview").waitFor();
    await shot(tab, "reattached");
    await tab.getByRole("button", { name: "Cancel", exact: true }).click();
    await status(tab, /Cancelled/);
    assert.equal(await tab.getByLabel("Prompt", { exact: true }).inputValue(), CIRCLE);
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("a picture that the server's disk damaged is drawn again, and is whole then", async () => {
    const folder = path.join(stack.data, "jobs", "images");
    const images = async () =>
      new Set((await readdir(folder, { recursive: true })).filter((name) => /[0-9a-f]{64}$/.test(name)));
    const before = await images();
    const tab = await open(browser, stack.url);
    await fill(tab, { Prompt: CIRCLE, Width: "64", Height: "64", Steps: "2" });
    await draw(tab);
    await status(tab, /Done in/);
    const [name] = [...(await images())].filter((one) => !before.has(one));
    const whole = await readFile(path.join(folder, name));
    const damaged = Buffer.from(whole);
    damaged[damaged.length >> 1] ^= 1;
    await writeFile(path.join(folder, name), damaged);
    await tab.reload();
    await tab.getByText("The server's copy of the picture is damaged.").waitFor();
    await shot(tab, "damaged");
    await tab.getByRole("button", { name: "Draw again" }).click();
    await tab.getByRole("button", { name: "Draw again" }).waitFor({ state: "detached" });
    await status(tab, /Done in/);
    await tab.locator("img.final").waitFor();
    assert.deepEqual(await readFile(path.join(folder, name)), whole);
    await tab.locator(".history .item .open").nth(1).click();
    await tab.locator("img.final").waitFor();
    assert.equal(await tab.getByText("damaged").count(), 0);
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("an uploaded adapter changes the picture; both are compared", async () => {
    const tab = await open(browser, stack.url);
    const file = await readFile(path.join(LORA_ROOT, "hollow_shapes.safetensors"));
    await fill(tab, { Prompt: "a hlw large red circle in the middle on a white background", Steps: "10" });
    await tab.getByLabel("Random seed").uncheck();
    await fill(tab, { Seed: "7" });
    await draw(tab);
    await status(tab, /Done in/);
    const upload = { name: "my_shapes.safetensors", mimeType: "application/octet-stream", buffer: file };
    await tab.getByLabel("Upload an adapter").setInputFiles(upload);
    await tab.getByRole("slider", { name: "Strength of my_shapes.safetensors" }).waitFor();
    await tab.getByRole("button", { name: "Look into my_shapes.safetensors" }).click();
    await tab.locator("dialog").getByText("ai-toolkit LoRA").waitFor();
    await shot(tab, "inspected");
    await tab.keyboard.press("Escape");
    await tab.locator("dialog").waitFor({ state: "detached" });
    await draw(tab);
    await tab.locator(".facts", { hasText: "× 1" }).waitFor();
    await status(tab, /Done in/);
    const compare = tab.locator(".history").getByRole("button", { name: "Compare" });
    await compare.nth(1).click();
    await tab.getByText("Choose a second run").waitFor();
    await tab.locator(".history .item .open").first().click();
    await tab.getByText("What differs").waitFor();
    await tab.locator(".comparison img.over").waitFor();
    await shot(tab, "compared");
    const slider = tab.getByLabel("Where the right run begins");
    const before = await slider.inputValue();
    await slider.focus();
    await tab.keyboard.press("ArrowRight");
    assert.notEqual(await slider.inputValue(), before);
    await tab.getByLabel("difference").check();
    await shot(tab, "difference");
    assert.ok(await hasContrast(tab), "the adapter changed nothing");
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  /** Whether the two pictures that are compared differ visibly. */
  function hasContrast(tab) {
    return tab.evaluate(async () => {
      const pixels = [];
      for (const image of document.querySelectorAll(".comparison img")) {
        const canvas = document.createElement("canvas");
        canvas.width = canvas.height = 64;
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0, 64, 64);
        pixels.push(context.getImageData(0, 0, 64, 64).data);
      }
      const [one, other] = pixels;
      return one.reduce((sum, value, index) => sum + Math.abs(value - other[index]), 0) / one.length > 3;
    });
  }

  test("an error stands at its field, and goes when the field changes", async () => {
    const tab = await open(browser, stack.url);
    await fill(tab, { Prompt: CIRCLE, Width: "63", Steps: "many" });
    await draw(tab);
    await tab.getByText("must be a number, got “many”").waitFor();
    await fill(tab, { Steps: "200" });
    await draw(tab);
    const width = tab.getByLabel("Width", { exact: true });
    await tab.getByText("must be between 64 and 4096, got 63").waitFor();
    assert.equal(await width.getAttribute("aria-invalid"), "true");
    assert.equal(await tab.getByLabel("Steps").first().getAttribute("aria-invalid"), "true");
    await shot(tab, "field-error");
    await width.fill("64");
    assert.equal(await width.getAttribute("aria-invalid"), "false");
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("several prompts give several pictures", async () => {
    const tab = await open(browser, stack.url);
    await fill(tab, { Prompt: "a red circle", Width: "64", Height: "64", Steps: "2" });
    await tab.getByRole("button", { name: "+ Another prompt" }).click();
    await fill(tab, { "Prompt 2": "a blue square" });
    await draw(tab);
    await status(tab, /Done in/);
    assert.equal(await tab.locator(".run img.final").count(), 2);
    await tab.close();
  });

  test("the keyboard alone is enough", async () => {
    const tab = await open(browser, stack.url);
    await tab.locator(".dot").waitFor();
    for (let presses = 0; presses < 5; presses++) {
      await tab.keyboard.press("Tab");
      if (await tab.evaluate(() => document.activeElement?.tagName === "TEXTAREA")) break;
    }
    await tab.keyboard.type("a red circle");
    await tab.keyboard.press("Control+Enter");
    await status(tab, /Done in/);
    await tab.close();
  });

  test("a phone's width, in the dark", async () => {
    const phone = {
      viewport: { width: 390, height: 844 },
      colorScheme: "dark",
      hasTouch: true,
      isMobile: true,
    };
    const tab = await open(browser, stack.url, phone);
    await fill(tab, { Prompt: CIRCLE });
    await draw(tab);
    await status(tab, /Done in/);
    await tab.locator(".run").scrollIntoViewIfNeeded();
    assert.deepEqual(await misfits(tab), []);
    await shot(tab, "phone-dark");
    await tab.close();
  });

  test("a closed tab stops a run that was not to outlive it, within one step", async () => {
    const watcher = await open(browser, stack.url, { allowed: LOST });
    const tab = await open(browser, stack.url);
    await fill(tab, { Prompt: CIRCLE, ...LONG });
    await tab.getByText("More", { exact: true }).click();
    await tab.getByLabel("Go on drawing when this page is closed").uncheck();
    await draw(tab);
    await status(tab, /Step \d+ of 150/);
    await tab.close();
    await fill(watcher, { Prompt: CIRCLE, Width: "64", Height: "64", Steps: "1" });
    await draw(watcher);
    await status(watcher, /Done in/); // 150 steps of 512 × 512 take minutes
    await watcher.close();
  });

  test("fifty tabs at once, and the last one draws", async () => {
    const context = await browser.newContext();
    const tabs = await Promise.all(
      Array.from({ length: 50 }, async () => {
        const tab = await context.newPage();
        await tab.goto(stack.url);
        return tab;
      }),
    );
    for (const tab of tabs) await tab.locator(".dot").waitFor({ timeout: 60_000 });
    const last = tabs.at(-1);
    await last.bringToFront();
    await fill(last, { Prompt: CIRCLE, Width: "64", Height: "64", Steps: "2" });
    await draw(last);
    await status(last, /Done in/);
    await context.close();
  });

  test("a page of another origin cannot call", async () => {
    const port = await freePort();
    const foreign = await startGateway(suite, port);
    const tab = await open(browser, foreign.url, { allowed: /./ });
    await tab.context().route("**/*", (route) => route.continue());
    const outcome = await tab.evaluate(async (url) => {
      try {
        const body = JSON.stringify({ model: "chroma-mini", prompts: [{ prompt: "a" }] });
        const headers = { "content-type": "application/json" };
        await fetch(`${url}v1/inference`, { method: "POST", headers, body });
        return "answered";
      } catch {
        return "refused";
      }
    }, stack.url);
    assert.equal(outcome, "refused");
    await tab.close();
  });

  test("the page opens without its server, says so, and recovers; so does a run in the middle", async () => {
    const data = await dataFolder(suite);
    const port = await freePort();
    const gateway = await startGateway(suite, port);
    const tab = await open(browser, gateway.url, { allowed: LOST });
    await tab.getByText("The server cannot be reached").waitFor();
    assert.ok(await tab.getByRole("button", { name: /^Draw/ }).isDisabled());
    assert.deepEqual(await misfits(tab, 320), []);
    await tab.setViewportSize({ width: 1280, height: 860 });
    await shot(tab, "server-down");
    let server = await startServer(port, data);
    await tab.locator(".dot").waitFor();
    await tab.getByText("The server cannot be reached").waitFor({ state: "detached" });
    await fill(tab, { Prompt: CIRCLE, ...LONG });
    await draw(tab);
    await status(tab, /Step \d+ of 150/);
    await server.stop("SIGKILL");
    await tab.getByText("The server cannot be reached").waitFor();
    await shot(tab, "server-gone");
    server = await startServer(port, data);
    try {
      await tab.getByText("The server cannot be reached").waitFor({ state: "detached" });
      // A server that keeps its jobs goes on; one that does not says so.
      await tab.locator(".status", { hasText: /Failed|Step|Starting|queue/ }).waitFor();
      const cancel = tab.getByRole("button", { name: "Cancel", exact: true });
      if (await cancel.count()) await cancel.click();
      await fill(tab, { Width: "64", Height: "64", Steps: "2" });
      await draw(tab);
      await status(tab, /Done in/);
    } finally {
      await tab.close();
      await server.stop();
    }
  });

  test("a token is asked for, and asked for again when it ends", async () => {
    const data = await dataFolder(suite);
    const callers = path.join(data, "callers.toml");
    const told = spawnSync(COMMAND, ["token", "ann"], { encoding: "utf8" });
    const token = told.stdout.trim();
    await writeFile(callers, /\[\[callers\]\][\s\S]*?\n\n/.exec(told.stderr)?.[0] ?? "");
    const closed = await startStack(suite, "--callers", callers);
    const tab = await open(browser, closed.url, { allowed: LOST });
    await tab.getByText("The server wants a token").waitFor();
    assert.deepEqual(await misfits(tab, 320), []);
    await tab.setViewportSize({ width: 1280, height: 860 });
    await shot(tab, "token");
    await tab.getByLabel("The server wants a token").fill(token);
    await tab.getByRole("button", { name: "Use it" }).click();
    await tab.locator(".dot").waitFor();
    await fill(tab, { Prompt: CIRCLE, Width: "64", Height: "64", Steps: "2" });
    await draw(tab);
    await status(tab, /Done in/);
    await tab.close();
  });
});
