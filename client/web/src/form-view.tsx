/** The form. */
import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { servedModels, serverInfo, serverState } from "./connection.ts";
import { held } from "./drops.ts";
import { FleetingButton } from "./fleeting-button.tsx";
import {
  change,
  chosenModel,
  defaultProfile,
  fieldErrors,
  form,
  otherErrors,
  removePrompt,
  sharedError,
} from "./form.ts";
import { LoraView } from "./lora-view.tsx";
import { isSubmitting, submit } from "./runs.ts";
import { SamplingView } from "./sampling-view.tsx";
import { TrainerView } from "./trainer-view.tsx";

const IDEAS = [
  "a large red circle in the middle on a white background",
  "a small blue square at the left on a yellow background",
  "a green triangle above a purple circle",
];

function promptField(index: number): HTMLElement | null {
  return document.getElementById(`field-prompts-${index}-prompt`);
}

export function FormView() {
  const values = form.value;
  const model = chosenModel.value;
  const { defaults } = model ?? {};
  const hasTrigger = values.prompts.some((prompt) => prompt.includes("[trigger]"));
  const element = useRef<HTMLFormElement>(null);
  const errors = fieldErrors.value;

  // The first field at fault is brought to the eye and under the cursor.
  useEffect(() => {
    if (errors.size === 0) return;
    const field = element.current?.querySelector<HTMLElement>("[aria-invalid=true]");
    field?.focus();
    field?.scrollIntoView({ block: "nearest" });
  }, [errors]);

  return (
    <form
      ref={element}
      class="panel form"
      aria-label="What to draw"
      noValidate
      onSubmit={(event) => {
        event.preventDefault();
        void submit();
      }}
      onKeyDown={(event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) void submit();
      }}
    >
      {values.prompts.map((prompt, index) => (
        <PromptField key={index} index={index} prompt={prompt} count={values.prompts.length} />
      ))}
      <div class="row tight">
        <button type="button" class="quiet" onClick={() => change({ prompts: [...values.prompts, ""] })}>
          + Another prompt
        </button>
        {values.prompts.every((prompt) => prompt === "") && (
          <FleetingButton
            heir={() => promptField(0)}
            class="quiet"
            onClick={() => change({ prompts: [IDEAS[Math.floor(Math.random() * IDEAS.length)] ?? ""] })}
          >
            Give me an idea
          </FleetingButton>
        )}
      </div>
      {(hasTrigger || values.triggerWord !== "" || values.loras.length > 0) && (
        <Field name="trigger_word" label="Trigger word" hint="replaces [trigger] in the prompts">
          {(props) => (
            <input
              {...props}
              value={values.triggerWord}
              onInput={(event) => change({ triggerWord: event.currentTarget.value })}
            />
          )}
        </Field>
      )}
      {servedModels.value.length > 1 && (
        <Field name="model" label="Model">
          {(props) => (
            <select
              {...props}
              value={model?.id ?? ""}
              onChange={(event) => change({ model: event.currentTarget.value })}
            >
              {servedModels.value.map(({ id, aliasOf }) => (
                <option key={id} value={id}>
                  {aliasOf ? `${id} (served by ${aliasOf})` : id}
                </option>
              ))}
            </select>
          )}
        </Field>
      )}
      <div class="row">
        <NumberField
          name="width"
          label="Width"
          value={values.width}
          hint="px"
          placeholder={defaults?.width}
          step={32}
        />
        <NumberField
          name="height"
          label="Height"
          value={values.height}
          hint="px"
          placeholder={defaults?.height}
          step={32}
        />
      </div>
      <div class="row">
        <NumberField
          name="steps"
          wire="sample_steps"
          label="Steps"
          value={values.steps}
          placeholder={defaults?.sampleSteps}
          step={1}
        />
        <NumberField
          name="guidance"
          wire="guidance_scale"
          label="Guidance"
          value={values.guidance}
          placeholder={defaults?.guidanceScale}
          step={0.5}
        />
      </div>
      <div class="row">
        <Field name="seed" label="Seed">
          {(props) => (
            <input
              {...props}
              inputMode="numeric"
              disabled={values.isSeedRandom}
              value={values.isSeedRandom ? "" : values.seed}
              placeholder={values.isSeedRandom ? "new each time" : "42"}
              onInput={(event) => change({ seed: event.currentTarget.value })}
            />
          )}
        </Field>
        <label class="check">
          <input
            type="checkbox"
            checked={values.isSeedRandom}
            onChange={(event) => change({ isSeedRandom: event.currentTarget.checked })}
          />
          Random seed
        </label>
      </div>
      <LoraView isHeldOver={held.value === "adapters"} />
      <details>
        <summary>More</summary>
        <Field name="profile" label="Numerics profile">
          {(props) => (
            <select
              {...props}
              value={values.profile}
              onChange={(event) => change({ profile: event.currentTarget.value })}
            >
              <option value="">{defaultProfile.value || "default"} (default)</option>
              {serverInfo.value?.profiles.map(({ id, description }) => (
                <option key={id} value={id} title={description}>
                  {id}
                </option>
              ))}
            </select>
          )}
        </Field>
        <Field name="format" label="File format">
          {(props) => (
            <select
              {...props}
              value={values.format}
              onChange={(event) => change({ format: event.currentTarget.value as typeof values.format })}
            >
              <option value="png">PNG</option>
              <option value="jpeg">JPEG</option>
              <option value="webp">WebP</option>
              <option value="jpeg-trainer">JPEG as the trainer writes it</option>
            </select>
          )}
        </Field>
        <label class="check">
          <input
            type="checkbox"
            checked={values.outlivesPage}
            onChange={(event) => change({ outlivesPage: event.currentTarget.checked })}
          />
          Go on drawing when this page is closed
        </label>
      </details>
      <SamplingView />
      <TrainerView />
      {otherErrors.value.map(([field, message]) => (
        <p key={field} class="error" role="alert">
          {field && <code>{field}</code>} {message}
        </p>
      ))}
      <button
        type="submit"
        class="primary"
        data-once
        aria-disabled={isSubmitting.value || serverState.value !== "up"}
      >
        {isSubmitting.value
          ? "Sending …"
          : values.prompts.length > 1
            ? `Draw ${values.prompts.length} pictures`
            : "Draw"}
      </button>
    </form>
  );
}

function PromptField({ index, prompt, count }: { index: number; prompt: string; count: number }) {
  const set = (prompts: readonly string[]): void => change({ prompts });
  return (
    <Field
      name={`prompts.${index}.prompt`}
      label={count > 1 ? `Prompt ${index + 1}` : "Prompt"}
      action={
        count > 1 ? (
          <button
            type="button"
            class="quiet"
            data-once
            aria-label={`Remove prompt ${index + 1}`}
            onClick={() => {
              removePrompt(index);
              // The next prompt's button has this place now.
              promptField(Math.min(index, count - 2))?.focus();
            }}
          >
            ✕
          </button>
        ) : undefined
      }
    >
      {(props) => (
        <textarea
          {...props}
          rows={count > 1 ? 2 : 4}
          value={prompt}
          placeholder="What to draw. Ctrl + Enter draws it."
          onInput={(event) => {
            const text = event.currentTarget.value;
            set(form.value.prompts.map((old, other) => (other === index ? text : old)));
          }}
        />
      )}
    </Field>
  );
}

interface NumberFieldProps {
  readonly name: "width" | "height" | "steps" | "guidance" | "shift";
  readonly wire?: string;
  readonly label: string;
  readonly value: string;
  readonly hint?: string;
  readonly placeholder: number | undefined;
  readonly step: number;
}

/** A number that arrows change by a step. */
export function NumberField({ name, wire, label, value, hint, placeholder, step }: NumberFieldProps) {
  return (
    <Field name={wire ?? name} label={label} {...(hint === undefined ? {} : { hint })}>
      {(props) => (
        <input
          {...props}
          inputMode="decimal"
          value={value}
          placeholder={placeholder === undefined ? "" : String(placeholder)}
          onInput={(event) => change({ [name]: event.currentTarget.value })}
          onKeyDown={(event) => {
            const direction = event.key === "ArrowUp" ? 1 : event.key === "ArrowDown" ? -1 : 0;
            if (direction === 0) return;
            event.preventDefault();
            const next = Number(value || placeholder || 0) + direction * step;
            if (Number.isFinite(next)) change({ [name]: String(next) });
          }}
        />
      )}
    </Field>
  );
}

interface ControlProps {
  readonly id: string;
  readonly "aria-invalid": boolean;
  readonly "aria-describedby"?: string;
}

interface FieldProps {
  /** As the server names it. */
  readonly name: string;
  readonly label: string;
  readonly hint?: string;
  readonly action?: ComponentChildren;
  readonly children: (props: ControlProps) => ComponentChildren;
}

/** A label, its control, and what is wrong with its value. */
export function Field({ name, label, hint, action, children }: FieldProps) {
  const id = `field-${name.replaceAll(".", "-")}`;
  const error = fieldErrors.value.get(name) ?? sharedError(name);
  return (
    <div class="field">
      <div class="label">
        <span>
          <label for={id}>{label}</label> {hint && <span class="hint">{hint}</span>}
        </span>
        {action}
      </div>
      {children({
        id,
        "aria-invalid": error !== undefined,
        ...(error && { "aria-describedby": `${id}-error` }),
      })}
      {error && (
        <p class="error" id={`${id}-error`} role="alert">
          {error}
        </p>
      )}
    </div>
  );
}
