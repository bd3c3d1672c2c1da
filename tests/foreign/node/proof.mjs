/** Calls the server as any Node program would: @grpc/grpc-js, the .proto files, nothing of ours. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const at = (path) => fileURLToPath(new URL(path, import.meta.url));
const definition = loader.loadSync(
  ["chromarpc/v1/generation_service.proto", "chromarpc/v1/job_service.proto"],
  { includeDirs: [at("../../../protos")], keepCase: true, longs: String, enums: String, oneofs: true },
);
const { GenerationService, JobService } = grpc.loadPackageDefinition(definition).chromarpc.v1;
const [target] = process.argv.slice(2);
const credentials = grpc.credentials.createInsecure();
const generation = new GenerationService(target, credentials);
const jobs = new JobService(target, credentials);

/** Every event of a call, and the status it ended with. */
function follow(call, onEvent = () => undefined) {
  return new Promise((resolve) => {
    const events = [];
    call.on("data", ({ event }) => {
      events.push(event);
      onEvent(event);
    });
    call.on("error", () => undefined);
    call.on("status", (status) => resolve({ events, status }));
  });
}

const small = { model: "chroma-mini", prompts: [{ prompt: "a red circle", width: 64, height: 64, sample_steps: 3 }] };
const long = { model: "chroma-mini", prompts: [{ prompt: "a", width: 512, height: 512, sample_steps: 150 }] };

const { events, status } = await follow(generation.Generate(small));
assert.equal(status.code, grpc.status.OK);
assert.equal(events[0].event, "accepted");
assert.equal(events.filter(({ step }) => step).length, 3);
const header = events.find(({ image_header }) => image_header).image_header;
const bytes = Buffer.concat(events.filter(({ image_chunk }) => image_chunk).map(({ image_chunk }) => image_chunk.data));
assert.equal(createHash("sha256").update(bytes).digest("hex"), header.sha256);
assert.equal(events.at(-1).event, "completed");
console.log(`grpc-js: ${events.length} events, an image of ${bytes.length} bytes`);

const call = generation.Generate(long);
const cancelled = await follow(call, ({ step }) => step && call.cancel());
assert.equal(cancelled.status.code, grpc.status.CANCELLED);
assert.equal((await follow(generation.Generate(small))).status.code, grpc.status.OK); // the device is free
console.log("grpc-js: cancelled at its first step");

const refused = await follow(generation.Generate({ ...small, prompts: [{ prompt: "a", width: 63 }] }));
assert.equal(refused.status.code, grpc.status.INVALID_ARGUMENT);
const [details] = refused.status.metadata.get("grpc-status-details-bin");
for (const part of ["INVALID_PARAMETER", "chromarpc", "prompts.0.width"]) assert.ok(details.includes(part), part);
console.log("grpc-js: an error with its field");

const timeUp = await follow(generation.Generate(long, { deadline: Date.now() + 700 }));
assert.equal(timeUp.status.code, grpc.status.DEADLINE_EXCEEDED);
const created = await new Promise((resolve, reject) =>
  jobs.CreateJob({ request: small }, (error, answer) => (error ? reject(error) : resolve(answer))),
);
const watched = await follow(jobs.WatchJob({ job_id: created.job.job_id }));
assert.equal(watched.events.at(-1).event, "completed");
console.log("grpc-js: a deadline, and a job watched to its end");
generation.close();
jobs.close();
