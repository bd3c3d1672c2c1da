/** What is in an adapter. */
import { signal } from "@preact/signals";
import { type LoraInspection, LoraSource, NotFound, type StoredLora } from "chromarpc/web";
import { useEffect, useRef } from "preact/hooks";
import { client, loras, noteFailure, refreshLoras } from "./connection.ts";
import { change, chosenModel, form } from "./form.ts";
import { remove } from "./undo.ts";
import { bytes } from "./words.ts";

interface Inspected {
  readonly path: string;
  readonly inspection?: LoraInspection;
  readonly error?: string;
}

const inspected = signal<Inspected | undefined>(undefined);

export function InspectionDialog() {
  return inspected.value ? <Dialog {...inspected.value} /> : null;
}

function Dialog({ path, inspection, error }: Inspected) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => dialog.current?.showModal(), []);
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
            removeUpload(stored);
          }}
        >
          Delete this upload
        </button>
      )}
    </dialog>
  );
}

/** What whoever uploaded it called it, or its path below the root. */
export function nameOf(lora: StoredLora): string {
  return lora.filename || lora.path;
}

/** Asks what is in an adapter, and shows it. */
export async function inspect(path: string): Promise<void> {
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

/** Takes an upload away: at once from the form, and from the server when it cannot be undone any more. */
function removeUpload(lora: StoredLora): void {
  const { path } = lora;
  const choice = form.value.loras.find((other) => other.path === path);
  change({ loras: form.value.loras.filter((other) => other !== choice) });
  remove({
    notice: `${nameOf(lora)} deleted.`,
    id: path,
    undo() {
      if (choice !== undefined && !form.value.loras.some((other) => other.path === path))
        change({ loras: [...form.value.loras, choice] });
    },
    async finish() {
      try {
        await client.deleteLora(path);
      } catch (error) {
        noteFailure(error);
        if (!(error instanceof NotFound)) throw error;
      } finally {
        await refreshLoras();
      }
    },
  });
}
