/** Adapters: those in use with their strength, those to choose from, and uploads. */
import { signal } from "@preact/signals";
import { client, loras, noteFailure, refreshLoras } from "./connection.ts";
import { FleetingButton } from "./fleeting-button.tsx";
import { change, fieldErrors, form, type LoraChoice } from "./form.ts";
import { inspect, nameOf } from "./inspection-dialog.tsx";
import { isHidden, keep } from "./undo.ts";
import { bytes } from "./words.ts";

interface Upload {
  readonly key: number;
  readonly name: string;
  readonly sent: number;
  readonly total: number;
  readonly error: string | undefined;
  readonly abort: AbortController;
}

/** Uploads under way, and those that failed. */
const uploads = signal<readonly Upload[]>([]);
let lastKey = 0;

export function LoraView({ isHeldOver }: { isHeldOver: boolean }) {
  const chosen = form.value.loras;
  const free = loras.value.filter(
    ({ path }) => !isHidden(path) && !chosen.some((choice) => choice.path === path),
  );
  return (
    <fieldset class={isHeldOver ? "loras over" : "loras"}>
      <legend>Adapters (LoRA)</legend>
      {chosen.map((choice, index) => (
        <ChosenLora key={choice.path} choice={choice} index={index} />
      ))}
      {/* An upload stands where its adapter will stand. */}
      {uploads.value.map((upload) => (
        <UploadLine key={upload.key} upload={upload} />
      ))}
      <div class="row tight">
        <select
          id="add-adapter"
          aria-label="Add an adapter"
          value=""
          disabled={free.length === 0}
          onFocus={() => void refreshLoras()}
          onChange={(event) => {
            const path = event.currentTarget.value;
            event.currentTarget.value = "";
            if (path !== "") change({ loras: [...chosen, { path, multiplier: 1 }] });
          }}
        >
          <option value="">{free.length === 0 ? "No other adapters here" : "Add an adapter …"}</option>
          {free.map((lora) => (
            <option key={lora.path} value={lora.path}>
              {nameOf(lora)} · {bytes(Number(lora.sizeBytes))}
            </option>
          ))}
        </select>
        <label class="button quiet">
          Upload …
          <input
            type="file"
            class="visually-hidden"
            accept=".safetensors"
            multiple
            aria-label="Upload an adapter"
            onChange={(event) => {
              for (const file of event.currentTarget.files ?? []) void upload(file);
              event.currentTarget.value = "";
            }}
          />
        </label>
      </div>
    </fieldset>
  );
}

function ChosenLora({ choice, index }: { choice: LoraChoice; index: number }) {
  const id = `field-loras-${index}`;
  const others = form.value.loras;
  const stored = loras.value.find(({ path }) => path === choice.path);
  const name = stored ? nameOf(stored) : choice.path;
  const error =
    fieldErrors.value.get(`loras.${index}.path`) ??
    fieldErrors.value.get(`loras.${index}.network_multiplier`) ??
    fieldErrors.value.get(`loras.${index}`);
  return (
    <div class="lora">
      <div class="label">
        <label for={id} title={choice.path}>
          {name}
        </label>
        <output>{choice.multiplier.toFixed(2)}</output>
      </div>
      <div class="row tight">
        <input
          id={id}
          type="range"
          min="-2"
          max="2"
          step="0.05"
          value={choice.multiplier}
          aria-label={`Strength of ${name}`}
          aria-invalid={error !== undefined}
          onInput={(event) => {
            const multiplier = Number(event.currentTarget.value);
            change({
              loras: others.map((other) => (other.path === choice.path ? { ...other, multiplier } : other)),
            });
          }}
        />
        <FleetingButton
          heir={addField}
          class="quiet"
          aria-label={`Look into ${name}`}
          onClick={() => void inspect(choice.path)}
        >
          Inspect
        </FleetingButton>
        <FleetingButton
          heir={addField}
          class="quiet"
          aria-label={`Remove ${name}`}
          onClick={() => change({ loras: others.filter(({ path }) => path !== choice.path) })}
        >
          ✕
        </FleetingButton>
      </div>
      {error && (
        <p class="error" role="alert">
          {error}
        </p>
      )}
    </div>
  );
}

/** The field that stays when an adapter or an upload goes. */
function addField(): HTMLElement | null {
  return document.getElementById("add-adapter");
}

function UploadLine({ upload }: { upload: Upload }) {
  const { name, sent, total, error, abort } = upload;
  if (error !== undefined) {
    return (
      <div class="lora">
        <p class="error" role="alert">
          {name}: {error}
        </p>
        <FleetingButton
          heir={addField}
          class="quiet"
          aria-label={`Dismiss the error of ${name}`}
          onClick={() => forget(upload)}
        >
          Dismiss
        </FleetingButton>
      </div>
    );
  }
  return (
    <div class="lora">
      <div class="label">
        <span>{name}</span>
        <FleetingButton
          heir={addField}
          class="quiet"
          aria-label={`Stop uploading ${name}`}
          onClick={() => abort.abort()}
        >
          Stop
        </FleetingButton>
      </div>
      <div class="row tight">
        <progress aria-label={`Uploading ${name}`} value={sent} max={total} />
        <span class="hint">
          {bytes(sent)} of {bytes(total)}
        </span>
      </div>
    </div>
  );
}

function note(upload: Upload): void {
  uploads.value = uploads.value.map((other) => (other.key === upload.key ? upload : other));
}

function forget({ key }: Upload): void {
  uploads.value = uploads.value.filter((other) => other.key !== key);
}

/** Sends an adapter to the server, and chooses it. */
export async function upload(file: File): Promise<void> {
  const abort = new AbortController();
  const own: Upload = {
    key: ++lastKey,
    name: file.name,
    sent: 0,
    total: file.size,
    error: undefined,
    abort,
  };
  uploads.value = [...uploads.value, own];
  try {
    const lora = await client.uploadLora(file, {
      signal: abort.signal,
      onProgress: (sent) => note({ ...own, sent }),
    });
    keep(lora.path);
    await refreshLoras();
    const chosen = form.value.loras;
    if (!chosen.some(({ path }) => path === lora.path))
      change({ loras: [...chosen, { path: lora.path, multiplier: 1 }] });
    forget(own);
  } catch (error) {
    noteFailure(error);
    const message = error instanceof Error ? error.message : String(error);
    if (abort.signal.aborted) forget(own);
    else note({ ...own, error: message });
  }
}
