/** The way in for a picture: a button with a file chooser. */
import { explain } from "./state.ts";

export function PictureButton() {
  return (
    <label class="button quiet">
      Explain a picture …
      <input
        type="file"
        class="visually-hidden"
        accept="image/png,image/jpeg,image/webp"
        aria-label="Explain a picture"
        onChange={(event) => {
          const [file] = event.currentTarget.files ?? [];
          if (file !== undefined) void explain(file);
          event.currentTarget.value = "";
        }}
      />
    </label>
  );
}
