/** Adapters: those in use with their strength, those to choose from, what is in one, and uploads. */
import { signal } from "@preact/signals";
import { type LoraInspection, LoraSource, type StoredLora } from "chromarpc/web";
import { useEffect, useRef } from "preact/hooks";
import { client, loras, noteFailure, refreshLoras } from "./connection.ts";
import { change, chosenModel, fieldErrors, form, type LoraChoice } from "./form.ts";
import { bytes } from "./words.ts";

interface Upload {
  readonly name: string;
  readonly sent: number;
  readonly total: number;
  readonly error: string | undefined;
  readonly abort: AbortController;
}

const upload = signal<Upload | undefined>(undefined);
const inspected = signal<{ path: string; inspection?: LoraInspection; error?: string } | undefined>(
  undefined,
);
const isOverDrop = signal(false);

export function LoraView() {
  const chosen = form.value.loras;
  const free = loras.value.filter(({ path }) => !chosen.some((choice) => choice.path === path));
  return (
    <fieldset
      class={isOverDrop.value ? "loras over" : "loras"}
      onDragOver={(event) => {
        event.preventDefault();
        isOverDrop.value = true;
      }}
      onDragLeave={() => {
        isOverDrop.value = false;
      }}
      onDrop={(event) => {
        event.preventDefault();
        isOverDrop.value = false;
        const file = event.dataTransfer?.files[0];
        if (file !== undefined) void send(file);
      }}
    >
      <legend>Adapters (LoRA)</legend>
      {chosen.map((choice, index) => (
        <ChosenLora key={choice.path} choice={choice} index={index} />
      ))}
      <div class="row tight">
        <select
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
            aria-label="Upload an adapter"
            onChange={(event) => {
              const file = event.currentTarget.files?.[0];
              if (file !== undefined) void send(file);
              event.currentTarget.value = "";
            }}
          />
        </label>
      </div>
      <UploadLine />
      {inspected.value && <InspectionDialog />}
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
        <button
          type="button"
          class="quiet"
          aria-label={`Look into ${name}`}
          onClick={() => void inspect(choice.path)}
        >
          Inspect
        </button>
        <button
          type="button"
          class="quiet"
          aria-label={`Remove ${name}`}
          onClick={() => change({ loras: others.filter(({ path }) => path !== choice.path) })}
        >
          ✕
        </button>
      </div>
      {error && (
        <p class="error" role="alert">
          {error}
        </p>
      )}
    </div>
  );
}

function UploadLine() {
  const state = upload.value;
  if (state === undefined) return null;
  if (state.error !== undefined) {
    return (
      <p class="error" role="alert">
        {state.name}: {state.error}{" "}
        <button
          type="button"
          class="quiet"
          onClick={() => {
            upload.value = undefined;
          }}
        >
          ✕
        </button>
      </p>
    );
  }
  return (
    <div class="row tight">
      <progress aria-label={`Uploading ${state.name}`} value={state.sent} max={state.total} />
      <span class="hint">
        {bytes(state.sent)} of {bytes(state.total)}
      </span>
      <button type="button" class="quiet" onClick={() => state.abort.abort()}>
        Stop
      </button>
    </div>
  );
}

function InspectionDialog() {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => dialog.current?.showModal(), []);
  const { path, inspection, error } = inspected.value ?? { path: "" };
  const stored = loras.value.find((lora) => lora.path === path);
  const strongest = Math.max(0, ...(inspection?.blocks.map(({ relativeNorm }) => relativeNorm ?? 0) ?? []));
  return (
    <dialog
      ref={dialog}
      onClose={() => {
        inspected.value = undefined;
      }}
    >
      <div class="label">
        <h2>{stored ? nameOf(stored) : path}</h2>
        <button type="button" class="quiet" aria-label="Close" onClick={() => dialog.current?.close()}>
          ✕
        </button>
      </div>
      {error && <p class="error">{error}</p>}
      {inspection === undefined && error === undefined && <p>Reading …</p>}
      {inspection && (
        <>
          <dl>
            <dt>Format</dt>
            <dd>
              {inspection.format}, {inspection.dtypes.join(", ")}, {bytes(Number(inspection.sizeBytes))}
            </dd>
            <dt>Rank, alpha</dt>
            <dd>
              {inspection.ranks.join(", ") || "none"};{" "}
              {inspection.alphas.map((alpha) => alpha.toPrecision(3)).join(", ") || "none"}
            </dd>
            <dt>Keys</dt>
            <dd>
              {inspection.matchedKeyCount} change {inspection.changedParameterCount} parameters of{" "}
              {inspection.model}; {inspection.unmatchedKeyCount} without effect
            </dd>
            {Object.entries(inspection.metadata).map(([key, value]) => (
              <>
                <dt>{key}</dt>
                <dd>{value}</dd>
              </>
            ))}
            <dt>SHA-256</dt>
            <dd class="hash">{inspection.sha256}</dd>
          </dl>
          {inspection.warnings.map(({ code, message }) => (
            <p key={code} class="warning">
              {message}
            </p>
          ))}
          <h3>How strongly it changes each block</h3>
          <div class="blocks">
            {inspection.blocks.map(({ block, relativeNorm = 0 }) => (
              <div key={block} title={`${block}: ${(100 * relativeNorm).toPrecision(3)} % of its own norm`}>
                <span>{block}</span>
                <meter value={relativeNorm} max={strongest} aria-label={block} />
              </div>
            ))}
          </div>
        </>
      )}
      {stored?.source === LoraSource.UPLOAD && (
        <button
          type="button"
          class="danger"
          onClick={() => {
            dialog.current?.close();
            void remove(stored.path);
          }}
        >
          Delete this upload
        </button>
      )}
    </dialog>
  );
}

function nameOf(lora: StoredLora): string {
  return lora.filename || lora.path;
}

async function inspect(path: string): Promise<void> {
  inspected.value = { path };
  try {
    const model = chosenModel.value?.id;
    const inspection = await client.inspectLora(path, { model });
    if (inspected.value?.path === path) inspected.value = { path, inspection };
  } catch (error) {
    noteFailure(error);
    if (inspected.value?.path === path) {
      inspected.value = { path, error: error instanceof Error ? error.message : String(error) };
    }
  }
}

async function send(file: File): Promise<void> {
  upload.value?.abort.abort();
  const abort = new AbortController();
  const state: Upload = { name: file.name, sent: 0, total: file.size, error: undefined, abort };
  upload.value = state;
  try {
    const lora = await client.uploadLora(file, {
      signal: abort.signal,
      onProgress: (sent) => {
        upload.value = { ...state, sent };
      },
    });
    await refreshLoras();
    const chosen = form.value.loras;
    if (!chosen.some(({ path }) => path === lora.path))
      change({ loras: [...chosen, { path: lora.path, multiplier: 1 }] });
    upload.value = undefined;
  } catch (error) {
    noteFailure(error);
    const message = error instanceof Error ? error.message : String(error);
    upload.value = abort.signal.aborted ? undefined : { ...state, error: message };
  }
}

async function remove(path: string): Promise<void> {
  try {
    await client.deleteLora(path);
    change({ loras: form.value.loras.filter((choice) => choice.path !== path) });
  } catch (error) {
    noteFailure(error);
  }
  await refreshLoras();
}
