/** Sampler, schedule, shift, settings and negative text: into the request, and back out of what the server tells. */
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { create } from "@bufbuild/protobuf";
import { AcceptedSchema } from "../src/gen/chromarpc/v1/job_event_pb.js";
import { buildRequest, Client, InvalidRequest, repeatRequest } from "../src/node.js";
import { planOf } from "../src/stream.js";
import { startServer, type TestServer } from "./server.js";

const DRAWN = { width: 64, height: 64, sampleSteps: 3, guidanceScale: 4, seed: 7n };

test("options become the request, a prompt's own before those for all, and what is left out stays out", () => {
  const request = buildRequest(["a", { prompt: "b", sampler: "dpmpp_2m", useNeg: false }], {
    sampler: "heun",
    schedule: "beta",
    shift: 1.5,
    neg: "ugly",
    useNeg: true,
    settings: "comfyui",
  });
  const said = request.prompts.map(({ sampler, schedule, shift, useNeg }) => [
    sampler,
    schedule,
    shift,
    useNeg,
  ]);
  assert.deepEqual(said, [
    ["heun", "beta", 1.5, true],
    ["dpmpp_2m", "beta", 1.5, false],
  ]);
  assert.equal(request.settings, "comfyui");
  const bare = buildRequest("a");
  assert.equal(bare.settings, undefined);
  assert.deepEqual(
    Object.keys(bare.prompts[0] ?? {}).filter((name) => !name.startsWith("$")),
    ["prompt"],
  );
});

test("a shift that is no number is refused before it is sent", () => {
  assert.throws(
    () => buildRequest("a", { shift: Number.NaN }),
    (error) => error instanceof InvalidRequest && error.violations[0]?.field === "prompts.0.shift",
  );
});

test("what the server tells repeats the run", () => {
  const plan = planOf(
    create(AcceptedSchema, {
      prompts: [{ ...DRAWN, prompt: "a", neg: "ugly", sampler: "heun", schedule: "beta", shift: 1 }],
      settings: "comfyui",
    }),
  );
  const body = repeatRequest(plan, 0);
  const [prompt] = body.prompts;
  assert.deepEqual(
    [prompt?.sampler, prompt?.schedule, prompt?.shift, prompt?.neg, prompt?.use_neg, body.settings],
    ["heun", "beta", 1, "ugly", true, "comfyui"],
  );
});

test("an older server samples as the reference does", () => {
  const plan = planOf(create(AcceptedSchema, { prompts: [{ ...DRAWN, prompt: "a" }] }));
  assert.equal(plan.settings, "reference");
  assert.deepEqual(
    plan.prompts.map(({ sampler, schedule, shift }) => [sampler, schedule, shift]),
    [["flowmatch", "flowmatch", undefined]],
  );
  const body = repeatRequest(plan, 0);
  assert.ok(!("settings" in body) && !("shift" in (body.prompts[0] ?? {})));
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

  test("lists what a request may name, and refuses other names with it", async () => {
    const { samplers, schedules, settings } = await client.serverInfo();
    assert.ok(samplers.includes("heun") && schedules.includes("beta") && settings.includes("comfyui"));
    await assert.rejects(
      client.createJob("a", { ...SMALL, sampler: "euler_ancestral" }),
      (error) =>
        error instanceof InvalidRequest &&
        error.violations[0]?.field === "prompts.0.sampler" &&
        samplers.every((name) => error.violations[0]?.description.includes(name)),
    );
  });

  test("warns that negative text needs to be turned on, and takes it where it is", async () => {
    const codes: string[][] = [];
    for (const useNeg of [undefined, true]) {
      const job = await client.createJob("a", { ...SMALL, neg: "ugly", useNeg });
      codes.push((job.plan?.warnings ?? []).map(({ code }) => code));
      assert.equal(job.plan?.prompts[0]?.neg || undefined, useNeg ? "ugly" : undefined);
      await client.cancelJob(job.jobId);
    }
    assert.deepEqual(codes, [["NEG_IGNORED"], []]);
  });
});
