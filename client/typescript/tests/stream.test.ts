/** A job's messages to events, without a server: which device draws, and why a job begins again. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import type { GenerationEvent } from "../src/node.js";
import { StreamReader } from "../src/stream.js";
import { JobEventSchema } from "../src/v1.js";

type Happening = NonNullable<MessageInitShape<typeof JobEventSchema>["event"]>;

function read(...happenings: Happening[]): (GenerationEvent | undefined)[] {
  const reader = new StreamReader();
  return happenings.map((event, index) =>
    reader.read(create(JobEventSchema, { sequence: BigInt(index + 1), time: { seconds: 1n }, event })),
  );
}

const ACCEPTED: Happening = { case: "accepted", value: { jobId: "a job", model: "chroma", prompts: [{}] } };

test("prepared names the device, and of a pair the second card", () => {
  const [, pair] = read(ACCEPTED, {
    case: "prepared",
    value: { device: "NVIDIA H100", deviceId: "cuda:0+cuda:1", secondDevice: "cuda:1" },
  });
  assert.ok(pair?.type === "prepared");
  assert.deepEqual(
    [pair.device, pair.deviceId, pair.secondDevice],
    ["NVIDIA H100", "cuda:0+cuda:1", "cuda:1"],
  );
  const [, older] = read(ACCEPTED, { case: "prepared", value: { device: "NVIDIA H100" } });
  assert.ok(older?.type === "prepared");
  assert.deepEqual([older.deviceId, older.secondDevice], ["", ""]);
});

test("restarted says whether a device was lost, and whether bits may differ", () => {
  const [, moved, again] = read(
    ACCEPTED,
    { case: "restarted", value: { attempt: 2, movedFrom: "cuda:0", bitsMayDiffer: true } },
    { case: "restarted", value: { attempt: 3 } },
  );
  assert.ok(moved?.type === "restarted" && again?.type === "restarted");
  assert.deepEqual([moved.attempt, moved.movedFrom, moved.bitsMayDiffer], [2, "cuda:0", true]);
  assert.deepEqual([again.attempt, again.movedFrom, again.bitsMayDiffer], [3, "", false]);
});
