/** What only profiles take that draw as the trainer does: negative text, and what its config says. */
import { change, chosenProfile, form } from "./form.ts";
import { Field } from "./form-view.tsx";

export function TrainerView() {
  const values = form.value;
  const profile = chosenProfile.value;
  if (!profile?.honoursNeg && !profile?.takesTrainerOptions) return null;
  return (
    // Open, so that what is wrong with a value is seen.
    <details open>
      <summary>As the trainer drew</summary>
      {profile.honoursNeg && (
        <Field name="neg" label="Negative text">
          {(props) => (
            <textarea
              {...props}
              rows={2}
              value={values.neg}
              onInput={(event) => change({ neg: event.currentTarget.value })}
            />
          )}
        </Field>
      )}
      {profile.takesTrainerOptions && <ConfigFields />}
    </details>
  );
}

function ConfigFields() {
  const values = form.value;
  return (
    <>
      <label class="check">
        <input
          type="checkbox"
          checked={values.isQuantized}
          onChange={(event) => change({ isQuantized: event.currentTarget.checked })}
        />
        Transformer quantized (model.quantize)
      </label>
      <Field name="trainer.qtype" label="Quantizer" hint="model.qtype">
        {(props) => (
          <input
            {...props}
            value={values.qtype}
            placeholder="qfloat8"
            onInput={(event) => change({ qtype: event.currentTarget.value })}
          />
        )}
      </Field>
      <Field name="trainer.quantize_te" label="Text encoder" hint="model.quantize_te">
        {(props) => (
          <select
            {...props}
            value={values.textQuantized}
            onChange={(event) =>
              change({ textQuantized: event.currentTarget.value as typeof values.textQuantized })
            }
          >
            <option value="">as the transformer</option>
            <option value="yes">quantized</option>
            <option value="no">not quantized</option>
          </select>
        )}
      </Field>
      <Field name="trainer.dtype" label="Type" hint="train.dtype">
        {(props) => (
          <select
            {...props}
            value={values.dtype || "bf16"}
            onChange={(event) => change({ dtype: event.currentTarget.value })}
          >
            <option value="bf16">bf16</option>
            <option value="float32">float32</option>
          </select>
        )}
      </Field>
      <Field name="trainer.lokr_form" label="LoKr">
        {(props) => (
          <select
            {...props}
            value={values.lokrForm || "factorized"}
            onChange={(event) => change({ lokrForm: event.currentTarget.value as typeof values.lokrForm })}
          >
            <option value="factorized">factorized</option>
            <option value="weight">in the weight, as before 2026-07-15</option>
          </select>
        )}
      </Field>
    </>
  );
}
