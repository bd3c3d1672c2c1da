/** What both entry points export. */

export { Code } from "@connectrpc/connect";
export {
  BaseClient,
  type CallControl,
  type ClientOptions,
  type GenerateControl,
  type ListJobsOptions,
  type RedrawOptions,
  type WatchControl,
} from "./client.js";
export * from "./errors.js";
export type * from "./events.js";
export { type LoraInspection, LoraSource, type StoredLora } from "./gen/chromarpc/v1/lora_service_pb.js";
export type { GetServerInfoResponse, Model, ModelProfile } from "./gen/chromarpc/v1/model_service_pb.js";
export { GeneratedImage, type ImageFacts, type RequestJson, repeatRequest } from "./images.js";
export type { ImageInfo, Job, JobState } from "./jobs.js";
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
