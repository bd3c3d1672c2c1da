/** What the page says of a server's devices, and of jobs that leave one. */
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { load } from "./source.mjs";

describe("devices", () => {
  let words;
  const ends = [];

  before(async () => {
    words = await load({ after: (end) => ends.push(end) }, "devices.ts");
  });
  after(async () => {
    for (const end of ends.reverse()) await end();
  });

  const { IDLE, LOST } = { IDLE: 2, LOST: 4 };
  const one = { id: "cuda:0", name: "NVIDIA H100", state: IDLE, lostBecause: "" };
  const lost = { id: "cuda:1", name: "NVIDIA H100", state: LOST, lostBecause: "it does not answer" };

  test("one device is named, several are counted, lost ones apart", () => {
    const told = (devices, unavailableBecause = "") =>
      words.devicesOf({ device: devices[0], devices, unavailableBecause });
    assert.equal(told([one]), "NVIDIA H100");
    assert.equal(told([one, one]), "2 devices");
    assert.equal(told([one, one, lost]), "2 devices, 1 lost");
    assert.equal(told([], "the cluster has no GPU"), "no device now: the cluster has no GPU");
    assert.equal(
      words.devicesOf({ device: one, devices: [], unavailableBecause: "" }),
      "NVIDIA H100",
      "an older server",
    );
  });

  test("a device says what it does, or why it does nothing", () => {
    assert.equal(words.deviceLine(one), "cuda:0: NVIDIA H100, idle");
    assert.equal(words.deviceLine(lost), "cuda:1: NVIDIA H100, lost: it does not answer");
    assert.equal(words.deviceLine({ ...one, state: 99 }), "cuda:0: NVIDIA H100, unknown");
  });

  test("a job that begins again says why, and whether its pictures may be other ones", () => {
    const moved = { movedFrom: "cuda:1", bitsMayDiffer: false };
    assert.equal(
      words.whyAgain({ movedFrom: "", bitsMayDiffer: false }, false),
      "The server was restarted; the job begins again.",
    );
    assert.equal(
      words.whyAgain(moved, false),
      "Device cuda:1 was lost; the job begins again on another one.",
    );
    assert.equal(words.whyAgain(moved, true), undefined, "it came to the same picture");
    const differs =
      "Device cuda:1 was lost; the job begins again on one of another model, so pictures may differ a little.";
    for (const hasEnded of [false, true]) {
      assert.equal(words.whyAgain({ ...moved, bitsMayDiffer: true }, hasEnded), differs);
    }
  });
});
