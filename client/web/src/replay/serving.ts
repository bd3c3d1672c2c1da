/** Which of a server's models and profiles a run is drawn with. */
import { type BaseClient, DEFAULT_MODEL, type GetServerInfoResponse, type Model } from "chromarpc/web";
import { shownOf } from "./python-values.ts";
import type { TrainingRun } from "./settings.ts";

/** The profiles that draw the trainer's own picture; the first that a server has is taken. */
export const PROFILES = ["preview", "preview-exact"] as const;

/** Nothing can be drawn of this folder, or on this server; a sentence for people. */
export class Unusable extends Error {}

/** No model fits the config: the person has to name one of `models`. */
export class ModelWanted extends Unusable {
  readonly models: readonly string[];

  constructor(message: string, models: readonly string[]) {
    super(message);
    this.models = models;
  }
}

/** Where it is drawn. */
export interface Server {
  readonly version: string;
  /** The model of its device; of several, each model once, since any of them may draw. */
  readonly device: string;
  readonly model: string;
  readonly servedModel: string;
  readonly baseCheckpoint: string;
  readonly profile: string;
}

/**
 * The server, the model and the profile to draw with, and how many drawings to ask for at once.
 *
 * @param model asked for; undefined finds the run's.
 * @param inFlight as many as are wished for at once.
 * @param assumptions told what was assumed.
 * @throws Unusable the server lacks the model or the profile.
 */
export async function choose(
  client: Pick<BaseClient, "listModels" | "serverInfo">,
  run: TrainingRun,
  model: string | undefined,
  inFlight: number,
  assumptions: string[],
  signal: AbortSignal,
): Promise<{ readonly server: Server; readonly inFlight: number }> {
  const [info, models] = await Promise.all([client.serverInfo({ signal }), client.listModels({ signal })]);
  const served = info.profiles.map(({ id }) => id);
  const profile = PROFILES.find((one) => served.includes(one));
  if (profile === undefined) {
    const all = PROFILES.join(", ");
    throw new Unusable(`the server serves none of the profiles ${all}; it has ${served.join(", ")}`);
  }
  const found = modelOf(models, run, model, assumptions);
  const { maxStreams = 0, maxQueuedJobs = 0, maxQueuedJobsPerCaller = 0 } = info.limits ?? {};
  const limits = [maxStreams, maxQueuedJobs, maxQueuedJobsPerCaller].filter((limit) => limit > 0);
  return {
    server: {
      version: info.version,
      device: modelsOfDevices(info),
      model: found.id,
      servedModel: found.aliasOf || found.id,
      baseCheckpoint: found.baseCheckpoint,
      profile,
    },
    inFlight: Math.min(inFlight, ...limits),
  };
}

function modelsOfDevices({ device, devices }: GetServerInfoResponse): string {
  const all = devices.length > 0 || device === undefined ? devices : [device]; // older servers have no list
  const found = all.map(({ id, name, second }) => `${name || id}${second ? ", guidance on two" : ""}`);
  return [...new Set(found)].sort().join("; ");
}

function modelOf(
  models: readonly Model[],
  run: TrainingRun,
  asked: string | undefined,
  assumptions: string[],
): Model {
  const byId = new Map(models.map((model) => [model.id, model]));
  const known = [...byId.keys()];
  if (asked !== undefined) {
    const model = byId.get(asked);
    if (model === undefined) throw new ModelWanted(`the server has no model ${asked}`, known);
    return model;
  }
  const wanted = run.baseModel;
  const stem = (wanted.replaceAll("\\", "/").replace(/\/+$/, "").split("/").at(-1) ?? "").replace(
    /\.safetensors$/,
    "",
  );
  const exact = models.find((model) => wanted !== "" && model.baseCheckpoint === wanted);
  // Its weights in another file, where the server lacks the trainer's own.
  const based = models.find((model) => wanted !== "" && model.weightsPresent && model.baseName === wanted);
  if (based !== undefined && !exact?.weightsPresent) {
    assumptions.push(
      `Base model: ${shownOf(stem)} is the base of the server's model ${shownOf(based.id)}, whose file may hold other weights.`,
    );
    return based;
  }
  const found = exact ?? byId.get(stem) ?? byId.get(DEFAULT_MODEL);
  if (found === undefined)
    throw new ModelWanted(
      `the config's base model is ${shownOf(wanted)}, the server has ${known.join(", ")}`,
      known,
    );
  if (found.id === stem && exact === undefined) {
    assumptions.push(
      `Base model: ${shownOf(stem)}, found by its name; a file of that name may hold other weights.`,
    );
  } else if (exact === undefined) {
    assumptions.push(
      `Base model: the config names ${shownOf(stem)}; taken for the server's model ${shownOf(found.id)}.`,
    );
  }
  return found;
}
