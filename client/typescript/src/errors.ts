/**
 * Every error of a call, as one tree.
 *
 *     ChromarpcError
 *     ├── StatusError               the call ended with an error status
 *     │   ├── InvalidRequest        INVALID_ARGUMENT, OUT_OF_RANGE       `violations` name the fields
 *     │   │   └── LoraInvalid       LORA_INVALID
 *     │   ├── NotFound              NOT_FOUND
 *     │   │   ├── ModelNotFound     MODEL_NOT_FOUND
 *     │   │   ├── LoraNotFound      LORA_NOT_FOUND
 *     │   │   ├── UploadNotFound    UPLOAD_NOT_FOUND
 *     │   │   ├── JobNotFound       JOB_NOT_FOUND
 *     │   │   └── ImageNotFound     IMAGE_NOT_FOUND
 *     │   ├── AlreadyExists         ALREADY_EXISTS
 *     │   │   └── RequestIdReused   REQUEST_ID_REUSED
 *     │   ├── FailedPrecondition    FAILED_PRECONDITION
 *     │   │   ├── LoraIncompatible  LORA_INCOMPATIBLE
 *     │   │   ├── LoraContentChanged LORA_CONTENT_CHANGED
 *     │   │   ├── LoraForbidden     LORA_FORBIDDEN
 *     │   │   ├── LoraDownloadFailed LORA_DOWNLOAD_FAILED
 *     │   │   ├── UploadOutOfOrder  UPLOAD_OUT_OF_ORDER
 *     │   │   ├── LoraChanged       LORA_CHANGED
 *     │   │   ├── NotKept           NOT_KEPT
 *     │   │   ├── WeightsMissing    WEIGHTS_MISSING
 *     │   │   ├── WeightsInvalid    WEIGHTS_INVALID
 *     │   │   └── JobNotEnded       JOB_NOT_ENDED
 *     │   ├── ResourceExhausted     RESOURCE_EXHAUSTED
 *     │   │   ├── QueueFull         QUEUE_FULL                           `retryAfterMs` says when to retry
 *     │   │   ├── UploadsFull       UPLOADS_FULL
 *     │   │   ├── QuotaExceeded     QUOTA_EXCEEDED                       `metadata` names the quota
 *     │   │   ├── DiskFull          DISK_FULL                            the server's; delete what you can
 *     │   │   └── OutOfMemory       OUT_OF_MEMORY
 *     │   ├── ServerUnavailable     UNAVAILABLE                          nobody listens, or it broke off
 *     │   │   ├── Draining          DRAINING
 *     │   │   └── StoreUnavailable  STORE_UNAVAILABLE                    its disk is full, or fails
 *     │   ├── DeadlineExceeded      DEADLINE_EXCEEDED                    `timeoutMs` passed
 *     │   │   └── QueueTimeExceeded QUEUE_TIME_EXCEEDED
 *     │   ├── Cancelled             CANCELLED                            by this side or by the server
 *     │   ├── AccessDenied          UNAUTHENTICATED, PERMISSION_DENIED
 *     │   └── ServerError           INTERNAL, UNKNOWN and all other codes
 *     │       ├── AttemptsExhausted ATTEMPTS_EXHAUSTED
 *     │       ├── DeviceHung        DEVICE_HUNG
 *     │       ├── DeviceLost        DEVICE_LOST
 *     │       └── DataLoss          DATA_LOSS                            what was stored is damaged
 *     │           ├── ImageDamaged  IMAGE_DAMAGED                        `redrawJob` draws it again
 *     │           ├── JobDamaged    JOB_DAMAGED
 *     │           ├── LoraDamaged   LORA_DAMAGED                         uploading the file again heals it
 *     │           └── StoreDamaged  STORE_DAMAGED
 *     └── ProtocolError             the stream broke its contract: bytes missing or changed, no last event
 *
 * A request that cannot even be sent (a width of 2**40) throws `InvalidRequest` too, before anything is sent.
 */
import { Code, ConnectError } from "@connectrpc/connect";
import type { ErrorReason } from "./gen/chromarpc/v1/codes_pb.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import { milliseconds } from "./units.js";

/** `google.rpc.ErrorInfo.domain` of this service; a proxy's own reasons are not ours to interpret. */
const DOMAIN = "chromarpc";

/** One thing wrong with one field of a request. */
export interface FieldViolation {
  /** Dotted path with list indices, `prompts.0.width`; empty where it is about no single field. */
  readonly field: string;
  /** A sentence for people. */
  readonly description: string;
}

/** What a `StatusError` is made of. */
export interface StatusDetails {
  readonly code: Code;
  readonly reason?: string;
  readonly violations?: readonly FieldViolation[];
  readonly metadata?: Readonly<Record<string, string>>;
  readonly retryAfterMs?: number | undefined;
  readonly cause?: unknown;
}

/** Anything this package throws for a call. */
export class ChromarpcError extends Error {
  override get name(): string {
    return this.constructor.name;
  }
}

/** The server's stream broke its contract; what it sent so far is not to be trusted. */
export class ProtocolError extends ChromarpcError {}

/** The call ended with an error status. */
export class StatusError extends ChromarpcError {
  /** The gRPC status code. */
  readonly code: Code;
  /** Stable name such as `LORA_NOT_FOUND`; empty where the status carries none. */
  readonly reason: string;
  /** The fields at fault, where the request is. */
  readonly violations: readonly FieldViolation[];
  /** Further facts for programs. */
  readonly metadata: Readonly<Record<string, string>>;
  /** When trying again makes sense, in milliseconds; undefined when the server gives no advice. */
  readonly retryAfterMs: number | undefined;

  constructor(message: string, details: StatusDetails) {
    super(message, { cause: details.cause });
    this.code = details.code;
    this.reason = details.reason ?? "";
    this.violations = details.violations ?? [];
    this.metadata = details.metadata ?? {};
    this.retryAfterMs = details.retryAfterMs;
  }
}

/** A field is out of range, missing, too large, or cannot be honoured; `violations` name it. */
export class InvalidRequest extends StatusError {}
/** The adapter's file is not safetensors, is truncated, or lies about its contents. */
export class LoraInvalid extends InvalidRequest {}
/** What the request names does not exist on the server. */
export class NotFound extends StatusError {}
/** No model is served under this id. */
export class ModelNotFound extends NotFound {}
/** The server has no such adapter. */
export class LoraNotFound extends NotFound {}
/** The server knows no such upload; it may have dropped it because no bytes came for too long. */
export class UploadNotFound extends NotFound {}
/** The server knows no such job, or not for this caller. */
export class JobNotFound extends NotFound {}
/** The job has no such image, or not yet. */
export class ImageNotFound extends NotFound {}
/** What the request would make is there already. */
export class AlreadyExists extends StatusError {}
/** Another request was sent under this `requestId`. */
export class RequestIdReused extends AlreadyExists {}
/** The request is right and the server is in no state to serve it. */
export class FailedPrecondition extends StatusError {}
/** The adapter is well formed and does not fit this model. */
export class LoraIncompatible extends FailedPrecondition {}
/** The adapter is another one than the request expects; `metadata.sha256_now` says which it is. */
export class LoraContentChanged extends FailedPrecondition {}
/** The host that the adapter's URL names wants a token, or another one. */
export class LoraForbidden extends FailedPrecondition {}
/** The host that the adapter's URL names did not give it. */
export class LoraDownloadFailed extends FailedPrecondition {}
/** The bytes do not go on where the upload is; `metadata.expected_offset` says where that is. */
export class UploadOutOfOrder extends FailedPrecondition {}
/** The adapter has other bytes than when the job was admitted, or is gone. */
export class LoraChanged extends FailedPrecondition {}
/** After a restart the job needs what the server does not store: a token, or its prompts. */
export class NotKept extends FailedPrecondition {}
/** The model's files are not on the server; the message gives the command that fetches them. */
export class WeightsMissing extends FailedPrecondition {}
/** The model's files are damaged, or of another architecture. */
export class WeightsInvalid extends FailedPrecondition {}
/** The job waits or runs; cancel it first. */
export class JobNotEnded extends FailedPrecondition {}
/** The server has no room for this request now, or at all. */
export class ResourceExhausted extends StatusError {}
/** The server's queue is at its bound; try again after `retryAfterMs`. */
export class QueueFull extends ResourceExhausted {}
/** The server keeps no more uploads. */
export class UploadsFull extends ResourceExhausted {}
/** The caller has as much as it may have; `metadata` names the quota and its limit. */
export class QuotaExceeded extends ResourceExhausted {}
/** The server's disk has no room for anything new; what it has can be read, and deleted. */
export class DiskFull extends ResourceExhausted {}
/** The server's device had too little memory for this job. */
export class OutOfMemory extends ResourceExhausted {}
/** Nobody answers at the target, or the connection broke. */
export class ServerUnavailable extends StatusError {}
/** The server is starting or stopping and takes no work. */
export class Draining extends ServerUnavailable {}
/** The server answers, and cannot store the job or what came of it: its disk is full, or fails. */
export class StoreUnavailable extends ServerUnavailable {}
/** `timeoutMs` passed; the server has stopped the job. */
export class DeadlineExceeded extends StatusError {}
/** The job waited in the queue for longer than its `maxQueueTimeMs`. */
export class QueueTimeExceeded extends DeadlineExceeded {}
/** The call was cancelled, by this side or by the server. */
export class Cancelled extends StatusError {}
/** The server wants a token, or another one. */
export class AccessDenied extends StatusError {}
/** The server, or something between, failed in a way it did not foresee. */
export class ServerError extends StatusError {}
/** The server was stopped, or died, each time it ran the job. */
export class AttemptsExhausted extends ServerError {}
/** The job's device does not answer, and the server has no other one for it. */
export class DeviceHung extends ServerError {}
/** The job's device cannot be used any more, and the server has no other one for it. */
export class DeviceLost extends ServerError {}
/** What the server stored is not there as it was stored; asking again does not help. */
export class DataLoss extends ServerError {}
/** A stored image is gone or damaged: `redrawJob` draws it again. */
export class ImageDamaged extends DataLoss {}
/** What is stored of the job cannot be read. */
export class JobDamaged extends DataLoss {}
/** A stored adapter is damaged: uploading the same file again heals it. */
export class LoraDamaged extends DataLoss {}
/** The server's database is damaged; its operator has to repair it. */
export class StoreDamaged extends DataLoss {}

type StatusErrorClass = new (message: string, details: StatusDetails) => StatusError;

const BY_CODE: Readonly<Record<Code, StatusErrorClass>> = {
  [Code.Canceled]: Cancelled,
  [Code.Unknown]: ServerError,
  [Code.InvalidArgument]: InvalidRequest,
  [Code.DeadlineExceeded]: DeadlineExceeded,
  [Code.NotFound]: NotFound,
  [Code.AlreadyExists]: AlreadyExists,
  [Code.PermissionDenied]: AccessDenied,
  [Code.Unauthenticated]: AccessDenied,
  [Code.ResourceExhausted]: ResourceExhausted,
  [Code.FailedPrecondition]: FailedPrecondition,
  [Code.Aborted]: ServerError,
  [Code.OutOfRange]: InvalidRequest,
  [Code.Unimplemented]: ServerError,
  [Code.Internal]: ServerError,
  [Code.Unavailable]: ServerUnavailable,
  [Code.DataLoss]: DataLoss,
};

/** What a reason narrows it to, where the status code agrees: all that the contract has. */
const BY_REASON: Readonly<Record<Exclude<keyof typeof ErrorReason, "UNSPECIFIED">, StatusErrorClass>> = {
  INVALID_PARAMETER: InvalidRequest,
  LORA_INVALID: LoraInvalid,
  MODEL_NOT_FOUND: ModelNotFound,
  LORA_NOT_FOUND: LoraNotFound,
  UPLOAD_NOT_FOUND: UploadNotFound,
  JOB_NOT_FOUND: JobNotFound,
  IMAGE_NOT_FOUND: ImageNotFound,
  JOB_NOT_ENDED: JobNotEnded,
  QUOTA_EXCEEDED: QuotaExceeded,
  QUEUE_TIME_EXCEEDED: QueueTimeExceeded,
  REQUEST_ID_REUSED: RequestIdReused,
  LORA_INCOMPATIBLE: LoraIncompatible,
  LORA_CONTENT_CHANGED: LoraContentChanged,
  LORA_FORBIDDEN: LoraForbidden,
  LORA_DOWNLOAD_FAILED: LoraDownloadFailed,
  LORA_CHANGED: LoraChanged,
  NOT_KEPT: NotKept,
  UPLOAD_OUT_OF_ORDER: UploadOutOfOrder,
  WEIGHTS_MISSING: WeightsMissing,
  WEIGHTS_INVALID: WeightsInvalid,
  QUEUE_FULL: QueueFull,
  UPLOADS_FULL: UploadsFull,
  OUT_OF_MEMORY: OutOfMemory,
  DISK_FULL: DiskFull,
  DRAINING: Draining,
  STORE_UNAVAILABLE: StoreUnavailable,
  CANCELLED: Cancelled,
  DEADLINE_EXCEEDED: DeadlineExceeded,
  UNAUTHENTICATED: AccessDenied,
  ATTEMPTS_EXHAUSTED: AttemptsExhausted,
  DEVICE_HUNG: DeviceHung,
  DEVICE_LOST: DeviceLost,
  IMAGE_DAMAGED: ImageDamaged,
  JOB_DAMAGED: JobDamaged,
  LORA_DAMAGED: LoraDamaged,
  STORE_DAMAGED: StoreDamaged,
  INTERNAL: ServerError,
};

/** The error of a status; the code rules, the reason refines. */
export function statusError(message: string, details: StatusDetails): StatusError {
  const byCode = BY_CODE[details.code] ?? ServerError;
  const byReason = (BY_REASON as Readonly<Record<string, StatusErrorClass>>)[details.reason ?? ""] ?? byCode;
  const refines = byReason === byCode || byReason.prototype instanceof byCode;
  return new (refines ? byReason : byCode)(message, details);
}

/** A status code as a number on the wire; `Unknown` for one that does not exist. */
export function statusCode(number: number): Code {
  return number in BY_CODE ? number : Code.Unknown;
}

/** A request that cannot be sent, blaming one field. */
export function invalidRequest(field: string, description: string): InvalidRequest {
  return new InvalidRequest(field ? `${field}: ${description}` : description, {
    code: Code.InvalidArgument,
    reason: "INVALID_PARAMETER",
    violations: [{ field, description }],
  });
}

/** This side asked to stop. */
export function cancelledHere(cause: unknown): Cancelled {
  return new Cancelled("cancelled by this side", { code: Code.Canceled, reason: "CANCELLED", cause });
}

/** Whatever a call threw, as an error of the tree; `target` is named where it could not be reached. */
export function fromThrown(thrown: unknown, target: string, signal: AbortSignal | undefined): ChromarpcError {
  if (thrown instanceof ChromarpcError) return thrown;
  if (signal?.aborted) return cancelledHere(signal.reason);
  const error = ConnectError.from(thrown);
  const info = error.findDetails(ErrorInfoSchema).find((found) => found.domain === DOMAIN);
  const [retry] = error.findDetails(RetryInfoSchema);
  const violations = error
    .findDetails(BadRequestSchema)
    .flatMap((found) => found.fieldViolations.map(({ field, description }) => ({ field, description })));
  const code = isLostConnection(error) ? Code.Unavailable : error.code;
  let message = error.rawMessage || `the call ended with ${Code[code]}`;
  if (code === Code.Unavailable && info === undefined) message = `cannot reach ${target}: ${message}`;
  if (code === Code.DeadlineExceeded && info === undefined)
    message = "the time limit passed before the server was done";
  return statusError(message, {
    code,
    reason: info?.reason ?? "",
    violations,
    metadata: { ...info?.metadata },
    retryAfterMs: retry?.retryDelay && Math.max(0, milliseconds(retry.retryDelay)),
    cause: thrown,
  });
}

/**
 * A browser says only "Failed to fetch" or "network error", which is `Unknown` to the transport, and a stream that
 * ends without its trailers is `InvalidArgument` or `Internal`: all of them are a connection that is not there.
 */
function isLostConnection(error: ConnectError): boolean {
  if (error.details.length > 0) return false;
  if (error.cause instanceof TypeError) return true;
  if (error.code === Code.Aborted) return error.cause !== undefined;
  return /missing trailer|premature (EOF|end)|protocol error: (incomplete|missing)|stream closed|ECONNRE|EPIPE|GOAWAY/i.test(
    error.rawMessage,
  );
}
