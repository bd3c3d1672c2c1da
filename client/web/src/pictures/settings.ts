/** A picture's settings as the form's values, and by name what the form cannot hold. Knows no page. */
import type { ImageFormat, LokrForm } from "chromarpc/web";
import type { FormValues, LoraChoice } from "../form.ts";
import { compared, isOurs, nameOfFile, shown } from "./facts.ts";
import { RECORD_KEY } from "./files.ts";
import { isList, isObject, type Json, type JsonObject } from "./json.ts";
import type { OpenedPicture } from "./opened.ts";
import { isUrl, recordedHashes } from "./recorded.ts";
import { FLOWMATCH, REFERENCE } from "./sampling.ts";

/** What the server has. */
export interface Served {
  readonly models: readonly string[];
  readonly profiles: readonly ServedProfile[];
  /** That draws where a picture names none. */
  readonly profile: string;
  readonly adapters: readonly ServedAdapter[];
  /** Empty of an older server, which has one way. */
  readonly samplers: readonly string[];
  readonly schedules: readonly string[];
  readonly settings: readonly string[];
}

export interface ServedProfile {
  readonly id: string;
  readonly honoursNeg: boolean;
  readonly takesTrainerOptions: boolean;
}

export interface ServedAdapter {
  readonly path: string;
  /** Empty where it is not known yet. */
  readonly sha256: string;
}

export interface Taken {
  readonly values: Partial<FormValues>;
  /** What was not taken, and what is not as recorded; each a sentence that begins with a name. */
  readonly remarks: readonly string[];
}

const FORMATS: Readonly<Record<string, ImageFormat>> = {
  IMAGE_FORMAT_PNG: "png",
  IMAGE_FORMAT_JPEG: "jpeg",
  IMAGE_FORMAT_WEBP: "webp",
  IMAGE_FORMAT_JPEG_TRAINER: "jpeg-trainer",
};
const LOKR_FORMS: Readonly<Record<string, LokrForm>> = {
  LOKR_FORM_FACTORIZED: "factorized",
  LOKR_FORM_WEIGHT: "weight",
};
/** What the server takes where the form says nothing of it. */
const DEFAULT_QUALITY = 95n;
const DEFAULT_DRAWS: readonly Json[] = ["NOISE_DRAW_FLOAT32", "NOISE_DRAW_UNSPECIFIED"];
const DTYPES: readonly Json[] = ["bf16", "float32"];
/** What other programs do in ways that no request of this service can ask for. */
const FOREIGN = [
  ["sampler", "sampler"],
  ["scheduler", "schedule"],
] as const;
const NO_FIELD = "the form has no field for it";

/** Addresses from which a picture's request has a server fetch adapters. */
export function urlsIn(request: JsonObject): string[] {
  return lorasIn(request).flatMap(({ path }) => (path !== undefined && isUrl(path) ? [path] : []));
}

/**
 * What the form becomes.
 *
 * @param withUrls whether adapters are taken that a server has to fetch: only when somebody saw their addresses.
 */
export function settingsOf(picture: OpenedPicture, served: Served, withUrls: boolean): Taken {
  const { request } = picture.facts;
  if (request === undefined) return { values: {}, remarks: picture.facts.remarks };
  const taker = new Taker(request, served);
  taker.model(picture);
  taker.prompt(isOurs(picture.facts));
  taker.adapters(picture, withUrls);
  taker.profile();
  taker.output();
  taker.rest();
  if (!isOurs(picture.facts)) taker.foreign(picture);
  return { values: taker.values, remarks: taker.remarks };
}

type Values = { -readonly [Name in keyof FormValues]?: FormValues[Name] };

class Taker {
  readonly values: Values = { triggerWord: "" };
  readonly remarks: string[] = [];
  private readonly request: JsonObject;
  private readonly served: Served;

  constructor(request: JsonObject, served: Served) {
    this.request = request;
    this.served = served;
  }

  model({ facts }: OpenedPicture): void {
    const told = facts.facts.get("model");
    if (!isOurs(facts) && told?.value !== undefined) {
      const name = nameOfFile(String(told.value));
      if (this.served.models.includes(name)) this.values.model = name;
      else this.leave("model", `${shown(told)} is a file of another program; the form's model stays`);
      return;
    }
    this.take("model", this.request.get("model"), (value) => {
      if (typeof value !== "string") return false;
      if (this.served.models.includes(value)) this.values.model = value;
      else this.leave("model", `${value} is not served here; the form's model stays`);
      return true;
    });
  }

  /** @param isWhole whether what it leaves out was left out, rather than is unknown. */
  prompt(isWhole: boolean): void {
    const prompts = this.request.get("prompts");
    const [first, ...more] = isList(prompts) ? prompts : [];
    for (const number of more.keys()) this.leave(`prompts.${number + 1}`, "a picture has one prompt");
    if (!isObject(first)) return;
    if (isWhole) {
      // As the reference samples, and every older version.
      const asBefore: Values = { neg: "", sampler: FLOWMATCH, schedule: FLOWMATCH, shift: "", settings: "" };
      Object.assign(this.values, { ...asBefore, usesNeg: false });
    }
    for (const [name, value] of first) {
      this.take(name, value, () => {
        switch (name) {
          case "prompt":
            return this.text(value, (text) => ({ prompts: [text] }));
          case "neg":
            return this.text(value, (text) => ({ neg: text }));
          case "use_neg":
            return this.flag(value, (usesNeg) => ({ usesNeg }));
          case "sampler":
            return this.listed(name, value, this.served.samplers, (sampler) => ({ sampler }));
          case "schedule":
            return this.listed(name, value, this.served.schedules, (schedule) => ({ schedule }));
          case "shift":
            return this.number(value, (shift) => ({ shift }));
          case "width":
            return this.number(value, (text) => ({ width: text }));
          case "height":
            return this.number(value, (text) => ({ height: text }));
          case "sample_steps":
            return this.number(value, (text) => ({ steps: text }));
          case "guidance_scale":
            return this.number(value, (text) => ({ guidance: text }));
          case "seed":
            return this.number(value, (text) => ({ seed: text, isSeedRandom: text.startsWith("-") }));
        }
        return false;
      });
    }
  }

  adapters(picture: OpenedPicture, withUrls: boolean): void {
    const taken: LoraChoice[] = [];
    const record = picture.file.texts.get(RECORD_KEY);
    const hashes = record !== undefined && isOurs(picture.facts) ? recordedHashes(record) : new Map();
    for (const [number, { path, multiplier, expectedSha256, odd }] of lorasIn(this.request).entries()) {
      const at = `loras.${number}`;
      for (const name of odd) this.leave(`${at}.${name}`, NO_FIELD);
      if (path === undefined) {
        this.leave(`${at}.path`, "is no text");
      } else if (isUrl(path) && !withUrls) {
        this.leave(`${at}.path`, `${path} was not to be fetched`);
      } else {
        const here = this.counterpart(at, path, hashes.get(path), isOurs(picture.facts));
        if (taken.some((other) => other.path === here)) {
          this.leave(`${at}.path`, `${here} is there already, and the form holds each adapter once`);
        } else {
          taken.push({ path: here, multiplier, expectedSha256 });
        }
      }
    }
    this.values.loras = taken;
  }

  /** The path under which the server has an adapter: the same content, or a foreign file's one namesake. */
  private counterpart(at: string, path: string, sha256: string | undefined, isRecorded: boolean): string {
    if (isUrl(path)) return path;
    const { adapters } = this.served;
    const listed = adapters.find((adapter) => adapter.path === path);
    const same = sha256 ? adapters.find((adapter) => adapter.sha256 === sha256) : undefined;
    if (listed !== undefined) {
      if (sha256 && listed.sha256 && listed.sha256 !== sha256) {
        const there = same ? `; the recorded one is here as ${same.path}` : "";
        const hash = `${listed.sha256.slice(0, 12)}, not ${sha256.slice(0, 12)}`;
        this.leave(`${at}.sha256`, `${path} has other content than recorded: ${hash}${there}`);
      }
      return path;
    }
    if (same !== undefined) {
      this.leave(`${at}.path`, `${path} is not here; ${same.path} has the same content and is taken`);
      return same.path;
    }
    const namesakes = adapters.filter((adapter) => nameOfFile(adapter.path) === nameOfFile(path));
    const [namesake] = namesakes;
    if (!isRecorded && namesakes.length === 1 && namesake !== undefined) {
      this.leave(`${at}.path`, `${namesake.path} is taken for ${path}, by its name alone`);
      return namesake.path;
    }
    this.leave(`${at}.path`, `${path} is not among the server's adapters: upload it, or remove it`);
    return path;
  }

  profile(): void {
    const { profiles } = this.served;
    this.take("profile", this.request.get("profile"), (value) => {
      if (typeof value !== "string") return false;
      if (profiles.some(({ id }) => id === value)) this.values.profile = value;
      else this.leave("profile", `${value} is not served here; the form's profile stays`);
      return true;
    });
    const drawn = profiles.find(({ id }) => id === (this.values.profile ?? this.served.profile));
    if (this.values.neg && drawn?.honoursNeg === false && !this.values.usesNeg) {
      this.leave("neg", `has no effect in the profile ${drawn.id}`);
    }
    const trainer = this.request.get("trainer");
    if (isObject(trainer)) this.trainer(trainer);
    else if (trainer !== undefined) this.leave("trainer", NO_FIELD);
    else if (this.values.profile !== undefined) {
      const values: Values = { isQuantized: true, qtype: "", textQuantized: "", dtype: "", lokrForm: "" };
      Object.assign(this.values, values);
    }
    if (isObject(trainer) && trainer.size > 0 && drawn?.takesTrainerOptions === false) {
      this.leave("trainer", `has no effect in the profile ${drawn.id}`);
    }
  }

  private trainer(trainer: JsonObject): void {
    for (const [name, value] of trainer) {
      this.take(`trainer.${name}`, value, () => {
        const isFlag = typeof value === "boolean";
        const lokrForm = typeof value === "string" ? LOKR_FORMS[value] : undefined;
        if (name === "quantize" && isFlag) this.values.isQuantized = value;
        else if (name === "quantize_te" && isFlag) this.values.textQuantized = value ? "yes" : "no";
        else if (name === "qtype" && typeof value === "string") this.values.qtype = value;
        else if (name === "dtype" && DTYPES.includes(value)) this.values.dtype = String(value);
        else if (name === "lokr_form" && lokrForm !== undefined) this.values.lokrForm = lokrForm;
        else return false;
        return true;
      });
    }
  }

  output(): void {
    const output = this.request.get("output");
    if (!isObject(output)) return;
    for (const [name, value] of output) {
      this.take(`output.${name}`, value, () => {
        const format = typeof value === "string" ? FORMATS[value] : undefined;
        if (name === "format" && format !== undefined) this.values.format = format;
        else return name === "quality" && value === DEFAULT_QUALITY;
        return true;
      });
    }
  }

  /** All that the form does not know. */
  rest(): void {
    const known = ["model", "prompts", "loras", "profile", "trainer", "output"];
    for (const [name, value] of this.request) {
      if (known.includes(name)) continue;
      this.take(name, value, () => {
        if (name === "trigger_word") return this.text(value, (text) => ({ triggerWord: text }));
        if (name === "settings") return this.settings(value);
        return name === "noise_draw" && DEFAULT_DRAWS.includes(value);
      });
    }
  }

  foreign({ facts }: OpenedPicture): void {
    for (const [name, field] of FOREIGN) {
      if (this.values[field] !== undefined) continue;
      const told = facts.facts.get(name);
      if (told?.value === undefined || compared(told) === "euler") continue;
      this.leave(name, `${shown(told)} has no counterpart here`);
    }
  }

  private settings(value: Json): boolean {
    return this.listed("settings", value, this.served.settings, (settings) => ({
      settings: settings === REFERENCE ? "" : settings,
    }));
  }

  /** A name that the server must have; the reference's ways need no list. */
  private listed(
    name: string,
    value: Json,
    known: readonly string[],
    values: (text: string) => Values,
  ): boolean {
    if (typeof value !== "string") return false;
    if (known.includes(value) || value === FLOWMATCH || value === REFERENCE) {
      Object.assign(this.values, values(value));
    } else this.leave(name, `this server has no ${value}`);
    return true;
  }

  private flag(value: Json, values: (flag: boolean) => Values): boolean {
    if (typeof value !== "boolean") return false;
    Object.assign(this.values, values(value));
    return true;
  }

  private take(name: string, value: Json | undefined, taken: (value: Json) => boolean): void {
    if (value === undefined || taken(value)) return;
    const written = typeof value === "object" ? "" : ` (${shown({ value, note: "", sameAs: undefined })})`;
    this.leave(name, `${NO_FIELD}${written}`);
  }

  private leave(name: string, why: string): void {
    this.remarks.push(`${name}: ${why}`);
  }

  private text(value: Json, values: (text: string) => Values): boolean {
    if (typeof value !== "string") return false;
    Object.assign(this.values, values(value));
    return true;
  }

  /** Whole numbers may come as texts, as the API's JSON has them. */
  private number(value: Json, values: (text: string) => Values): boolean {
    const isNumber = typeof value === "bigint" || (typeof value === "number" && Number.isFinite(value));
    if (!isNumber && !(typeof value === "string" && /^-?\d{1,20}$/.test(value))) return false;
    Object.assign(this.values, values(String(value)));
    return true;
  }
}

interface NamedLora {
  readonly path: string | undefined;
  readonly multiplier: number;
  readonly expectedSha256: string | undefined;
  /** Names of what is not as it should be. */
  readonly odd: readonly string[];
}

function lorasIn(request: JsonObject): NamedLora[] {
  const loras = request.get("loras");
  return (isList(loras) ? loras : []).map((lora) => {
    const fields = isObject(lora) ? lora : new Map<string, Json>();
    const [path, multiplier, expected] = ["path", "network_multiplier", "expected_sha256"].map((name) =>
      fields.get(name),
    );
    const scale = typeof multiplier === "bigint" ? Number(multiplier) : multiplier;
    const isScale = typeof scale === "number" && Number.isFinite(scale);
    const isHash = typeof expected === "string";
    const odd = [...fields.keys()].filter((name) => {
      if (name === "network_multiplier") return !isScale;
      return name === "expected_sha256" ? !isHash : name !== "path";
    });
    return {
      path: typeof path === "string" ? path : undefined,
      multiplier: isScale ? scale : 1,
      expectedSha256: isHash ? expected : undefined,
      odd,
    };
  });
}
