/** The messages and services themselves, as generated. */
export * from "./gen/chromarpc/v1/codes_pb.js";
export * from "./gen/chromarpc/v1/generation_service_pb.js";
export * from "./gen/chromarpc/v1/job_event_pb.js";
export * from "./gen/chromarpc/v1/job_service_pb.js";
export * from "./gen/chromarpc/v1/lora_service_pb.js";
export * from "./gen/chromarpc/v1/model_service_pb.js";
export * from "./gen/chromarpc/v1/options_pb.js";
