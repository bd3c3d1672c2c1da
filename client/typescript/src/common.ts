/** What both entry points export. */

export { Code } from "@connectrpc/connect";
export { BaseClient } from "./client.js";
export * from "./errors.js";
export type * from "./events.js";
export { type LoraInspection, LoraSource, type StoredLora } from "./gen/chromarpc/v1/lora_service_pb.js";
export {
  type Device,
  DeviceState,
  type GetServerInfoResponse,
  type Model,
  type ModelProfile,
  type ModelResidence,
} from "./gen/chromarpc/v1/model_service_pb.js";
export { GeneratedImage, type ImageFacts, type RequestJson, repeatRequest } from "./images.js";
export type { ImageInfo, Job, JobState } from "./jobs.js";
export type {
  CallControl,
  ClientOptions,
  GenerateControl,
  ListJobsOptions,
  RedrawOptions,
  WatchControl,
} from "./options.js";
export {
  buildRequest,
  DEFAULT_MODEL,
  type GenerateOptions,
  type GenerateRequest,
  type Lora,
  type Prompt,
  type PromptOptions,
  type Prompts,
} from "./request.js";
export type { UploadOptions } from "./upload.js";
