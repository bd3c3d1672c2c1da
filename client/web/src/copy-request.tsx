/** The request of a run as text, to repeat it from elsewhere. */
import { signal } from "@preact/signals";
import { type Plan, type RequestJson, repeatRequest } from "chromarpc/web";

type Form = "JSON" | "Python" | "curl";

const FORMS: Readonly<Record<Form, (plan: Plan) => string>> = {
  JSON: (plan) => JSON.stringify(bodyOf(plan), null, 2),
  Python: pythonOf,
  curl: curlOf,
};
/** What came of the last press, for a moment. */
const told = signal("");

export function CopyRequest({ plan }: { plan: Plan }) {
  return (
    <span class="copy">
      Copy request as{" "}
      {(Object.keys(FORMS) as Form[]).map((form) => (
        <button key={form} type="button" class="quiet" onClick={() => void copy(form, FORMS[form](plan))}>
          {form}
        </button>
      ))}
      {/* After the buttons, so that none of them moves. */}
      <span role="status">{told.value}</span>
    </span>
  );
}

/** The body that repeats a run, all of its pictures. */
export function bodyOf(plan: Plan): RequestJson {
  const [first, ...rest] = plan.prompts.map((_, index) => repeatRequest(plan, index));
  if (first === undefined) throw new RangeError("a plan without prompts");
  return { ...first, prompts: [first, ...rest].flatMap(({ prompts }) => prompts) };
}

function pythonOf(plan: Plan): string {
  const body = JSON.stringify(bodyOf(plan), null, 4);
  return [
    "from chromarpc import Client, ImageReady, parse_request_json",
    "",
    `REQUEST = r'''`,
    body.replaceAll("'''", "\\u0027\\u0027\\u0027"),
    `'''`,
    "",
    'with Client("127.0.0.1:50051") as client:',
    "    for event in client.generate_request(parse_request_json(REQUEST).request):",
    "        if isinstance(event, ImageReady):",
    "            event.image.save(f\"{event.prompt_index}.{event.image.media_type.removeprefix('image/')}\")",
    "        else:",
    "            print(event)",
    "",
  ].join("\n");
}

function curlOf(plan: Plan): string {
  const body = JSON.stringify(bodyOf(plan)).replaceAll("'", "\\u0027");
  return `curl -X POST '${location.origin}/v1/inference' -H 'content-type: application/json' -d '${body}'\n`;
}

async function copy(form: Form, text: string): Promise<void> {
  let isCopied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without a secure address or the permission: the old way.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    isCopied = document.execCommand("copy");
    area.remove();
  }
  const notice = isCopied ? `${form} copied ✓` : `${form} could not be copied`;
  told.value = notice;
  setTimeout(() => {
    if (told.value === notice) told.value = "";
  }, 2500);
}
