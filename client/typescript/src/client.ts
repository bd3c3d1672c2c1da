/** The client: the same calls and events in Node and in browsers, over whatever transport it is given. */
import {
  type CallOptions,
  Code,
  createClient,
  type Client as ServiceClient,
  type Transport,
} from "@connectrpc/connect";
import { Connection } from "./connection.js";
import {
  cancelledHere,
  DeadlineExceeded,
  Draining,
  fromThrown,
  ProtocolError,
  ServerUnavailable,
  StatusError,
} from "./errors.js";
import type { GenerationEvent } from "./events.js";
import {
  DisconnectPolicy,
  type GenerateRequest,
  GenerationService,
} from "./gen/chromarpc/v1/generation_service_pb.js";
import type { JobEvent } from "./gen/chromarpc/v1/job_event_pb.js";
import { JobService, type JobState as JobStateNumber } from "./gen/chromarpc/v1/job_service_pb.js";
import { type LoraInspection, LoraService, type StoredLora } from "./gen/chromarpc/v1/lora_service_pb.js";
import { type GetServerInfoResponse, type Model, ModelService } from "./gen/chromarpc/v1/model_service_pb.js";
import type { GeneratedImage } from "./images.js";
import { type Job, jobOf, stateNumber } from "./jobs.js";
import type {
  CallControl,
  ClientOptions,
  GenerateControl,
  ListJobsOptions,
  RedrawOptions,
  WatchControl,
} from "./options.js";
import { buildRequest, type GenerateOptions, type Prompts } from "./request.js";
import { ImageAssembler, imageOf, StreamReader } from "./stream.js";
import { type UploadOptions, upload } from "./upload.js";
import { randomUuid, waitFor } from "./waiting.js";

/** Deadline of the short calls where nobody says, in milliseconds. */
export const DEFAULT_UNARY_TIMEOUT_MS = 10_000;
/** Inspecting reads a whole adapter. */
const INSPECT_TIMEOUT_MS = 120_000;
/** How long leaving a generation takes at most. */
const LEAVE_TIMEOUT_MS = 2000;
/** Waits before the tries that follow a lost connection; an event that arrives starts over. */
const RECONNECT_DELAYS_MS = [250, 500, 1000, 2000, 4000, 8000, 8000, 8000, 8000, 8000];

/** Speaks to one server. */
export class BaseClient {
  /** Where the server is. */
  readonly target: string;
  readonly #generation: ServiceClient<typeof GenerationService>;
  readonly #jobs: ServiceClient<typeof JobService>;
  readonly #models: ServiceClient<typeof ModelService>;
  readonly #loras: ServiceClient<typeof LoraService>;
  readonly #timeoutMs: number | undefined;

  constructor(transport: Transport, target: string, options: ClientOptions = {}) {
    this.target = target;
    this.#timeoutMs = options.timeoutMs;
    this.#generation = createClient(GenerationService, transport);
    this.#jobs = createClient(JobService, transport);
    this.#models = createClient(ModelService, transport);
    this.#loras = createClient(LoraService, transport);
  }

  /**
   * Runs a generation and yields its events; one image for each prompt.
   *
   * Leaving the loop before its end cancels the call, and the server stops within one step. A lost connection does
   * not where the request has a `requestId`: the same request finds the job again for a while.
   *
   * @throws InvalidRequest an argument that no request can hold, or that the server refuses.
   * @throws StatusError the generation ended with an error; see errors.ts.
   * @throws ProtocolError the stream broke its contract; the call was cancelled.
   */
  async *generate(
    prompts: Prompts,
    options: GenerateOptions & GenerateControl = {},
  ): AsyncGenerator<GenerationEvent, void, undefined> {
    yield* this.generateRequest(buildRequest(prompts, options), options);
  }

  /** The same for a ready message. */
  async *generateRequest(
    request: GenerateRequest,
    control: GenerateControl = {},
  ): AsyncGenerator<GenerationEvent, void, undefined> {
    if (control.reattach) {
      yield* this.#generateReattaching(request, control);
      return;
    }
    const reader = new StreamReader();
    const connection = this.#connection(control);
    const events = this.#read(reader, this.#generation.generate(request, connection.call), connection);
    const { requestId, onDisconnect } = request;
    if (!requestId || onDisconnect !== DisconnectPolicy.UNSPECIFIED) {
      yield* events;
      return;
    }
    let isLeft = true;
    try {
      yield* events;
      isLeft = false;
    } catch (error) {
      // The server knows of its own errors; where it cannot be reached, it keeps the job for who comes back.
      isLeft = control.signal?.aborted === true || !(error instanceof StatusError);
      throw error;
    } finally {
      // Such a job outlives its call, as if the connection had been lost; others may hold on to it too.
      if (isLeft) await this.#cancelLeft(reader, requestId, true);
    }
  }

  /** Has the server stop a job that was left; a server that cannot be told ends it by itself, only later. */
  async #cancelLeft(reader: StreamReader, requestId: string, whenUnattended: boolean): Promise<void> {
    if (reader.ending !== undefined || reader.isCompleted) return;
    const job = reader.plan === undefined ? { requestId } : { jobId: reader.plan.jobId };
    await this.#ask({ timeoutMs: LEAVE_TIMEOUT_MS }, (call) =>
      this.#jobs.cancelJob({ ...job, whenUnattended }, call),
    ).catch(() => undefined);
  }

  async *#generateReattaching(
    request: GenerateRequest,
    control: GenerateControl,
  ): AsyncGenerator<GenerationEvent, void, undefined> {
    const requestId = request.requestId || randomUuid();
    const lasting = { ...request, requestId, onDisconnect: DisconnectPolicy.DETACH };
    const reader = new StreamReader();
    let isOver = false;
    try {
      yield* this.#persist(reader, control, (call) =>
        reader.plan === undefined
          ? this.#generation.generate(lasting, call)
          : this.#jobs.watchJob({ jobId: reader.plan.jobId, afterSequence: BigInt(reader.sequence) }, call),
      );
      isOver = true;
    } finally {
      // Also before the server told the job's id: nothing else would end a job that outlives its caller.
      if (!isOver) await this.#cancelLeft(reader, requestId, false);
    }
  }

  /**
   * Runs a generation to its end and returns its images in the order of the prompts.
   *
   * @throws ChromarpcError see errors.ts; images that were ready before it are lost.
   */
  async generateImages(
    prompts: Prompts,
    options: GenerateOptions & GenerateControl & { readonly onEvent?: (event: GenerationEvent) => void } = {},
  ): Promise<GeneratedImage[]> {
    const images: GeneratedImage[] = [];
    for await (const event of this.generate(prompts, options)) {
      options.onEvent?.(event);
      if (event.type === "imageReady") images.push(event.image);
    }
    return images.sort((a, b) => a.promptIndex - b.promptIndex);
  }

  /**
   * Queues a generation that goes on without a caller; `watchJob` follows it.
   *
   * A `requestId` is drawn where the options have none, so that a call whose answer was lost is repeated safely.
   */
  async createJob(prompts: Prompts, options: GenerateOptions & CallControl = {}): Promise<Job> {
    return this.createJobFrom(buildRequest(prompts, options), options);
  }

  /** The same for a ready message. */
  async createJobFrom(request: GenerateRequest, control: CallControl = {}): Promise<Job> {
    const named = { ...request, requestId: request.requestId || randomUuid() };
    return this.#madeOnce(control, async (call) =>
      jobOf((await this.#jobs.createJob({ request: named }, call)).job),
    );
  }

  /** Makes a call again whose answer was lost; it has a request id, so that it makes one job. */
  async #madeOnce(control: CallControl, make: (call: CallOptions) => Promise<Job>): Promise<Job> {
    for (let attempt = 0; ; attempt++) {
      try {
        return await this.#ask(control, make);
      } catch (error) {
        const delayMs = RECONNECT_DELAYS_MS[attempt];
        const isWorthTrying = error instanceof ServerUnavailable && !(error instanceof Draining);
        if (!isWorthTrying || delayMs === undefined || attempt >= 3) throw error;
        await waitFor(delayMs, control.signal);
      }
    }
  }

  /**
   * Yields a job's events from any point, until its last one; goes on by itself after a lost connection.
   *
   * Leaving the loop leaves the job alone. A job that failed or was cancelled throws, as in `generate`.
   */
  async *watchJob(
    jobId: string,
    control: WatchControl = {},
  ): AsyncGenerator<GenerationEvent, void, undefined> {
    const { afterSequence = 0 } = control;
    const plan = afterSequence > 0 ? (await this.getJob(jobId, control)).plan : undefined;
    const reader = new StreamReader(afterSequence, plan);
    yield* this.#persist(reader, control, (call) =>
      this.#jobs.watchJob({ jobId, afterSequence: BigInt(reader.sequence) }, call),
    );
  }

  /** How a job is. */
  async getJob(jobId: string, control: CallControl = {}): Promise<Job> {
    const { job } = await this.#ask(control, (call) => this.#jobs.getJob({ jobId }, call));
    return jobOf(job);
  }

  /** Jobs of this caller, newest first. */
  async listJobs(options: ListJobsOptions = {}): Promise<Job[]> {
    const { limit = 100 } = options;
    const states: JobStateNumber[] = (options.states ?? []).map(stateNumber);
    const jobs: Job[] = [];
    let pageToken = "";
    do {
      const pageSize = Math.min(1000, limit - jobs.length);
      const page = await this.#ask(options, (call) =>
        this.#jobs.listJobs({ pageSize, pageToken, states }, call),
      );
      jobs.push(...page.jobs.map(jobOf));
      pageToken = page.nextPageToken;
    } while (pageToken && jobs.length < limit);
    return jobs;
  }

  /** Stops a job: at once while it waits, within one denoising step while it runs. */
  async cancelJob(jobId: string, control: CallControl = {}): Promise<Job> {
    const { job } = await this.#ask(control, (call) => this.#jobs.cancelJob({ jobId }, call));
    return jobOf(job);
  }

  /** Forgets a job that ended, with its pictures. */
  async deleteJob(jobId: string, control: CallControl = {}): Promise<void> {
    await this.#ask(control, (call) => this.#jobs.deleteJob({ jobId }, call));
  }

  /**
   * Has a job that ended drawn again, by a new job with its plan, seeds and adapters; `watchJob` follows it.
   *
   * On the same model of device, with the same version and settings, it draws the same bytes. Pictures of the job
   * that were damaged are then whole again too. A `requestId` is drawn where none is given, as for `createJob`.
   */
  async redrawJob(jobId: string, options: RedrawOptions = {}): Promise<Job> {
    const requestId = options.requestId ?? randomUuid();
    return this.#madeOnce(options, async (call) =>
      jobOf((await this.#jobs.redrawJob({ jobId, requestId }, call)).job),
    );
  }

  /** One of a job's pictures again, whole; goes on where a lost connection left it. */
  async getImage(jobId: string, promptIndex: number, control: CallControl = {}): Promise<GeneratedImage> {
    const { plan } = await this.getJob(jobId, control);
    if (plan === undefined) throw new ProtocolError("the server told a job without its plan");
    const parts = new ImageAssembler();
    for (let attempt = 0; ; attempt++) {
      const connection = this.#connection(control);
      try {
        const offsetBytes = BigInt(parts.have);
        for await (const { part } of this.#jobs.getImage(
          { jobId, promptIndex, offsetBytes },
          connection.call,
        )) {
          if (part.case === "imageHeader" && !parts.isOpen) parts.begin(part.value);
          if (part.case === "imageChunk") {
            const whole = parts.add(part.value);
            if (whole !== undefined) return imageOf(whole.header, whole.data, plan);
          }
        }
        throw new ProtocolError("the picture ended before its bytes did");
      } catch (thrown) {
        const error = fromThrown(thrown, this.target, control.signal);
        const delayMs = RECONNECT_DELAYS_MS[attempt];
        if (!(error instanceof ServerUnavailable) || delayMs === undefined) throw error;
        await waitFor(delayMs, control.signal);
      } finally {
        connection.close();
      }
    }
  }

  /** The models that requests can name, in the server's order. */
  async listModels(control: CallControl = {}): Promise<Model[]> {
    return (await this.#ask(control, (call) => this.#models.listModels({}, call))).models;
  }

  /** Version, devices, numerics profiles, limits and queue of the server. */
  async serverInfo(control: CallControl = {}): Promise<GetServerInfoResponse> {
    return this.#ask(control, (call) => this.#models.getServerInfo({}, call));
  }

  /** The adapters that requests can name. */
  async listLoras(control: CallControl = {}): Promise<StoredLora[]> {
    const loras: StoredLora[] = [];
    let pageToken = "";
    do {
      const page = await this.#ask(control, (call) =>
        this.#loras.listLoras({ pageSize: 1000, pageToken }, call),
      );
      loras.push(...page.loras);
      pageToken = page.nextPageToken;
    } while (pageToken);
    return loras;
  }

  /** What an adapter is, and how strongly it changes a model. */
  async inspectLora(
    path: string,
    options: CallControl & { readonly model?: string | undefined } = {},
  ): Promise<LoraInspection> {
    const { model, ...control } = options;
    const { inspection } = await this.#ask({ timeoutMs: INSPECT_TIMEOUT_MS, ...control }, (call) =>
      this.#loras.inspectLora({ path, ...(model === undefined ? {} : { model }) }, call),
    );
    if (inspection === undefined) throw new ProtocolError("the server told nothing about the adapter");
    return inspection;
  }

  /** Uploads an adapter, unless its bytes were uploaded before; resumes after a lost connection. */
  async uploadLora(file: Blob, options: UploadOptions = {}): Promise<StoredLora> {
    return upload(this.#loras, file, options, this.target);
  }

  /** Deletes an uploaded adapter; all others are the server's own. */
  async deleteLora(path: string, control: CallControl = {}): Promise<void> {
    await this.#ask(control, (call) => this.#loras.deleteLora({ path }, call));
  }

  /** Asks once; an error of the tree where it fails. */
  async #ask<T>(control: CallControl, call: (options: CallOptions) => Promise<T>): Promise<T> {
    const timeoutMs = control.timeoutMs ?? this.#timeoutMs ?? DEFAULT_UNARY_TIMEOUT_MS;
    try {
      return await call({ timeoutMs, ...(control.signal && { signal: control.signal }) });
    } catch (thrown) {
      throw fromThrown(thrown, this.target, control.signal);
    }
  }

  /** Reads streams, one after another while the connection is lost, until the job is over. */
  async *#persist(
    reader: StreamReader,
    control: WatchControl,
    open: (call: CallOptions) => AsyncIterable<{ event?: JobEvent | undefined }>,
  ): AsyncGenerator<GenerationEvent, void, undefined> {
    const timeoutMs = control.timeoutMs ?? this.#timeoutMs;
    const deadline = timeoutMs === undefined ? Number.POSITIVE_INFINITY : Date.now() + timeoutMs;
    for (let attempt = 0; ; ) {
      const leftMs = deadline - Date.now();
      if (leftMs <= 0) {
        throw new DeadlineExceeded("the time limit passed before the job was done", {
          code: Code.DeadlineExceeded,
        });
      }
      const connection = this.#connection({
        signal: control.signal,
        timeoutMs: Number.isFinite(leftMs) ? leftMs : undefined,
      });
      try {
        for await (const event of this.#read(reader, open(connection.call), connection)) {
          if (attempt > 0) control.onReconnect?.(0, undefined);
          attempt = 0;
          yield event;
        }
        return;
      } catch (error) {
        // What the job itself ended with is final, even where it says UNAVAILABLE.
        if (error === reader.ending || !(error instanceof ServerUnavailable)) throw error;
        const last = RECONNECT_DELAYS_MS.length - 1;
        if (attempt > last && !control.persistent) throw error;
        const delayMs = Math.max(RECONNECT_DELAYS_MS[Math.min(attempt, last)] ?? 0, error.retryAfterMs ?? 0);
        attempt += 1;
        control.onReconnect?.(attempt, error);
        await waitFor(Math.min(delayMs, Math.max(0, deadline - Date.now())), control.signal);
      }
    }
  }

  /** One stream's events; a stream that is left is cancelled. */
  async *#read(
    reader: StreamReader,
    messages: AsyncIterable<{ event?: JobEvent | undefined }>,
    connection: Connection,
  ): AsyncGenerator<GenerationEvent, void, undefined> {
    try {
      for await (const { event: message } of messages) {
        const event = reader.read(message);
        if (event !== undefined) yield event;
      }
    } catch (thrown) {
      // Gateways are known to drop the details of a status; the last event has them too.
      if (reader.ending !== undefined) throw reader.ending;
      throw fromThrown(thrown, this.target, connection.given);
    } finally {
      connection.close();
    }
    if (connection.given?.aborted && !reader.isCompleted) throw cancelledHere(connection.given.reason);
    if (!reader.isCompleted && reader.ending === undefined) {
      throw new ServerUnavailable(`cannot reach ${this.target}: the stream broke off`, {
        code: Code.Unavailable,
      });
    }
    reader.finish();
  }

  #connection(control: CallControl): Connection {
    return new Connection(control.signal, control.timeoutMs ?? this.#timeoutMs);
  }
}
