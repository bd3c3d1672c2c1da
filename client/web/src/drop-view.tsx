/** What letting go would do, while something is held over the page. */
import { type Held, held } from "./drops.ts";

const WORDS: Readonly<Record<Exclude<Held, "adapters">, string>> = {
  picture: "Drop the picture to see what it was drawn with",
  unknown: "Drop the folder of a training run anywhere; an adapter, on “Adapters (LoRA)”",
  several: "One picture or one folder at a time; adapters, on “Adapters (LoRA)”",
};

export function DropView() {
  const now = held.value;
  if (now === undefined || now === "adapters") return null;
  return (
    <div class={now === "picture" ? "drop-over" : "drop-over low"} aria-hidden="true">
      <p>{WORDS[now]}</p>
    </div>
  );
}
