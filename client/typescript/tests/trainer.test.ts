/** What the trainer's profiles take: into the request, and back out of what the server tells. */
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { create } from "@bufbuild/protobuf";
import { AcceptedSchema } from "../src/gen/chromarpc/v1/job_event_pb.js";
import { ImageFormat, LokrForm } from "../src/gen/chromarpc/v1/options_pb.js";
import { buildRequest, Client, InvalidRequest, LoraContentChanged, repeatRequest } from "../src/node.js";
import { planOf } from "../src/stream.js";
import { startServer, type TestServer } from "./server.js";

const SHA256 = "ab".repeat(32);
const TRAINER = {
  quantize: true,
  qtype: "uint4",
  quantizeTe: false,
  dtype: "float32",
  lokrForm: "weight",
} as const;

test("options become the request, and what is left out stays out", () => {
  const request = buildRequest(
    { prompt: "a", neg: "ugly" },
    {
      profile: "preview",
      loras: { path: "l", expectedSha256: SHA256 },
      outputFormat: "jpeg-trainer",
      pictureRecord: true,
      trainer: TRAINER,
    },
  );
  assert.equal(request.prompts[0]?.neg, "ugly");
  assert.equal(request.loras[0]?.expectedSha256, SHA256);
  assert.equal(request.output?.format, ImageFormat.JPEG_TRAINER);
  assert.equal(request.output?.pictureRecord, true);
  assert.ok(request.trainer);
  const { $typeName: _, ...trainer } = request.trainer;
  assert.deepEqual(trainer, { ...TRAINER, lokrForm: LokrForm.WEIGHT });

  const bare = buildRequest("a", { loras: "l" });
  assert.deepEqual([bare.trainer, bare.output], [undefined, undefined]);
  assert.equal(bare.loras[0]?.expectedSha256, undefined);
  const record = buildRequest("a", { pictureRecord: false }).output;
  assert.deepEqual([record?.format, record?.pictureRecord], [ImageFormat.UNSPECIFIED, false]);
  const empty = buildRequest("a", { trainer: {} }).trainer;
  assert.deepEqual([empty?.quantize, empty?.qtype, empty?.lokrForm], [undefined, undefined, undefined]);
});

test("a form of LoKr that does not exist is refused before it is sent", () => {
  assert.throws(
    () => buildRequest("a", { trainer: { lokrForm: "old" as "weight" } }),
    (error) => error instanceof InvalidRequest && error.violations[0]?.field === "trainer.lokr_form",
  );
});

test("what the server tells is read, and repeats the run", () => {
  const plan = planOf(
    create(AcceptedSchema, {
      model: "chroma",
      profile: "preview",
      prompts: [
        { prompt: "a", width: 80, height: 64, sampleSteps: 3, guidanceScale: 4, seed: 7n, neg: "ugly" },
      ],
      loras: [{ path: "l", networkMultiplier: 1, expectedSha256: SHA256 }],
      output: { format: ImageFormat.JPEG_TRAINER, pictureRecord: true },
      trainer: { ...TRAINER, lokrForm: LokrForm.WEIGHT },
    }),
  );
  assert.deepEqual(plan.trainer, TRAINER);
  assert.deepEqual(
    [plan.outputFormat, plan.outputQuality, plan.pictureRecord],
    ["jpeg-trainer", undefined, true],
  );
  const body = repeatRequest(plan, 0);
  assert.deepEqual([body.prompts[0]?.neg, body.prompts[0]?.use_neg], ["ugly", true]);
  assert.equal(body.loras[0]?.expected_sha256, SHA256);
  assert.deepEqual(body.output, { format: "IMAGE_FORMAT_JPEG_TRAINER", picture_record: true });
  assert.deepEqual(body.trainer, {
    quantize: true,
    qtype: "uint4",
    quantize_te: false,
    dtype: "float32",
    lokr_form: "LOKR_FORM_WEIGHT",
  });
});

test("the plan of another profile, or of an older server, repeats without any of it", () => {
  const plan = planOf(
    create(AcceptedSchema, {
      model: "chroma",
      profile: "reference",
      prompts: [{ prompt: "a", width: 64, height: 64, sampleSteps: 3, guidanceScale: 4, seed: 7n }],
      loras: [{ path: "l", networkMultiplier: 1 }],
      output: { format: ImageFormat.PNG },
    }),
  );
  const body = repeatRequest(plan, 0);
  assert.deepEqual(Object.keys(body), ["model", "loras", "prompts", "output", "profile", "noise_draw"]);
  assert.deepEqual(body.output, { format: "IMAGE_FORMAT_PNG" });
  assert.deepEqual(body.loras, [{ path: "l", network_multiplier: 1 }]);
  assert.ok(!("neg" in (body.prompts[0] ?? {})));
});

describe("a real server", () => {
  let server: TestServer;
  let client: Client;
  const SMALL = { model: "chroma-mini", width: 64, height: 64, sampleSteps: 2 } as const;

  before(async () => {
    server = await startServer();
    client = new Client(server.target);
  });
  after(async () => {
    client.close();
    await server.stop();
  });

  test("refuses an adapter of other content", async () => {
    const loras = { path: "hollow_shapes.safetensors", expectedSha256: SHA256 };
    await assert.rejects(client.generateImages("a", { ...SMALL, loras }), (error) => {
      assert.ok(error instanceof LoraContentChanged);
      assert.equal(error.violations[0]?.field, "loras.0.expected_sha256");
      return true;
    });
  });

  test("writes the trainer's JPEG, and tells what it did not honour and where adapters are", async () => {
    const [image] = await client.generateImages("a", {
      ...SMALL,
      loras: "hollow_shapes.safetensors",
      profile: "reference",
      outputFormat: "jpeg-trainer",
      neg: "ugly",
      trainer: TRAINER,
    });
    assert.deepEqual([image?.mediaType, image?.extension], ["image/jpeg", "jpeg"]);
    assert.deepEqual([image?.plan.pictureRecord, image?.plan.trainer], [false, undefined]);
    assert.equal(image?.prepared?.adapters[0]?.placement, "merged");
    const codes = image?.warnings.map(({ code }) => code).sort();
    assert.deepEqual(codes, ["NEG_IGNORED", "TRAINER_OPTIONS_IGNORED"]);
  });

  test("tells of each profile what it makes of a request", async () => {
    const model = (await client.listModels()).find(({ id }) => id === "chroma-mini");
    const reference = model?.profiles.find(({ id }) => id === "reference");
    assert.deepEqual([reference?.resolutionDivisor, reference?.honoursNeg], [32, false]);
  });
});
