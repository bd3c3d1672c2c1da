/** Everything has its place in the window, however narrow it is, however large the text, however long the names. */
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import path from "node:path";
import { after, before, describe, test } from "node:test";
import {
  draw,
  fill,
  LORA_ROOT,
  launch,
  misfits,
  noBrowser,
  open,
  shot,
  startStack,
  status,
} from "./stack.mjs";

const WORD = "averylongwordwithoutanyspace".repeat(6);
/** As ai-toolkit names its files. */
const TRAINED = "my_style_000002000.safetensors";
const LONG_NAME = `${"my_portrait_style_of_many_words_".repeat(3)}000002000.safetensors`;
const PHONE = { hasTouch: true, isMobile: true, deviceScaleFactor: 2 };

describe("the page's layout", { skip: noBrowser }, () => {
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

  /** Looks at the page in each of its states and widths. */
  async function look(tab, widths, name) {
    async function check(state) {
      for (const width of widths) {
        assert.deepEqual(await misfits(tab, width), [], `${state}, ${width} px`);
        await shot(tab, `layout-${name}-${state}-${width}`);
      }
    }
    await tab.locator(".dot").waitFor();
    await check("empty");

    await fill(tab, { Prompt: `a ${WORD}`, Width: "64", Height: "64", Steps: "2" });
    await draw(tab);
    await status(tab, /Done in/);
    await tab.locator("img.final").waitFor();
    await check("drawn");

    for (const [file, called] of [
      ["hollow_shapes.safetensors", TRAINED],
      ["blue_frame.safetensors", LONG_NAME],
    ]) {
      const buffer = await readFile(path.join(LORA_ROOT, file));
      const upload = { name: called, mimeType: "application/octet-stream", buffer };
      await tab.getByLabel("Upload an adapter").setInputFiles(upload);
      await tab.getByRole("slider", { name: `Strength of ${called}` }).waitFor();
    }
    await tab.getByRole("button", { name: "+ Another prompt" }).click();
    await fill(tab, { "Prompt 2": "a blue square", "Trigger word": WORD });
    await tab.getByText("More", { exact: true }).click();
    await tab.locator("#field-model option").evaluateAll((options, word) => {
      for (const option of options) option.textContent = word;
    }, WORD);
    await draw(tab);
    await tab.locator(".facts", { hasText: "× 1" }).waitFor();
    await status(tab, /Done in/);
    await tab.locator("img.final").nth(1).waitFor();
    await tab.locator(".facts summary").click();
    await check("adapters");

    await fill(tab, { Steps: WORD });
    await draw(tab);
    await tab.getByText("must be a number").waitFor();
    await check("error");

    for (const called of [TRAINED, LONG_NAME]) {
      await tab.getByRole("button", { name: `Look into ${called}` }).click();
      await tab.locator("dialog").getByText("ai-toolkit LoRA").waitFor();
      await check(called === TRAINED ? "dialog" : "dialog-long");
      await tab.keyboard.press("Escape");
      await tab.locator("dialog").waitFor({ state: "detached" });
    }

    await tab.locator(".history").getByRole("button", { name: "Compare" }).nth(1).click();
    await tab.getByText("Choose a second run").waitFor();
    await check("choosing");
    await tab.locator(".history .item .open").first().click();
    for (const mode of ["slider", "difference", "side by side"]) {
      await tab.getByLabel(mode).check();
      await tab.locator(".comparison img").nth(1).waitFor();
      await check(mode.replaceAll(" ", "-"));
    }
    await tab.getByRole("button", { name: "Close", exact: true }).click();
    await tab.getByRole("button", { name: "Delete", exact: true }).click();
    await tab.getByText("Run deleted.").waitFor();
    await check("deleted");
    assert.deepEqual(tab.complaints, []);
  }

  test("on phones", async () => {
    const tab = await open(browser, stack.url, { ...PHONE, viewport: { width: 390, height: 844 } });
    await look(tab, [320, 360, 390], "phone");
    await tab.close();
  });

  test("in windows of any width, in the dark", async () => {
    const tab = await open(browser, stack.url, { colorScheme: "dark" });
    await look(tab, [1280, 1000, 801, 768, 480], "window");
    await tab.close();
  });

  test("at a zoom of 200 %", async () => {
    const zoomed = { viewport: { width: 640, height: 430 }, deviceScaleFactor: 2 };
    const tab = await open(browser, stack.url, zoomed);
    await look(tab, [640], "zoom");
    await tab.close();
  });

  test("with text of twice the size, in a window and on a phone", async (context) => {
    const large = await launch(context, "--blink-settings=defaultFontSize=32");
    const tab = await open(large, stack.url);
    assert.equal(await tab.evaluate(() => getComputedStyle(document.documentElement).fontSize), "30px");
    await look(tab, [1280, 390], "text");
    await tab.close();
  });

  test("pictures side by side stand side by side at every width, as large as there is room", async () => {
    const tab = await open(browser, stack.url);
    for (const prompt of ["a red circle", "a blue square"]) {
      await fill(tab, { Prompt: prompt, Width: "256", Height: "256", Steps: "2" });
      await draw(tab);
      await tab.locator(".prompt", { hasText: prompt }).waitFor();
      await status(tab, /Done in/);
    }
    await tab.locator(".history").getByRole("button", { name: "Compare" }).nth(1).click();
    await tab.locator(".history .item .open").first().click();
    await tab.getByLabel("side by side").check();
    await tab.locator(".comparison img").nth(1).waitFor();
    for (const width of [320, 390, 640, 800, 1280]) {
      await tab.setViewportSize({ width, height: 844 });
      const room = await tab.locator(".comparison").evaluate((element) => element.clientWidth);
      const [left, right] = await tab
        .locator(".comparison img")
        .evaluateAll((images) => images.map((image) => image.getBoundingClientRect().toJSON()));
      assert.deepEqual(
        { top: right.top, isBeside: right.left >= left.right },
        { top: left.top, isBeside: true },
        `${width} px`,
      );
      assert.ok(left.width > 0.4 * room, `${left.width} px of ${room} px in a window of ${width} px`);
      assert.ok(Math.abs(left.width - left.height) < 1, `${left.width} × ${left.height}`);
    }
    await tab.close();
  });
});
