/** How pictures are sampled, for who wants another way than the model's: what the trainer's profiles have no choice of. */
import { serverInfo } from "./connection.ts";
import { change, chosenModel, chosenProfile, form, isSampledOtherwise, sharedError } from "./form.ts";
import { Field, NumberField } from "./form-view.tsx";

const NAMES = ["settings", "sampler", "schedule", "shift", "neg", "use_neg"];

export function SamplingView() {
  const info = serverInfo.value;
  // An older server has one way.
  if (chosenProfile.value?.takesTrainerOptions || !info?.samplers.length) return null;
  const values = form.value;
  const defaults = chosenModel.value?.defaults;
  const isOpen = isSampledOtherwise.value || NAMES.some((name) => sharedError(name) !== undefined);
  return (
    <details open={isOpen}>
      <summary>Advanced</summary>
      <Field name="settings" label="Draw as">
        {(props) => (
          <select
            {...props}
            value={values.settings}
            onChange={(event) => change({ settings: event.currentTarget.value })}
          >
            {info.settings.map((name) => (
              <option key={name} value={name === "reference" ? "" : name}>
                {name === "comfyui" ? "ComfyUI" : name}
              </option>
            ))}
          </select>
        )}
      </Field>
      <ChoiceField name="sampler" label="Sampler" choices={info.samplers} usual={defaults?.sampler} />
      <ChoiceField name="schedule" label="Schedule" choices={info.schedules} usual={defaults?.schedule} />
      <NumberField
        name="shift"
        label="Shift"
        hint="1 shifts nothing; empty is the schedule's own"
        value={values.shift}
        placeholder={undefined}
        step={0.5}
      />
      <Field name="neg" label="Negative prompt">
        {(props) => (
          <textarea
            {...props}
            rows={2}
            value={values.neg}
            onInput={(event) => change({ neg: event.currentTarget.value })}
          />
        )}
      </Field>
      <label class="check">
        <input
          type="checkbox"
          checked={values.usesNeg}
          onChange={(event) => change({ usesNeg: event.currentTarget.checked })}
        />
        Use the negative prompt
      </label>
    </details>
  );
}

interface ChoiceFieldProps {
  readonly name: "sampler" | "schedule";
  readonly label: string;
  readonly choices: readonly string[];
  /** The model's own. */
  readonly usual: string | undefined;
}

function ChoiceField({ name, label, choices, usual }: ChoiceFieldProps) {
  // As ComfyUI, a model that has none of its own is drawn with other ones: the server says which.
  const isKnown = usual && !form.value.settings;
  return (
    <Field name={name} label={label}>
      {(props) => (
        <select
          {...props}
          value={form.value[name]}
          onChange={(event) => change({ [name]: event.currentTarget.value })}
        >
          <option value="">{isKnown ? `${usual} (default)` : "default"}</option>
          {choices.map((choice) => (
            <option key={choice} value={choice}>
              {choice}
            </option>
          ))}
        </select>
      )}
    </Field>
  );
}
