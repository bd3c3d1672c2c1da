/** The form's fields that only profiles take that draw as the trainer does. */
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { draw, fill, launch, noBrowser, open, shot, startStack, status } from "./stack.mjs";

describe("the trainer's profiles", { skip: noBrowser }, () => {
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

  test("their fields come with the profile, are sent, and come back from a run", async (context) => {
    const permissions = ["clipboard-read", "clipboard-write"];
    const tab = await open(browser, stack.url, { permissions });
    await tab.getByText("More", { exact: true }).click();
    const profiles = tab.getByLabel("Numerics profile");
    await profiles.locator("option", { hasText: "exact" }).first().waitFor({ state: "attached" });
    if ((await profiles.locator("option", { hasText: /^preview$/ }).count()) === 0) {
      return context.skip("this server serves no profile that draws as the trainer does");
    }
    const negative = tab.getByLabel("Negative text");
    await profiles.selectOption("exact");
    assert.equal(await negative.count(), 0);
    await profiles.selectOption("preview");
    await fill(tab, { Prompt: "a red circle", Width: "80", Height: "64", Steps: "2" });
    await fill(tab, { "Negative text": "ugly", Quantizer: "nvfp4" });
    await draw(tab);
    const error = tab.locator("#field-trainer-qtype-error");
    await error.waitFor();
    assert.match(await error.textContent(), /'nvfp4' is known, and not built/);
    await fill(tab, { Quantizer: "qint8" });
    assert.equal(await error.count(), 0);
    await tab.getByLabel("Text encoder").selectOption("no");
    await tab.getByLabel("LoKr").selectOption("weight");
    await shot(tab, "trainer");
    await draw(tab);
    await status(tab, /Done in/);
    await tab.locator(".copy").getByRole("button", { name: "JSON" }).click();
    await tab.getByText("Copied ✓").waitFor();
    const body = JSON.parse(await tab.evaluate(() => navigator.clipboard.readText()));
    assert.deepEqual([body.profile, body.prompts[0].neg, body.prompts[0].width], ["preview", "ugly", 80]);
    assert.deepEqual(body.trainer, {
      quantize: true,
      qtype: "qint8",
      quantize_te: false,
      dtype: "bf16",
      lokr_form: "LOKR_FORM_WEIGHT",
    });
    await tab.reload();
    assert.equal(await negative.inputValue(), "ugly");
    await fill(tab, { "Negative text": "", Quantizer: "" });
    await tab.getByRole("button", { name: "Use these settings" }).click();
    assert.deepEqual(
      [await negative.inputValue(), await tab.getByLabel("Quantizer").inputValue()],
      ["ugly", "qint8"],
    );
    await tab.getByText("More", { exact: true }).click();
    await profiles.selectOption("exact");
    assert.equal(await negative.count(), 0);
    assert.deepEqual(tab.complaints, []);
    await tab.close();
  });
});
