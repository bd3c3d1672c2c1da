/** No press does what nobody meant by it, and what it takes away can be had back. */
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import path from "node:path";
import { after, before, describe, test } from "node:test";
import { draw, fill, LORA_ROOT, launch, noBrowser, open, shot, startStack, status } from "./stack.mjs";

/** Long enough that no test sees its end. */
const LONG = { Prompt: "a red circle", Width: "512", Height: "512", Steps: "150" };
/** Long enough to be seen at work. */
const MIDDLE = { Width: "64", Height: "64", Steps: "25" };
const SHORT = { Width: "64", Height: "64", Steps: "2" };
/** Longer than anything can be undone. */
const LATER_MS = 15_000;

describe("presses", { skip: noBrowser }, () => {
  let browser;
  let stack;
  const ends = [];
  const suite = { after: (end) => ends.push(end) };

  before(async () => {
    browser = await launch(suite);
    stack = await startStack(suite);
  });
  after(async () => {
    for (const end of ends.reverse()) await end();
  });

  /** The calls of a method so far, and from now on. */
  function callsOf(tab, method) {
    const calls = [];
    tab.on("request", (request) => request.url().endsWith(`/${method}`) && calls.push(method));
    return calls;
  }

  async function middleOf(button) {
    const { x, y, width, height } = await button.boundingBox();
    return { x: x + width / 2, y: y + height / 2 };
  }

  /** What a press at this place would press. */
  function controlAt(tab, place) {
    return tab.evaluate(
      ({ x, y }) => document.elementFromPoint(x, y)?.closest("button, a")?.textContent ?? "nothing",
      place,
    );
  }

  const button = (tab, name) => tab.getByRole("button", { name, exact: true });
  const runOf = (tab, prompt) => tab.locator(".history .item", { hasText: prompt });

  async function drawShortly(tab, prompt) {
    await fill(tab, { Prompt: prompt, ...SHORT });
    await draw(tab);
    await tab.locator(".run .prompt", { hasText: prompt }).waitFor();
    await status(tab, /Done in/);
    await tab.locator("img.final").waitFor();
  }

  test("nothing stands where Cancel stood, when a run was cancelled and when it ended by itself", async () => {
    const tab = await open(browser, stack.url);
    await fill(tab, LONG);
    await draw(tab);
    await status(tab, /Step \d+ of 150/);
    let place = await middleOf(button(tab, "Cancel"));
    await tab.mouse.click(place.x, place.y);
    await status(tab, /Cancelled/);
    assert.equal(await controlAt(tab, place), "nothing");
    await fill(tab, MIDDLE);
    await draw(tab);
    await status(tab, /Step \d+ of 25/);
    place = await middleOf(button(tab, "Cancel"));
    await status(tab, /Done in/);
    await tab.locator("img.final").waitFor();
    assert.equal(await controlAt(tab, place), "nothing");
    await tab.close();
  });

  test("Enter on Cancel deletes nothing when the run has ended meanwhile", async () => {
    const tab = await open(browser, stack.url);
    const deletions = callsOf(tab, "DeleteJob");
    await fill(tab, { Prompt: "a green triangle", ...MIDDLE });
    await draw(tab);
    await status(tab, /Step \d+ of 25/);
    await button(tab, "Cancel").focus();
    await status(tab, /Done in/);
    await tab.locator("img.final").waitFor();
    const focused = await tab.evaluate(() => document.activeElement?.textContent);
    assert.notEqual(focused, "Delete");
    assert.ok(await tab.evaluate(() => document.activeElement?.matches(".stage")));
    await tab.keyboard.press("Enter");
    await runOf(tab, "a green triangle").first().waitFor();
    assert.equal(await tab.locator("img.final").count(), 1);
    assert.deepEqual(deletions, []);
    await tab.close();
  });

  test("a deleted run comes back; the server hears of it when the time for that is over", async () => {
    const tab = await open(browser, "about:blank");
    await tab.clock.install();
    await tab.goto(stack.url);
    const deletions = callsOf(tab, "DeleteJob");
    await drawShortly(tab, "to be deleted");
    await button(tab, "Delete").click();
    await tab.locator(".run").waitFor({ state: "detached" });
    assert.deepEqual(deletions, []);
    assert.equal(await runOf(tab, "to be deleted").count(), 0);
    await shot(tab, "deleted");
    await button(tab, "Undo").click();
    await tab.locator("img.final").waitFor();
    assert.equal(await runOf(tab, "to be deleted").count(), 1);
    await tab.clock.fastForward(LATER_MS);
    assert.deepEqual(deletions, []);
    await button(tab, "Delete").click();
    await tab.getByText("Run deleted.").waitFor();
    const answered = tab.waitForResponse(/DeleteJob$/);
    await tab.clock.fastForward(LATER_MS);
    await answered;
    await button(tab, "Undo").waitFor({ state: "detached" });
    await tab.reload();
    await tab.locator(".history .hint, .history .item").first().waitFor();
    assert.equal(await runOf(tab, "to be deleted").count(), 0);
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("a page that is left sends the deletions that could still be undone", async () => {
    const watcher = await open(browser, stack.url);
    const tab = await open(browser, stack.url);
    await drawShortly(tab, "gone with the page");
    await runOf(watcher, "gone with the page").waitFor();
    await button(tab, "Delete").click();
    await tab.locator(".run").waitFor({ state: "detached" });
    assert.equal(await button(tab, "Undo").count(), 1);
    assert.equal(await runOf(watcher, "gone with the page").count(), 1);
    await tab.goto("about:blank");
    await runOf(watcher, "gone with the page").waitFor({ state: "detached" });
    await tab.close();
    await watcher.close();
  });

  test("a run that the server did not delete comes back, and the page says why", async () => {
    const tab = await open(browser, "about:blank", { allowed: /ERR_FAILED/ });
    await tab.clock.install();
    await tab.goto(stack.url);
    await drawShortly(tab, "stays");
    await tab.route("**/DeleteJob", (route) => route.abort());
    const failed = tab.waitForEvent("requestfailed");
    await button(tab, "Delete").click();
    await tab.clock.fastForward(LATER_MS);
    await failed;
    const words = tab.getByText("Not deleted: cannot reach");
    const isSaid = await words.waitFor({ timeout: 10_000 }).then(
      () => true,
      () => false,
    );
    assert.ok(isSaid, "the page says nothing");
    await runOf(tab, "stays").waitFor();
    await tab.close();
  });

  test("a deleted upload comes back with its strength", async () => {
    const tab = await open(browser, stack.url);
    const deletions = callsOf(tab, "DeleteLora");
    const buffer = await readFile(path.join(LORA_ROOT, "hollow_shapes.safetensors"));
    const upload = { name: "my_hollow_shapes.safetensors", mimeType: "application/octet-stream", buffer };
    await tab.getByLabel("Upload an adapter").setInputFiles(upload);
    const slider = tab.getByRole("slider", { name: "Strength of my_hollow_shapes.safetensors" });
    await slider.fill("0.5");
    await button(tab, "Look into my_hollow_shapes.safetensors").click();
    await button(tab, "Delete this upload").click();
    await slider.waitFor({ state: "detached" });
    assert.deepEqual(deletions, []);
    await button(tab, "Undo").click();
    assert.equal(await slider.inputValue(), "0.5");
    await button(tab, "Remove my_hollow_shapes.safetensors").click();
    await tab
      .getByLabel("Add an adapter")
      .selectOption({ label: "my_hollow_shapes.safetensors · 498\u00a0kB" });
    await slider.waitFor();
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("an upload is not stopped by the next one", async () => {
    const tab = await open(browser, stack.url);
    let isFirst = true;
    let hold;
    const held = new Promise((resolve) => {
      hold = resolve;
    });
    await tab.route("**/chromarpc.v1.LoraService/*Upload*", (route) => {
      if (isFirst) hold(route);
      else route.continue();
      isFirst = false;
    });
    for (const name of ["hollow_shapes.safetensors", "blue_frame.safetensors"]) {
      const buffer = await readFile(path.join(LORA_ROOT, name));
      const upload = { name: `my_${name}`, mimeType: "application/octet-stream", buffer };
      await tab.getByLabel("Upload an adapter").setInputFiles(upload);
      await held;
    }
    await tab.getByRole("slider", { name: "Strength of my_blue_frame.safetensors" }).waitFor();
    const first = tab.getByRole("progressbar", { name: "Uploading my_hollow_shapes.safetensors" });
    assert.equal(await first.count(), 1);
    await (await held).continue();
    await tab.getByRole("slider", { name: "Strength of my_hollow_shapes.safetensors" }).waitFor();
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("a double click on Draw and a held Enter draw once each", async () => {
    const tab = await open(browser, stack.url);
    const created = callsOf(tab, "CreateJob");
    await fill(tab, { Prompt: "once", ...SHORT });
    const place = await middleOf(button(tab, "Draw"));
    let answered = tab.waitForResponse(/CreateJob$/);
    await tab.mouse.click(place.x, place.y);
    await answered;
    await button(tab, "Draw").waitFor();
    await tab.mouse.down({ clickCount: 2 });
    await tab.mouse.up({ clickCount: 2 });
    await status(tab, /Done in/);
    assert.equal(created.length, 1);
    answered = tab.waitForResponse(/CreateJob$/);
    await tab.getByLabel("Steps").first().focus();
    await tab.keyboard.down("Enter");
    await answered;
    await button(tab, "Draw").waitFor();
    await tab.keyboard.down("Enter"); // the key repeats
    await tab.keyboard.up("Enter");
    await status(tab, /Done in/);
    assert.equal(created.length, 2);
    await tab.close();
  });

  test("a double click removes one prompt, and Undo brings it back", async () => {
    const tab = await open(browser, stack.url);
    const prompts = () => tab.getByLabel(/^Prompt/).evaluateAll((fields) => fields.map(({ value }) => value));
    await fill(tab, { Prompt: "one" });
    for (const [number, prompt] of [
      [2, "two"],
      [3, "three"],
      [4, "four"],
    ]) {
      await tab.getByRole("button", { name: "+ Another prompt" }).click();
      await fill(tab, { [`Prompt ${number}`]: prompt });
    }
    await button(tab, "Remove prompt 2").dblclick();
    assert.deepEqual(await prompts(), ["one", "three", "four"]);
    await button(tab, "Undo").click();
    assert.deepEqual(await prompts(), ["one", "two", "three", "four"]);
    await tab.close();
  });

  test("a prompt that a run's settings replaced comes back", async () => {
    const tab = await open(browser, stack.url);
    await drawShortly(tab, "drawn already");
    await fill(tab, { Prompt: "not drawn yet" });
    await button(tab, "Use these settings").click();
    const prompt = tab.getByLabel("Prompt", { exact: true });
    assert.equal(await prompt.inputValue(), "drawn already");
    assert.equal(await button(tab, "Undo").count(), 1);
    await button(tab, "Undo").click();
    assert.equal(await prompt.inputValue(), "not drawn yet");
    await tab.close();
  });

  test("a second click in the same place does nothing to what has come there", async () => {
    const tab = await open(browser, stack.url);
    await drawShortly(tab, "left");
    await drawShortly(tab, "right");
    await tab.locator(".history").getByRole("button", { name: "Compare" }).nth(1).click();
    await tab.locator(".history .item .open").first().click();
    const close = button(tab, "Close");
    // Stands in for whatever a run in progress would show at this place.
    await close.evaluate((element) => {
      element.addEventListener("click", () => {
        const trap = document.createElement("button");
        trap.textContent = "Trap";
        trap.style.cssText = "position: fixed; inset: 0; z-index: 9";
        trap.onclick = () => trap.setAttribute("data-sprung", "");
        document.body.append(trap);
      });
    });
    await close.dblclick();
    assert.equal(await tab.locator("[data-sprung]").count(), 0);
    await tab.close();
  });
});
