/** Pictures that are dropped on the page: explained, taken into the form, compared. */
import assert from "node:assert/strict";
import { mkdir, open as openFile, readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { after, before, describe, test } from "node:test";
import { deflateSync } from "node:zlib";
import { png, text } from "./picture-files.mjs";
import {
  dataFolder,
  draw,
  drop,
  fill,
  LORA_ROOT,
  launch,
  middleOf,
  misfits,
  noBrowser,
  open,
  shot,
  startStack,
  status,
} from "./stack.mjs";

const PROMPT = "a small blue square at the left";
const COMFYUI = {
  model: { class_type: "UNETLoader", inputs: { unet_name: "Chroma1-HD.safetensors" } },
  lora: {
    class_type: "LoraLoaderModelOnly",
    inputs: { lora_name: "mine/hollow_shapes.safetensors", strength_model: 0.8, model: ["model", 0] },
  },
  yes: { class_type: "CLIPTextEncode", inputs: { text: "a red circle" } },
  no: { class_type: "CLIPTextEncode", inputs: { text: "blurry" } },
  size: { class_type: "EmptyLatentImage", inputs: { width: 64, height: 64 } },
  sampler: {
    class_type: "KSampler",
    inputs: {
      ...{ seed: 43, steps: 20, cfg: 3.5, sampler_name: "euler", scheduler: "beta", denoise: 1 },
      ...{ model: ["lora", 0], positive: ["yes", 0], negative: ["no", 0], latent_image: ["size", 0] },
    },
  },
  save: { class_type: "SaveImage", inputs: { images: ["sampler", 0] } },
};
const A1111 = [
  "a red circle <lora:unheard_of:0.5>",
  "Negative prompt: blurry",
  "Steps: 20, Sampler: DPM++ 2M, CFG scale: 3.5, Seed: 43, Size: 64x64, Model: chroma, Version: v1.10.1",
].join("\n");

describe("pictures on the page", { skip: noBrowser }, () => {
  let browser;
  let stack;
  let folder;
  const ends = [];
  const suite = { after: (end) => ends.push(end) };

  before(async () => {
    browser = await launch(suite);
    stack = await startStack(suite);
    folder = await dataFolder(suite);
    await writeFile(file("comfyui.png"), png(text("tEXt", "prompt", "", JSON.stringify(COMFYUI))));
    await writeFile(
      file("a1111.png"),
      png(text("zTXt", "parameters", "\0", deflateSync(Buffer.from(A1111)))),
    );
    await writeFile(file("1795648942091__000000250_1.png"), png());
  });
  after(async () => {
    for (const end of ends.reverse()) await end();
  });

  const file = (name) => path.join(folder, name);
  const panel = (tab) => tab.getByRole("article", { name: "Explained picture" });

  /** The page, with the server's models and adapters known. */
  async function opened(options) {
    const tab = await open(browser, stack.url, options);
    await tab.locator(".dot").waitFor();
    return tab;
  }

  /** What the panel tells of one fact. */
  async function told(tab, name) {
    const term = panel(tab)
      .locator("dt")
      .filter({ hasText: new RegExp(`^${name.replaceAll(".", "\\.")}$`) });
    return (await term.locator("xpath=following-sibling::dd[1]").textContent()).trim();
  }

  async function settings(tab) {
    const labels = ["Prompt", "Width", "Height", "Steps", "Guidance", "Seed"];
    return await Promise.all(labels.map((label) => tab.getByLabel(label, { exact: true }).inputValue()));
  }

  /** Draws in the page and keeps the picture's file as it is downloaded. */
  async function drawn(tab, name) {
    await draw(tab);
    await status(tab, /Done in/);
    const link = tab.getByRole("link", { name: "Download" });
    const [download] = await Promise.all([tab.waitForEvent("download"), link.click()]);
    await download.saveAs(file(name));
  }

  async function lines(tab) {
    return await tab.getByRole("list", { name: "What differs" }).getByRole("listitem").allInnerTexts();
  }

  test("a picture of this page says what it was drawn with, fills the form, and is compared", async () => {
    const tab = await opened();
    const requests = [];
    await fill(tab, { Prompt: PROMPT, Width: "64", Height: "96", Steps: "3", Guidance: "2.5" });
    await tab.getByLabel("Random seed").uncheck();
    await fill(tab, { Seed: "7" });
    await tab.getByLabel("Add an adapter").selectOption({ index: 1 });
    await drawn(tab, "ours.png");
    await fill(tab, { Guidance: "3" });
    await draw(tab);
    await tab.locator(".facts", { hasText: "guidance 3" }).waitFor();
    await status(tab, /Done in/);
    await fill(tab, { Prompt: "something else", Width: "", Steps: "9", Seed: "1", Guidance: "" });
    await tab.getByRole("button", { name: /^Remove/ }).click();
    tab.on("request", (request) => requests.push(request));
    const hover = async () => {
      await tab.getByText("Drop the picture to see").waitFor();
      await shot(tab, "dropping");
    };
    await drop(tab, file("ours.png"), { x: 200, y: 500, hover });
    await panel(tab).getByText("ours.png: PNG, 64×96, drawn by chromarpc").waitFor();
    assert.equal(await tab.getByText("Drop the picture to see").count(), 0);
    assert.equal(await told(tab, "prompt"), PROMPT);
    assert.deepEqual(
      await Promise.all(["seed", "sample_steps", "guidance_scale", "height"].map((name) => told(tab, name))),
      ["7", "3", "2.5", "96"],
    );
    assert.match(await told(tab, "loras.0.path"), /\.safetensors$/);
    assert.equal(await panel(tab).evaluate((element) => element === document.activeElement), true);
    await shot(tab, "explained");
    await panel(tab).getByRole("button", { name: "Take its settings" }).click();
    await panel(tab).getByText("The form has all of its settings.").waitFor();
    assert.deepEqual(await settings(tab), [PROMPT, "64", "96", "3", "2.5", "7"]);
    assert.equal(await tab.getByRole("slider", { name: /^Strength of/ }).count(), 1);
    await tab.getByRole("button", { name: "Undo" }).click();
    assert.equal((await settings(tab))[0], "something else");
    await panel(tab).getByRole("button", { name: "Compare with the run shown" }).click();
    await panel(tab)
      .getByText(/pixels: PSNR \d+\.\d\d dB, SSIM 0\.\d{4}, largest difference \d+ of 255/)
      .waitFor();
    assert.deepEqual(await lines(tab), ["guidance_scale: 2.5 → 3.0"]);
    const slider = tab.getByLabel("Where the right picture begins");
    await slider.focus();
    await tab.keyboard.press("ArrowRight");
    assert.equal(await slider.inputValue(), "50.5");
    await tab.getByLabel("Equal fields too").check();
    assert.ok((await lines(tab)).includes("seed: 7"));
    await shot(tab, "explained-compared");
    // Nothing of it was sent: whatever was asked meanwhile is smaller than the picture.
    const sent = requests.map((request) => request.postDataBuffer()?.length ?? 0);
    assert.ok(Math.max(0, ...sent) < 1000, `${sent}`);
    await tab.getByRole("button", { name: "Close the picture" }).click();
    assert.equal(await panel(tab).count(), 0);
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("the same picture twice is the same to the byte; a run without a record is compared all the same", async () => {
    const tab = await opened();
    await fill(tab, { Prompt: PROMPT, Width: "64", Height: "64", Steps: "2" });
    await drawn(tab, "again.png");
    await tab.getByLabel("Explain a picture").setInputFiles(file("again.png"));
    await panel(tab).getByRole("button", { name: "Compare with the run shown" }).click();
    await panel(tab).getByText("pixels: the same, and so is every byte").waitFor();
    await panel(tab).getByText("No field differs that is known of both.").waitFor();
    await panel(tab).getByRole("button", { name: "Take its settings" }).click();
    await tab.getByText("More", { exact: true }).click();
    await tab.getByLabel("File format").selectOption("jpeg-trainer");
    await draw(tab);
    await tab.waitForFunction(() => {
      const { top, bottom } = document.querySelector(".status").getBoundingClientRect();
      return top >= 0 && bottom <= innerHeight;
    });
    await tab.locator("a[download$='.jpg'], a[download$='.jpeg']").waitFor();
    await panel(tab).getByRole("button", { name: "Compare with the run shown" }).click();
    await panel(tab)
      .getByText(/pixels: PSNR/)
      .waitFor();
    // The type it computed in, only a record tells.
    assert.deepEqual(await lines(tab), ["dtype: float32 → unknown", "output.format: png → jpeg-trainer"]);
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("a picture of ComfyUI fills the form as far as it goes, and says what is left", async () => {
    const tab = await opened();
    await drop(tab, file("comfyui.png"));
    await panel(tab).getByText("comfyui.png: PNG, 64×64, drawn by ComfyUI").waitFor();
    assert.equal(await told(tab, "model_revision"), "unknown");
    assert.match(await told(tab, "scheduler"), /^beta/);
    await panel(tab).getByRole("button", { name: "Take its settings" }).click();
    await panel(tab).getByText("The form has its settings, but for:").waitFor();
    assert.deepEqual(await settings(tab), ["a red circle", "64", "64", "20", "3.5", "43"]);
    const left = await tab.getByRole("list", { name: "What the form could not take" }).allInnerTexts();
    assert.match(left[0], /^model: Chroma1-HD\.safetensors is a file of another program/);
    assert.match(left[0], /loras\.0\.path: \S*hollow_shapes\.safetensors is taken for mine\/hollow_shapes/);
    assert.doesNotMatch(left[0], /neg:|sampler:|scheduler:|settings:/);
    const sampled = ["Draw as", "Sampler", "Schedule", "Negative prompt"].map((label) =>
      tab.getByLabel(label, { exact: true }).inputValue(),
    );
    assert.deepEqual(await Promise.all(sampled), ["comfyui", "euler", "beta", "blurry"]);
    assert.equal(await tab.getByLabel("Use the negative prompt").isChecked(), true);
    assert.equal(await tab.getByRole("slider", { name: /^Strength of .*hollow_shapes/ }).inputValue(), "0.8");
    await shot(tab, "explained-comfyui");
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("two pictures that are dropped one after the other are compared", async () => {
    const tab = await opened();
    await drop(tab, file("comfyui.png"));
    await panel(tab).getByText("drawn by ComfyUI").waitFor();
    await drop(tab, file("a1111.png"));
    await panel(tab).getByText("drawn by AUTOMATIC1111 or Forge v1.10.1").waitFor();
    await panel(tab).getByRole("button", { name: "Compare with comfyui.png" }).click();
    const found = await lines(tab);
    assert.ok(found.includes("sampler: euler → DPM++ 2M"), found.join("\n"));
    assert.ok(
      found.some((line) => line.startsWith("loras.0.path: mine/hollow_shapes.safetensors → unheard_of")),
    );
    assert.ok(!found.some((line) => line.startsWith("seed:")));
    await panel(tab).getByText("pixels: the same").waitFor();
    await panel(tab).getByText("comfyui.png → a1111.png").scrollIntoViewIfNeeded();
    await shot(tab, "explained-two");
    for (const width of [320, 390]) assert.deepEqual(await misfits(tab, width), []);
    await panel(tab).getByLabel("side by side").check();
    await shot(tab, "explained-two-narrow");
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("adapters from the network are taken only once their addresses were seen", async () => {
    const url = "https://example.test/an adapter.safetensors?token=1";
    const graph = structuredClone(COMFYUI);
    graph.lora.inputs.lora_name = url;
    await writeFile(file("url.png"), png(text("tEXt", "prompt", "", JSON.stringify(graph))));
    const tab = await opened();
    await drop(tab, file("url.png"));
    const take = panel(tab).getByRole("button", { name: "Take its settings" });
    const adapter = tab.getByRole("slider", { name: `Strength of ${url}` });
    await take.click();
    const question = tab.getByRole("region", { name: "The picture has the server fetch" });
    await question.getByText(url).waitFor();
    await shot(tab, "explained-url");
    assert.equal((await settings(tab))[0], "");
    await question.getByRole("button", { name: "Take the rest only" }).click();
    assert.equal((await settings(tab))[0], "a red circle");
    assert.equal(await adapter.count(), 0);
    await panel(tab).getByText(`loras.0.path: ${url} was not to be fetched`).waitFor();
    await take.click();
    await question.getByRole("button", { name: "Take these adapters too" }).click();
    await adapter.waitFor();
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("a trainer's sample has no record, and the page says who can tell", async () => {
    const tab = await opened();
    await drop(tab, file("1795648942091__000000250_1.png"));
    await panel(tab).getByText("it does not say what it was drawn with").waitFor();
    await panel(tab).getByText("“Redraw a training run” reads it").waitFor();
    assert.equal(await panel(tab).getByRole("button", { name: "Take its settings" }).count(), 0);
    await tab.close();
  });

  test("what is no picture is one line, however large", async () => {
    await writeFile(file("notes.png"), "no picture");
    await writeFile(file("adapter.safetensors"), Buffer.alloc(1000));
    const whole = await readFile(file("comfyui.png"));
    await writeFile(file("cut.png"), whole.subarray(0, 200));
    const pixels = whole.indexOf("IDAT") + 4;
    await writeFile(file("broken.png"), Buffer.from(whole).fill(7, pixels, pixels + 20));
    const large = await openFile(file("large.bin"), "w");
    await large.truncate(300 * 1024 ** 2);
    await large.close();
    const tab = await opened();
    const said = panel(tab).getByRole("alert");
    for (const [name, sentence] of [
      ["notes.png", "notes.png is no PNG, JPEG or WebP."],
      ["cut.png", "cut.png is a PNG that was cut short."],
      [
        "adapter.safetensors",
        "adapter.safetensors is an adapter. Drop it on the form’s box “Adapters (LoRA)”.",
      ],
      ["large.bin", "large.bin is no PNG, JPEG or WebP."],
    ]) {
      await drop(tab, file(name));
      await said.filter({ hasText: sentence }).waitFor();
      assert.equal(await said.textContent(), sentence);
    }
    await shot(tab, "explained-none");
    await tab.getByRole("button", { name: "Close the picture" }).click();
    assert.equal(await panel(tab).count(), 0);
    await drop(tab, file("broken.png"));
    await panel(tab).getByText("Its pixels cannot be shown: they are broken.").waitFor();
    await drop(tab, file("a1111.png"));
    await panel(tab).getByRole("button", { name: "Compare with broken.png" }).click();
    await panel(tab)
      .getByText("pixels: cannot be compared: one of them is no picture, or a broken one")
      .waitFor();
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("each kind of thing that is dropped goes where it belongs, and nothing opens in the page's place", async () => {
    await mkdir(file("run folder"));
    await writeFile(
      file("new.safetensors"),
      await readFile(path.join(LORA_ROOT, "hollow_shapes.safetensors")),
    );
    await writeFile(file("empty.safetensors"), Buffer.alloc(10));
    const tab = await opened();
    const box = tab.getByRole("group", { name: "Adapters (LoRA)" });
    const onBox = await middleOf(box);
    const said = panel(tab).getByRole("alert");
    const files = (...names) => names.map(file);
    for (const [names, sentence, at] of [
      [
        ["comfyui.png", "a1111.png"],
        "These are 2 files or folders. Drop one picture, or one folder of a training run.",
      ],
      [
        ["comfyui.png", "a1111.png"],
        "These are 2 files or folders. Drop one picture, or one folder of a training run.",
        onBox,
      ],
      [
        ["run folder", "new.safetensors", "comfyui.png"],
        "These are 3 files or folders. Drop one picture, or one folder of a training run.",
        onBox,
      ],
      [
        ["new.safetensors", "empty.safetensors"],
        "These are 2 adapters. Drop them on the form’s box “Adapters (LoRA)”.",
      ],
    ]) {
      const hover = async () => {
        if (at === undefined) await tab.getByText("One picture or one folder at a time").waitFor();
      };
      await drop(tab, files(...names), { ...at, hover });
      await said.filter({ hasText: sentence }).waitFor();
      assert.equal(await tab.locator(".drop-over").count(), 0);
      await tab.getByRole("button", { name: "Close the picture" }).click();
    }
    assert.equal(await tab.locator(".replay").count(), 0);
    // A picture is one wherever it is dropped.
    await drop(tab, file("comfyui.png"), onBox);
    await panel(tab).getByText("drawn by ComfyUI").waitFor();
    // A line about something else does not take it away.
    await drop(tab, files("a1111.png", "cut.png"));
    await said.filter({ hasText: "These are 2 files" }).waitFor();
    assert.equal(await panel(tab).getByText("drawn by ComfyUI").count(), 1);
    const hover = async () => {
      assert.match(await box.getAttribute("class"), /over/);
      assert.equal(await tab.locator(".drop-over").count(), 0);
    };
    await drop(tab, files("new.safetensors", "empty.safetensors"), { ...(await middleOf(box)), hover });
    await box.getByRole("slider").waitFor();
    await box.getByRole("alert").filter({ hasText: "empty.safetensors: " }).waitFor();
    assert.doesNotMatch(await box.getAttribute("class"), /over/);
    await drop(tab, file("run folder"), await middleOf(box));
    await tab.locator(".replay .error", { hasText: "this is no run folder" }).waitFor();
    assert.equal(await box.getByRole("alert").count(), 1);
    assert.equal(tab.url(), stack.url);
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });

  test("at 320 px, in the dark, with the keyboard alone", async () => {
    const tab = await opened({ viewport: { width: 320, height: 700 }, colorScheme: "dark" });
    await tab.keyboard.press("Tab");
    const focused = await tab.evaluate(() => document.activeElement?.ariaLabel);
    assert.equal(focused, "Explain a picture");
    await tab.getByLabel("Explain a picture").setInputFiles(file("comfyui.png"));
    await panel(tab).getByText("drawn by ComfyUI").waitFor();
    assert.deepEqual(await misfits(tab, 320), []);
    await shot(tab, "explained-phone-dark");
    for (let presses = 0; presses < 3; presses++) {
      await tab.keyboard.press("Tab");
      const name = await tab.evaluate(() => document.activeElement?.textContent);
      if (name === "Take its settings") break;
    }
    await tab.keyboard.press("Enter");
    await panel(tab).getByText("The form has its settings, but for:").waitFor();
    await tab.getByText("What it was drawn with").scrollIntoViewIfNeeded();
    await shot(tab, "explained-phone-dark-facts");
    assert.deepEqual(await misfits(tab, 320), []);
    await tab.close();
  });
});
